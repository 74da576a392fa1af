"""The configuration of OLMoE, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.mixture_config import MixtureConfig


@dataclasses.dataclass(frozen=True)
class OlmoeConfig(MixtureConfig):
    """Architecture of an OLMoE, with the fields of `transformers.OlmoeConfig`.

    Attributes:
        attention_bias: Whether the projections of attention have a bias.
        clip_qkv: The largest absolute value of queries, keys and values; None for no limit.
        norm_topk_prob: Whether the factors of a token's experts add up to 1.

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> OlmoeConfig.from_hf({"model_type": "olmoe"}).num_experts
        64
    """

    stems = MappingProxyType({"olmoe": "Olmoe"})
    tasks = tasks_of("ForCausalLM", "Model")
    lacking = MappingProxyType({"olmoe": ("layer_types", "sliding_window", "head_dim")})

    vocab_size: int = 50304
    hidden_size: int = 2048
    intermediate_size: int = 2048
    num_hidden_layers: int = 16
    num_attention_heads: int = 16
    max_position_embeddings: int = 4096
    model_type: str = "olmoe"
    eos_token_id: int | tuple[int, ...] | None = 50279
    pad_token_id: int | None = 1
    rms_norm_eps: float = 1e-5
    num_experts: int = 64
    num_experts_per_tok: int = 8
    router_aux_loss_coef: float = 0.01
    attention_bias: bool = False
    clip_qkv: float | None = None
    norm_topk_prob: bool = False

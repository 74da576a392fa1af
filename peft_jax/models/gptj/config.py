"""The configuration of GPT-J, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import CAUSAL_LM, ModelConfig
from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class GPTJConfig(ModelConfig):
    """Architecture of a GPT-J, with the common names of `transformers.GPTJConfig`'s fields.

    Attributes:
        rotary_dim: How many features of a head positions turn.
        n_inner: Width of the feed-forward network; None means 4 * hidden_size.
        resid_pdrop: The probability with which outputs of layers are dropped in training.
        embd_pdrop: The same of embeddings.
        attn_pdrop: The same of weights of the attention.

    Raises:
        ValueError: A field has a value that is not supported, named in the message.

    Example:
        >>> GPTJConfig.from_hf({"model_type": "gptj", "n_embd": 64, "n_head": 4, "rotary_dim": 8}).head_size
        16
    """

    stems = MappingProxyType({"gptj": "GPTJ"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering", "Model")
    spelled = MappingProxyType(
        {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
    )
    fixed = MappingProxyType({"tie_word_embeddings": False})  # its head has a bias

    vocab_size: int = 50400
    hidden_size: int = 4096
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    max_position_embeddings: int = 2048
    model_type: str = "gptj"
    task_type: str = CAUSAL_LM
    rotary_dim: int = 64
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    resid_pdrop: float = 0.0
    embd_pdrop: float = 0.0
    attn_pdrop: float = 0.0

    def __post_init__(self) -> None:
        check_fields_of(self)
        self.check()
        check_activation("activation_function", self.activation_function)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"n_embd={self.hidden_size} is not a multiple of n_head={self.num_attention_heads}, which it must be."
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_size:
            raise ValueError(
                f"rotary_dim={self.rotary_dim} is not supported: it must be even, above 0, and at most the "
                f"{self.head_size} features of a head."
            )

    @property
    def type_rows(self) -> int | None:
        """Rows of the table of tokens, of which ``token_type_ids`` are too."""
        return self.vocab_size

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out = self.resid_pdrop
        return DropoutRates(self.embd_pdrop, self.attn_pdrop, out, out)

"""The configuration of StarCoder2, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.models.config import rarely_set
from peft_jax.models.decoder_config import WindowedConfig, tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class Starcoder2Config(WindowedConfig):
    """Architecture of a StarCoder2, with the fields of `transformers.Starcoder2Config`.

    Attributes:
        use_bias: Whether all projections of the layers have a bias.
        residual_dropout: The probability with which outputs of layers are dropped in training.
        embedding_dropout: The same of embeddings.

    Example:
        >>> Starcoder2Config.from_hf({"model_type": "starcoder2", "sliding_window": 4096}).kinds[0]
        'sliding_attention'
    """

    stems = MappingProxyType({"starcoder2": "Starcoder2"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model")
    lacking = MappingProxyType({"starcoder2": ("layer_types",)})

    vocab_size: int = 49152
    hidden_size: int = 3072
    intermediate_size: int = 12288
    num_hidden_layers: int = 30
    num_attention_heads: int = 24
    num_key_value_heads: int | None = 2
    hidden_act: str = "gelu_pytorch_tanh"
    max_position_embeddings: int = 4096
    model_type: str = "starcoder2"
    initializer_range: float = 0.018042
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    norm_epsilon: float = 1e-5
    use_bias: bool = True
    residual_dropout: float = rarely_set(0.0)
    embedding_dropout: float = rarely_set(0.0)

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out = self.residual_dropout
        return super().rates._replace(embedding=self.embedding_dropout, attention_out=out, mlp_out=out)

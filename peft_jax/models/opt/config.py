"""The configuration of OPT, with transformers' common names for its fields."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType

from peft_jax.core.activations import check_activation
from peft_jax.core.config_ranges import check_fields_of
from peft_jax.models.config import CAUSAL_LM, ModelConfig
from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.modules.base_dropout import DropoutRates


@dataclasses.dataclass(frozen=True)
class OPTConfig(ModelConfig):
    """Architecture of an OPT, with the common names of `transformers.OPTConfig`'s fields.

    Attributes:
        ffn_dim: Width of the feed-forward network.
        do_layer_norm_before: Whether layers normalise their inputs, and the last output is normalised; if not, layers
            normalise their outputs (OPT-350M).
        remove_final_layer_norm: Whether the last output is not normalised nevertheless.
        word_embed_proj_dim: Features of the embedding of a token; None means hidden_size. If it is another number,
            embeddings are projected on their way in, and back on their way out (OPT-350M).
        enable_bias: Whether projections have a bias.
        layer_norm_elementwise_affine: Whether norms have a scale and a bias.
        dropout: The probability with which outputs of layers are dropped in training.
        attention_dropout: The same of weights of the attention.
        layerdrop: The same of whole layers.

    Raises:
        ValueError: A field has a value that is not supported, named in the message.

    Example:
        >>> OPTConfig.from_hf({"model_type": "opt", "word_embed_proj_dim": 512}).embedding_size
        512
    """

    has_padding_row = True
    stems = MappingProxyType({"opt": "OPT"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering", "Model")
    spelled = MappingProxyType({"initializer_range": "init_std", "remove_final_layer_norm": "_remove_final_layer_norm"})

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 2048
    model_type: str = "opt"
    task_type: str = CAUSAL_LM
    tie_word_embeddings: bool = True
    ffn_dim: int = 3072
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    dropout: float = 0.1
    attention_dropout: float = 0.0
    layerdrop: float = 0.0

    def __post_init__(self) -> None:
        check_fields_of(self)
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        self.check()
        check_activation("activation_function", self.activation_function)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}, "
                "which it must be."
            )

    @property
    def embedding_size(self) -> int:
        """Features of the embedding of a token, and of what the head takes."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def position_rows(self) -> int | None:
        """Rows of the table of positions, without those of padding."""
        return self.max_position_embeddings

    @property
    def ends_in_norm(self) -> bool:
        """Whether the last output is normalised."""
        return self.do_layer_norm_before and not self.remove_final_layer_norm

    @property
    def rates(self) -> DropoutRates:
        """The probabilities with which the model drops in training."""
        out, layer = self.dropout, self.layerdrop
        return DropoutRates(attention=self.attention_dropout, attention_out=out, mlp_out=out, layer=layer)

"""P-tuning: embeddings before the inputs' that a small network makes of trained ones.

Liu et al., 2021, https://arxiv.org/abs/2103.10385, section 3. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax

from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability
from peft_jax.prompts.base import PROMPT
from peft_jax.prompts.dense import linear, linear_shapes, started
from peft_jax.prompts.learning import PromptLearning
from peft_jax.prompts.lstm import lstm, lstm_shapes


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network that makes the embeddings."""

    MLP = "MLP"
    LSTM = "LSTM"


@register("P_TUNING")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptEncoderConfig(PromptLearning):
    """Puts embeddings that a trained network makes before those of the inputs; fields and defaults are PEFT's.

    The file holds the embeddings, not the network, so an adapter cannot be trained on once it is saved.

    Attributes:
        encoder_reparameterization_type: ``"MLP"`` (three linear layers) or ``"LSTM"`` (in both directions, and two
            linear layers).
        encoder_hidden_size: Hidden features of the network; None takes the model's.
        encoder_num_layers: Layers of the LSTM. An MLP always has three linear ones.
        encoder_dropout: Probability of zeroing what an LSTM's layer hands to the next in training, in [0, 1). An MLP
            has no dropout.

    The other fields are those of `PromptLearning`.

    Raises:
        ValueError: if a field has a value that is wrong or would say nothing; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> config = PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16)
        >>> pj.get_peft_model(model, config)(jnp.array([[1, 2, 3]])).logits.shape[:2]  # of the virtual tokens too
        (1, 7)
    """

    learning_rate: ClassVar[float] = 3e-3
    encoder_reparameterization_type: str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [str(name) for name in PromptEncoderReparameterizationType]
        if self.encoder_reparameterization_type not in known:
            found = self.encoder_reparameterization_type
            raise ValueError(f"encoder_reparameterization_type={found!r} is unknown. Write one of {', '.join(known)}.")
        check_probability(self, "encoder_dropout")
        if self.encoder_num_layers < 1:
            raise ValueError(f"encoder_num_layers is at least 1, got {self.encoder_num_layers}.")
        if not self._is_lstm and not self.inference_mode and (self.encoder_num_layers, self.encoder_dropout) != (2, 0):
            raise ValueError(
                "An MLP has three linear layers and no dropout: encoder_num_layers and encoder_dropout go with "
                "encoder_reparameterization_type='LSTM'. Leave them out."
            )

    @property
    def _is_lstm(self) -> bool:
        return self.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM

    @property
    def trains_from_file(self) -> bool:
        """Never: the network is not in it."""
        return False

    @property
    def dropout_rate(self) -> float:
        """``encoder_dropout``, of an LSTM."""
        return self.encoder_dropout if self._is_lstm else 0.0

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """With the model's sizes."""
        config = super().completed(defaults)
        return config.replace(encoder_hidden_size=config.encoder_hidden_size or config.token_dim)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The virtual tokens' array, and the network's."""
        prompt: dict[str, tuple[int, ...]] = {PROMPT: (self.total_tokens, n_out)}
        hidden = self.encoder_hidden_size or n_out
        if self.inference_mode:
            return prompt
        if not self._is_lstm:
            sizes = (n_out, hidden, hidden, n_out)
            layers = [linear_shapes(f"mlp_{i}", *sizes[i : i + 2]) for i in range(3)]
        else:
            ends = [linear_shapes("mlp_0", 2 * hidden, 2 * hidden), linear_shapes("mlp_1", 2 * hidden, n_out)]
            layers = [lstm_shapes(n_out, hidden, self.encoder_num_layers), *ends]
        return prompt | {role: shape for layer in layers for role, shape in layer.items()}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """As PyTorch starts Embedding, Linear and LSTM."""
        if role == PROMPT:
            return super().initialize(role, shape, key, lookup=lookup)
        hidden = self.encoder_hidden_size or 1
        if role.startswith("lstm"):
            return started(shape, hidden, key)
        if self._is_lstm:
            return started(shape, 2 * hidden, key)
        return started(shape, (self.token_dim or 1) if role.startswith("mlp_0") else hidden, key)

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The embeddings that the network makes."""
        if len(params) == 1:
            return params
        x = params[PROMPT]
        if self._is_lstm:
            x = lstm(params, x, self.encoder_num_layers, state)
        ends = 2 if self._is_lstm else 3
        for i in range(ends):
            x = linear(params, f"mlp_{i}", jax.nn.relu(x) if i else x)
        return {PROMPT: x}

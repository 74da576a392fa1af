"""Prefix tuning: trained keys and values that every position of every layer attends to.

Li and Liang, 2021, https://arxiv.org/abs/2101.00190, equations 2 and 3; without the reparameterization it is P-Tuning
v2, Liu et al., 2021, https://arxiv.org/abs/2110.07602. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from peft_jax.methods.base import Arrays, register
from peft_jax.prompts.base import PROMPT
from peft_jax.prompts.dense import linear, linear_shapes, started
from peft_jax.prompts.key_values import KeyValuePrompt


@register("PREFIX_TUNING")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(KeyValuePrompt):
    """Puts trained keys and values before those of the inputs, in every layer; fields and defaults are PEFT's.

    Attributes:
        init_weights: ``"zero"`` starts at zero keys and values; None at random ones, which change the outputs.
        encoder_hidden_size: Hidden features of the projection; None takes ``token_dim``.
        prefix_projection: Train token embeddings and a two-layer network that makes keys and values of them. The file
            holds what it makes, so such an adapter cannot be trained on once it is saved.

    The other fields are those of `PromptLearning`; ``token_dim`` is here ``num_attention_heads * head_dim`` of the
    keys.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=4))
        >>> model(jnp.array([[1, 2, 3]])).logits.shape[:2]
        (1, 3)
    """

    learning_rate: ClassVar[float] = 1e-2
    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r} is unknown. Write 'zero', or leave it out.")

    @property
    def trains_from_file(self) -> bool:
        """Unless there is a projection."""
        return not self.prefix_projection

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """The config with the model's sizes; the projection has ``token_dim`` hidden features, if it says no others."""
        config = super().completed(defaults)
        return config.replace(encoder_hidden_size=config.encoder_hidden_size or config.token_dim)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Keys and values of all layers, flattened; with a projection, what makes them."""
        tokens, features, hidden = self.num_virtual_tokens or 0, self.token_dim or 0, self.encoder_hidden_size or 0
        width = 2 * (self.num_layers or 0) * features
        if not self.prefix_projection or self.inference_mode:
            return super().shapes(module, n_in, n_out, lookup=lookup)
        layers = {**linear_shapes("transform_0", features, hidden), **linear_shapes("transform_1", hidden, width)}
        return {PROMPT: (tokens, features), **layers}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """As PyTorch starts Embedding and Linear; zeros for what makes keys and values, if so asked."""
        last = "transform_1_" if self.prefix_projection and not self.inference_mode else PROMPT
        if self.init_weights == "zero" and role.startswith(last):
            return jnp.zeros(shape)
        if role == PROMPT:
            return super().initialize(role, shape, key, lookup=lookup)
        fan_in = self.token_dim if role.startswith("transform_0") else self.encoder_hidden_size
        return started(shape, fan_in or 1, key)

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """Keys and values, flattened: (tokens, layers * 2 * heads * head_dim)."""
        if len(params) == 1:
            return params
        return {PROMPT: linear(params, "transform_1", jnp.tanh(linear(params, "transform_0", params[PROMPT])))}

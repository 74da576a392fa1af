"""Cartridges: a cache of keys and values that is trained, and may start as a model's own cache of a text.

Eyuboglu et al., 2025, https://arxiv.org/abs/2506.06266, section 3: of each layer, p trained keys and values stand
before those of the inputs; the first of them stay as they are, for they draw the attention of all others. Numbers
follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peft_jax.methods.base import Arrays, register
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.prompts.base import PROMPT
from peft_jax.prompts.key_values import KeyValuePrompt

FROZEN = "prompt_frozen"  # in the state: the first keys and values, which are not trained


@register("CARTRIDGE")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CartridgeConfig(FrozenArrays, KeyValuePrompt):
    """Puts trained keys and values before those of the inputs, in every layer; fields and defaults are PEFT's.

    A fresh one is random. `peft_jax.initialize_kv_prefix_from_text` makes it what the model itself keeps of a text.

    Attributes:
        num_frozen_tokens: Of how many of the first virtual tokens keys and values stay as they are.

    The other fields are those of `PromptLearning`; ``token_dim`` is here ``num_attention_heads * head_dim`` of the
    keys.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, CartridgeConfig(num_virtual_tokens=4))
        >>> model(jnp.array([[1, 2, 3]])).logits.shape[:2]
        (1, 3)
    """

    learning_rate: ClassVar[float] = 1e-2

    num_frozen_tokens: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_frozen_tokens <= self.slots:
            raise ValueError(
                f"num_frozen_tokens is from 0 to num_virtual_tokens={self.slots}, got {self.num_frozen_tokens}."
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The first keys and values."""
        return (FROZEN,)

    def apart(self, arrays: Mapping[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """The keys and values of all tokens, as those that are trained and the first ones."""
        first = self.num_frozen_tokens
        return {PROMPT: arrays[PROMPT][first:]}, {FROZEN: arrays[PROMPT][:first]}

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The keys and values of all tokens."""
        trained = params[PROMPT]
        return {PROMPT: jnp.concatenate([state[FROZEN].astype(trained.dtype), trained])}

"""Base class of prompts that are keys and values, which every position of every layer attends to."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from peft_jax.methods.base import Arrays
from peft_jax.prompts.base import PROMPT, Prompt
from peft_jax.prompts.learning import PromptLearning


class KeyValuePrompt(PromptLearning):
    """Keys and values of all layers before those of the inputs: ``(tokens, layers * 2 * heads * head_dim)``.

    ``token_dim`` is here ``num_attention_heads * head_dim`` of the keys.
    """

    structural: ClassVar[tuple[str, ...]] = (*PromptLearning.structural, "num_layers", "num_attention_heads")

    @property
    def virtual_tokens(self) -> int:
        """None: keys and values have no logits."""
        return 0

    @property
    def slots(self) -> int:
        """``num_virtual_tokens``."""
        return self.num_virtual_tokens or 0

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """With the model's sizes.

        Raises:
            ValueError: if the config gives other sizes, or those of a decoder alone to an encoder-decoder.
        """
        if self.num_transformer_submodules == 1 and defaults.get("num_transformer_submodules") == 2:
            raise ValueError(
                f"{type(self).__name__}(num_transformer_submodules=1) is not supported on an encoder-decoder: PEFT's "
                "cross-attention then reads the decoder's own keys too, also those of later tokens. Write "
                "num_transformer_submodules=2, or leave it out, and train again."
            )
        return super().completed(defaults)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Keys and values of all layers, flattened."""
        return {PROMPT: (self.num_virtual_tokens or 0, 2 * (self.num_layers or 0) * (self.token_dim or 0))}

    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """Keys and values, each (layers, 1, tokens, heads, head_dim)."""
        flat = self.saved(params, state)[PROMPT]
        tokens, layers = flat.shape[0], self.num_layers or 0
        parts = flat.reshape(tokens, 2 * layers, self.num_attention_heads or 1, -1).transpose(1, 0, 2, 3)[:, None]
        every = jnp.arange(layers) * 2
        if self.num_transformer_submodules == 2:
            # PEFT repeats all parts and deals four to a layer, of which the first two are the decoder's own.
            every = every * 2 % (2 * layers)
        return Prompt(prefix=(parts[every], parts[every + 1]))

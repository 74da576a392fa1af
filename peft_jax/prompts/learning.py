"""PEFT's prompt learning: a number of virtual tokens, or of keys and values, that the config gives."""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import numpy as np

from peft_jax.core.handle import Handle
from peft_jax.core.layout import Layout
from peft_jax.methods.base import Arrays
from peft_jax.prompts.base import PROMPT, Prompt, PromptMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLearning(PromptMethod):
    """Fields that PEFT's configs of prompt learning share.

    Attributes:
        num_virtual_tokens: How many virtual tokens there are.
        token_dim: Their features; None takes the model's.
        num_transformer_submodules: 2 if encoder and decoder have their own, else 1; None takes the model's.
        num_attention_heads: None takes the model's.
        num_layers: None takes the model's.
        modules_to_save: Modules trained whole, beside the prompt.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {PROMPT: ("tokens", "features")}
    structural: ClassVar[tuple[str, ...]] = ("num_virtual_tokens", "num_transformer_submodules")

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_virtual_tokens, int) or self.num_virtual_tokens < 1:
            found = self.num_virtual_tokens
            raise ValueError(f"{type(self).__name__} needs num_virtual_tokens of at least 1, got {found!r}.")

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """The config with the model's sizes.

        Raises:
            ValueError: if the config gives other sizes.
        """
        for name, value in defaults.items():
            if name == "num_transformer_submodules" and getattr(self, name) in range(1, value + 1):
                continue
            if (given := getattr(self, name)) not in (None, value):
                raise ValueError(
                    f"{type(self).__name__}({name}={given}) does not fit this model, whose {name} is {value}. "
                    f"Leave {name} out."
                )
        return super().completed(defaults)

    @property
    def total_tokens(self) -> int:
        """Rows of the virtual tokens' array: those of all submodules."""
        return self.virtual_tokens * (self.num_transformer_submodules or 1)

    @property
    def virtual_tokens(self) -> int:
        """``num_virtual_tokens``."""
        return self.num_virtual_tokens or 0

    def places(self, modules: Sequence[str], handle: Handle) -> list[str]:
        """The input embedding."""
        return [handle.input_module]

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """One array a role, float32; each role has its own random key, made from its name."""
        n_in, n_out = layout.sizes(shape)
        shapes = self.shapes(str(names), n_in, n_out, lookup=layout.lookup)
        keys = {role: jax.random.fold_in(key, zlib.crc32(role.encode())) for role in shapes}
        params = {role: self.initialize(role, shapes[role], keys[role], lookup=layout.lookup) for role in shapes}
        return params, self.state(names, adapted)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The virtual tokens' array."""
        return {PROMPT: (self.total_tokens, n_out)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """Normal numbers, as PyTorch's Embedding starts."""
        return jax.random.normal(key, shape)

    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """The virtual tokens, the same for every row; of an encoder-decoder's, those of the encoder, as in PEFT."""
        return Prompt(tokens=self.saved(params, state)[PROMPT][None, : self.virtual_tokens])

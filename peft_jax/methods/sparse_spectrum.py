"""Shared base class of FourierFT and WaveFT: trained coefficients at random places of a spectrum."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.targets import by_end, pattern_value
from peft_jax.methods.added_change import AddedChange
from peft_jax.methods.base import Arrays
from peft_jax.methods.torch_draws import permutation


class SparseSpectrum(AddedChange):
    """A method whose one role is coefficients; where each stands is drawn from a seed, and not in its files.

    Layers of a size have the same places, the first ones of one permutation: of stacked layers with several numbers of
    coefficients the shorter arrays are padded at their end, and what is there does not count.
    """

    n_frequency: int
    scaling: float
    random_loc_seed: int
    n_frequency_pattern: Mapping[str, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {"n_frequency": self.n_frequency, **self.n_frequency_pattern}
        if wrong := {name: count for name, count in counts.items() if not isinstance(count, int) or count < 1}:
            raise ValueError(f"{self.peft_type} needs at least 1 coefficient, got {wrong}.")

    @staticmethod
    def pattern_rule(pattern: str) -> str:
        """The expression of whole paths that a key of ``n_frequency_pattern`` stands for."""
        return by_end(pattern)

    @property
    def patterns(self) -> Mapping[str, str]:
        """Those of numbers of coefficients."""
        return {pattern: self.pattern_rule(pattern) for pattern in self.n_frequency_pattern}

    def count(self, module: str) -> int:
        """Number of coefficients of a module."""
        return int(pattern_value(self.n_frequency_pattern, module, self.n_frequency, self.pattern_rule))

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The coefficients."""
        count = self.count(module)
        if count > n_in * n_out:
            raise ValueError(
                f"{self.peft_type} with n_frequency={count} has more coefficients than the {n_in * n_out} elements of "
                f"'{module}'. Lower n_frequency, or give the module its own in n_frequency_pattern."
            )
        (role,) = self.axes
        return {role: (count,)}

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """Scale and number of coefficients of each stacked layer, 0 where it is not adapted."""
        counts = np.where(adapted, np.vectorize(self.count, otypes=[np.int32])(names), 0)
        scaling = np.where(adapted, self.scaling, 0)
        return {
            "hit": jnp.asarray(adapted),
            "scaling": jnp.asarray(scaling, jnp.float32),
            "count": jnp.asarray(counts, jnp.int32),
        }

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The number of coefficients of each stacked layer."""
        return np.asarray(state["count"])

    def coefficients(self, params: Arrays, state: Mapping[str, Any]) -> Float[Array, " frequencies"]:
        """Those of one layer in float32, zero where they are padding."""
        (values,) = params.values()
        return jnp.where(jnp.arange(values.shape[-1]) < state["count"], values.astype(jnp.float32), 0)

    def places(self, n_in: int, n_out: int, count: int) -> np.ndarray:
        """Where the coefficients of a matrix stand, of its ``in * out`` elements in PyTorch's order."""
        return permutation(self.random_loc_seed, n_in * n_out, count)

"""SHiRA: W' = W + S with a sparse S, whose nonzero elements are trained: as many as a LoRA of rank r has.

Bhardwaj et al., 2024, https://arxiv.org/abs/2406.13175, section 3. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.float_types import wider_float
from peft_jax.core.layout import Layout
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.frozen_arrays import FrozenArrays, check_indices
from peft_jax.methods.ranked import Ranked
from peft_jax.methods.target_fields import TargetFields
from peft_jax.methods.torch_draws import permutation

VALUES, PLACES = "shira_weight", "shira_indices"
TORCH_SEED = 67280421310721  # of a generator that is given none


@register("SHIRA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShiraConfig(TargetFields, FrozenArrays, Ranked):
    """Trains some elements of a matrix, and leaves the others as they are; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields` say.

    Attributes:
        r: A module has ``r * (in + out)`` trained elements, at most all; at least 1.
        mask_type: How a fresh adapter chooses them: ``"random"``. Another name is that of a function of the user's in
            PEFT; such an adapter is read from its file, which has the places.
        random_seed: Seed of the choice, which is the one that PyTorch makes of it; None is always the same one too.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        init_weights: True starts at no change; False at normal numbers.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 8))}}
        >>> params = pj.apply_adapter(params, ShiraConfig(r=2, target_modules=["q"]))
        >>> params["q"]["kernel"].params["shira_weight"].shape, params["q"]["kernel"].state["shira_indices"].shape
        ((32,), (2, 32))
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {VALUES: ("places",), PLACES: ("out_in", "places")}

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False
    init_weights: bool = True

    @property
    def frozen(self) -> tuple[str, ...]:
        """The places of the trained elements."""
        return (PLACES,)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The trained elements, and the output and the input that each is between."""
        count = self.r * (n_in + n_out)
        if count > n_in * n_out:
            raise ValueError(
                f"SHIRA with r={self.r} trains {count} elements of '{module}', which has {n_in * n_out}. Lower r."
            )
        return {VALUES: (count,), PLACES: (2, count)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """No change, or normal numbers."""
        return jnp.zeros(shape) if role == PLACES or self.init_weights else jax.random.normal(key, shape)

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As every method's, with the places that PyTorch would draw, which are the same in all layers of a size."""
        if self.mask_type != "random":
            raise ValueError(
                f"mask_type={self.mask_type!r} names a function that PEFT is given by its user. Write 'random', or "
                "load the adapter's file."
            )
        params, state = super().init(layout, shape, names, adapted, key)
        n_in, n_out = layout.sizes(shape)
        seed = TORCH_SEED if self.random_seed is None else self.random_seed
        drawn = np.sort(permutation(seed, n_in * n_out, params[VALUES].shape[-1]))
        places = np.unravel_index(drawn, (n_out, n_in))
        state[PLACES] = jnp.broadcast_to(jnp.asarray(places, jnp.int32), state[PLACES].shape)
        return params, state

    def check_frozen(self, arrays: Mapping[str, np.ndarray], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if a place of a file is outside of the matrix."""
        places = arrays[PLACES]
        check_indices(PLACES, places[..., 0, :], n_out, path)
        check_indices(PLACES, places[..., 1, :], n_in, path)

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The number of trained elements of each stacked layer."""
        return (np.asarray(state["rank"]) > 0) * params[VALUES].shape[-1]

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + S``, added in the adapter's precision."""
        values = state["scaling"].astype(params[VALUES].dtype) * params[VALUES]
        outputs, inputs = state[PLACES].astype(jnp.int32)
        wide = wider_float(matrix.dtype, values.dtype)
        return matrix.astype(wide).at[inputs, outputs].add(values.astype(wide)).astype(matrix.dtype)

"""Base class of methods that train two vectors at two random matrices which all layers share, as VeRA does."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.methods.shared_arrays import SharedArrays
from peft_jax.methods.torch_draws import kaiming_uniform, seeded


class RandomFactors(SharedArrays):
    """The random matrices ``(in, width)`` and ``(r, out)``, and the vectors ``(width,)`` and ``(out,)``.

    The matrices are as large as the largest layer asks for, and each layer takes its part from their beginning.

    Attributes:
        axes: Those of the vectors, the one behind the first matrix first.
        shared_axes: Those of the matrices, the first one first.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]]

    # Fields of the configs.
    r: int
    projection_prng_key: int
    save_projection: bool
    d_initial: float
    init_weights: bool

    @property
    def width(self) -> int:
        """The values that the first matrix gives."""
        return self.r

    @property
    def saves_shared(self) -> bool:
        """``save_projection``."""
        return self.save_projection

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The two vectors."""
        inner, outer = self.axes
        return {inner: (self.width,), outer: (n_out,)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """A small constant, and zeros; or random numbers, and ones."""
        inner, _ = self.axes
        if role == inner:
            return jnp.full(shape, self.d_initial) if self.init_weights else jax.random.normal(key, shape)
        return jnp.zeros(shape) if self.init_weights else jnp.ones(shape)

    def shared_shapes(self, sizes: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        """The random matrices, as large as the largest layer."""
        first, second = self.shared_axes
        n_in, n_out = np.max(sizes, axis=0).tolist()
        return {first: (n_in, self.width), second: (self.r, n_out)}

    def shared(self, sizes: Sequence[tuple[int, int]]) -> dict[str, jax.Array]:
        """Drawn as PyTorch's ``kaiming_uniform_`` draws them one after the other, from ``projection_prng_key``."""
        generator = seeded(self.projection_prng_key)
        shapes = self.shared_shapes(sizes)
        return {
            role: jnp.asarray(kaiming_uniform(generator, (out, fan_in)).T) for role, (fan_in, out) in shapes.items()
        }

    def share(self, shared: Mapping[str, Any], sizes: tuple[int, int], stack: tuple[int, ...]) -> dict[str, jax.Array]:
        """The beginnings of the random matrices, for each stacked layer."""
        first, second = self.shared_axes
        parts = {first: shared[first][: sizes[0]], second: shared[second][:, : sizes[1]]}
        return {role: jnp.broadcast_to(jnp.asarray(part), (*stack, *part.shape)) for role, part in parts.items()}

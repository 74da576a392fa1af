"""Statistics of adapted weights in a program, summed over batches: moments of their inputs, and their gradients.

In place of an adapter a leaf has an array of zeros, whose gradient is what is asked for. So it is found through
in any program: scans over layers, `jax.jit`, checkpoints.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import map_adapted
from peft_jax.core.partition import combine, partition
from peft_jax.core.paths import leaf_names
from peft_jax.core.product import Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import Weight
from peft_jax.methods.roles import Role

MASK = "mask"
Moment = Callable[..., jax.Array]  # of inputs (tokens, in), and which tokens count


@dataclasses.dataclass(frozen=True)
class Inputs(Role):
    """Sums ``moment(x)`` over the products of a weight, ``(in + 1, in + 1)``; ``x`` has a row for each token."""

    moment: Moment
    side_path: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"sum": ("in", "in")}

    def structure(self) -> tuple[Any, ...]:
        """Equal for equal moments."""
        return (Inputs, self.moment)

    @staticmethod
    def zeros(n_in: int, n_out: int) -> tuple[int, int]:
        """Shape of the sum of one layer."""
        return n_in + 1, n_in + 1

    def merge(self, params: PyTree, state: Any, matrix: jax.Array) -> jax.Array:
        """The matrix as it is."""
        return matrix

    def apply(self, params: PyTree, state: Any, base: Weight, x: jax.Array, product: Product) -> jax.Array:
        """The product with the base, and a note of its inputs."""
        y = base.apply(x, product)
        if type(product) is not Product:
            return y
        mask = state.get(MASK, jnp.ones(x.shape[:-1]))
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"Inputs of shape {x.shape} meet a weight, and the mask of their tokens has shape {mask.shape}. Give "
                "mask= that fits, or leave that module out of the targets."
            )
        return _noted(self.moment, y, x, params["sum"], mask)


@dataclasses.dataclass(frozen=True)
class Gradients(Role):
    """Sums the gradients of a weight's matrix, ``(in, out)``."""

    side_path: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"sum": ("in", "out")}

    def structure(self) -> tuple[Any, ...]:
        """All are equal."""
        return (Gradients,)

    @staticmethod
    def zeros(n_in: int, n_out: int) -> tuple[int, int]:
        """Shape of the sum of one layer."""
        return n_in, n_out

    def merge(self, params: PyTree, state: Any, matrix: jax.Array) -> jax.Array:
        """The matrix plus zeros."""
        return matrix + params["sum"].astype(matrix.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _noted(moment: Moment, y: jax.Array, x: jax.Array, total: jax.Array, mask: jax.Array) -> jax.Array:
    """``y``; the gradient of ``total`` is the moment of ``x``."""
    return y


def _noted_forward(moment: Moment, y: jax.Array, x: jax.Array, total: jax.Array, mask: jax.Array) -> Any:
    return y, (x, mask)


def _noted_backward(moment: Moment, kept: Any, cotangent: jax.Array) -> Any:
    x, mask = kept
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return cotangent, jnp.zeros_like(x), moment(rows, mask.reshape(-1)), jnp.zeros_like(mask)


_noted.defvjp(_noted_forward, _noted_backward)


def observing(adapted: Any, adapter_name: str, role: Inputs | Gradients) -> Any:
    """The tree with arrays of zeros where it has the matrices of an adapter; nothing else in it is trained."""

    def put(_: str, leaf: Adapted) -> Any:
        if leaf.tag.name != adapter_name or leaf.tag.role is not None:
            return dataclasses.replace(leaf, trainable=False)
        if leaf.layout.lookup:
            return dataclasses.replace(leaf, trainable=False)
        stack = leaf.layout.stack_shape(leaf.shape)
        zeros = jnp.zeros((*stack, *role.zeros(*leaf.layout.sizes(leaf.shape))))
        tag = dataclasses.replace(leaf.tag, role=role)
        return dataclasses.replace(leaf, params={"sum": zeros}, state={}, tag=tag)

    return map_adapted(put, adapted)


def observer(tree: PyTree, scalar: Callable[[Any, Any], jax.Array]) -> Callable[[Any, Any], dict[str, jax.Array]]:
    """A compiled function of a batch and a mask (or None): the sums of each leaf, by its path, stacked axes first."""
    trainable, frozen = partition(tree)

    @jax.jit
    def sums(trainable: PyTree, frozen: PyTree, batch: Any, mask: Any) -> Any:
        def run(trainable: PyTree) -> jax.Array:
            return scalar(map_adapted(_masked(mask), combine(trainable, frozen)), batch)

        return jax.grad(run)(trainable)

    def observe(batch: Any, mask: Any) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}

        def note(path: str, leaf: Adapted) -> Adapted:
            if isinstance(leaf.tag.role, (Inputs, Gradients)):
                found[path] = leaf.params["sum"]
            return leaf

        map_adapted(note, sums(trainable, frozen, batch, mask))
        return found

    return observe


def _masked(mask: Any) -> Callable[[str, Adapted], Adapted]:
    def put(_: str, leaf: Adapted) -> Adapted:
        if mask is None or not isinstance(leaf.tag.role, Inputs):
            return leaf
        stack = leaf.layout.stack_shape(leaf.shape)
        return dataclasses.replace(leaf, state={MASK: jnp.broadcast_to(mask, (*stack, *mask.shape))})

    return put


def layers_of(path: str, leaf: Adapted) -> tuple[np.ndarray, np.ndarray]:
    """Names of the layers of an adapted leaf, and which of them have the adapter."""
    return leaf_names(path, leaf.layout, leaf.shape), np.asarray(leaf.state["rank"]) > 0

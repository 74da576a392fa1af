"""C3A: W' = W + C / in, where C is of circulant blocks: y = x W + the circular convolutions of x with trained kernels.

Chen et al., 2024, https://arxiv.org/abs/2407.19342. Numbers follow PEFT 0.21.2,
but for two of its own: its gradient of x has the circulant blocks not transposed (so layers below an adapted one learn
otherwise there), and of several active adapters the second one gets the first one's outputs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.targets import below_others, pattern_value
from peft_jax.methods.added_change import AddedChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.target_fields import LayerFields, TargetFields

KERNEL = "c3a_kernel"
STARTS = (True, False, "gaussian", "kaiming_uniform", "xavier_uniform")


@register("C3A")
@dataclasses.dataclass(frozen=True, kw_only=True)
class C3AConfig(TargetFields, LayerFields, AddedChange):
    """Adds a matrix of circulant blocks, each of one trained vector; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        block_size: Rows and columns of a block, a divisor of a module's inputs and outputs.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"c3a_only"`` (those of adapted modules).
        block_size_pattern: Size of blocks by pattern of module paths, where it differs from ``block_size``. As in PEFT
            a pattern is the end of a path, with a module in front of it.
        init_weights: True starts at no change; ``"gaussian"``, ``"kaiming_uniform"`` or ``"xavier_uniform"`` at random
            numbers, and False as the last one, as in PEFT.

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 4))}}
        >>> params = pj.apply_adapter(params, C3AConfig(block_size=4, target_modules=["q"]))
        >>> params["q"]["kernel"].params["c3a_kernel"].shape  # of the outputs' block, of the inputs' two
        (1, 2, 4)
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {KERNEL: ("out_blocks", "in_blocks", "offsets")}

    block_size: int = 256
    bias: str = "none"
    block_size_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool | str | None = "xavier_uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = {"block_size": self.block_size, **self.block_size_pattern}
        if wrong := {name: size for name, size in sizes.items() if not isinstance(size, int) or size < 1}:
            raise ValueError(f"C3A needs blocks of at least 1 row, got {wrong}.")
        if self.init_weights not in STARTS:
            raise ValueError(f"init_weights is one of {', '.join(map(repr, STARTS))}, got {self.init_weights!r}.")

    @property
    def patterns(self) -> Mapping[str, str]:
        """Those of sizes of blocks, by PEFT's older rule."""
        return {pattern: below_others(pattern) for pattern in self.block_size_pattern}

    def size(self, module: str) -> int:
        """Rows and columns of a block of a module."""
        return int(pattern_value(self.block_size_pattern, module, self.block_size, below_others))

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """A vector for each block."""
        size = self.size(module)
        if n_in % size or n_out % size:
            raise ValueError(
                f"C3AConfig(block_size={size}) needs a divisor of the {n_in} inputs and {n_out} outputs of '{module}'."
            )
        return {KERNEL: (n_out // size, n_in // size, size)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Zeros, or random numbers by the numbers of inputs and outputs."""
        if self.init_weights is True:
            return jnp.zeros(shape)
        if self.init_weights == "gaussian":
            return jax.random.normal(key, shape)
        n_out, n_in = shape[0] * shape[2], shape[1] * shape[2]
        bound = n_in**-0.5 if self.init_weights == "kaiming_uniform" else (6 / (n_in + n_out)) ** 0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The size of blocks of each stacked layer, 0 where it is not adapted."""
        sizes = np.where(adapted, np.vectorize(self.size, otypes=[np.int32])(names), 0)
        return {"hit": jnp.asarray(adapted), "block": jnp.asarray(sizes, jnp.int32)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``in * out / size`` of each stacked layer; the padded kernel has as many blocks as the smallest size asks."""
        sizes, (*_, rows, columns, _offsets) = np.asarray(state["block"]), params[KERNEL].shape
        smallest = np.min(sizes[sizes > 0], initial=np.iinfo(np.int32).max)
        return np.where(sizes > 0, rows * columns * int(smallest) ** 2 // np.maximum(sizes, 1), 0)

    def change(self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int) -> Float[Array, "in out"]:
        """``C / in``, whose element of an input and an output is that of their block's vector at their distance."""
        size = jnp.maximum(state["block"], 1)
        inputs, outputs = jnp.arange(n_in)[:, None], jnp.arange(n_out)[None, :]
        circulant = params[KERNEL][outputs // size, inputs // size, (inputs - outputs) % size]
        return jnp.where(state["hit"], circulant / n_in, 0)

"""LILY: h = W x + s B' A x, where B' is a mixture of matrices that a router weighs; layers share A and all B.

Zhong et al., 2024, https://arxiv.org/abs/2407.09946, section 3: B' = sum_i p_i B_i, where p is the mean over tokens of
softmax(R A x). Blocks of neighbouring layers have one A, and all layers have the same B_i. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError, Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_rank, kaiming
from peft_jax.methods.grouped_arrays import GroupedArrays
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

A, B, ROUTER = "lily_A", "lily_B", "lily_router"


@register("LILY")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LilyConfig(TargetFields, ExcludeFields, LayerFields, GroupedArrays):
    """Adds a product of factors that layers share, mixed by the inputs; fields and defaults are PEFT's.

    Layers share among those of one name in ``target_modules`` and one size, in the order in which PyTorch declares
    them; with a regex among all of one size. In a bare tree they are sorted by name. Of two names that a module ends
    with, the longer one counts, where PEFT takes any of them. A list of 20 names or more is shortened first, as in
    PEFT, to the ends of paths that name the same modules.

    The weights of the mixture are means over all tokens of a call, padding among them, as in PEFT. So the numbers of a
    row depend on the other rows of its batch, and there is no merged matrix.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Rank, at least 1.
        stride_A: Number of neighbouring layers that have one first factor.
        num_B: Number of second factors, at least 2.
        scaling: Factor of the change.
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"layers": [{"q": {"kernel": jnp.ones((8, 4))}} for _ in range(2)]}
        >>> params = pj.apply_adapter(params, LilyConfig(r=2, stride_A=2, target_modules=["q"]))
        >>> first, second = (layer["q"]["kernel"] for layer in params["layers"])
        >>> {role: array.shape for role, array in sorted(first.params.items())}
        {'lily_A': (8, 2), 'lily_B': (2, 2, 4), 'lily_router': (2, 2)}
        >>> list(second.params)
        ['lily_router']
    """

    takes_conv1d: ClassVar[bool] = False
    over_rows: ClassVar[bool] = True
    carried: ClassVar[tuple[str, ...]] = (A, B)
    structural: ClassVar[tuple[str, ...]] = ("scaling",)
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        A: ("in", "rank"),
        B: ("choices", "rank", "out"),
        ROUTER: ("rank", "choices"),
    }

    r: int = 32
    stride_A: int = 1
    num_B: int = 2
    scaling: float = 1.0
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        if self.stride_A < 1:
            raise ValueError(f"stride_A is a number of layers, at least 1, got {self.stride_A}.")
        if self.num_B < 2:
            raise ValueError(f"num_B is at least 2, so that there is something to mix, got {self.num_B}.")

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The factors and the router."""
        if lookup:
            raise ValueError(f"LILY is not for embeddings, as '{module}' is. Target other modules.")
        return {A: (n_in, self.r), B: (self.num_B, self.r, n_out), ROUTER: (self.r, self.num_B)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random; second factors of zeros, or random too."""
        if role == B:
            return jnp.zeros(shape) if self.init_weights else kaiming(key, shape, shape[-1])
        return kaiming(key, shape, shape[0])

    def leaders(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
        """The first module of a block of ``stride_A`` has ``A``, and that of its group all ``B``."""
        targets = self.target_modules or ()
        return leaders(sizes, () if isinstance(targets, str) else targets, self.stride_A)

    def merge(self, params: Arrays, state: Mapping[str, Any], matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """Raise MergeError: a LILY adapter has no merged matrix.

        Raises:
            MergeError: always.
        """
        raise MergeError(
            "A LILY adapter mixes its factors by the inputs, so that it is no one matrix. Use it unmerged, in products "
            "alone."
        )

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + s (x A) B'``."""
        if not product.is_plain or state["hit"].ndim:
            raise MergeError(
                "LILY weighs its factors by the tokens of plain products alone, and a module here is used in another "
                "way. Leave it out of target_modules."
            )
        inner = product.down(x, self.of_layer(params, state, A))
        weights = jax.nn.softmax(inner @ params[ROUTER], axis=-1)
        mean = jnp.mean(weights, axis=tuple(range(weights.ndim - 1)))
        second = jnp.einsum("c,cro->ro", mean, self.of_layer(params, state, B))
        second = jnp.where(state["hit"], self.scaling * second, 0)
        return product.added(base.apply(x, product), product.up(inner, second))


def leaders(sizes: Mapping[str, tuple[int, int]], endings: Collection[str], stride: int) -> dict[str, dict[str, str]]:
    """By role, the module whose factor each module uses: modules of one ending and one size are a group.

    Args:
        sizes: Sizes of the matrices by name, in the order of the layers.
        endings: Names of targets, of which the longest one counts that a module ends with; none for a regex.
        stride: Number of neighbouring layers of a group that have one ``A``.

    Example:
        >>> leaders({"0.q": (8, 4), "1.q": (8, 4)}, ["q"], 1)
        {'lily_A': {'0.q': '0.q', '1.q': '1.q'}, 'lily_B': {'0.q': '0.q', '1.q': '0.q'}}
    """
    groups: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for module, size in sizes.items():
        ending = max((name for name in endings if module.endswith(name)), key=len, default="")
        groups.setdefault((ending, size), []).append(module)
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    for modules in groups.values():
        for place, module in enumerate(modules):
            first[module] = modules[place // stride * stride]
            second[module] = modules[0]
    return {A: first, B: second}

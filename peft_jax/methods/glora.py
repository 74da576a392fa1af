"""GLoRA: W' = W + W * A + B and b' = b + b * D + E + C W, where * multiplies element by element.

Chavan et al., 2023, https://arxiv.org/abs/2306.07967: each of A, B, C, D and E is a product of two low-rank factors, a
vector, one number, or left out. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.float_types import added, wider_float
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_rank, kaiming
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.target_fields import TargetFields

LORA, VECTOR, CONSTANT, NONE = "lora", "vector", "constant", "none"
OF_WEIGHT, OF_BIAS = "AB", "CDE"
WEIGHTED = "weight_C"  # the product of C and the weight, in the state of a bias


@register("GLORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GloraConfig(TargetFields, FrozenArrays, BiasRule):
    """Multiplies the elements of weight and bias, and adds to them; fields and defaults are PEFT's.

    A module without a bias has no C, D and E. Files hold zeros in place of what is left out.

    It goes on the modules that the fields of `TargetFields` say.

    Attributes:
        r: Rank of what has low-rank factors, at least 1.
        bias: Which biases are trained whole: ``"none"``, ``"all"``, or ``"glora_only"`` (those of adapted modules).
        config_A_B: What A and B are: ``"lora"``, ``"vector"`` (of the outputs), ``"constant"`` or ``"none"``.
        config_C: What C is: ``"lora"``, ``"vector"`` (of the inputs) or ``"none"``.
        config_D_E: What D and E are: ``"vector"``, ``"constant"`` or ``"none"``.
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)}}
        >>> params = pj.apply_adapter(params, GloraConfig(r=2, config_A_B="vector", target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'A.X': (6,), 'B.X': (6,), 'C.Xd': (8, 2), 'C.Xu': (2,), 'D.X': (1,), 'E.X': (1,)}
    """

    takes_conv1d: ClassVar[bool] = False
    reads_base: ClassVar[bool] = True
    reads_base_bias: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "A.Xd": ("rank", "out"),
        "A.Xu": ("in", "rank"),
        "B.Xd": ("rank", "out"),
        "B.Xu": ("in", "rank"),
        "A.X": ("out",),
        "B.X": ("out",),
        "A.number": ("one",),
        "B.number": ("one",),
        "C.Xd": ("in", "rank"),
        "C.Xu": ("rank",),
        "C.X": ("in",),
        "D.X": ("values",),
        "E.X": ("values",),
        "A.zeros": ("in", "out"),
        "B.zeros": ("in", "out"),
        "C.zeros": ("in",),
        "D.zeros": ("out",),
        "E.zeros": ("out",),
    }
    structural: ClassVar[tuple[str, ...]] = ("config_A_B", "config_C", "config_D_E")

    r: int = 8
    bias: str = "none"
    config_A_B: str = LORA
    config_C: str = LORA
    config_D_E: str = CONSTANT
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        choices = {
            "config_A_B": (LORA, VECTOR, CONSTANT, NONE),
            "config_C": (LORA, VECTOR, NONE),
            "config_D_E": (VECTOR, CONSTANT, NONE),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is one of {', '.join(allowed)}, got {getattr(self, field)!r}.")

    @property
    def frozen(self) -> tuple[str, ...]:
        """The zeros in files."""
        return tuple(role for role in self.axes if role.endswith(".zeros"))

    def changes_bias(self, module: str) -> bool:
        """C, D and E do."""
        return True

    def has_array(self, role: str, *, biased: bool) -> bool:
        """Whether a module has an array, given whether it has a bias: zeros stand for what is left out."""
        part = role[0]
        kind = self._kind(part)
        is_there = kind != NONE and (biased or part in OF_WEIGHT)
        return is_there != role.endswith(".zeros")

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Those of what the fields say, and of the zeros that stand for it in a module without a bias."""
        whole = {"A": (n_in, n_out), "B": (n_in, n_out), "C": (n_in,), "D": (n_out,), "E": (n_out,)}
        found: dict[str, tuple[int, ...]] = {}
        for part in OF_WEIGHT + OF_BIAS:
            kind = self._kind(part)
            if kind == LORA and part == "C":
                found |= {"C.Xd": (n_in, self.r), "C.Xu": (self.r,)}
            elif kind == LORA:
                found |= {f"{part}.Xd": (self.r, n_out), f"{part}.Xu": (n_in, self.r)}
            elif kind != NONE:
                size = n_in if part == "C" else n_out
                is_number = kind == CONSTANT and part in OF_WEIGHT
                found[f"{part}.number" if is_number else f"{part}.X"] = (1,) if kind == CONSTANT else (size,)
            if kind == NONE or part in OF_BIAS:
                found[f"{part}.zeros"] = whole[part]
        return found

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Zeros but for the second factors; or all as PyTorch starts a layer, and numbers at 0.02 times normal ones."""
        part, name = role.split(".")
        if name == "zeros" or (self.init_weights and name != "Xu"):
            return jnp.zeros(shape)
        if name == "Xu":
            return kaiming(key, shape, 1 if part == "C" else shape[0])
        if self._kind(part) == CONSTANT:
            return 0.02 * jax.random.normal(key, shape)
        if name == "Xd":
            return kaiming(key, shape, self.r)
        return kaiming(key, shape, shape[0] if part in "DE" else 1)

    def check_frozen(self, arrays: Mapping[str, np.ndarray], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if what a file has in place of something that is left out is not zero."""
        for role in self.frozen:
            if role in arrays and np.any(arrays[role]):
                raise ValueError(
                    f"glora_{role} of '{path}' is not zero, but the config leaves {role[0]} out, or the module has no "
                    "bias. Save the adapter again from the model that it was trained on."
                )

    def merge(
        self,
        params: Arrays,
        state: Arrays,
        matrix: Float[Array, "in out"],
        unadapted: Float[Array, "in out"] | None = None,
    ) -> Float[Array, "in out"]:
        """``W + U * A + B`` with ``unadapted`` as U, the weight without the adapters under this one; None if U is W."""
        if self.config_A_B == NONE:
            return matrix
        factor, term = self._of_weight(params, "A"), self._of_weight(params, "B")
        wide = wider_float(matrix.dtype, term.dtype)
        base = (matrix if unadapted is None else unadapted).astype(wide)
        change = base * factor.astype(wide) + term.astype(wide)
        return added(matrix, jnp.where(state["hit"], change, 0))

    def merge_bias(
        self,
        params: Arrays,
        state: Arrays,
        bias: Float[Array, " out"],
        unadapted: Float[Array, " out"] | None = None,
    ) -> Float[Array, " out"]:
        """``b + u * D + E + C W`` with ``unadapted`` as u, the bias without the adapters under this one."""
        base = bias if unadapted is None else unadapted
        change = jnp.zeros(bias.shape, bias.dtype)
        if self.config_D_E != NONE:
            term = jnp.broadcast_to(params["E.X"], bias.shape)
            change = base.astype(term.dtype) * jnp.broadcast_to(params["D.X"], bias.shape) + term
        if WEIGHTED in params:
            change = change.astype(params[WEIGHTED].dtype) + params[WEIGHTED]
        return added(bias, jnp.where(state["hit"], change, 0))

    def for_bias(self, params: Arrays, state: Arrays, base: Weight) -> dict[str, jax.Array]:
        """The trained arrays, and the product of C and the weight."""
        arrays = dict(params)
        if self.config_C == NONE:
            return arrays
        matrix = base.layout.matrix(base.unadapted.dense())
        if self.config_C == LORA:
            column = jnp.einsum("...ir,...r->...i", params["C.Xd"], params["C.Xu"])
        else:
            column = params["C.X"]
        arrays[WEIGHTED] = jnp.einsum("...io,...i->...o", matrix.astype(column.dtype), column)
        return arrays

    def bias_roles(self, params: Arrays) -> set[str]:
        """Names of those of `for_bias`."""
        return {*params, WEIGHTED} if self.config_C != NONE else set(params)

    def _kind(self, part: str) -> str:
        """How the config makes one of the five."""
        return {"A": self.config_A_B, "B": self.config_A_B, "C": self.config_C}.get(part, self.config_D_E)

    def _of_weight(self, params: Arrays, part: str) -> Float[Array, "#in #out"]:
        """A or B of one layer."""
        if self.config_A_B == LORA:
            return params[f"{part}.Xu"] @ params[f"{part}.Xd"]
        return params[f"{part}.number" if self.config_A_B == CONSTANT else f"{part}.X"][None]

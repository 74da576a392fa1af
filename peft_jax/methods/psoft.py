"""PSOFT: W' = W + s B (R - I) A, with R = diag(b) Q diag(a) and Q a rotation of the largest singular directions of W.

Wu et al., 2026, https://arxiv.org/abs/2505.11235, section 4: B A is the part of W of its ``r`` largest singular values
over s, and is frozen. Q is made of a skew-symmetric matrix by Cayley's map. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.weight import Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank
from peft_jax.methods.on_host import on_host
from peft_jax.methods.principal_vectors import Principal, principal_vectors, random_principal_vectors
from peft_jax.methods.rotations import cayley, cayley_series, skew
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

ANGLES, MATRIX, OF_OUTPUTS, OF_INPUTS = "psoft_R", "psoft_R_matrix", "psoft_vector_b", "psoft_vector_a"
FROM_IN, TO_OUT = "psoft_A", "psoft_B"
BOTH_ALIKE, FULL, LOWRANK = "pissa_init", "full", "lowrank"
SEEDS = range(-(2**63), 2**64)  # that PyTorch takes
NEEDS = {  # fields that count beside a value of another one alone
    "psoft_svd_lowrank_niter": ("psoft_svd", LOWRANK),
    "num_cayley_neumann_terms": ("use_cayley_neumann", True),
    "cayley_neumann_eps": ("use_cayley_neumann", True),
}


@register("PSOFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PsoftConfig(TargetFields, ExcludeFields, LayerFields, StartsFromWeight, FactoredChange):
    """Rotates the largest singular directions of a frozen matrix among themselves; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    A file has R alone. A and B are made again of the weight wherever it is read, here as in PEFT, and R says something
    only with the signs that their singular vectors had. They are PyTorch's on a CPU where PyTorch is installed, and
    NumPy's elsewhere, of which a warning says that they may differ.

    Attributes:
        r: Number of singular directions, from 1 to the smaller of inputs and outputs.
        psoft_alpha: Numerator of the scale s = ``psoft_alpha / r``, above 0. B is divided by s, so that a fresh adapter
            and its training do not depend on it, but for rounding.
        psoft_dropout: Probability of zeroing an input of the change in training, in [0, 1).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        ab_svd_init: ``"psoft_init"`` for singular vectors as A and B with the values; ``"pissa_init"`` for both with
            the roots of the values.
        psoft_svd: ``"full"`` for the whole decomposition, ``"lowrank"`` for PyTorch's ``svd_lowrank``, an approximation
            that needs PyTorch.
        psoft_svd_lowrank_niter: Number of power iterations of that.
        random_seed: Seed of its random numbers.
        psoft_orth: True for a rotation; False for any matrix.
        psoft_mag_b: Whether R has a trained factor of each output.
        psoft_mag_a: Whether it has one of each input.
        use_cayley_neumann: True for the series, which is a rotation up to its error; False for Cayley's map itself.
        num_cayley_neumann_terms: Number of terms of the series.
        cayley_neumann_eps: With the series, the largest norm of the skew-symmetric matrix, in (0, 1), to which a larger
            one is scaled down; None for any.
        init_weights: True starts at no change; False at a random one.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.eye(8, 6)}}
        >>> params = pj.apply_adapter(params, PsoftConfig(r=4, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'psoft_R': (6,), 'psoft_vector_b': (4,), 'psoft_vector_a': (4,)}
    """

    learning_rate: ClassVar[float] = 5e-4
    packages: ClassVar[tuple[str, ...]] = ("torch", "numpy")  # whose singular vectors have signs of their own
    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        ANGLES: ("pairs",),
        MATRIX: ("row", "column"),
        OF_OUTPUTS: ("row",),
        OF_INPUTS: ("column",),
        FROM_IN: ("in", "rank"),
        TO_OUT: ("rank", "out"),
    }
    structural: ClassVar[tuple[str, ...]] = ("use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps")

    r: int = 32
    psoft_alpha: float = 32
    psoft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    ab_svd_init: str = "psoft_init"
    psoft_svd: str = FULL
    psoft_svd_lowrank_niter: int = 10
    random_seed: int = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5
    cayley_neumann_eps: float | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        check_probability(self, "psoft_dropout")
        if self.psoft_alpha <= 0:
            raise ValueError(f"psoft_alpha is above 0, got {self.psoft_alpha}.")
        if self.ab_svd_init not in ("psoft_init", BOTH_ALIKE):
            raise ValueError(f"ab_svd_init is 'psoft_init' or '{BOTH_ALIKE}', got {self.ab_svd_init!r}.")
        if self.psoft_svd not in (FULL, LOWRANK):
            raise ValueError(f"psoft_svd is '{FULL}' or '{LOWRANK}', got {self.psoft_svd!r}.")
        if self.psoft_svd_lowrank_niter < 0:
            raise ValueError(f"psoft_svd_lowrank_niter is at least 0, got {self.psoft_svd_lowrank_niter}.")
        if self.random_seed not in SEEDS:
            raise ValueError(f"random_seed is from {SEEDS.start} to {SEEDS.stop - 1}, got {self.random_seed}.")
        if self.num_cayley_neumann_terms < 1:
            raise ValueError(f"num_cayley_neumann_terms is at least 1, got {self.num_cayley_neumann_terms}.")
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ValueError(f"cayley_neumann_eps is between 0 and 1, or None, got {self.cayley_neumann_eps}.")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, (switch, value) in NEEDS.items():
            if getattr(self, name) != defaults[name] and getattr(self, switch) != value:
                warnings.warn(f"PSOFT uses {name} with {switch}={value!r} alone. It is ignored.", stacklevel=3)

    @property
    def dropout_rate(self) -> float:
        """``psoft_dropout``."""
        return self.psoft_dropout

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The angles of pairs of directions, or a matrix, and the factors of its rows and columns."""
        r = self.r
        if r > min(n_in, n_out):
            raise ValueError(
                f"PSOFT rotates r={r} singular directions, and '{module}' of {n_in} inputs and {n_out} outputs has "
                f"{min(n_in, n_out)}. Lower r, or leave the module out."
            )
        shapes: dict[str, tuple[int, ...]] = {ANGLES: (r * (r - 1) // 2,)} if self.psoft_orth else {MATRIX: (r, r)}
        if self.psoft_mag_b:
            shapes[OF_OUTPUTS] = (r,)
        if self.psoft_mag_a:
            shapes[OF_INPUTS] = (r,)
        return shapes

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """No rotation, or a small random one; factors of one."""
        if role in (OF_OUTPUTS, OF_INPUTS):
            return jnp.ones(shape)
        start = jnp.eye(shape[0]) if role == MATRIX else jnp.zeros(shape)
        return start if self.init_weights else start + 0.1 * jax.random.normal(key, shape)

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init`, with A and B of the base without other adapters."""
        params, state = self.init(base.layout, base.shape, names, adapted, key)
        return params, state | self.state_on(base, names, adapted), base

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The scale of each stacked layer, 0 where it is not adapted."""
        scale = self.psoft_alpha / self.r
        return {"hit": jnp.asarray(adapted), "scaling": jnp.asarray(np.where(adapted, scale, 0), jnp.float32)}

    def state_on(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """A and B, computed on the host; zero where a layer is not adapted."""
        matrix = base.layout.matrix(base.unadapted.dense()).astype(jnp.float32)
        *stack, n_in, n_out = matrix.shape
        declared = {
            FROM_IN: jax.ShapeDtypeStruct((*stack, n_in, self.r), jnp.float32),
            TO_OUT: jax.ShapeDtypeStruct((*stack, self.r, n_out), jnp.float32),
        }

        def frozen(matrix: np.ndarray) -> dict[str, np.ndarray]:
            found = {role: np.zeros(one.shape, one.dtype) for role, one in declared.items()}
            for index in np.ndindex(*stack):
                if adapted[index]:
                    found[FROM_IN][index], found[TO_OUT][index] = self._factors_of(matrix[index])
            return found

        made: dict[str, Any] = on_host(frozen, declared, matrix)
        return made

    def _factors_of(self, matrix: Float[np.ndarray, "in out"]) -> tuple[np.ndarray, np.ndarray]:
        """``(in, rank)`` and ``(rank, out)`` of one layer."""
        weight = np.ascontiguousarray(matrix.T)  # in PyTorch's order, on which last digits depend
        if self.psoft_svd == FULL:
            found: Principal = principal_vectors(weight, self.r)
        else:
            found = random_principal_vectors(weight, self.r, self.psoft_svd_lowrank_niter, self.random_seed)
        values = found.values / np.float32(self.psoft_alpha / self.r)
        if self.ab_svd_init == BOTH_ALIKE:
            root = np.sqrt(values)
            return found.right.T * root[None], root[:, None] * found.left.T
        return found.right.T, values[:, None] * found.left.T

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """``A'`` and ``s (R' - I) B'``."""
        rotation = self._rotation(params)
        kind = rotation.dtype
        moves = jnp.swapaxes(rotation - jnp.eye(rotation.shape[-1], dtype=kind), -1, -2)
        second = moves @ state[TO_OUT].astype(kind)
        return state[FROM_IN].astype(kind), state["scaling"][..., None, None].astype(kind) * second

    def _rotation(self, params: Arrays) -> Float[Array, "*groups rank rank"]:
        """R, in the precision of its array."""
        given = params[ANGLES if ANGLES in params else MATRIX]
        rotation = given
        if ANGLES in params:
            turns = skew(given)
            if self.use_cayley_neumann and self.cayley_neumann_eps is not None:
                turns = _in_ball(turns, self.cayley_neumann_eps)
            series = self.use_cayley_neumann
            rotation = cayley_series(turns, self.num_cayley_neumann_terms) if series else cayley(turns)
        if OF_OUTPUTS in params:
            rotation = params[OF_OUTPUTS].astype(rotation.dtype)[..., :, None] * rotation
        if OF_INPUTS in params:
            rotation = rotation * params[OF_INPUTS].astype(rotation.dtype)[..., None, :]
        return rotation.astype(given.dtype)


def _in_ball(turns: Float[Array, "*groups rank rank"], radius: float) -> Float[Array, "*groups rank rank"]:
    """Matrices whose Frobenius norm is at most ``radius``; the gradient is that of the scaling too."""
    squares = jnp.sum(turns**2, axis=(-1, -2), keepdims=True)
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))  # whose gradient at 0 is none
    is_outside = (squares > 0) & jnp.isfinite(norm) & (norm > radius)
    return jnp.where(is_outside, turns * (radius / (norm + 1e-12)), turns)

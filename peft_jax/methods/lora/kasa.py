"""KaSA: W' = W_r + s A diag(d) B, where W_r is W without its r smallest singular values, and d is trained.

https://arxiv.org/abs/2412.06071, 2024. Numbers follow PEFT 0.21.2. PEFT leaves the
penalty of equations 9 to 11 to the caller (`LoraModel._get_kasa_loss`); here a training step adds it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from peft_jax.core.adapted import Adapted
from peft_jax.core.finite import holds_finite
from peft_jax.core.partition_specs import put
from peft_jax.core.weight import Dense, Weight
from peft_jax.methods.base import Arrays
from peft_jax.methods.fields import check_kinds
from peft_jax.methods.lora.variant import Shapes, Variant
from peft_jax.methods.training_hooks import Leaves

DIAGONAL = "lora_diag"


@dataclasses.dataclass(frozen=True)
class KasaConfig:
    """How much KaSA's penalties count in training.

    Attributes:
        beta: Factor of the sum of squares of the trained singular values, at least 0.
        gamma: Factor of the distances of A' A and B B' from one, at least 0.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> config = pj.LoraConfig(r=2, target_modules=["q"], kasa_config=KasaConfig())
        >>> params = pj.apply_lora({"q": {"kernel": jnp.diag(jnp.arange(4.0))}}, config)
        >>> jnp.diag(pj.unload(params)["q"]["kernel"]).round().tolist()
        [0.0, 0.0, 2.0, 3.0]
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.beta < 0 or self.gamma < 0:
            raise ValueError(f"KaSA's beta and gamma are at least 0, got {self}.")


class Kasa(Variant):
    """KaSA as a row of the table of variants."""

    field = "kasa_config"
    options = KasaConfig
    axes = {DIAGONAL: ("rank",)}
    changes_base = True
    takes_conv1d = False
    penalizes = True

    def shapes(self, config: Any, module: str, whole: Shapes) -> Shapes:
        """Those of plain factors, and the diagonal's."""
        _, rank = whole["lora_A"]
        return {**whole, DIAGONAL: (rank,)}

    def initial(self, config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, "..."]:
        """A diagonal of normal numbers."""
        return jax.random.normal(key, shape)

    def changed(self, config: Any, base: Weight, names: np.ndarray, adapted: np.ndarray) -> Weight:
        """The base without its smallest singular values."""
        return truncated(config, base, names, adapted)

    def factors(
        self,
        params: Arrays,
        state: Mapping[str, Any],
        a: Float[Array, "*groups in rank"],
        b: Float[Array, "*groups rank out"],
        n_in: int,
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """A and ``diag(d) B``, which spares a product with the activations."""
        return (a, b * params[DIAGONAL][..., None].astype(b.dtype)) if DIAGONAL in params else (a, b)

    def penalty(self, config: Any, leaves: Leaves) -> Float[Array, ""]:
        """The sum of all layers' penalties."""
        total = jnp.zeros(())
        for leaf in leaves.values():
            total += penalty(leaf.params, leaf.state, config.kasa_config)
        return total


def truncated(config: Any, base: Weight, names: np.ndarray, adapted: np.ndarray) -> Weight:
    """The base without the ``r`` smallest singular values of each adapted layer.

    A base that a KaSA of the same ranks is on already has lost them, and stays.

    Raises:
        ValueError: if the base is quantized or has other adapters, holds what is not finite, or has too few singular
            values.
    """
    name = str(names.flat[0])
    if isinstance(base, Adapted) and _is_truncated(base, config.ranks(names, adapted)):
        return base
    if not isinstance(base, Dense):
        raise ValueError(
            f"kasa_config takes singular values out of the weight of '{name}', which is quantized, has another adapter "
            "or a KaSA of a smaller rank already. Attach the KaSA of the largest rank to the float model first; then "
            "quantize it, or attach the others."
        )
    layout, dense = base.layout, base.dense()
    n_in, n_out = layout.sizes(base.shape)
    matrices = jnp.reshape(layout.matrix(dense), (-1, n_in, n_out))
    layers = []
    for matrix, layer, is_adapted in zip(matrices, names.flat, adapted.flat, strict=True):
        layers.append(_without_smallest(matrix, config.rank(layer), str(layer)) if is_adapted else matrix)
    whole = jnp.reshape(jnp.stack(layers), (*names.shape, n_in, n_out))
    array = layout.unmatrix(whole, base.shape)
    sharding = None if isinstance(dense, jax.core.Tracer) else dense.sharding
    return Dense(put(array, sharding) if isinstance(sharding, NamedSharding) else array, layout)


def _without_smallest(matrix: Float[Array, "in out"], rank: int, name: str) -> Float[Array, "in out"]:
    """The matrix without its ``rank`` smallest singular values."""
    if rank >= min(matrix.shape):
        raise ValueError(
            f"kasa_config takes r={rank} singular values out of '{name}', which has {min(matrix.shape)}. Choose a "
            "smaller r."
        )
    if not holds_finite(matrix):
        raise ValueError(f"kasa_config starts from the weight of '{name}', which holds NaN or infinity. Repair it.")
    u, s, vt = jnp.linalg.svd(matrix.astype(jnp.float32), full_matrices=False)
    kept = min(matrix.shape) - rank
    return ((u[:, :kept] * s[None, :kept]) @ vt[:kept]).astype(matrix.dtype)


def _is_truncated(base: Adapted, ranks: np.ndarray) -> bool:
    """Whether a KaSA under this one has taken as many singular values, or more, out of each layer."""
    if DIAGONAL not in base.params:
        return False
    return bool(np.all(np.asarray(base.state["rank"]) >= ranks))


def penalty(params: Arrays, state: Mapping[str, Any], options: Mapping[str, float]) -> Float[Array, ""]:
    """``beta |d|² + gamma (|B B' - 1| + |A' A - 1|)``, summed over the layers of a leaf."""
    a, b, rank = params["lora_A"], params["lora_B"], jnp.asarray(state["rank"])
    squares = jnp.sum(jnp.square(params[DIAGONAL]), axis=-1)
    distances = _distance(jnp.swapaxes(a, -1, -2) @ a, rank) + _distance(b @ jnp.swapaxes(b, -1, -2), rank)
    of_layers = options["beta"] * squares + options["gamma"] * distances
    return jnp.sum(jnp.where(rank > 0, of_layers, 0))


def _distance(gram: Float[Array, "*stack rank rank"], rank: jax.Array) -> Float[Array, "*stack"]:
    """The distance of a matrix from one in Frobenius's norm; padding has none, and no slope where it is zero."""
    row = jax.lax.broadcasted_iota(jnp.int32, gram.shape, gram.ndim - 2)
    column = jax.lax.broadcasted_iota(jnp.int32, gram.shape, gram.ndim - 1)
    is_one = (row == column) & (row < rank[..., None, None])
    square = jnp.sum(jnp.square(gram - is_one.astype(gram.dtype)), axis=(-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

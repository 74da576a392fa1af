"""DoRA: W' = m (W + s A B) / n with n the norms of the columns of W + s A B, and m trained in their place.

Liu et al., 2024, https://arxiv.org/abs/2402.09353, equation 5; as its section 4.3 has it, no gradient goes through n.
Numbers follow PEFT 0.21.2: on a weight that has adapters already, n is the norm of U + s A B, where U is the weight
without them, and what it divides is W + s A B with them. On a convolution with groups n is PEFT's too, of a kernel that
it makes of A and B as if there were none (`grouped_conv.norm_kernel`); that of what is computed would be another one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.core.adapted import apply_merged
from peft_jax.core.dropout import dropout
from peft_jax.core.float_types import wider_float
from peft_jax.core.product import MATMUL, Product
from peft_jax.core.weight import Weight, varying
from peft_jax.methods.base import Arrays
from peft_jax.methods.lora import grouped_conv

MAGNITUDE = "lora_magnitude_vector"


def initialize(params: Arrays, state: Arrays, base: Weight) -> jax.Array:
    """The norms of the columns of ``U + s A B``, ``(*stack, out)``; 0 for layers that are not adapted."""

    def norms(params: Arrays, state: Arrays, matrix: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(_sum(params, state, matrix)), axis=0))

    matrix = base.layout.matrix(base.unadapted.dense())
    for _ in base.layout.stack:
        norms = jax.vmap(norms)
    return jnp.where(state["rank"][..., None] > 0, norms(params, state, matrix), 0)


def merge(params: Arrays, state: Mapping[str, Any], matrix: jax.Array, unadapted: jax.Array | None = None) -> jax.Array:
    """``m (W + s A B) / n``, in the adapter's precision; ``W`` where the layer is not adapted.

    ``unadapted`` is U, None where it is W, which is ``matrix``.
    """
    added = _sum(params, state, matrix)
    normed = added if unadapted is None else _sum(params, state, unadapted)
    factor = _factor(params, state, jnp.sum(jnp.square(normed), axis=0))
    return (added * factor[None]).astype(matrix.dtype)


def apply(
    method: Any, params: Arrays, state: Mapping[str, Any], base: Weight, x: jax.Array, product: Product
) -> jax.Array:
    """``m / n (x W + s (x A) B)``; with dropout switched on ``x W``, and what is added to it has dropped inputs."""
    if base.layout.stack:  # a grouped product
        return apply_merged(method, params, state, base, x, product)
    b = params["lora_B"]
    factor = _factor(params, state, _squares(params, state, base))
    y, dropped = base.apply(x, product), x if product.looks_up else dropout(x, state)
    inner = product.down_by_role(dropped, params, "lora_A") * state["scaling"].astype(params["lora_A"].dtype)
    update = product.up(inner, b)
    wide = wider_float(y.dtype, update.dtype)
    if dropped is x:
        return product.scale(product.added(y.astype(wide), update), factor).astype(y.dtype)
    again = base.apply(dropped, product).astype(wide)
    scaled = product.added(product.scale(again, factor - 1), product.scale(update, factor))
    return product.added(y, scaled)


def _sum(params: Arrays, state: Mapping[str, Any], matrix: jax.Array) -> jax.Array:
    a, b = params["lora_A"], params["lora_B"]
    scaled = a * state["scaling"].astype(a.dtype)
    change = scaled @ b if grouped_conv.groups_of(params) == 1 else grouped_conv.norm_kernel(scaled, b)
    return matrix.astype(a.dtype) + change


def _squares(params: Arrays, state: Mapping[str, Any], base: Weight) -> jax.Array:
    """Of ``U + s A B``, without that matrix: ``|U|² + 2 s (A'U) B + s² |A B|²`` for each column."""
    a, b = params["lora_A"], params["lora_B"]
    scaling, weight = state["scaling"].astype(a.dtype), base.unadapted.astype(a.dtype)
    matrix = weight.layout.matrix(weight.dense())
    if weight.layout.groups > 1:
        return jnp.sum(jnp.square(_sum(params, state, matrix)), axis=0)
    products = weight.apply(a.T, _over_inputs(matrix))
    squares = jnp.sum(jnp.square(matrix), axis=0) + 2 * scaling * jnp.sum(products * b, axis=0)
    return squares + jnp.square(scaling) * jnp.sum(b * (_over_inputs(a).full(a.T, a) @ b), axis=0)


def _over_inputs(matrix: jax.Array) -> Product:
    """The product of ``A'`` with a matrix ``(in, k)``, whose inputs may be sharded on a mesh of explicit axes."""
    sharding = jax.typeof(matrix).sharding
    if all(entry is None for entry in sharding.spec):
        return MATMUL
    return MATMUL.replace(out_sharding=NamedSharding(sharding.mesh, PartitionSpec(None, sharding.spec[1])))


def _factor(params: Arrays, state: Mapping[str, Any], squares: jax.Array) -> jax.Array:
    """``m / n``; inside of ``shard_map`` the inputs may be spread over devices, which A then is and m is not."""
    magnitude = params[MAGNITUDE]
    if spread := varying(params["lora_A"]) - varying(magnitude):
        squares = jax.lax.psum(squares, tuple(sorted(spread)))
    norm = jnp.sqrt(jax.lax.stop_gradient(jnp.maximum(squares, 0)))
    return jnp.where(state["rank"] > 0, magnitude / jnp.where(norm > 0, norm, 1), 1)

"""What each primitive does with a weight among its operands.

A rule takes ``(evaluate, eqn, values)`` and gives the equation's outputs, or None where the weight has to be merged.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.adapt import compat
from peft_jax.core.weight import Dot, Weight, is_weight

Rule = Callable[[Callable[..., list[Any]], Any, list[Any]], list[Any] | None]


def dot_general(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any] | None:
    """A product over all input axes runs on the side path; over all output axes, its transpose does."""
    if all(map(is_weight, values)):
        return None
    contract, batch = eqn.params["dimension_numbers"]
    side = 0 if is_weight(values[0]) else 1  # where the weight stands
    weight, x = values[side], values[1 - side]
    over, x_over = contract[side], contract[1 - side]
    stack, x_stack = batch[side], batch[1 - side]
    layout = weight.layout
    if set(over) == set(layout.inp):
        roles, kept = layout.inp, layout.out
    elif set(over) == set(layout.out):
        roles, kept = layout.out, layout.inp
    else:
        return None
    if not set(stack) <= set(layout.stack) or x.dtype != weight.dtype or not roles:
        return None
    # Bring x to (*batch, *free, contracted), and the weight's stacked axes to the front.
    x_batch = [x_stack[stack.index(axis)] for axis in layout.stack if axis in stack]
    x_last = [x_over[over.index(axis)] for axis in roles]
    free = [axis for axis in range(x.ndim) if axis not in (*x_batch, *x_last)]
    n_last = math.prod(x.shape[axis] for axis in x_last)
    x = jnp.transpose(x, (*x_batch, *free, *x_last)).reshape(*(x.shape[axis] for axis in (*x_batch, *free)), n_last)
    dot = Dot(eqn.params["precision"], eqn.params["preferred_element_type"])
    product: Callable[..., jax.Array] = functools.partial(_product, transpose=roles != layout.inp, dot=dot)
    for axis in reversed(layout.stack):
        product = _over_stack(product, batched=axis in stack)
    front = (*layout.stack, *(axis for axis in range(weight.ndim) if axis not in layout.stack))
    moved = weight
    if front != tuple(range(weight.ndim)):
        moved = weight.rearranged(functools.partial(jnp.transpose, axes=front), layout.permuted(front))
    y = product(x, moved)
    # y is (*stack, *free, kept); bring it to dot_general's order: batch, left free axes, right free axes.
    n_stack, n_free = len(layout.stack), y.ndim - len(layout.stack) - 1
    y = y.reshape(*y.shape[:-1], *(weight.shape[axis] for axis in kept))
    position = {axis: i for i, axis in enumerate(layout.stack)}
    position |= {axis: n_stack + n_free + i for i, axis in enumerate(kept)}
    batch_axes = [position.pop(axis) for axis in stack]
    x_axes = list(range(n_stack, n_stack + n_free))
    weight_axes = [position[axis] for axis in sorted(position)]
    order = (*batch_axes, *weight_axes, *x_axes) if side == 0 else (*batch_axes, *x_axes, *weight_axes)
    return [jnp.transpose(y, order).astype(eqn.outvars[0].aval.dtype)]


def _product(x: jax.Array, weight: Weight, transpose: bool, dot: Dot) -> jax.Array:
    if not transpose:
        return weight.matmul(x, dot)
    n_in, _ = weight.layout.sizes(weight.shape)
    probe = jnp.zeros((*x.shape[:-1], n_in), x.dtype)
    # matmul is linear in its first argument, so its vjp anywhere is the product with the transpose.
    return jax.vjp(lambda probe: weight.matmul(probe, dot._replace(preferred_element_type=None)), probe)[1](x)[0]


def _over_stack(product: Callable[..., jax.Array], batched: bool) -> Callable[..., jax.Array]:
    return jax.vmap(lambda x, weight: product(x, weight.unstacked()), in_axes=(0 if batched else None, 0))


def gather(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any] | None:
    """A lookup of whole rows: ``weight[ids]``, as ``jnp.take`` along axis 0 or indexing writes it."""
    weight, indices = values
    if not is_weight(weight) or is_weight(indices) or weight.layout.order != (0, 1) or weight.layout.inp != (0,):
        return None
    p = eqn.params
    numbers = p["dimension_numbers"]
    rows_only = (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and numbers.offset_dims == (indices.ndim - 1,)
        and p["slice_sizes"] == (1, weight.shape[1])
    )
    if not rows_only:
        return None

    def rows(matrix: jax.Array) -> jax.Array:
        fill = p["fill_value"] if jnp.issubdtype(matrix.dtype, jnp.inexact) else None
        options = {name: p[name] for name in ("unique_indices", "indices_are_sorted", "mode")}
        return jax.lax.gather(matrix, indices, numbers, (1, matrix.shape[1]), fill_value=fill, **options)

    return [weight.take(rows)]


def transpose(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """The same weight with its axes elsewhere."""
    permutation = eqn.params["permutation"]
    move = functools.partial(jnp.transpose, axes=permutation)
    return [values[0].rearranged(move, values[0].layout.permuted(permutation))]


def convert_element_type(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any] | None:
    """The same weight in another floating-point type."""
    dtype = eqn.params["new_dtype"]
    return [values[0].astype(dtype)] if jnp.issubdtype(dtype, jnp.floating) else None


def jit(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """A nested ``jit`` stays one."""
    inner = functools.partial(evaluate, eqn.params["jaxpr"])
    inner.__name__ = eqn.params["name"]  # type: ignore[attr-defined]
    return jax.jit(inner, inline=eqn.params["inline"])(*values)


def checkpoint(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """``jax.checkpoint`` stays, with its policy."""
    inner = functools.partial(evaluate, eqn.params["jaxpr"])
    return jax.checkpoint(inner, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(*values)


def scan(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any] | None:
    """Stacked weights are sliced layer by layer; weights that every step sees are closed over."""
    parts = compat.scan_parts(eqn)
    consts = values[: parts.num_consts]
    init = [_dense(value) for value in values[parts.num_consts : parts.num_consts + parts.num_carry]]
    xs = values[parts.num_consts + parts.num_carry :]
    xs = [x.dense() if is_weight(x) and x.layout.stack[:1] != (0,) else x for x in xs]

    def body(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        sliced = [x.unstacked() if is_weight(x) else x for x in sliced]
        out = [_dense(value) for value in evaluate(parts.body, *consts, *carry, *sliced)]
        return out[: parts.num_carry], out[parts.num_carry :]

    carry, ys = jax.lax.scan(body, init, xs, length=parts.length, reverse=parts.reverse, unroll=parts.unroll)
    return [*carry, *ys]


def while_loop(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any]:
    """Weights that the loop does not change are closed over."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = [_dense(value) for value in values[n_cond + n_body :]]

    def cond(carry: list[Any]) -> Any:
        return evaluate(p["cond_jaxpr"], *cond_consts, *carry)[0]

    def body(carry: list[Any]) -> list[Any]:
        return [_dense(value) for value in evaluate(p["body_jaxpr"], *body_consts, *carry)]

    return jax.lax.while_loop(cond, body, init)


def cond(evaluate: Any, eqn: Any, values: list[Any]) -> list[Any] | None:
    """Each branch sees the weights."""
    index, *operands = values
    if is_weight(index):
        return None

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *operands: [_dense(value) for value in evaluate(jaxpr, *operands)]

    return jax.lax.switch(index, [branch(jaxpr) for jaxpr in eqn.params["branches"]], *operands)


def _dense(value: Any) -> Any:
    return value.dense() if is_weight(value) else value


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "gather": gather,
    "transpose": transpose,
    "convert_element_type": convert_element_type,
    "jit": jit,
    "pjit": jit,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
}

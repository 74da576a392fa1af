"""A row of a table that a lookup does not train: PyTorch's ``padding_idx``.

It is a primitive, not ``jax.lax.stop_gradient`` on some results: what an adapter shares between the rows, such as
LoRA's second factor, is trained by every row in PyTorch. `peft_jax.adapt` hands the row on to the lookup
(`peft_jax.core.product.Lookup`), which leaves out that row of each table that it reads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

untrained_row_p = Primitive("untrained_row")


def untrained_row(table: jax.Array, row: int) -> jax.Array:
    """The table ``(n, ...)`` itself; no gradient goes to one of its rows through the result.

    Example:
        >>> jax.grad(lambda table: untrained_row(table, 1).sum())(jnp.ones((3, 1))).tolist()
        [[1.0], [0.0], [1.0]]
    """
    result: jax.Array = untrained_row_p.bind(table, row=row)
    return result


def _jvp(primals: tuple[Any], tangents: tuple[Any], *, row: int) -> tuple[Any, Any]:
    (table,), (tangent,) = primals, tangents
    out = untrained_row_p.bind(table, row=row)
    if type(tangent) is ad.Zero:
        return out, tangent
    is_row = jnp.reshape(jnp.arange(table.shape[0]) == row, (-1, *[1] * (table.ndim - 1)))
    return out, jnp.where(is_row, jnp.zeros_like(tangent), tangent)


def _batch(operands: tuple[Any], dims: tuple[int], *, row: int) -> tuple[Any, int]:
    (table,), (dim,) = operands, dims
    return untrained_row_p.bind(jnp.moveaxis(table, dim, -1), row=row), table.ndim - 1


untrained_row_p.def_impl(lambda table, *, row: table)
untrained_row_p.def_abstract_eval(lambda table, *, row: table)
mlir.register_lowering(untrained_row_p, lambda context, table, *, row: [table])
ad.primitive_jvps[untrained_row_p] = _jvp
batching.primitive_batchers[untrained_row_p] = _batch

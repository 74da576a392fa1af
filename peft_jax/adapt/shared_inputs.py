"""Products of one input with several adapted weights, as those with queries, keys and values are.

What their adapters multiply the input by first is narrow: ``x A``, of a few columns. All such products of one input
are one, ``x [A_q A_k A_v]``, forward and backward; the bases' own stay apart, for joining them would copy the weights.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.adapt import compat
from peft_jax.adapt.view import View
from peft_jax.core.product import Begun, Product
from peft_jax.core.weight import varying


def siblings(eqns: Sequence[Any]) -> Mapping[int, tuple[int, ...]]:
    """For each equation that is a plain product ``x @ w``, by its place: those after it that differ in ``w`` alone."""
    groups = collections.defaultdict(list)
    for place, eqn in enumerate(eqns):
        if eqn.primitive.name == "dot_general" and not any(map(compat.is_literal, eqn.invars)):
            x, w = eqn.invars
            plain = (((x.aval.ndim - 1,), (0,)), ((), ()))
            if eqn.params["dimension_numbers"] == plain and w.aval.ndim == 2 and eqn.params["out_sharding"] is None:
                groups[x, eqn.params["precision"], eqn.params["preferred_element_type"], eqn.ctx].append(place)
    return {place: tuple(group[i + 1 :]) for group in groups.values() for i, place in enumerate(group)}


def begin_together(run: Callable[[Any, list[Any]], list[Any]], eqns: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """The outputs of products of one input, the first of ``values``, with the weights after it.

    Args:
        run: Runs one equation by itself.
        eqns: The products.
        values: The input, and a weight for each product.
    """
    x, *views = values
    factors = [view.weight.first_factors() if _is_matrix(view, x) else [] for view in views]
    every = [factor for some in factors for factor in some]
    if sum(map(bool, factors)) < 2 or len({(factor.dtype, varying(factor)) for factor in every}) > 1:
        return [out for eqn, view in zip(eqns, views, strict=True) for out in run(eqn, [x, view])]
    p = eqns[0].params
    product = Product(p["precision"], p["preferred_element_type"])
    ends = [sum(factor.shape[1] for factor in every[: i + 1]) for i in range(len(every) - 1)]
    halves = jnp.split(product.down(x, jnp.concatenate(every, axis=1)), ends, axis=-1)
    begun = Begun(p["precision"], p["preferred_element_type"], x=x, halves=tuple(zip(every, halves, strict=True)))
    outs = []
    for eqn, view, own in zip(eqns, views, factors, strict=True):
        outs += [view.weight.apply(x, begun).astype(eqn.outvars[0].aval.dtype)] if own else run(eqn, [x, view])
    return outs


def _is_matrix(view: View, x: jax.Array) -> bool:
    """Whether a view is a weight as it is, one matrix ``(in, out)``, to be multiplied in its own element type."""
    layout = view.weight.layout
    as_it_is = view.axes == View.of(view.weight).axes and (layout.stack, layout.inp, layout.out) == ((), (0,), (1,))
    return as_it_is and view.dtype == x.dtype

"""Products of one input with several adapted weights, as those with queries, keys and values are.

Adapters such as LoRA multiply the input by a narrow matrix first: ``x A``, of a few columns. All such products of one
input become one shared first product, ``x [A_q A_k A_v]``, forward and backward. The bases' products stay apart,
because joining them would copy the weights.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.view import Value, View
from peft_jax.core.product import FirstFactor, Product, SharedFirstProducts
from peft_jax.core.weight import varying

FirstFactors = Mapping[FirstFactor, jax.Array]
RunEquation = Callable[[JaxprEqn, list[Value]], list[Value]]


def products_of_one_input(eqns: Sequence[JaxprEqn]) -> dict[int, list[int]]:
    """For each equation that is a plain product ``x @ w``, by its place: places of those after it with the same ``x``.

    They differ in ``w`` alone: precision, element type and context are the same.
    """
    later: dict[int, list[int]] = {}
    groups: dict[object, list[int]] = {}
    for place, eqn in enumerate(eqns):
        if not _is_plain_product(eqn):
            continue
        key = (eqn.invars[0], eqn.params["precision"], eqn.params["preferred_element_type"], eqn.ctx)
        earlier = groups.setdefault(key, [])
        for other in earlier:
            later[other].append(place)
        earlier.append(place)
        later[place] = []
    return later


def _is_plain_product(eqn: JaxprEqn) -> bool:
    """Whether an equation is ``x @ w`` of two variables: the last axis of ``x`` meets the first of a matrix ``w``."""
    if eqn.primitive.name != "dot_general" or eqn.params["out_sharding"] is not None:
        return False
    x, w = eqn.invars
    if compat.is_literal(x) or compat.is_literal(w) or compat.type_of(w).ndim != 2:
        return False
    return bool(eqn.params["dimension_numbers"] == (((compat.type_of(x).ndim - 1,), (0,)), ((), ())))


def run_products_of_one_input(run: RunEquation, eqns: Sequence[JaxprEqn], values: Sequence[Value]) -> list[Value]:
    """The outputs of `products_of_one_input`; adapters that begin with a product of the input share it.

    Args:
        run: Runs one equation by itself.
        eqns: The products.
        values: The input, and a view of a weight for each product.
    """
    x, *weights = values
    views = [view.replace(weight=view.weight.ready()) for view in weights]
    factors = [_first_factors(view, x) for view in views]
    outs = []
    if not _can_be_joined(factors):
        for eqn, view in zip(eqns, views, strict=True):
            outs += run(eqn, [x, view])
        return outs
    params = eqns[0].params
    product = Product(params["precision"], params["preferred_element_type"])
    results = _first_products(product, x, factors)
    for eqn, view, own, own_results in zip(eqns, views, factors, results, strict=True):
        if own:
            shared = product.replace(shared=SharedFirstProducts(x, own, own_results))
            outs.append(view.weight.apply(x, shared).astype(compat.type_of(eqn.outvars[0]).dtype))
        else:
            outs += run(eqn, [x, view])
    return outs


def _first_factors(view: View, x: jax.Array) -> FirstFactors:
    """First factors of a weight's adapters that meet ``x``; none unless the view is the weight, one matrix, as it is.

    The product has to be in the weight's own element type, too.
    """
    layout = view.weight.layout
    is_unmoved = view.axes == View.of(view.weight).axes
    is_matrix = (layout.stack, layout.inp, layout.out) == ((), (0,), (1,))
    if not (is_unmoved and is_matrix and view.dtype == x.dtype):
        return {}
    return view.weight.first_factors()


def _can_be_joined(factors: Sequence[FirstFactors]) -> bool:
    """Whether more than one weight has first factors, and all of them can be columns of one matrix."""
    kinds = set()
    weights = 0
    for own in factors:
        weights += bool(own)
        for factor in own.values():
            kinds.add((factor.dtype, varying(factor)))
    return weights > 1 and len(kinds) == 1


def _first_products(product: Product, x: jax.Array, factors: Sequence[FirstFactors]) -> list[FirstFactors]:
    """``x`` times each of the factors, computed as one product with all of them side by side."""
    every: list[jax.Array] = []
    for own in factors:
        every += own.values()
    ends: list[int] = []
    for factor in every:
        ends.append(factor.shape[1] + (ends[-1] if ends else 0))
    joined = product.down(x, jnp.concatenate(every, axis=1))
    parts = iter(jnp.split(joined, ends[:-1], axis=-1))
    results: list[FirstFactors] = []
    for own in factors:
        results.append({which: next(parts) for which in own})
    return results

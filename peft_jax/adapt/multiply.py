"""Products with the weight of a view: the operand's axes are brought to the weight's, and the result's back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.adapt.digits import EDITED, Atom, Axis, arrange, flat, in_front
from peft_jax.adapt.view import View
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight, as_leaf, varying, varying_over


def through(
    view: View, x: jax.Array, have: Sequence[Axis], want: Sequence[Axis], role: str, product: Product
) -> jax.Array | None:
    """A product with each stacked layer of a weight, axes found by their digits; None if there is no such product.

    Args:
        view: The weight.
        x: The other operand.
        have: Its axes. Digits of the weight mean that both operands have the axis.
        want: The axes of the result.
        role: The side of the matrix that ``x`` meets.
        product: The product.
    """
    layout, there = view.weight.layout, flat(have)
    if view.edits:
        return _through_edits(view, x, there, want, role, product)
    met, kept = view.digits(layout.inp), view.digits(layout.out)
    if role == "out":
        met, kept = kept, met
    groups, front = [view.digits((axis,)) for axis in layout.stack], []
    batched = []
    for group in groups:
        found = set(group) & set(there)
        if found and found != set(group):
            return None
        is_shared = found == set(group)
        batched.append(is_shared)
        if is_shared and group:
            front.append(group)
    others = [(atom,) for atom in there if atom.axis < 0]
    last = [] if product.looks_up else [met]
    if product.is_plain:
        product = product.replace(in_sizes=_several(view, layout.inp), out_sizes=_several(view, layout.out))
    result = [*flat(groups), *flat(others), *kept]
    if set(flat(want)) != set(result):
        return None
    how = _How(there, (*front, *others, *last), tuple(batched), role == "out", product, tuple(result), tuple(want))
    return _use_weight(x, view.weight, how)


def _several(view: View, axes: Sequence[int]) -> tuple[int, ...]:
    """The sizes of the digits that make the inputs or the outputs, where they are several."""
    digits = view.digits(axes)
    return tuple(digit.size for digit in digits) if len(digits) > 1 else ()


def _through_edits(
    view: View, x: jax.Array, have: Sequence[Atom], want: Sequence[Axis], role: str, product: Product
) -> jax.Array | None:
    """`through` for a view with edits: those of the side that ``x`` meets are done to it, the others to the result."""
    met_edits: list[int] = []
    kept_edits: list[int] = []
    for number, edit in enumerate(view.edits):
        (met_edits if edit.is_input == (role == "in") else kept_edits).append(number)
    if product.looks_up and met_edits or product.out_sharding is not None:
        return None
    for number in reversed(met_edits):
        x, have = view.before_edit(number, x, have)
    whole = _without_edits(view)
    kept = view.digits(view.weight.layout.out if role == "in" else view.weight.layout.inp)
    made = set(view.digits(range(EDITED, EDITED + len(view.edits))))
    there = [atom for atom in flat(want) if atom not in made and atom not in kept]
    there += kept
    have_axes = [(atom,) for atom in have]
    want_axes = [(atom,) for atom in there]
    y = through(whole, x, have_axes, want_axes, role, product)
    if y is None:
        return None
    for number in kept_edits:
        y, there = view.with_edit(number, y, there)
    return arrange(y, there, want)


def _without_edits(view: View) -> View:
    """The view of all digits of a weight, each an axis."""
    return view.replace(axes=tuple((atom,) for atom in view.digits(range(view.weight.ndim))), edits=())


class _How(NamedTuple):
    """Axes of x, as they are and as they are wanted; how each layer is used; axes of the result, likewise."""

    there: tuple[Atom, ...]
    met: tuple[Axis, ...]
    batched: tuple[bool, ...]
    transpose: bool
    product: Product
    result: tuple[Atom, ...]
    want: tuple[Axis, ...]


@partial(jax.jit, static_argnames="how")  # so that one of many like layers is traced, not each of them
def _use_weight(x: jax.Array, weight: Weight, how: _How) -> jax.Array:
    use = partial(_product, product=how.product, transpose=how.transpose)
    y = _over_stack(use, how.batched)(arrange(x, how.there, how.met), weight)
    return arrange(y, how.result, how.want)


def _product(x: jax.Array, weight: Weight, product: Product, transpose: bool) -> jax.Array:
    if not transpose:
        return weight.apply(x, product)
    if product.preferred_element_type not in (None, x.dtype):  # a transpose has the types of its forward product
        x, weight = x.astype(product.preferred_element_type), weight.astype(product.preferred_element_type)
    product = product.replace(preferred_element_type=None, out_sharding=None)
    # Inside shard_map x has to vary over the axes that the weight varies over, or the transpose would sum over them.
    x = varying_over(x, frozenset().union(*map(varying, jax.tree.leaves(as_leaf(weight)))))
    n_in, _ = weight.layout.sizes(weight.shape)
    probe = jax.typeof(x).update(shape=(*x.shape[:-1], n_in), weak_type=False)
    try:
        (y,) = jax.linear_transpose(lambda probe: weight.apply(probe, product), probe)(x)
    except (NotImplementedError, AssertionError) as error:  # the second of a product of two linear inputs
        raise ValueError(
            "A weight is multiplied by its transpose too, as that of a tied head is, and one of its adapters is not "
            "linear in what it is multiplied with, as LILY, and PVERA in training. Leave that module out of "
            "target_modules."
        ) from error
    return y


def _over_stack(use: Callable[..., jax.Array], batched: Sequence[bool]) -> Callable[..., jax.Array]:
    """``use`` mapped over the stacked axes of a weight, and over those axes of x that stand for the same layers."""
    if not batched:
        return use
    rest = _over_stack(use, batched[1:])

    def mapped(x: jax.Array, weight: Weight) -> jax.Array:
        if weight.shape[weight.layout.stack[0]] == 1:
            return rest(x, weight.mapped(0, lambda array, axis: jnp.squeeze(array, axis), drop=True))
        front = weight.mapped(0, in_front, drop=True)
        return jax.vmap(rest, in_axes=(0 if batched[0] else None, 0))(x, front)

    return mapped

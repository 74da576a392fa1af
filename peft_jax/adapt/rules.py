"""What each primitive does with a weight among its operands.

A rule takes ``(evaluate, eqn, values)`` and gives the equation's outputs, or None where the weight has to be merged.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from peft_jax.adapt import compat
from peft_jax.adapt.view import (
    BROADCAST,
    Atom,
    Axis,
    View,
    arrange,
    free,
    in_front,
    is_view,
    length,
    through,
)
from peft_jax.core.product import Convolution, Grouped, Lookup, Product
from peft_jax.core.repeated import with_bases, without_bases
from peft_jax.core.weight import MergeError, varying_over

Outputs = list[Any] | None
Rule = Callable[[Callable[..., list[Any]], Any, list[Any]], Outputs]


# ---- Uses: products, lookups, convolutions


def dot_general(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """A product over all input axes, or with the transpose over all output axes."""
    side = 0 if is_view(values[0]) else 1
    view, x = values[side], values[1 - side]
    (over, x_over), (stack, x_stack) = (dims[:: 1 if side == 0 else -1] for dims in eqn.params["dimension_numbers"])
    role = view.role(over, stack)
    if is_view(x):
        x.role(x_over, x_stack)  # for who watches: of two weights both are merged
    if is_view(x) or role is None or x.dtype != view.dtype:
        return None
    shared = dict(zip((*x_stack, *x_over), (*stack, *over), strict=True))
    have = _axes(x, shared, view)
    rest, own = _without(view.axes, (*stack, *over)), _without(have, shared)
    want = [*(view.axes[i] for i in stack), *(rest + own if side == 0 else own + rest)]
    product = _product(eqn.params, side, len(own), len(want))
    return product and _used(eqn, view, through(view, x, have, want, role, product))


def _product(p: Any, side: int, rows: int, ndim: int) -> Any:
    """How a dot_general multiplies; None if its result has a sharding that axes joined to one cannot have."""
    precision = p["precision"][:: -1 if side == 0 else 1] if isinstance(p["precision"], tuple) else p["precision"]
    told, sharding = p.get("out_sharding"), None  # given on a mesh of explicit axes
    if told is not None:
        entries = [*told.spec, *[None] * (ndim - len(told.spec))]
        if p["dimension_numbers"][1][0] or side == 0 or any(entry is not None for entry in entries[rows + 1 :]):
            return None
        sharding = NamedSharding(told.mesh, PartitionSpec(*entries[: rows + 1]))
    return Product(precision, p["preferred_element_type"], sharding)


def ragged_dot(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Rows in groups, each with its own layer of the weight."""
    p, (x, view, group_sizes) = eqn.params, values
    numbers = p["ragged_dot_dimension_numbers"]
    usual = (numbers.dot_dimension_numbers, numbers.lhs_ragged_dimensions) == ((((1,), (1,)), ((), ())), (0,))
    if not usual or is_view(x) or is_view(group_sizes) or view.role([1], [0]) != "in" or x.dtype != view.dtype:
        return None
    layout, row = view.weight.layout, free(0, len(x))
    if view.stack_position(0) is None or len(layout.stack) > 1:
        return None
    product = Grouped(p["precision"], p["preferred_element_type"], group_sizes=group_sizes)
    y = view.weight.apply(arrange(x, [*row, *view.axes[1]], [row, view.digits(layout.inp)]), product)
    return _used(eqn, view, arrange(y, [*row, *view.digits(layout.out)], [row, view.axes[2]]))


def gather(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """A lookup of whole rows."""
    p, (view, indices), numbers = eqn.params, values, eqn.params["dimension_numbers"]
    stack, gone = numbers.operand_batching_dims, numbers.collapsed_slice_dims
    rows = [i for i, n in enumerate(view.shape) if i not in stack and (i in gone or p["slice_sizes"][i] != n)]
    if len(rows) != 1 or view.role(rows, stack, looks_up=True) != "in" or not _looks_up(p, rows[0]):
        return None
    ids = indices[..., numbers.start_index_map.index(rows[0])]
    have = _axes(ids, dict(zip(numbers.start_indices_batching_dims, stack, strict=True)), view)
    left = [() if i in rows else axis for i, axis in enumerate(view.axes) if i not in (*gone, *stack)]
    rest = {True: iter(left), False: iter(have)}
    want = [next(rest[i in numbers.offset_dims]) for i in range(len(have) + len(left))]
    options = tuple((name, p[name]) for name in ("unique_indices", "indices_are_sorted", "mode", "fill_value"))
    return _used(eqn, view, through(view, ids, have, want, "in", Lookup(options=options)))


def _looks_up(p: Any, row: int) -> bool:
    """Whether a gather takes single rows, and fills with what a sum of products can be."""
    fill, clips = p["fill_value"], p["mode"] == jax.lax.GatherScatterMode.CLIP  # which makes all other indices 0
    only = p["dimension_numbers"].start_index_map == (row,)
    return p["slice_sizes"][row] == 1 and (only or clips) and (fill is None or fill == 0 or fill != fill)


def convolution(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """A convolution whose kernel is the weight."""
    p, (x, view) = eqn.params, values
    if is_view(view) and view.watch is not None:
        view.watch.kernel(view, p["dimension_numbers"].rhs_spec[2:], p["feature_group_count"])
    (out, *rest), channels = p["dimension_numbers"].rhs_spec, p["dimension_numbers"].out_spec[1]
    if is_view(x) or not is_view(view) or view.role(rest) != "in" or view.weight.layout.stack:
        return None
    if p["batch_group_count"] > 1 or view.axes[out] != view.digits(view.weight.layout.out) or x.dtype != view.dtype:
        return None
    layout, groups = view.weight.layout, p["feature_group_count"]
    if layout.taps and layout.groups != groups:
        raise ValueError(
            f"A kernel of shape {view.shape} is that of a convolution of {groups} groups, and its layout says "
            f"{layout.groups}. Write groups={groups} in its Layout."
        )
    product = Convolution(
        p["precision"],
        p["preferred_element_type"],
        kernel=functools.partial(view.as_kernel, out),
        bind=functools.partial(eqn.primitive.bind, **p),
        groups=groups,
        rows=layout.sizes(view.weight.shape)[0],
        in_axis=rest[0],
        out_axis=out,
        channel_axis=channels,
    )
    return _used(eqn, view, jnp.moveaxis(view.weight.apply(x, product), -1, channels))


def _axes(x: Any, shared: Mapping[int, int], view: View) -> list[Axis]:
    """The axes of the other operand: the weight's where they share them, else its own."""
    return [view.axes[shared[i]] if i in shared else free(i, n) for i, n in enumerate(x.shape)]


def _without(axes: Sequence[Axis], gone: Collection[int]) -> list[Axis]:
    return [axis for i, axis in enumerate(axes) if i not in gone]


def _used(eqn: Any, view: View, y: jax.Array | None) -> Outputs:
    if y is None:
        return None
    view.done(eqn, merged=False)
    return [y.astype(eqn.outvars[0].aval.dtype)]


def elementwise(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """A vector that each row has its own of; others are merged."""
    shape = eqn.outvars[0].aval.shape
    own = [value.by_row(shape) if is_view(value) else None for value in values]
    if all(one is None for one in own):
        return None
    for value, one in zip(values, own, strict=True):
        if one is not None:
            value.done(eqn, merged=False)
    return compat.bind(eqn, [merged(v, eqn) if one is None else one for v, one in zip(values, own, strict=True)])


# ---- Moves: the same weight, seen otherwise


def transpose(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Axes in another order."""
    (view,) = values
    return [view.replace(axes=tuple(view.axes[i] for i in eqn.params["permutation"]))]


def reshape(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Axes split and joined."""
    return _or_merge(values[0].reshaped(eqn.params["new_sizes"]))


def squeeze(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Without some axes of length 1."""
    (view,) = values
    gone = eqn.params["dimensions"]
    return [view.replace(axes=tuple(axis for i, axis in enumerate(view.axes) if i not in gone))]


def broadcast_in_dim(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """With axes added along which nothing changes."""
    view, shape, at = values[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    number = 1 + max((atom.stride for axis in view.axes for atom in axis if atom.axis == BROADCAST), default=0)
    added = [() if n == 1 else (Atom(BROADCAST, number + i, n),) for i, n in enumerate(shape)]
    old = {i: axis for i, axis in zip(at, view.axes, strict=True) if length(axis) == shape[i]}
    return [view.replace(axes=tuple(old.get(i, axis) for i, axis in enumerate(added)))]


def convert_element_type(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """In another floating-point type; one of 8 bits rounds the merged weight, as those who write it want."""
    view, dtype = values[0], eqn.params["new_dtype"]
    is_wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16
    return [view.replace(weight=view.weight.astype(dtype))] if is_wide else None


def slice_(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Some of the stacked layers."""
    view, p = values[0], eqn.params
    limits = list(zip(p["start_indices"], p["limit_indices"], p["strides"] or [1] * len(view.shape), strict=True))
    cut = [i for i, n in enumerate(view.shape) if limits[i] != (0, n, 1)]
    if len(cut) != 1:
        return None if cut else [view]
    start, limit, stride = limits[cut[0]]
    return _or_merge(view.mapped(cut[0], lambda a, i: jax.lax.slice_in_dim(a, start, limit, stride, i), drop=False))


def dynamic_slice(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Some of the stacked layers, from a computed one on; or a lookup of one row."""
    view, *starts = values
    sizes = eqn.params["slice_sizes"]
    cut = [i for i, n in enumerate(view.shape) if sizes[i] != n]
    if len(cut) != 1:
        return None if cut else [view]
    start, size = starts[cut[0]], sizes[cut[0]]
    layers = view.mapped(cut[0], lambda a, i: jax.lax.dynamic_slice_in_dim(a, start, size, i), drop=False)
    if layers is not None or size != 1 or is_view(start) or view.role(cut, looks_up=True) != "in":
        return _or_merge(layers)
    want = [() if i in cut else axis for i, axis in enumerate(view.axes)]
    return _used(eqn, view, through(view, start, [], want, "in", Lookup(options=(("mode", "clip"),))))


def on_each_array(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """The same for all arrays of the weight."""
    return [jax.tree.map(lambda array: compat.bind(eqn, [array])[0], values[0])]


def pvary(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Those arrays of the weight that do not vary yet."""
    return [jax.tree.map(lambda array: varying_over(array, eqn.params["axes"]), values[0])]


def optimization_barrier(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """A weight's arrays have a barrier each: one for all would give the frozen base a gradient."""
    others = iter(jax.lax.optimization_barrier([value for value in values if not is_view(value)]))
    return [jax.tree.map(jax.lax.optimization_barrier, v) if is_view(v) else next(others) for v in values]


def sharding_constraint(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """The adapter is constrained as its base."""
    (view,), sharding = values, eqn.params["sharding"]
    if not isinstance(sharding, NamedSharding):
        return None
    loose = eqn.params["unconstrained_dims"]
    spec = [
        PartitionSpec.UNCONSTRAINED if i in loose else entry for i, entry in enumerate(_entries(sharding.spec, view))
    ]
    specs = view.specs(spec)
    if specs is None:
        return None
    shardings = jax.tree.map(lambda spec: NamedSharding(sharding.mesh, spec), specs)
    return [jax.lax.with_sharding_constraint(view, shardings)]


def _or_merge(view: View | None) -> Outputs:
    return None if view is None else [view]


def _entries(spec: PartitionSpec, value: Any) -> list[Any]:
    return [*spec, *[None] * (len(value.shape) - len(spec))]


# ---- Calls and loops: the weight goes inside


def jit(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """A nested ``jit`` stays one, unless somebody watches, who wants to see each call."""
    if not any(is_view(value) and value.watch for value in values):
        # A weight's arrays are the caller's, even where the program's own copy of the weight could be donated.
        donated = tuple(d and not is_view(v) for d, v in zip(eqn.params["donated_invars"], values, strict=True))
        run = functools.partial(_merging_outputs, evaluate) if any(compat.out_shardings(eqn)) else evaluate
        return compat.jit_again(run, eqn, donated)(*values)
    inner = [
        value.replace(watch=value.watch.inside(eqn)) if is_view(value) and value.watch else value for value in values
    ]
    return evaluate(eqn.params["jaxpr"], *inner)


def _merging_outputs(evaluate: Any, jaxpr: Any, *values: Any) -> list[Any]:
    return [merged(value, None) for value in evaluate(jaxpr, *values)]


def checkpoint(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """``jax.checkpoint`` stays, with its policy."""
    p, inner = eqn.params, functools.partial(evaluate, eqn.params["jaxpr"])
    return jax.checkpoint(inner, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


def scan(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Stacked weights are sliced layer by layer; what every step sees, repeated layers too, is closed over."""
    parts = compat.scan_parts(eqn)
    start = parts.num_consts + parts.num_carry
    consts, init = values[: parts.num_consts], [merged(value, eqn) for value in values[parts.num_consts : start]]
    xs, bases = without_bases([_in_front(value, eqn) for value in values[start:]])

    def body(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        layers = with_bases(sliced, bases)
        out = [merged(value, eqn) for value in evaluate(parts.body, *consts, *carry, *layers)]
        return out[: parts.num_carry], out[parts.num_carry :]

    carry, ys = jax.lax.scan(body, init, xs, length=parts.length, reverse=parts.reverse, unroll=parts.unroll)
    return [*carry, *ys]


def _in_front(value: Any, eqn: Any) -> Any:
    """What a scan slices: a stacked weight has all its arrays' layers in front, under the name of one layer."""
    moved = value.mapped(0, in_front, drop=True) if is_view(value) else value
    return merged(value, eqn) if moved is None else moved


def while_loop(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Weights that the loop does not change are closed over."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = [merged(value, eqn) for value in values[n_cond + n_body :]]

    def proceed(carry: list[Any]) -> Any:
        return evaluate(p["cond_jaxpr"], *cond_consts, *carry)[0]

    def body(carry: list[Any]) -> list[Any]:
        return [merged(value, eqn) for value in evaluate(p["body_jaxpr"], *body_consts, *carry)]

    return jax.lax.while_loop(proceed, body, init)


def cond(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Each branch sees the weights."""
    index, *operands = values

    def branch(jaxpr: Any) -> Callable[..., list[Any]]:
        return lambda *operands: [merged(value, eqn) for value in evaluate(jaxpr, *operands)]

    return jax.lax.switch(merged(index, eqn), [branch(jaxpr) for jaxpr in eqn.params["branches"]], *operands)


def shard_map(evaluate: Any, eqn: Any, values: list[Any]) -> Outputs:
    """Each device sees its part of base and adapter."""
    parts = compat.shard_map_parts(eqn)
    specs = [v.specs(_entries(s, v)) if is_view(v) else s for v, s in zip(values, parts.in_specs, strict=True)]
    if any(spec is None for spec in specs):
        return None

    def body(*local: Any) -> list[Any]:
        inner = [value.refreshed() if is_view(value) else value for value in local]
        return [merged(value, eqn) for value in evaluate(parts.body, *inner)]

    return parts.again(body, in_specs=tuple(specs))(*values)


def merged(value: Any, eqn: Any) -> Any:
    """A value as an array; ``eqn`` is why it has to be one, None the program's end.

    Raises:
        MergeError: if merging would change what is computed.
    """
    if not is_view(value):
        return value
    value.done(eqn, merged=True)
    try:
        return value.dense()
    except MergeError as error:
        what = "The program's output is" if eqn is None else f"Primitive '{eqn.primitive.name}' takes"
        raise MergeError(f"{what} a weight that has to be merged. {error}") from None


RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "gather": gather,
    "conv_general_dilated": convolution,
    **dict.fromkeys(("add", "sub", "mul", "div"), elementwise),
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "broadcast_in_dim": broadcast_in_dim,
    "convert_element_type": convert_element_type,
    "slice": slice_,
    "dynamic_slice": dynamic_slice,
    "copy": lambda evaluate, eqn, values: values,
    "name": lambda evaluate, eqn, values: values,  # jax.ad_checkpoint.checkpoint_name
    "stop_gradient": on_each_array,
    "pvary": pvary,
    "pcast": pvary,
    "optimization_barrier": optimization_barrier,
    "sharding_constraint": sharding_constraint,
    "jit": jit,
    "pjit": jit,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "shard_map": shard_map,
}

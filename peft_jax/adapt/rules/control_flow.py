"""Calls, loops and branches: the weight goes inside."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.custom_calls import has_derivative_of_body
from peft_jax.adapt.digits import in_front
from peft_jax.adapt.joined import layers_of
from peft_jax.adapt.rules.base import entries_of, merged
from peft_jax.adapt.view import Evaluate, Outputs, Value, View, is_view, is_watched, rewatched, stands_for_weights
from peft_jax.core.repeated import with_bases, without_bases


def jit(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A nested ``jit`` stays one, unless a weight is watched: the watch has to see each call."""
    inner = [rewatched(value, lambda watch: watch.inside(eqn)) for value in values]
    has_pad = any(one.primitive.name == "pad" for one in compat.closed(eqn.params["jaxpr"]).eqns)
    if any(map(is_watched, values)) or has_pad:  # a pad needs to see that what it is given is 0
        return evaluate(eqn.params["jaxpr"], *inner)
    donated = []
    for is_donated, value in zip(eqn.params["donated_invars"], values, strict=True):
        # A weight's arrays are the caller's, even where the program's own copy of the weight could be donated.
        donated.append(is_donated and not stands_for_weights(value))
    run = evaluate
    if any(compat.out_shardings(eqn)):
        run = functools.partial(_merging_outputs, evaluate)
    outs: list[Value] = compat.jit_again(run, eqn, tuple(donated))(*values)
    return outs


def _merging_outputs(evaluate: Evaluate, jaxpr: Jaxpr, *values: Value) -> list[jax.Array]:
    """The outputs of a jaxpr, merged."""
    return [merged(value, None) for value in evaluate(jaxpr, *values)]


def checkpoint(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """``jax.checkpoint`` stays, with its policy."""
    p, inner = eqn.params, functools.partial(evaluate, eqn.params["jaxpr"])
    return jax.checkpoint(inner, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


def custom_call(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """A function with a derivative of its own is what its body is, if the derivative is that of the body."""
    if not has_derivative_of_body(eqn):
        return None
    inner = [rewatched(value, lambda watch: watch.inside(eqn)) for value in values]
    return evaluate(eqn.params["call_jaxpr"], *inner)


def scan(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Stacked weights are sliced layer by layer; constants and the bases of repeated layers are closed over."""
    parts = compat.scan_parts(eqn)
    start = parts.num_consts + parts.num_carry
    if any(is_watched(value) and layers_of(value) for value in values[start:]):
        return _watched_scan(evaluate, eqn, parts, values)
    consts = values[: parts.num_consts]
    init = [merged(value, eqn) for value in values[parts.num_consts : start]]
    single: dict[int, View] = {}  # weights with an axis of length 1 in front, which is gone in the body
    moved: list[Value] = []
    for place, value in enumerate(values[start:]):
        alone = _single(value)
        if alone is None:
            moved.append(_in_front(value, eqn))
        else:
            single[place] = alone
            moved.append(None)
    xs, bases = without_bases(moved)

    def body(carry: list[Any], sliced: list[Any]) -> tuple[list[Any], list[Any]]:
        layers = with_bases(sliced, bases)
        for place, value in single.items():
            layers[place] = value
        out = [merged(value, eqn) for value in evaluate(parts.body, *consts, *carry, *layers)]
        return out[: parts.num_carry], out[parts.num_carry :]

    carry, ys = jax.lax.scan(body, init, xs, length=parts.length, reverse=parts.reverse, unroll=parts.unroll)
    return [*carry, *ys]


def _watched_scan(evaluate: Evaluate, eqn: JaxprEqn, parts: compat.Scan, values: list[Value]) -> list[Value]:
    """A scan over watched weights that would be stacked for it: each of them is seen in the body."""
    start = parts.num_consts + parts.num_carry
    xs = values[start:]
    for i in range(parts.length):
        sliced: list[Value] = []
        for value in xs:
            layers = layers_of(value)
            if layers is not None:
                sliced.append(layers[i])
            elif (alone := _single(value)) is not None:
                sliced.append(alone)
            else:
                moved = _in_front(value, eqn)
                sliced.append(jax.tree.map(lambda array, i=i: array[i], moved))
        carry = [merged(value, eqn) for value in values[parts.num_consts : start]]
        outs = evaluate(parts.body, *values[: parts.num_consts], *carry, *sliced)
        for value in outs:
            merged(value, eqn)
    return [jnp.zeros(compat.type_of(var).shape, compat.type_of(var).dtype) for var in eqn.outvars]


def _single(value: Value) -> View | None:
    """A weight without its first axis, if that has length 1 and is no stacked one."""
    if not is_view(value) or value.axes[0] or value.stack_position(0) is not None:
        return None
    return value.replace(axes=value.axes[1:])


def _in_front(value: Value, eqn: JaxprEqn) -> Value:
    """A value for a scan to slice: of a stacked weight the layers are in front, under the layout of one.

    Weights side by side, such as two stacks that are joined, have no such layers in common.
    """
    moved = value.mapped(0, in_front, drop=True) if is_view(value) else None
    return merged(value, eqn) if moved is None else moved


def while_loop(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Weights that the loop does not change are closed over."""
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    cond_consts, body_consts = values[:n_cond], values[n_cond : n_cond + n_body]
    init = [merged(value, eqn) for value in values[n_cond + n_body :]]

    def proceed(carry: list[jax.Array]) -> jax.Array:
        return evaluate(p["cond_jaxpr"], *cond_consts, *carry)[0]

    def body(carry: list[jax.Array]) -> list[jax.Array]:
        return [merged(value, eqn) for value in evaluate(p["body_jaxpr"], *body_consts, *carry)]

    return jax.lax.while_loop(proceed, body, init)


def cond(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Each branch sees the weights."""
    index, *operands = values

    def branch(jaxpr: Jaxpr, *operands: Value) -> list[jax.Array]:
        return [merged(value, eqn) for value in evaluate(jaxpr, *operands)]

    branches = [functools.partial(branch, jaxpr) for jaxpr in eqn.params["branches"]]
    platforms = compat.platforms_of(eqn)
    if platforms is not None:  # a choice that is made before compilation has to stay one
        return list(platform_dependent(platforms, branches, operands))
    outs: list[Value] = jax.lax.switch(merged(index, eqn), branches, *operands)
    return outs


def platform_dependent(
    platforms: Sequence[Sequence[str] | None], branches: Sequence[Callable[..., Any]], operands: Sequence[Value]
) -> Any:
    """The branch of the platform that the program is compiled for; ``None`` among the platforms is all others."""
    own: dict[str, Callable[..., Any]] = {}
    default = None
    for names, branch in zip(platforms, branches, strict=True):
        if names is None:
            default = branch
        else:
            own |= dict.fromkeys(names, branch)
    return jax.lax.platform_dependent(*operands, default=default, **own)


def shard_map(evaluate: Evaluate, eqn: JaxprEqn, values: list[Value]) -> Outputs:
    """Each device sees its part of base and adapter."""
    parts = compat.shard_map_parts(eqn)
    specs = []
    if any(stands_for_weights(value) and not is_view(value) for value in values):
        return None
    for value, spec in zip(values, parts.in_specs, strict=True):
        specs.append(value.specs(entries_of(spec, value)) if is_view(value) else spec)
    if any(spec is None for spec in specs):
        return None

    def body(*local: Value) -> list[jax.Array]:
        inner = []
        for value, spec in zip(local, parts.in_specs, strict=True):
            inner.append(value.part(entries_of(spec, value)) if is_view(value) else value)
        return [merged(value, eqn) for value in evaluate(parts.body, *inner)]

    outs: list[Value] = parts.again(body, in_specs=tuple(specs))(*values)
    return outs

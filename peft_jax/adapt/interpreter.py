"""Run any JAX function over adapted and quantized leaves: trace it on dense shapes, then rewrite and run the jaxpr.

An equation with no weight among its operands is kept. One with a weight is rewritten by the rule of its
primitive; without a rule, or where the rule does not apply, the weight is merged first, so that an unknown primitive
costs speed and never correctness.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.tree_util import PyTreeDef

from peft_jax.adapt import compat
from peft_jax.adapt.joined import run_joined
from peft_jax.adapt.nnx_state import holds_objects, run_with_state
from peft_jax.adapt.rules import CALLS, RULES
from peft_jax.adapt.rules.base import merged
from peft_jax.adapt.shared_inputs import run_products_of_one_input
from peft_jax.adapt.splice import splice
from peft_jax.adapt.view import Joined, Value, View, is_watched, stands_for_weights
from peft_jax.core.selecting import picked
from peft_jax.core.weight import as_sliced, is_weight

F = TypeVar("F", bound=Callable[..., Any])


class Traced(NamedTuple):
    """A traced function: its jaxpr on dense shapes, its inputs, weights among them, and its output's structure."""

    jaxpr: ClosedJaxpr
    values: list[Value]
    structure: PyTreeDef


def adapt(fn: F) -> F:
    """A pure function that understands adapted and quantized leaves anywhere in its arguments.

    ``fn`` is traced once on the dense shapes; products, lookups and convolutions with a weight run on the side path
    (``x W + s (x A) B``), so that no merged weight and no gradient of a frozen weight is formed. All else merges the
    weight, and computes the same; `peft_jax.explain` tells where. The result composes with ``jit``, ``grad``, ``jvp``,
    ``vmap`` (over adapters too), ``scan``, ``checkpoint`` and ``shard_map``; ``jit`` it, or each call traces ``fn``
    again.

    Without ``adapt``, whatever asks its operands for ``__jax_array__`` (``jax.numpy``, Flax and Equinox layers) merges
    each adapted leaf at each use, with one warning. Functions of ``jax.lax`` do not ask: they raise an error.

    Args:
        fn: Any function of pytrees that JAX can trace. Arguments that are not arrays are static. It sees plain
            arrays. What it does to the state of Flax NNX modules among its arguments (batch statistics, counts of
            random numbers, new attributes) they have afterwards, as with ``nnx.jit``. Other Python side effects
            happen while tracing, with traced values, and on copies of the arguments.

    Returns:
        A function of the same signature. Without weights in its arguments it is ``fn`` itself.

    Raises:
        MergeError: where merging a weight would change the meaning (dropout switched on).
        ValueError: if ``fn`` changes an adapted or quantized leaf of an NNX module, or a module that comes from
            outside of a transform around the call, where the change would be lost.

    Example:
        >>> import peft_jax as pj
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["in"]["kernel"]) @ params["out"]["kernel"]
        >>> params = {"in": {"kernel": jnp.ones((4, 8))}, "out": {"kernel": jnp.ones((8, 2))}}
        >>> adapted = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["in", "out"]))
        >>> adapt(model)(adapted, jnp.ones((3, 4))).shape
        (3, 2)
    """

    @functools.wraps(fn)
    def adapted(*args: Any, **kwargs: Any) -> Any:
        if not any(map(is_weight, jax.tree.leaves((args, kwargs), is_leaf=is_weight))):
            return fn(*args, **kwargs)
        if holds_objects((args, kwargs)):
            return run_with_state(_run, fn, args, kwargs)
        out, structure, _ = _run(fn, *args, **kwargs)
        return jax.tree.unflatten(structure, [merged(value, None) for value in out])

    return adapted  # type: ignore[return-value]


def _run(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[list[Value], PyTreeDef, ClosedJaxpr]:
    """The leaves of a pure function's result, views of weights among them; their structure; the function's jaxpr."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_weight)
    program = trace(fn, leaves, treedef)
    inputs = [View.of(value) if is_weight(value) else value for value in program.values]
    return evaluate(program.jaxpr, *inputs), program.structure, program.jaxpr


def trace(fn: Callable[..., Any], leaves: Sequence[Any], treedef: PyTreeDef, *, keep: bool = False) -> Traced:
    """Trace a function on dense shapes.

    Args:
        fn: The function.
        leaves: Those of its arguments ``(args, kwargs)``; what is no array is static.
        treedef: The structure of the arguments.
        keep: Whether weights without a side path stay among the inputs; if not, they are merged at once.
    """
    filled: list[Any] = []
    places: list[int] = []  # of the inputs among the leaves
    types: list[Any] = []
    for place, leaf in enumerate(leaves):
        if is_weight(leaf):
            leaf = as_sliced(leaf)
            if not keep and not leaf.side_path:
                leaf = leaf.dense()
        filled.append(leaf)
        if is_weight(leaf):
            places.append(place)
            types.append(compat.dense_type(leaf))
        elif compat.is_array(leaf):
            places.append(place)
            types.append(leaf)

    def flat(*arrays: jax.Array) -> Any:
        own = list(filled)
        for place, array in zip(places, arrays, strict=True):
            own[place] = array
        args, kwargs = jax.tree.unflatten(treedef, own)
        return fn(*args, **kwargs)

    jaxpr, shapes = jax.make_jaxpr(flat, return_shape=True)(*types)
    return Traced(jaxpr, list(picked(filled, places)), jax.tree.structure(shapes))


def evaluate(jaxpr: Jaxpr | ClosedJaxpr, *args: Value) -> list[Value]:
    """The outputs of a jaxpr on arrays and views of weights; an output may be such a view."""
    program, inputs, structure = splice(compat.closed(jaxpr), args, _equations)
    return list(jax.tree.unflatten(structure, compat.run(program, inputs)))


def _equations(eqns: Sequence[JaxprEqn], values: list[Value]) -> list[Value]:
    if len(eqns) == 1:
        return _equation(eqns[0], values)
    return run_products_of_one_input(_equation, eqns, values)


def _equation(eqn: JaxprEqn, values: list[Value]) -> list[Value]:
    rule = RULES.get(eqn.primitive.name)
    if eqn.primitive.name not in CALLS and any(isinstance(value, Joined) for value in values):
        rule = run_joined
    out = None if rule is None else rule(evaluate, eqn, values)
    return _merging(eqn, values) if out is None else out


def _merging(eqn: JaxprEqn, values: list[Value]) -> list[jax.Array]:
    """Run an equation on merged weights, which backward forms again rather than keeps.

    Of watched weights the shapes alone are asked for.
    """
    if any(map(is_watched, values)) and compat.is_plain(eqn):
        for value in values:
            if stands_for_weights(value):
                value.done(eqn, merged=True)
        return compat.placeholders(eqn)

    def run(*values: Value) -> list[jax.Array]:
        return compat.bind(eqn, [merged(value, eqn) for value in values])

    return run(*values) if eqn.effects else jax.checkpoint(run)(*values)

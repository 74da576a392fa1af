"""The scan over a decoder's layers: of one shape in one stack, or of several shapes in several stacks.

Layers of one shape are one scan over their stack. Layers of several shapes have a stack for each shape, and are scanned
over the shortest pattern of shapes that repeats, in which each layer's weights are taken from its stack by number. So
compile time does not grow with depth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from peft_jax.core.pytree import PyTree
from peft_jax.models.modules.base_dropout import key_of
from peft_jax.models.modules.layer_views import View, chosen
from peft_jax.models.modules.positions import Beside
from peft_jax.models.modules.remat import rematerialized
from peft_jax.models.modules.shadow_state import beside_shadow


class LayerCall(NamedTuple):
    """The arguments of one layer beside its input and the buffers of the cache.

    Attributes:
        view: What its kind of layer sees.
        layer: Its number.
        place: Its number in its stack, and so in the buffers of the cache.
        index: The slot of the cache that the first new position takes.
        beside: Its part of a prompt.
        own: Its part of `Run.own`.
        stack: The name of its stack; empty if there is one alone.
        key: The random key of its dropout; None for none.
    """

    view: View
    layer: jax.Array
    place: jax.Array
    index: jax.Array | int  # type: ignore[assignment]  # a field, not the method of tuples
    beside: Beside
    own: Any
    stack: str = ""
    key: jax.Array | None = None


class Run(NamedTuple):
    """The arguments that the layers of one call of a decoder share.

    Attributes:
        views: What the layers of each kind see.
        kinds: The kind of each layer.
        stacks: The stack of each layer; empty if there is one alone.
        index: The slot of the cache that the first new position takes.
        beside: A prompt's part in the attention of all layers.
        own: Any tree of arrays with an axis of layers in front.
        keep: Whether each layer's input is returned.
        remat: Whether backward keeps each layer's input alone.
        key: The random key of dropout in the layers; None for none.
    """

    views: Mapping[str, View]
    kinds: Sequence[str]
    stacks: Sequence[str]
    index: jax.Array | int  # type: ignore[assignment]
    beside: Beside
    own: Any
    keep: bool
    remat: bool
    key: jax.Array | None = None


class Segment(NamedTuple):
    """A pattern of layers that repeats: its first layer, its length, and how often it is there."""

    start: int
    length: int
    count: int  # type: ignore[assignment]


class Stacks(nnx.Module):
    """Stacks of layers of several shapes, by name.

    Args:
        layers: What makes a layer of each stack from random streams.
        order: The stack of each layer.
        rngs: Random streams.
    """

    def __init__(
        self, layers: Mapping[str, Callable[[nnx.Rngs], nnx.Module]], order: Sequence[str], rngs: nnx.Rngs
    ) -> None:
        for name in sorted(set(order)):
            setattr(self, name, stacked(layers[name], list(order).count(name), rngs))


def stacked(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """A number of layers as one module, all of whose leaves have an axis of layers in front."""
    keys = jax.random.split(rngs.params(), count)
    made: list[nnx.Module] = []

    def layer(key: jax.Array) -> nnx.Module:
        made.append(make(nnx.Rngs(key)))
        return made[-1]

    layers = nnx.vmap(layer)(keys)
    _set_in_order(layers, made[0])
    return layers


def _set_in_order(module: nnx.Module, first: nnx.Module) -> None:
    """Put the attributes of a module and of those in it into the order of another one's, which `nnx.vmap` loses."""
    own = vars(module)
    for name, part in vars(first).items():
        own[name] = own.pop(name)
        if isinstance(part, nnx.Module | nnx.Dict):
            _set_in_order(own[name], part)


def run_layers(layers: Any, x: jax.Array, buffers: PyTree, run: Run) -> tuple[jax.Array, Any, jax.Array | None]:
    """Run all layers.

    A layer is called as ``layer(x, call, buffers)``, with a `LayerCall`, and returns its output and the buffers.

    Args:
        layers: The layers, as from `stacked`, or `Stacks`.
        x: Their input (batch, length, hidden).
        buffers: The cache's buffers, or whatever tree the layers hand on to one another.
        run: What they share.

    Returns:
        The last output, the buffers, and if kept the inputs of all layers (layers, batch, length, hidden).
    """
    if run.stacks:
        return _run_stacks(layers, x, buffers, run)
    graph, weights = nnx.split(layers)
    names = sorted(set(run.kinds))
    which = jnp.array([names.index(kind) for kind in run.kinds], jnp.int32) if len(names) > 1 else None

    def body(carry: tuple[jax.Array, Any], inputs: Any) -> Any:
        own_weights, layer, kind, beside, own = inputs
        view = run.views[names[0]] if kind is None else chosen(run.views, names, kind)
        call = LayerCall(view, layer, layer, run.index, beside, own, key=key_of(run.key, layer))
        module = nnx.merge(graph, own_weights)
        following = beside_shadow(lambda x, handed: module(x, call, handed), beside.shadow, *carry)
        return following, carry[0] if run.keep else None

    body = rematerialized(body, whole=run.remat)
    per_layer = (weights, jnp.arange(len(run.kinds)), which, run.beside, run.own)
    (x, buffers), inputs = jax.lax.scan(body, (x, buffers), per_layer)
    return x, buffers, inputs


def _run_stacks(layers: Any, x: jax.Array, buffers: PyTree, run: Run) -> tuple[jax.Array, Any, jax.Array | None]:
    """As `run_layers`, of layers of several shapes."""
    parts = {name: nnx.split(getattr(layers, name)) for name in sorted(set(run.stacks))}
    graphs = {name: graph for name, (graph, _) in parts.items()}
    weights = {name: state for name, (_, state) in parts.items()}
    states = []
    for segment in segments(list(zip(run.stacks, run.kinds, strict=True))):
        x, buffers, inputs = _run_segment(segment, graphs, weights, x, buffers, run)
        if inputs is not None:
            states.append(inputs)
    return x, buffers, jnp.concatenate(states) if states else None


def _run_segment(
    segment: Segment, graphs: Mapping[str, Any], weights: Mapping[str, Any], x: jax.Array, buffers: PyTree, run: Run
) -> tuple[jax.Array, Any, jax.Array | None]:
    """Run the layers of a pattern as often as it repeats."""
    start, length, count = segment
    pattern = list(run.stacks[start : start + length])
    before = list(run.stacks[:start])

    def apply(offset: int, x: jax.Array, buffers: PyTree, step: jax.Array) -> tuple[jax.Array, Any]:
        name = pattern[offset]
        layer = start + step * length + offset
        place = before.count(name) + step * pattern.count(name) + pattern[:offset].count(name)
        own_weights = _taken(weights[name], place)
        beside, own = _taken((run.beside, run.own), layer)
        view, key = run.views[run.kinds[start + offset]], key_of(run.key, layer)
        call = LayerCall(view, layer, place, run.index, beside, own, name, key)
        module = nnx.merge(graphs[name], own_weights)
        return beside_shadow(lambda x, handed: module(x, call, handed), beside.shadow, x, buffers)

    def body(carry: tuple[jax.Array, Any], step: jax.Array) -> Any:
        x, buffers = carry
        inputs = []
        for offset in range(length):
            inputs.append(x)
            one = rematerialized(
                lambda x, buffers, step, offset=offset: apply(offset, x, buffers, step), whole=run.remat
            )
            x, buffers = one(x, buffers, step)
        return (x, buffers), jnp.stack(inputs) if run.keep else None

    (x, buffers), inputs = jax.lax.scan(body, (x, buffers), jnp.arange(count))
    return x, buffers, inputs.reshape(-1, *x.shape) if run.keep else None


def _taken(tree: PyTree, number: jax.Array) -> Any:
    """A tree's part for one layer."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), tree)


def segments(kinds: Sequence[Any]) -> list[Segment]:
    """Split layers into patterns that repeat, so that as few layers as can be are compiled.

    Example:
        >>> segments(list("aab" * 4 + "aa"))
        [Segment(start=0, length=3, count=4), Segment(start=12, length=1, count=2)]
    """
    total = len(kinds)
    best: list[Split] = [Split(0, 0, 0, [])] * (total + 1)
    for start in reversed(range(total)):
        options = []
        for length in range(1, total - start + 1):
            pattern = kinds[start : start + length]
            for count in itertools.count(1):
                stop = start + length * count
                if kinds[stop - length : stop] != pattern:
                    break
                rest = best[stop]
                parts = [Segment(start, length, count), *rest.parts]
                options.append(Split(rest.compiled + length, rest.number + 1, -stop, parts))
        best[start] = min(options)
    return best[0].parts


class Split(NamedTuple):
    """A way to split layers, compared by its first fields: layers compiled, segments, and minus the first one's end."""

    compiled: int
    number: int
    behind: int
    parts: list[Segment]

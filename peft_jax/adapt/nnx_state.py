"""Run a function of Flax NNX modules as a pure one, and write what it changed into the modules, as ``nnx.jit`` does."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import errors, nnx

from peft_jax.adapt import compat
from peft_jax.adapt.rules.base import merged
from peft_jax.core.paths import dotted
from peft_jax.core.pytree import KeyPath, PyTree
from peft_jax.core.weight import is_weight

TAG = "peft_jax.adapt"  # of the context in which NNX remembers which object is which


def is_object(node: object) -> bool:
    """Whether a node of a tree is a module, a variable or another object whose state a function may change."""
    return isinstance(node, (nnx.Variable, nnx.Pytree))


def holds_objects(tree: PyTree) -> bool:
    """Whether there is such an object in a tree."""
    return any(map(is_object, jax.tree.leaves(tree, is_leaf=is_object)))


@dataclasses.dataclass
class _After:
    """The objects after the function, noted while it is traced.

    Attributes:
        definition: Their graph, as NNX describes it.
        structure: The structure of their state.
        kept: For each leaf of the state, its place among the leaves before the function; None for another leaf.
        others: Key paths of the other leaves.
        is_other_graph: Whether the graph is another than before.
    """

    definition: Any = None  # of nnx.GraphDef and PyTreeDef once the function is traced
    structure: Any = None
    kept: list[int | None] = dataclasses.field(default_factory=list)
    others: list[KeyPath] = dataclasses.field(default_factory=list)
    is_other_graph: bool = False

    def state(self, before: Sequence[Any], others: Sequence[Any]) -> PyTree:
        """The state, of leaves from before the function and the other ones."""
        rest = iter(others)
        leaves = [next(rest) if place is None else before[place] for place in self.kept]
        return jax.tree.unflatten(self.structure, leaves)


def run_with_state(run: Callable[..., Any], fn: Callable[..., Any], args: PyTree, kwargs: PyTree) -> PyTree:
    """``fn(*args, **kwargs)`` on copies of the objects among the arguments; the objects get the copies' changes.

    Args:
        run: Calls a pure function, its first argument, with the rest of its arguments. It gives the leaves of the
            result, views of weights among them, their structure, and the function's jaxpr.
        fn: The function.
        args: Its arguments.
        kwargs: Likewise.

    Raises:
        ValueError: if ``fn`` changes a weight that is adapted or quantized, or objects that come from outside of a
            transform around this call.
    """
    found, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=_is_object_or_weight)
    places: list[int] = []  # of the objects among the parts of the arguments
    objects: list[Any] = []
    owners: list[KeyPath] = []
    others: list[Any] = []
    for place, (key_path, part) in enumerate(found):
        if is_object(part):
            places.append(place)
            objects.append(part)
            owners.append(key_path[2:])  # without the number of the argument
            others.append(None)
        else:
            others.append(part)

    def name(key_path: KeyPath) -> str:
        return dotted((*owners[key_path[0].key], *key_path[1:]))

    after = _After()

    with nnx.update_context(TAG):
        with nnx.split_context(TAG) as outside:
            definition, state = outside.split(tuple(objects))
        leaves, structure = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_weight)
        before = [leaf for _, leaf in leaves]
        place_of = {path: place for place, (path, _) in enumerate(leaves)}

        def pure(leaves: list[Any], others: list[Any]) -> tuple[Any, list[Any]]:
            with nnx.merge_context(TAG, inner=True) as inside:
                copies = inside.merge(definition, jax.tree.unflatten(structure, leaves))
            graph = nnx.graphdef(copies)
            filled = list(others)
            for place, copy in zip(places, copies, strict=True):
                filled[place] = copy
            args, kwargs = jax.tree.unflatten(treedef, filled)
            out = fn(*args, **kwargs)
            after.is_other_graph = nnx.graphdef(copies) != graph
            with nnx.split_context(TAG) as inside:
                after.definition, state = inside.split(copies)
            left, after.structure = jax.tree_util.tree_flatten_with_path(state)
            after.kept, after.others, new = [], [], []
            for path, leaf in left:
                earlier = place_of.get(path)
                if earlier is not None and leaf is leaves[earlier]:
                    after.kept.append(earlier)
                else:
                    after.kept.append(None)
                    after.others.append(path)
                    new.append(leaf)
            return out, new

        values, out_structure, jaxpr = run(pure, before, others)
        end = len(values) - len(after.others)
        outputs = [merged(value, None) for value in values[:end]]
        result, _ = jax.tree.unflatten(out_structure, [*outputs, *after.others])
        inputs = jax.tree.leaves((before, others), is_leaf=is_weight)
        traced = [leaf for leaf in inputs if is_weight(leaf) or compat.is_array(leaf)]

        sources: list[Any] = []  # for each of the other leaves the input that it is; None if it was computed
        changed: list[str] = []
        lost: list[str] = []
        for path, number in zip(after.others, compat.passed_through(jaxpr.jaxpr)[end:], strict=True):
            source = None if number is None else traced[number]
            old = before[place_of[path]] if path in place_of else None
            sources.append(source)
            if source is None or source is not old:
                changed.append(name(path))
                if is_weight(old):
                    lost.append(name(path))
        if changed or after.is_other_graph:
            _check_may_change(objects, sorted(changed), sorted(lost))
            new = []
            for value, source in zip(values[end:], sources, strict=True):
                new.append(merged(value, None) if source is None else source)
            with nnx.merge_context(TAG, inner=False) as outside:
                outside.merge(after.definition, after.state(before, new))
    return result


def _is_object_or_weight(node: object) -> bool:
    return is_object(node) or is_weight(node)


def _check_may_change(objects: Sequence[Any], changed: Sequence[str], weights: Sequence[str]) -> None:
    """Raise ValueError before anything is written, for NNX takes a module apart to write into it."""
    if weights:
        raise ValueError(
            f"The function changes {weights}, adapted or quantized, and an adapter cannot follow its weight. Change "
            "the weight outside of pj.adapt, or pj.merge the module first."
        )
    try:
        for _, node in nnx.iter_graph(objects):
            if isinstance(node, nnx.Variable):
                node.set_raw_value(node.get_raw_value())  # raises where it must not be written
    except errors.TraceContextError:
        raise ValueError(
            f"The function changes {changed or 'attributes'} of an NNX module that comes from outside of the "
            "transform (jit, grad, ...) around pj.adapt, where the change would be lost. Give the module to "
            "the transform as an argument, with nnx.jit or nnx.grad in place of jax.jit or jax.grad; or return its "
            "new state."
        ) from None

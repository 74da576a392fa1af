"""What a program does with each adapted leaf, told before any training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from peft_jax.adapt import compat
from peft_jax.adapt.interpreter import evaluate, trace
from peft_jax.adapt.rules import merged
from peft_jax.adapt.view import View
from peft_jax.core.adapted import is_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.layout import Layout
from peft_jax.core.paths import dotted
from peft_jax.core.weight import is_weight


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a leaf.

    Attributes:
        primitive: Name of the primitive, or ``"output"`` where the program returns the leaf.
        where: File and line that wrote it.
        merged: Whether the leaf is merged for it; else it runs on the side path.
    """

    primitive: str
    where: str
    merged: bool

    def __str__(self) -> str:
        place = "returned by the function" if self.primitive == "output" else f"{self.primitive} at {self.where}"
        return f"{place}: {'merged' if self.merged else 'side path'}"


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """An adapted or quantized leaf and what becomes of it.

    Attributes:
        path: Dotted path of the leaf.
        shape: Its shape.
        kinds: Adapters on it, outermost first, as ``name: method``; ``int8`` for a quantized base.
        layout: Its axes; ``layout.source`` says how they were found.
        uses: Each use in the program, in order; a loop's body counts once.
        whole: Whether a copy that is trained whole stands in its place wherever it is used.
    """

    path: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    layout: Layout
    uses: tuple[Use, ...]
    whole: bool = False

    def __str__(self) -> str:
        axes = [("stack", self.layout.stack), ("in", self.layout.inp), ("out", self.layout.out)]
        told = ", ".join(f"{name} {axis}" for name, axis in axes if axis)
        uses = ["its trained copy, wherever it is used"] if self.whole else list(map(str, self.uses))
        uses = uses if self.uses else ["never used by this function"]
        lines = [f"{self.path} {self.shape}  {', '.join(self.kinds)}", f"  axes  {told} ({self.layout.source})"]
        return "\n".join([*lines, f"  uses  {uses[0]}", *(f"        {use}" for use in uses[1:])])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Reports on all adapted and quantized leaves, to print or to look through."""

    leaves: tuple[LeafReport, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """Paths of leaves that the function never uses."""
        return tuple(leaf.path for leaf in self.leaves if not leaf.uses)

    def __str__(self) -> str:
        used = [leaf for leaf in self.leaves if leaf.uses]
        whole = sum(leaf.whole for leaf in used)
        merging = sum(any(use.merged for use in leaf.uses) and not leaf.whole for leaf in used)
        side = len(used) - whole - merging
        parts = [f"{side} on the side path", f"{merging} merged somewhere", f"{whole} trained whole"]
        count = f"{len(self.leaves)} leaves: {', '.join(parts)}, {len(self.unused)} never used."
        return "\n".join([*map(str, self.leaves), count])


def explain(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Explanation:
    """What ``fn(params, *args)`` does with each adapted or quantized leaf; only shapes are evaluated.

    Args:
        fn: The function, plain or through `adapt`.
        params: A tree or model handle with adapted leaves.
        *args: The function's other arguments; arrays, or shapes as ``jax.ShapeDtypeStruct``.
        **kwargs: Likewise.

    Returns:
        An object to print, whose ``leaves`` hold the same.

    Example:
        >>> import peft_jax as pj
        >>> def model(params, x):
        ...     return x @ params["up"]["kernel"] @ (2 * params["down"]["kernel"])
        >>> params = {name: {"kernel": jnp.ones((4, 4))} for name in ("up", "down", "spare")}
        >>> params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["up", "down", "spare"]))
        >>> print(pj.explain(model, params, jnp.ones((1, 4))))  # doctest: +ELLIPSIS
        down.kernel (4, 4)  default: LORA
          axes  in (0,), out (1,) (by convention for 'kernel')
          uses  mul at ...: merged
        spare.kernel (4, 4)  default: LORA
          axes  in (0,), out (1,) (by convention for 'kernel')
          uses  never used by this function
        up.kernel (4, 4)  default: LORA
          axes  in (0,), out (1,) (by convention for 'kernel')
          uses  dot_general at ...: side path
        3 leaves: 1 on the side path, 1 merged somewhere, 0 trained whole, 1 never used.
    """
    tree = params.params if isinstance(params, Handle) else params
    found = [pair for pair in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight) if is_weight(pair[1])]
    notes = [_Note([]) for _ in found]
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_weight)
    jaxpr, values, _ = trace(fn, leaves, treedef, keep=True)
    watches = iter(notes)
    views = [View.of(value, next(watches, None)) if is_weight(value) else value for value in values]
    jax.eval_shape(lambda views: [merged(value, None) for value in evaluate(jaxpr, *views)], views)
    return Explanation(
        tuple(_report(dotted(path), leaf, note) for note, (path, leaf) in zip(notes, found, strict=True))
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Collects the uses of one leaf; ``place`` is where the function was called that they are in."""

    uses: list[Use]
    place: str | None = None

    def kernel(self, *_: Any) -> None:
        pass

    def product(self, *_: Any) -> None:
        pass

    def done(self, view: View, eqn: Any, merged: bool) -> None:
        place = "" if eqn is None else compat.where(eqn) or self.place or "a place inside a library"
        self.uses.append(Use("output" if eqn is None else eqn.primitive.name, place, merged))

    def inside(self, eqn: Any) -> "_Note":
        return _Note(self.uses, compat.where(eqn) or self.place)


def _report(path: str, leaf: Any, note: _Note) -> LeafReport:
    kinds, node = [], leaf
    while is_adapted(node):
        kinds.append(f"{node.tag.name}: {node.method.label}{'' if node.active else ' (not active)'}")
        node = node.base
    kinds += [type(node).__name__.lower()] if is_weight(node) else []
    return LeafReport(path, leaf.shape, tuple(kinds), leaf.layout, tuple(note.uses), whole=not leaf.side_path)

"""Report how a program uses each adapted leaf, before any training."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import JaxprEqn

from peft_jax.adapt import compat
from peft_jax.adapt.interpreter import evaluate, trace
from peft_jax.adapt.rules.base import merged
from peft_jax.adapt.view import Value, View
from peft_jax.core.adapted import Adapted
from peft_jax.core.handle import Handle
from peft_jax.core.layout import Layout
from peft_jax.core.paths import dotted
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import Weight, is_weight


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
        place = f"{self.primitive} at {self.where}"
        if self.primitive == "output":
            place = "returned by the function"
        return f"{place}: {'merged' if self.merged else 'side path'}"


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """An adapted or quantized leaf and its uses.

    Attributes:
        path: Dotted path of the leaf.
        shape: Its shape.
        kinds: Adapters on it, outermost first, as ``name: method``; the format of a quantized base, such as ``int8``.
        layout: Its axes; ``layout.source`` says how they were found.
        uses: Each use in the program, in order; a loop's body counts once.
        whole: Whether a copy that is trained whole is used in its place everywhere.
    """

    path: str
    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    layout: Layout
    uses: tuple[Use, ...]
    whole: bool = False

    def __str__(self) -> str:
        roles = {"stack": self.layout.stack, "in": self.layout.inp, "out": self.layout.out}
        axes = ", ".join(f"{name} {axis}" for name, axis in roles.items() if axis)
        if not self.uses:
            uses = "never used by this function"
        elif self.whole:
            uses = "its trained copy, wherever it is used"
        else:
            uses = "\n        ".join(map(str, self.uses))
        first_line = f"{self.path} {self.shape}  {', '.join(self.kinds)}"
        return "\n".join([first_line, f"  axes  {axes} ({self.layout.source})", f"  uses  {uses}"])


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Reports on all adapted and quantized leaves, to print or to look through."""

    leaves: tuple[LeafReport, ...]

    @property
    def unused(self) -> tuple[str, ...]:
        """Paths of leaves that the function never uses."""
        return tuple(leaf.path for leaf in self.leaves if not leaf.uses)

    def __str__(self) -> str:
        side = merging = whole = unused = 0
        for leaf in self.leaves:
            if not leaf.uses:
                unused += 1
            elif leaf.whole:
                whole += 1
            elif any(use.merged for use in leaf.uses):
                merging += 1
            else:
                side += 1
        count = (
            f"{len(self.leaves)} leaves: {side} on the side path, {merging} merged somewhere, {whole} trained whole, "
            f"{unused} never used."
        )
        return "\n".join([*map(str, self.leaves), count])


def explain(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> Explanation:
    """Report how ``fn(params, *args)`` uses each adapted or quantized leaf; only shapes are evaluated.

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
        ...     return x @ params["up"]["kernel"] @ jnp.tanh(params["down"]["kernel"])
        >>> params = {name: {"kernel": jnp.ones((4, 4))} for name in ("up", "down", "spare")}
        >>> params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["up", "down", "spare"]))
        >>> print(pj.explain(model, params, jnp.ones((1, 4))))  # doctest: +ELLIPSIS
        down.kernel (4, 4)  default: LORA
          axes  in (0,), out (1,) (by convention for 'kernel')
          uses  tanh at ...: merged
        spare.kernel (4, 4)  default: LORA
          axes  in (0,), out (1,) (by convention for 'kernel')
          uses  never used by this function
        up.kernel (4, 4)  default: LORA
          axes  in (0,), out (1,) (by convention for 'kernel')
          uses  dot_general at ...: side path
        3 leaves: 1 on the side path, 1 merged somewhere, 0 trained whole, 1 never used.
    """
    tree = params.params if isinstance(params, Handle) else params
    found: list[tuple[str, Weight, _Note]] = []
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight):
        if is_weight(leaf):
            found.append((dotted(key_path), leaf, _Note([])))
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_weight)
    program, values, _ = trace(fn, leaves, treedef, keep=True)
    jaxpr = compat.without_dead_code(program)
    watches = iter([note for _, _, note in found])  # the leaves of params come first
    views: list[Value] = []
    for value in values:
        views.append(View.of(value, next(watches, None)) if is_weight(value) else value)

    def run(views: list[Value]) -> list[jax.Array]:
        return [merged(value, None) for value in evaluate(jaxpr, *views)]

    jax.eval_shape(run, views)
    return Explanation(tuple(_report(path, leaf, note) for path, leaf, note in found))


@dataclasses.dataclass(frozen=True, eq=False)
class _Note:
    """Collects the uses of one leaf; ``place`` is the call of the function that is being watched."""

    uses: list[Use]
    place: str | None = None

    def kernel(self, *_: Any) -> None:
        pass

    def product(self, *_: Any) -> None:
        pass

    def done(self, view: View, eqn: JaxprEqn | None, merged: bool) -> None:
        if eqn is None:
            self.uses.append(Use("output", "", merged))
            return
        place = compat.where(eqn) or self.place or "a place inside a library"
        self.uses.append(Use(eqn.primitive.name, place, merged))

    def inside(self, eqn: JaxprEqn) -> "_Note":
        return _Note(self.uses, compat.where(eqn) or self.place)


def _report(path: str, leaf: Weight, note: _Note) -> LeafReport:
    kinds = []
    node: Any = leaf
    while isinstance(node, Adapted):
        suffix = "" if node.active else " (not active)"
        kinds.append(f"{node.tag.name}: {node.method.label}{suffix}")
        node = node.base
    if is_weight(node):
        kinds.append(getattr(type(node), "kind", type(node).__name__.lower()))
    return LeafReport(path, leaf.shape, tuple(kinds), leaf.layout, tuple(note.uses), whole=not leaf.side_path)

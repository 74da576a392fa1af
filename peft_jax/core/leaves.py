"""The leaves of a tree with their layouts and the names of the layers that they stand for."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import Ambiguous, Layout, conventional_layout
from peft_jax.core.paths import module_path, named_leaves, stacked_names
from peft_jax.core.weight import is_weight

Layouts = Mapping[str, Layout]


class Leaf(NamedTuple):
    """A leaf with its layout and the names of the layers it stands for; no layout where it is ambiguous."""

    path: str
    value: Any
    layout: Any
    names: np.ndarray
    unclear: Ambiguous | None = None

    def required_layout(self) -> Layout:
        """The layout.

        Raises:
            ValueError: if it is ambiguous.
        """
        if self.layout is None:
            unclear = self.unclear or Ambiguous("no convention names the axes of such a leaf")
            found = f" ({'; '.join(unclear.found)})" if unclear.found else ""
            hint = "" if self.unclear else ", or give fn= and args= to have the axes read off the program that uses it"
            raise ValueError(
                f"Leaf '{self.path}' of shape {self.value.shape} is a target, and its input and output axes are "
                f"ambiguous: {unclear.why}{found}. "
                f"Write layout={{r'{re.escape(self.path)}': pj.Layout(stack=..., inp=..., out=...)}}{hint}."
            )
        layout: Layout = self.layout
        return layout


def find_leaves(
    params: Any,
    layouts: Layouts | None,
    fan_in_fan_out: bool = False,
    read: Mapping[str, Layout | Ambiguous] = MappingProxyType({}),
) -> list[Leaf]:
    """All leaves of a tree, in order, with their layouts.

    Args:
        params: The tree.
        layouts: What the user says, by regex over whole paths; it comes first.
        fan_in_fan_out: What the conventions, which come last, are asked with.
        read: What was read off a program, by path.

    Raises:
        ValueError: if a layout does not fit its leaf, or fits none; or two leaves have one path.
    """
    unused = set(layouts or {})
    found = []
    for path, value in named_leaves(params, is_leaf=is_weight).items():
        shape = getattr(value, "shape", ())
        layout = value.layout if is_weight(value) else conventional_layout(path, shape, fan_in_fan_out)
        layout = read.get(path, layout)
        for pattern, given in (layouts or {}).items():
            if re.fullmatch(pattern, path):
                given.check(shape, path)
                if is_weight(value) and value.layout.unnamed:  # adapted as target_parameters, without experts' names
                    given = dataclasses.replace(given, index_after=value.layout.index_after)
                if is_weight(value) and given != layout:
                    raise ValueError(
                        f"Leaf '{path}' is quantized or adapted already, with the axes of {layout}. "
                        f"Give {given} to the call that made it so, or leave layout= out here."
                    )
                layout = given
                unused.discard(pattern)
                break
        unclear, layout = (layout, None) if isinstance(layout, Ambiguous) else (None, layout)
        module = module_path(path)
        names = stacked_names(module, layout, shape) if layout else np.array(module, dtype=object)
        found.append(Leaf(path, value, layout, names, unclear))
    if unused:
        raise ValueError(
            f"layout patterns {sorted(unused)} match no leaf; a pattern is matched against the whole path. "
            f"Paths: {[leaf.path for leaf in found][:5]}."
        )
    return found


def replace_leaves(params: Any, nodes: Mapping[int, Any]) -> Any:
    """``params`` with other nodes at some positions of `find_leaves`."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_weight)
    return jax.tree.unflatten(treedef, [nodes.get(position, leaf) for position, leaf in enumerate(leaves)])


def is_float(leaf: Leaf) -> bool:
    """Whether a leaf stands for floating-point numbers."""
    return bool(jnp.issubdtype(getattr(leaf.value, "dtype", None) or bool, jnp.floating))


def is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is seen as a matrix, or may be once its axes are told."""
    if not is_float(leaf):
        return False
    if leaf.layout is None:
        return getattr(leaf.value, "ndim", 0) > 1
    return bool(leaf.layout.inp)

"""Attach an adapter to a tree: which leaves, seen how, starting where."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.core.adapted import Adapted, Tag, adapters
from peft_jax.core.handle import Handle
from peft_jax.core.layout import Layout, conventional_layout
from peft_jax.core.paths import dotted, module_path, stacked_names
from peft_jax.core.targets import ALL_LINEAR, check_targets, is_saved_module, is_target
from peft_jax.core.weight import as_weight, is_weight
from peft_jax.methods.base import Method
from peft_jax.methods.lora import LoraConfig
from peft_jax.methods.whole import Whole

Layouts = Mapping[str, Layout]


class Leaf(NamedTuple):
    """A leaf with its layout and the names of the layers it stands for; no layout where it is ambiguous."""

    path: str
    value: Any
    layout: Any
    names: np.ndarray


class Choice(NamedTuple):
    """A leaf that an adapter changes: its position, which stacked layers, and its role if it is trained whole."""

    position: int
    leaf: Leaf
    hit: np.ndarray
    role: str | None


def apply_lora(
    params: Any,
    config: LoraConfig,
    *,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
) -> Any:
    """`apply_adapter` for LoRA.

    Example:
        >>> import peft_jax as pj
        >>> params = {"mlp": {"kernel": jnp.ones((4, 8))}}
        >>> adapted = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["mlp"]))
        >>> adapted["mlp"]["kernel"].params["lora_A"].shape
        (4, 2)
    """
    return apply_adapter(params, config, key=key, adapter_name=adapter_name, layout=layout)


def apply_adapter(
    params: Any,
    config: Method,
    *,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
) -> Any:
    """A new tree in which each target leaf is an adapted leaf; a fresh adapter changes no output.

    Targets follow PEFT's rules on dotted module paths: the path of a leaf without its own name (``kernel``,
    ``weight``, ``embedding``). A stacked leaf stands for its layers. Random numbers come from these names, so adding
    a target changes no other adapter.

    Args:
        params: Any pytree of arrays, or a model handle; quantized and adapted leaves are weights like others.
        config: What to attach, where, and how it starts.
        key: A JAX random key; None means ``jax.random.key(0)``.
        adapter_name: Name of the adapter, new to the tree.
        layout: Axes by regex over whole leaf paths, for leaves that follow no convention. By convention ``kernel`` is
            ``(in, out)``, ``weight`` is ``(out, in)``, ``embedding`` is ``(vocabulary, features)``.

    Raises:
        ValueError: if some part of the config hits nothing, a target's axes are ambiguous, a layout does not fit its
            leaf or matches none, or the name is taken.
    """
    if isinstance(params, Handle):
        handle = untied_for(params, lambda name: _touches(config, name))
        config = _completed(config, handle, layout)
        tree = apply_adapter(
            handle.params, config, key=key, adapter_name=adapter_name, layout={**handle.layouts(), **(layout or {})}
        )
        return handle.replace(tree)
    if adapter_name in adapters(params):
        raise ValueError(f"Adapter name '{adapter_name}' is taken. Choose another, or pj.delete_adapter it first.")
    key = jax.random.key(0) if key is None else key
    found = find_leaves(params, layout, getattr(config, "fan_in_fan_out", False))
    config = expand_all_linear(config, found)
    modules = [name for leaf in found for name in leaf.names.flat if is_matrix(leaf)]
    patterns = {**getattr(config, "rank_pattern", {}), **getattr(config, "alpha_pattern", {})}
    every = sorted({name for leaf in found for name in leaf.names.flat})
    targets = set(check_targets(config, modules, every, patterns))

    nodes = {}
    for position, leaf, hit, role in choose(found, config, targets):
        if role is None:
            method, arrays = config, config.init(leaf.layout, leaf.value.shape, leaf.names, hit, key)
        else:
            method = Whole(config, role)
            arrays = method.init(as_weight(leaf.value, leaf.layout), hit)
        nodes[position] = Adapted(
            leaf.value, *arrays, leaf.layout, Tag(adapter_name, method), trainable=not config.inference_mode
        )
    return replace_leaves(params, nodes)


def untied_for(handle: Handle, changes: Callable[[str], bool]) -> Handle:
    """The handle, with tied modules given leaves of their own if an adapter ``changes`` one of them.

    PEFT wraps one of the modules and leaves the other as it was; with one leaf for both, both would change.
    """
    return handle.untied() if any(map(changes, handle.tied_modules)) else handle


def _completed(config: Method, handle: Handle, layout: Layouts | None) -> Method:
    """The config with the model's name, its task, and its linear modules in place of ``"all-linear"``."""
    found = find_leaves(handle.params, {**handle.layouts(), **(layout or {})})
    return dataclasses.replace(
        expand_all_linear(config, found, handle.output_module),
        base_model_name_or_path=config.base_model_name_or_path or handle.name_or_path,
        task_type=config.task_type or handle.task_type,
    )


def choose(found: Sequence[Leaf], config: Method, targets: set[str]) -> Iterator[Choice]:
    """The leaves that an adapter changes, given the names of the modules that get a low-rank or other update.

    Raises:
        ValueError: if one of them has ambiguous axes.
    """
    bias = getattr(config, "bias", "none")
    for position, leaf in enumerate(found):
        role = None
        hit = np.vectorize(lambda name: is_saved_module(config, name), otypes=[bool])(leaf.names)
        if hit.any():
            role = "modules_to_save"
        elif leaf.path.rsplit(".", 1)[-1] == "bias":
            role = "bias"
            if bias != "none":
                hit = np.vectorize(lambda name: bias == "all" or name in targets, otypes=[bool])(leaf.names)
        elif is_matrix(leaf):
            hit = np.vectorize(lambda name: name in targets, otypes=[bool])(leaf.names)
        if hit.any() and leaf.layout is None:
            raise ValueError(
                f"Leaf '{leaf.path}' of shape {leaf.value.shape} is a target, and its input and output axes are "
                f"ambiguous. Write layout={{r'{re.escape(leaf.path)}': pj.Layout(stack=..., inp=..., out=...)}}."
            )
        if hit.any():
            yield Choice(position, leaf, hit, role)


def replace_leaves(params: Any, nodes: Mapping[int, Any]) -> Any:
    """``params`` with other nodes at some positions of `find_leaves`."""
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_weight)
    return jax.tree.unflatten(treedef, [nodes.get(position, leaf) for position, leaf in enumerate(leaves)])


def find_leaves(params: Any, layouts: Layouts | None, fan_in_fan_out: bool = False) -> list[Leaf]:
    """All leaves of a tree, in order, with their layouts.

    Raises:
        ValueError: if a layout does not fit its leaf, or fits none.
    """
    unused = set(layouts or {})
    found = []
    for key_path, value in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_weight):
        path = dotted(key_path)
        shape = getattr(value, "shape", ())
        layout = value.layout if is_weight(value) else conventional_layout(path, shape, fan_in_fan_out)
        for pattern, given in (layouts or {}).items():
            if re.fullmatch(pattern, path):
                given.check(shape, path)
                layout = given
                unused.discard(pattern)
                break
        module = module_path(path)
        names = stacked_names(module, layout, shape) if layout else np.array(module, dtype=object)
        found.append(Leaf(path, value, layout, names))
    if unused:
        raise ValueError(
            f"layout patterns {sorted(unused)} match no leaf; a pattern is matched against the whole path. "
            f"Paths: {[leaf.path for leaf in found][:5]}."
        )
    return found


def expand_all_linear(config: Method, found: Sequence[Leaf], output: str | None = None) -> Method:
    """The config with ``"all-linear"`` replaced by the names of all matmul weights but the ``output`` head."""
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return config
    linear = sorted(
        n for leaf in found if is_matrix(leaf) and not leaf.layout.lookup for n in leaf.names.flat if n != output
    )
    others = {name for leaf in found for name in leaf.names.flat} - set(linear)
    ends = {name.rsplit(".", 1)[-1] for name in linear}
    clash = any(name.rsplit(".", 1)[-1] in ends for name in others)
    return dataclasses.replace(config, target_modules=linear if clash else sorted(ends))


def _touches(config: Method, module: str) -> bool:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        return is_saved_module(config, module)
    return is_target(config, module) or is_saved_module(config, module)


def is_matrix(leaf: Leaf) -> bool:
    """Whether a leaf is seen as a matrix, or may be once its axes are told."""
    if leaf.layout is None:
        return getattr(leaf.value, "ndim", 0) > 1
    return bool(leaf.layout.inp)

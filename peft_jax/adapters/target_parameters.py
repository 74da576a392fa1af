"""``target_parameters``: weights named themselves, not by their module, as the fused experts of a mixture have to be.

PEFT 0.21.2 (``lora.ParamWrapper``) trains one LoRA for each expert of such a weight, and keeps them in one tensor;
where it adapts several weights of one module, each wraps the one that the module declares before it.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_jax.core.adapted import is_adapted
from peft_jax.core.layout import LEAF_NAMES, LISTS, READ, Layout
from peft_jax.core.leaves import Leaf, is_matrix, module_names
from peft_jax.core.paths import TORCH_NAMES, module_path, stacked_names
from peft_jax.core.selecting import picked
from peft_jax.core.targets import is_saved_module, is_target, names_module, names_some, nothing_hit, pattern_value
from peft_jax.core.weight import is_weight
from peft_jax.methods.base import Method

DECLARED = ("gate_up_proj", "up_proj", "down_proj")  # the order in which the experts of transformers declare theirs


def with_parameters(found: Sequence[Leaf], config: Method) -> list[Leaf]:
    """The leaves, with PyTorch's names of parameters for those that ``target_parameters`` names.

    The last stacked axis of such a leaf, unless it is one of layers, is that of the experts, which have no names.

    Raises:
        ValueError: if a name hits nothing, or a leaf that cannot be adapted in this way.
    """
    if not config.target_parameters:
        return list(found)
    leaves, every = list[Leaf](), list[str]()
    for leaf in found:
        every += parameter_names(leaf).ravel().tolist()
        leaves.append(_as_parameter(leaf, config) if names_parameter(config, leaf) else leaf)
    for target in config.target_parameters:
        if not names_some([target], every):
            raise ValueError(nothing_hit(f"Target parameter '{target}'", target, every))
    parameters = parameters_of(leaves, config)
    owners = tuple({f"{name.rpartition('.')[0]}." for name in parameters})
    for name in module_names(leaves):
        if name not in parameters and is_target(config, name) and name.startswith(owners):
            raise ValueError(
                f"'{name}' is a target in a module one of whose own weights is in target_parameters, which "
                "no file of PEFT's can hold. Remove one of them."
            )
    return leaves


def parameter_names(leaf: Leaf) -> np.ndarray:
    """PyTorch's names of the parameters that a leaf stands for, of the leaf's stacked shape."""
    module, last = module_path(leaf.path), leaf.path.rpartition(".")[2]
    shape = getattr(leaf.value, "shape", ())
    names = np.array(module, dtype=object) if leaf.layout is None else stacked_names(module, _of_experts(leaf), shape)
    return np.asarray(names + f".{TORCH_NAMES[last]}" if last in LEAF_NAMES else names, dtype=object)


def names_parameter(config: Method, leaf: Leaf) -> bool:
    """Whether ``target_parameters`` names a leaf."""
    targets = config.target_parameters
    return bool(targets) and names_some(targets or (), parameter_names(leaf).flat)


def is_parameter(config: Method, name: str) -> bool:
    """Whether ``target_parameters`` names a parameter: it is one of them, or ends in one."""
    return bool(config.target_parameters) and names_module(config.target_parameters or (), name)


def parameters_of(leaves: Sequence[Leaf], config: Method) -> set[str]:
    """The names of the adapted parameters, given the leaves of `with_parameters`.

    The name of a module may end like that of a parameter elsewhere: a dense layer's ``down_proj`` is none of experts.
    """
    if not config.target_parameters:
        return set()
    named = [leaf for leaf in leaves if names_parameter(config, leaf)]
    return {name for name in module_names(named) if is_parameter(config, name)}


def depth(config: Method, parameter: str, adapted: set[str]) -> int:
    """How many adapters of parameters of the same module wrap that of this one."""
    owner, _, own = parameter.rpartition(".")
    others = set[str]()
    for name in adapted:
        last = name.rpartition(".")[2]
        if is_parameter(config, name) and f"{owner}.{last}" in adapted:
            others.add(last)
    targets = config.target_parameters or ()

    def position(last: str) -> int:
        if others <= set(DECLARED):
            return DECLARED.index(last)
        return next(i for i, target in enumerate(targets) if names_module([target], f"{owner}.{last}"))

    return sum(position(last) > position(own) for last in others)


def check_apart(leaves: Sequence[Leaf], config: Method) -> None:
    """Raise ValueError if a file would not distinguish two parameters of one module, given `with_parameters`' leaves.

    PEFT's keys count on the order in which the module declares them. Where we do not know it, and cannot see by shapes
    that it is another one, each would be given the other's adapter.
    """
    seen: dict[tuple[Any, ...], str] = {}
    for leaf in leaves:
        for name in sorted(parameters_of([leaf], config)):
            owner, _, own = name.rpartition(".")
            experts = math.prod(picked(leaf.layout.stack_shape(leaf.value.shape), leaf.layout.unnamed))
            kind = (owner, *leaf.layout.sizes(leaf.value.shape), experts, pattern_value(config.rank_pattern, name, 0))
            other = seen.setdefault(kind, name)
            if other != name and not {own, other.rpartition(".")[2]} <= {*DECLARED}:
                raise ValueError(
                    f"target_parameters names '{other}' and '{name}', two of one shape in one module. PEFT's files "
                    "distinguish them by the order alone in which PyTorch's module declares them, which is not known. "
                    "Give each an adapter of its own, or ranks that differ (rank_pattern)."
                )


def _as_parameter(leaf: Leaf, config: Method) -> Leaf:
    """The leaf under its parameters' names."""
    names = parameter_names(leaf)
    first = str(names.flat[0])
    if modules := [name for name in leaf.modules if is_target(config, name)]:
        raise ValueError(
            f"'{first}' is named in target_parameters, and '{modules[0]}' is one of target_modules. Name it in one of "
            "them; target_modules=[] means no modules."
        )
    if saved := [name for name in names.flat if is_saved_module(config, name)]:
        raise ValueError(
            f"'{saved[0]}' is named in target_parameters and trained whole by modules_to_save. Choose one."
        )
    if not is_matrix(leaf) or leaf.layout is not None and leaf.layout.lookup:
        raise ValueError(
            f"target_parameters names '{first}' of shape {leaf.value.shape}, which is no weight of a product. "
            "Name weights (in, out), or of experts; embeddings are target_modules."
        )
    if leaf.layout is None:
        return leaf._replace(names=names)
    layout = _of_experts(leaf)
    if len(layout.unnamed) > 1 or len(layout.inp) != 1 or len(layout.out) != 1:
        raise ValueError(
            f"target_parameters names '{first}' of shape {leaf.value.shape}, whose axes are stack={layout.stack}, "
            f"inp={layout.inp}, out={layout.out}. PEFT has one input axis, one output axis and at most one of experts. "
            "Write layout={...: pj.Layout(stack=..., inp=..., out=..., index_after=...)}, with None in index_after for "
            "the experts and names for stacked layers."
        )
    if layout.stored_in_out and not layout.unnamed:
        raise ValueError(
            f"'{first}' is stored as (in, out) by PyTorch, where PEFT would turn its adapter around. Name its "
            "module in target_modules instead."
        )
    value = leaf.value
    if is_weight(value) and layout.stack != leaf.layout.stack:
        raise ValueError(
            f"'{first}' is quantized or adapted as one matrix of all its experts. Give {layout} to the call that made "
            "it so."
        )
    if is_adapted(value) and layout.index_after != leaf.layout.index_after:
        raise ValueError(
            f"'{first}' has adapters by the names of its experts already. Name them in target_modules again, or "
            "attach target_parameters first."
        )
    return leaf._replace(value=value.relaid(layout) if is_weight(value) else value, layout=layout, names=names)


def _of_experts(leaf: Leaf) -> Layout:
    """The leaf's layout without the experts in names.

    A program that multiplies all experts by the same inputs says that theirs is an output axis: for PEFT it is not.
    """
    layout, parts = leaf.layout, leaf.path.split(".")
    after: list[str | None] = []
    for name in layout.index_after[: len(layout.stack)]:
        numbered = name in parts and "".join(parts[parts.index(name) + 1 :][:1]).isdigit()
        layers = name in parts and not numbered and name not in after and (name in LISTS or layout.source != READ)
        after.append(name if layers else None)
    layout = dataclasses.replace(layout, index_after=tuple(after))
    features = sorted((*layout.inp, *layout.out))
    if layout.source != READ or layout.unnamed or len(features) != 3:
        return layout
    inp = tuple(axis for axis in layout.inp if axis != features[0])
    out = tuple(axis for axis in layout.out if axis != features[0])
    stack = (*layout.stack, features[0])
    return dataclasses.replace(layout, stack=stack, inp=inp, out=out, index_after=(*after, None))

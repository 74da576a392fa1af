"""Complete a config with a model's names, task, defaults and linear modules, and the model as the config asks."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from peft_jax.adapters.fused_targets import with_fused_targets
from peft_jax.adapters.target_parameters import names_parameter
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Leaf, find_leaves, is_matmul, is_matrix, module_names, own_names
from peft_jax.core.selecting import field_names
from peft_jax.core.targets import (
    EMBEDDING_LAYERS,
    SAVED_HEADS,
    is_all_linear,
    is_of_chosen_layer,
    is_target,
    names_some,
    spelled_out_names,
    spelled_out_regex,
)
from peft_jax.methods.base import Method
from peft_jax.methods.lora.checks import layer_order
from peft_jax.methods.trainable_tokens import TrainableTokensConfig, tokens_by_module

M = TypeVar("M", bound=Method)
H = TypeVar("H", bound=Handle)
T = TypeVar("T")


def completed(config: M, handle: Handle) -> M:
    """The config with what the model knows: its name, its task and the heads to train for it, its defaults."""
    config = with_model_defaults(config.replace(task_type=config.task_type or handle.task_type), handle)
    return config.replace(base_model_name_or_path=config.base_model_name_or_path or handle.name_or_path)


def with_model_defaults(config: M, handle: Handle) -> M:
    """The config with the model's defaults for fields that are None, and with the heads that its task trains."""
    defaults = {"target_modules": handle.input_module} if config.on_input else handle.defaults(config.peft_type)
    return _with_saved_heads(config).completed(defaults)


def _with_saved_heads(config: M) -> M:
    """The config with the heads in ``modules_to_save`` that PEFT trains for its task."""
    if "modules_to_save" not in field_names(config):
        return config
    saved = config.modules_to_save or ()
    heads = [name for name in SAVED_HEADS.get(config.task_type, ()) if name not in saved]
    return config.replace(modules_to_save=[*saved, *heads]) if heads else config


def spelled_out(config: M, handle: Handle, layout: Layouts) -> M:
    """The config with what the model's leaves say: its linear modules, and how PyTorch stores the targets."""
    found = find_leaves(handle.params, layout)
    expanded = expand_all_linear(config, found, handle.output_module)
    return _with_storage(with_fused_targets(expanded, config, handle, found), found)


def _with_storage(config: M, found: Sequence[Leaf]) -> M:
    """The config with ``fan_in_fan_out`` as PEFT sets it: whether PyTorch stores the targets as ``(in, out)``.

    Raises:
        ValueError: if it is True, and the model has no such layers; or a target is one, and PEFT does not take them.
    """
    stored_alike, targets_alike = set[bool](), set[bool]()
    for leaf in found:
        if leaf.layout is None or not is_matrix(leaf) or leaf.layout.lookup or leaf.layout.parameter:
            continue
        stored_alike.add(bool(leaf.layout.stored_in_out))
        for name in leaf.modules:
            if not is_target(config, name):
                continue
            if leaf.layout.stored_in_out and not config.takes_conv1d:
                raise ValueError(
                    f"{config.peft_type} takes no '{name}': PyTorch stores it as transformers' Conv1D, for which PEFT "
                    f"has no {config.peft_type}, so that the adapter could not be read there. Use LORA, or leave it "
                    "out."
                )
            targets_alike.add(bool(leaf.layout.stored_in_out))
    if "fan_in_fan_out" not in field_names(config):
        return config
    if config.fan_in_fan_out and True not in stored_alike:
        raise ValueError(
            "fan_in_fan_out=True is for layers stored (in, out), such as Conv1D. This model has none: leave it."
        )
    if not config.notes_storage:
        return config
    stored = targets_alike == {True}
    return config if stored == config.fan_in_fan_out else config.replace(fan_in_fan_out=stored)


def with_replicas(params: T, config: Method) -> T:
    """The model handle whose layers are those that ``layer_replication`` asks for.

    Raises:
        ValueError: if it has adapters already, or no such layers; or if it is no handle, but a tree.
    """
    if not config.layer_replication:
        return params
    if not isinstance(params, Handle):
        raise ValueError("layer_replication is for a model handle, which knows its layers. Give the handle.")
    if found := sorted(adapters(params.params)):
        raise ValueError(
            f"layer_replication makes other layers of the base, on which there are adapters already: {found}. Attach "
            "the adapter with it first, and the others to its layers, without it."
        )
    return params.replicated(layer_order(config.layer_replication))


def with_ties(config: M, handle: Handle, *, has_copies: bool = False) -> tuple[M, bool]:
    """The config as PEFT's ``ensure_weight_tying`` changes it, and whether one adapter is that of all tied modules.

    PEFT ties where the config names a module that is called `EMBEDDING_LAYERS`, be it the head: it then puts the
    adapter on the embedding, and the head shares it. Other names, as GPT-2's ``wte``, mean that module alone.

    Args:
        config: The config, its targets not expanded.
        handle: The model.
        has_copies: Whether a file has the adapter of the tied modules too, so that it was trained as theirs.

    Raises:
        ValueError: if PEFT would not tie all of the adapter: more than two modules, or DoRA.
    """
    if isinstance(config, TrainableTokensConfig):
        return config, True
    if not (config.ensure_weight_tying and handle.tied_modules):
        return config, config.ensure_weight_tying
    owner, *others = handle.tied_modules
    saved, targets = config.modules_to_save or (), config.target_modules or ()
    if not _ends(saved).isdisjoint(EMBEDDING_LAYERS):
        return config.replace(modules_to_save=_moved_to(owner, others, saved)), True
    if isinstance(targets, str):
        is_named = names_some(targets, EMBEDDING_LAYERS)
    else:
        is_named = not _ends(targets).isdisjoint(EMBEDDING_LAYERS)
    if not is_named:
        return config, has_copies
    if len(others) > 1:
        raise ValueError(
            f"ensure_weight_tying=True with a target of {', '.join(handle.tied_modules)} is not supported: PEFT ties "
            f"'{others[-1]}' to '{owner}', gives the others adapters of their own, and does not read its own file "
            "back. Leave ensure_weight_tying out, or name the module in modules_to_save."
        )
    if getattr(config, "use_dora", False):
        raise ValueError(
            f"ensure_weight_tying=True with use_dora=True on '{owner}' is not supported: PEFT trains one magnitude for "
            "it and another for the head. Leave one of the two out."
        )
    if isinstance(targets, str):
        return config.replace(target_modules=rf"(?:{targets}|^{re.escape(owner)}$)"), True
    return config.replace(target_modules=_moved_to(owner, others, targets)), True


def _moved_to(owner: str, others: Sequence[str], names: Sequence[str]) -> list[str]:
    """Names of modules with the ``owner`` of a shared leaf, and without the first that means each of the others."""
    left = list(names) if owner in names else [*names, owner]
    for other in others:
        meant = [name for name in left if re.match(rf"(^|.*\.){re.escape(name)}($|\..*)", other)]
        if meant:
            left.remove(meant[0])
    return left


def untied_for(handle: H, config: Method, changes: Callable[[str], bool], *, keeps_ties: bool) -> H:
    """The handle, with tied modules given leaves of their own if an adapter ``changes`` one of them alone.

    PEFT wraps one of the modules and leaves the other as it was; with one leaf for both, both would change. Where
    the adapter ``keeps_ties`` and changes the module that has the leaf, that is meant.
    """
    owner, *others = handle.tied_modules or ("",)
    if not others:
        return handle
    tokens = tokens_by_module(config.trainable_token_indices, handle.tied_modules, handle.input_module, strict=False)
    if apart := [other for other in others if tokens.get(other, ()) not in ((), tokens.get(owner))]:
        if config.ensure_weight_tying and owner in tokens:
            raise ValueError(
                f"ensure_weight_tying=True, and trainable_token_indices names other tokens of '{apart[0]}' than of "
                f"'{owner}', to which it is tied. Name the same tokens, or ensure_weight_tying=False."
            )
        return handle.untied()
    if owner in tokens and any(map(changes, others)):
        raise ValueError(
            f"Tokens of '{owner}' are trained in '{others[0]}' too, which is tied to it and is to be adapted "
            "otherwise. Leave one of them out."
        )
    if keeps_ties and changes(owner):
        return handle
    return handle.untied() if any(map(changes, handle.tied_modules)) else handle


def expand_all_linear(
    config: M, found: Sequence[Leaf], output: str | None = None, others: Sequence[Leaf] | None = None
) -> M:
    """The config with ``"all-linear"`` spelled out: all matmul weights but the excluded and the ``output`` head.

    Their names are shortened to their ends, unless one of the ``others`` ends in the same way.
    """
    if not is_all_linear(config):
        return config
    matmuls = [leaf for leaf in found if is_matmul(leaf) and not names_parameter(config, leaf)]
    every = [name for name in module_names(matmuls) if name != output]
    named = config.replace(target_modules=every)
    linear = {name for name in every if is_target(named, name)}
    ends = _ends(linear)
    clash = not ends.isdisjoint(_ends(set(module_names(others or found)) - linear))
    return config.replace(target_modules=sorted(linear if clash else ends))


def _ends(modules: Iterable[str]) -> set[str]:
    """The last parts of the paths of modules."""
    return {name.rsplit(".", 1)[-1] for name in modules}


def with_own_names(config: M, found: Sequence[Leaf]) -> M:
    """The config with leaves that it names by their own paths spelled out as the modules that they stand for."""
    own = own_names(found)
    if not own:
        return config
    modules, changes = module_names(found), dict[str, object]()
    for field in ("target_modules", "exclude_modules"):
        names = getattr(config, field, None)
        if isinstance(names, str) and not (field == "target_modules" and is_all_linear(config)):
            regex = spelled_out_regex(names, own)
            if regex != names:
                changes[field] = regex
        elif names and not isinstance(names, str):
            spelled = spelled_out_names(list(names), modules, own)
            if field == "target_modules":  # layers_to_transform does not filter whole names, so that it is done here
                spelled = [name for name in spelled if name in names or is_of_chosen_layer(config, name)]
            if spelled != list(names):
                changes[field] = spelled
    # Parameters that are targets by themselves have names of their own, which patterns name as they are.
    for field in () if config.target_parameters else ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, object] = {}
        for pattern, value in (getattr(config, field, None) or {}).items():
            for name in spelled_out_names([pattern], modules, own):
                patterns[name if name == pattern else re.escape(name)] = value
        if patterns and patterns != getattr(config, field):
            changes[field] = patterns
    return config.replace(**changes) if changes else config


def not_expanded(config: Method, expanded: Method, found: Sequence[Leaf]) -> set[str]:
    """Paths of the matrices that ``"all-linear"`` could mean and that it was not expanded to; of none if it was not."""
    if not is_all_linear(config):
        return set()
    named, paths = config.replace(target_modules=module_names(found)), set[str]()
    for leaf in found:
        if is_matrix(leaf) and not names_parameter(config, leaf):
            if _hits(named, leaf) and not _hits(expanded, leaf):
                paths.add(leaf.path)
    return paths


def _hits(config: Method, leaf: Leaf) -> bool:
    """Whether a config targets one of a leaf's layers."""
    return any(is_target(config, name) for name in leaf.modules)

"""Attach an adapter to a tree: which leaves, seen how, starting where."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from peft_jax.adapt.axes import read_layouts
from peft_jax.core.adapted import Adapted, Tag, adapters, tied
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Leaf, find_leaves, is_float, is_matrix, replace_leaves
from peft_jax.core.sharding import sharded_like_base
from peft_jax.core.targets import ALL_LINEAR, SAVED_HEADS, check_targets, is_saved_module, is_target
from peft_jax.core.weight import as_leaf, as_weight, is_weight
from peft_jax.methods.base import Method
from peft_jax.methods.lora import LoraConfig
from peft_jax.methods.trainable_tokens import Tokens, tokens_by_module
from peft_jax.methods.whole import REPLACED, Follower, Whole

M = TypeVar("M", bound=Method)
H = TypeVar("H", bound=Handle)
EMBEDDING = "embed_tokens"  # where PEFT looks for input tokens in what is no model of transformers'
TOKENS = "trainable_token_indices"
FOLLOWS = "bias of its layer"  # the role of a bias that the adapter of its layer's matrix changes too


class Choice(NamedTuple):
    """A leaf that an adapter changes: its position, which stacked layers, and its role if it is no target's matrix.

    ``tokens`` are ids of tokens that are trained in it, if that is its role.
    """

    position: int
    leaf: Leaf
    hit: np.ndarray
    role: str | None
    tokens: tuple[int, ...] = ()


def apply_lora(
    params: Any,
    config: LoraConfig,
    *,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> Any:
    """`apply_adapter` for LoRA.

    Example:
        >>> import peft_jax as pj
        >>> params = {"mlp": {"kernel": jnp.ones((4, 8))}}
        >>> adapted = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["mlp"]))
        >>> adapted["mlp"]["kernel"].params["lora_A"].shape
        (4, 2)
    """
    return apply_adapter(params, config, key=key, adapter_name=adapter_name, layout=layout, fn=fn, args=args)


def apply_adapter(
    params: Any,
    config: Method,
    *,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
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
        layout: Axes by regex over whole leaf paths; what is said here comes before all else.
        fn: The function that uses the leaves, as ``fn(params, *args)``. Axes are read off its program: those that a
            product contracts are inputs, those that are scanned, indexed or batched are stacked layers. Without it
            conventions hold: ``kernel`` is ``(in, out)``, ``weight`` is ``(out, in)``, ``embedding`` is
            ``(vocabulary, features)``. With it ``all-linear`` means every leaf that is the weight of a product, not
            of a lookup alone.
        args: The other arguments of ``fn``; arrays, or shapes as ``jax.ShapeDtypeStruct``.

    Raises:
        ValueError: if some part of the config hits nothing, a target's axes are ambiguous, a layout does not fit its
            leaf or matches none, or the name is taken.

    Example:
        >>> import peft_jax as pj
        >>> def attend(params, x):  # a kernel (in, heads, features), which no convention knows
        ...     return jnp.einsum("bi,iho->bho", x, params["query"]["kernel"])
        >>> params = {"query": {"kernel": jnp.ones((8, 2, 3))}}
        >>> config = pj.LoraConfig(r=2, target_modules=["query"])
        >>> params = pj.apply_adapter(params, config, fn=attend, args=(jnp.ones((1, 8)),))
        >>> params["query"]["kernel"].layout
        Layout(stack=(), inp=(0,), out=(1, 2), lookup=False, index_after=())
    """
    if config.on_model:
        raise ValueError(
            f"{type(config).__name__} is for a model handle, whose forward pass knows what to do with a prompt. "
            "Write pj.get_peft_model(model, config)."
        )
    if isinstance(params, Handle):
        if fn is not None:
            raise ValueError("A model handle knows the axes of its leaves. Leave fn= out.")
        config = completed(config, params)
        handle = untied_for(params, config, lambda name: is_target(config, name) or is_saved_module(config, name))
        layout = {**handle.layouts(), **(layout or {})}
        config = _spelled_out(config, handle, layout)
        tied, embedding = handle.tied_modules, handle.input_module
        tree = _attached(handle.params, config, key, adapter_name, layout, aliases=tied, embedding=embedding)
        return handle.replace(tree)
    return _attached(params, config, key, adapter_name, layout, fn, args)


def _attached(
    params: Any,
    config: Method,
    key: jax.Array | None,
    adapter_name: str,
    layout: Layouts | None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    embedding: str = EMBEDDING,
) -> Any:
    """`apply_adapter` for a bare tree.

    ``aliases`` are other names of its leaves, and ``embedding`` is the module of its input tokens.
    """
    if adapter_name in adapters(params):
        raise ValueError(f"Adapter name '{adapter_name}' is taken. Choose another, or pj.delete_adapter it first.")
    key = jax.random.key(0) if key is None else key
    read = read_layouts(params, fn, args, config.fan_in_fan_out) if fn is not None else {}
    found = find_leaves(params, layout, config.fan_in_fan_out, read)
    linear = found if fn is None else [leaf for leaf in found if leaf.path in read or is_weight(leaf.value)]
    config = expand_all_linear(config, linear, others=found)
    modules = [*(name for leaf in found for name in leaf.names.flat if may_be_target(config, leaf)), *aliases]
    every = sorted({name for leaf in found for name in leaf.names.flat})
    targets = set(check_targets(config, modules, every, config.patterns))

    tokens = tokens_by_module(config.trainable_token_indices, modules, embedding)

    def begin(leaf: Leaf, hit: np.ndarray) -> Any:
        return config.begin_on(as_weight(leaf.value, leaf.layout), leaf.names, hit, key)

    return place(params, found, config, targets, adapter_name, begin, tokens)


def place(
    params: Any,
    found: Sequence[Leaf],
    config: Method,
    targets: set[str],
    adapter_name: str,
    begin: Callable[[Leaf, np.ndarray], Any],
    tokens: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Any:
    """The tree of the leaves ``found`` with an adapter.

    Its arrays at a target, and the base that they go on, ``begin(leaf, hit)`` gives; ``tokens`` are as in `choose`.
    """
    nodes = {}
    choices = list(choose(found, config, targets, tokens))
    biased = modules_with_followers(choices)
    shared = config.shared(matrix_sizes(choices))
    for choice in choices:
        position, leaf, hit, role, _ = choice
        tagged, (arrays, state) = beside_target(config, choice)
        base = as_weight(leaf.value, leaf.layout)
        if role is None:
            arrays, state, base = begin(leaf, hit)
            state |= config.lone_state(leaf.names, hit, biased)
            state |= config.share(shared, leaf.layout.sizes(leaf.value.shape), hit.shape)
        tag = Tag(adapter_name, tagged)
        adapted = Adapted(as_leaf(base), arrays, state, leaf.layout, tag, trainable=not config.inference_mode)
        nodes[position] = sharded_like_base(adapted)
    return tied(replace_leaves(params, nodes))


def modules_with_followers(choices: Sequence[Choice]) -> set[str]:
    """Names of the modules whose bias changes with their matrix."""
    return {str(name) for _, leaf, hit, role, _ in choices if role == FOLLOWS for name in leaf.names[hit]}


def matrix_sizes(choices: Sequence[Choice]) -> list[tuple[int, int]]:
    """``(in, out)`` of the targets' matrices."""
    return [leaf.layout.sizes(leaf.value.shape) for _, leaf, _, role, _ in choices if role is None]


def may_be_target(config: Method, leaf: Leaf) -> bool:
    """Whether a leaf's module may be a target: for most methods, if the leaf is a matrix."""
    return is_float(leaf) if config.replaces else is_matrix(leaf)


def beside_target(config: Method, choice: Choice) -> tuple[Any, Any]:
    """What a leaf that has a role is tagged with, and its arrays; the config and no arrays for a target's matrix."""
    _, leaf, hit, role, tokens = choice
    if role == TOKENS:
        some = Tokens(config, role, tokens)
        return some, some.init(as_weight(leaf.value, leaf.layout), leaf.names, hit)
    if role is None:
        return config, ({}, {})
    if role == FOLLOWS:
        follower = Follower(config, role)
        return follower, follower.init(leaf.names, hit)
    whole = Whole(config, role)
    return whole, whole.init(as_weight(leaf.value, leaf.layout), hit)


def untied_for(handle: H, config: Method, changes: Callable[[str], bool]) -> H:
    """The handle, with tied modules given leaves of their own if an adapter ``changes`` one of them alone.

    PEFT wraps one of the modules and leaves the other as it was; with one leaf for both, both would change. Where
    the method keeps ties and changes the module that has the leaf, that is meant.
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
    if config.keeps_ties and changes(owner):
        return handle
    return handle.untied() if any(map(changes, handle.tied_modules)) else handle


def completed(config: M, handle: Handle) -> M:
    """The config with what the model knows: its name, its task and the heads to train for it, its defaults."""
    config = _with_saved_heads(config, config.task_type or handle.task_type)
    defaults = {"target_modules": handle.input_module} if config.on_input else handle.defaults(config.peft_type)
    return config.completed(defaults).replace(
        base_model_name_or_path=config.base_model_name_or_path or handle.name_or_path
    )


def _with_saved_heads(config: M, task_type: str | None) -> M:
    """The config for a task, with the heads in ``modules_to_save`` that PEFT trains there."""
    config = config.replace(task_type=task_type)
    if not any(field.name == "modules_to_save" for field in dataclasses.fields(config)):
        return config
    saved = config.modules_to_save or ()
    heads = [name for name in SAVED_HEADS.get(task_type, ()) if name not in saved]
    return config.replace(modules_to_save=[*saved, *heads]) if heads else config


def _spelled_out(config: M, handle: Handle, layout: Layouts) -> M:
    """The config with what the model's leaves say: its linear modules, and how PyTorch stores the targets."""
    found = find_leaves(handle.params, layout)
    return _with_storage(expand_all_linear(config, found, handle.output_module), found)


def _with_storage(config: M, found: Sequence[Leaf]) -> M:
    """The config with ``fan_in_fan_out`` as PEFT sets it: whether PyTorch stores the targets as ``(in, out)``.

    Raises:
        ValueError: if it is True, and the model has no such layers.
    """
    if not any(field.name == "fan_in_fan_out" for field in dataclasses.fields(config)):
        return config
    linear = [leaf for leaf in found if is_matrix(leaf) and leaf.layout is not None and not leaf.layout.lookup]
    if config.fan_in_fan_out and not any(leaf.layout.stored_in_out for leaf in linear):
        raise ValueError(
            "fan_in_fan_out=True is for layers stored (in, out), as GPT-2's. This model has none: leave it."
        )
    targets = [leaf for leaf in linear if any(is_target(config, name) for name in leaf.names.flat)]
    stored = bool(targets) and all(bool(leaf.layout.stored_in_out) for leaf in targets)
    return config if stored == config.fan_in_fan_out else config.replace(fan_in_fan_out=stored)


def choose(
    found: Sequence[Leaf], config: Method, targets: set[str], tokens: Mapping[str, tuple[int, ...]]
) -> Iterator[Choice]:
    """The leaves that an adapter changes.

    Args:
        found: All leaves.
        config: What to change.
        targets: Names of the modules that get a low-rank or other update.
        tokens: Ids of trained tokens by module.

    Raises:
        ValueError: if one of them has ambiguous axes, or is to be changed in two ways.
    """
    for position, leaf in enumerate(found):
        role = None
        hit = np.vectorize(lambda name: is_saved_module(config, name), otypes=[bool])(leaf.names)
        if hit.any():
            role = "modules_to_save"
            if both := sorted({str(name) for name in leaf.names.flat} & targets - set(leaf.names[hit].flat)):
                raise ValueError(
                    f"Leaf '{leaf.path}' stacks layers of which {both[:3]} are targets and others are in "
                    "modules_to_save, which one leaf cannot be. Save all of its layers, or none."
                )
        elif config.replaces and is_float(leaf):
            role = REPLACED
            hit = np.vectorize(lambda name: name in targets, otypes=[bool])(leaf.names)
        elif leaf.path.rsplit(".", 1)[-1] == "bias":
            role = "bias" if config.bias != "none" else FOLLOWS
            hit = np.vectorize(lambda name: _changes_bias(config, name, targets), otypes=[bool])(leaf.names)
        elif is_matrix(leaf):
            hit = np.vectorize(lambda name: name in targets, otypes=[bool])(leaf.names)
        own = next((tokens[name] for name in leaf.names.flat if name in tokens), ()) if is_matrix(leaf) else ()
        if own and hit.any():
            raise ValueError(
                f"Tokens of '{leaf.names.flat[0]}' are named in trainable_token_indices, and the module in "
                f"{role or 'target_modules'} too. Name it in one of them."
            )
        if own:
            role, hit = TOKENS, np.vectorize(lambda name: name in tokens, otypes=[bool])(leaf.names)
        if hit.any():
            leaf.required_layout()
            yield Choice(position, leaf, hit, role, own)


def _changes_bias(config: Method, module: str, targets: set[str]) -> bool:
    if config.bias != "none":
        return config.bias == "all" or module in targets
    return module in targets and config.changes_bias(module)


def expand_all_linear(
    config: M, found: Sequence[Leaf], output: str | None = None, others: Sequence[Leaf] | None = None
) -> M:
    """The config with ``"all-linear"`` spelled out: all matmul weights but the excluded and the ``output`` head.

    Their names are shortened to their ends, unless one of the ``others`` ends in the same way.
    """
    targets = config.target_modules
    if not isinstance(targets, str) or targets.lower() != ALL_LINEAR:
        return config
    matmuls = [leaf for leaf in found if is_matrix(leaf) and (leaf.layout is None or leaf.layout.is_linear)]
    every = [name for leaf in matmuls for name in leaf.names.flat if name != output]
    named = config.replace(target_modules=every)
    linear = sorted(name for name in every if is_target(named, name))
    rest = {name for leaf in others or found for name in leaf.names.flat} - set(linear)
    ends = {name.rsplit(".", 1)[-1] for name in linear}
    clash = any(name.rsplit(".", 1)[-1] in ends for name in rest)
    return config.replace(target_modules=linear if clash else sorted(ends))

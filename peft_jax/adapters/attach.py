"""Attach an adapter to a tree."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.adapt.infer_layouts import read_program
from peft_jax.adapt.left_out import left_out, report
from peft_jax.adapters.build import build, initial_contents
from peft_jax.adapters.complete import (
    completed,
    expand_all_linear,
    not_expanded,
    spelled_out,
    untied_for,
    with_own_names,
    with_replicas,
    with_ties,
)
from peft_jax.adapters.plan import Target, may_be_target, module_sizes, neighbours, plan
from peft_jax.adapters.target_parameters import parameters_of, with_parameters
from peft_jax.core.adapted_tree import check_adapter_name
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Leaf, Program, find_leaves, is_float, module_names
from peft_jax.core.precision import ComputeDtype, checked_compute_dtype, with_compute_dtype
from peft_jax.core.pytree import PyTree
from peft_jax.core.targets import check_targets, is_all_linear, is_saved_module, is_target, shortened_names
from peft_jax.core.weight import Weight, is_weight
from peft_jax.methods.base import Method
from peft_jax.methods.grouped_arrays import GroupedArrays
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.starts_from_weight import StartsAmongWeights, StartsFromWeight
from peft_jax.methods.trainable_tokens import tokens_by_module

EMBEDDING = "embed_tokens"  # where PEFT looks for input tokens in what is no model of transformers'
LEFT_OUT = (
    "Name them in target_modules with the others, and they are merged at each use; or in exclude_modules, to say that "
    "they are meant to be left out; or let the program multiply by them as they are."
)


def apply_lora(
    params: PyTree,
    config: LoraConfig,
    *,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    compute_dtype: ComputeDtype | None = None,
) -> Any:
    """`apply_adapter` for LoRA.

    Example:
        >>> import peft_jax as pj
        >>> params = {"mlp": {"kernel": jnp.ones((4, 8))}}
        >>> adapted = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["mlp"]))
        >>> adapted["mlp"]["kernel"].params["lora_A"].shape
        (4, 2)
    """
    options: dict[str, Any] = {"layout": layout, "fn": fn, "args": args, "compute_dtype": compute_dtype}
    return apply_adapter(params, config, key=key, adapter_name=adapter_name, **options)


def apply_adapter(
    params: PyTree,
    config: Method,
    *,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    compute_dtype: ComputeDtype | None = None,
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
            product contracts are inputs, those that are scanned or indexed are stacked layers, those that it batches
            are experts, which no ``layers_to_transform`` counts. What is added to a product is its matrix's bias, and
            a leaf that is only multiplied elementwise is a vector and no target of a matrix method. Without it
            conventions hold: ``kernel`` is ``(in, out)``, ``weight`` is ``(out, in)``, ``embedding`` is
            ``(vocabulary, features)``, and the bias is ``bias`` or ``b`` beside the only matrix, or ``b1`` beside
            ``w1``. With it ``all-linear`` means every leaf that is the weight of a product, not of a lookup alone. One
            that reaches its product through what is not followed, as ``x @ jnp.tanh(w)``, is left out with a warning;
            where it is named in ``target_modules``, it is merged there, as `peft_jax.explain` reports.
        args: The other arguments of ``fn``; arrays, or shapes as ``jax.ShapeDtypeStruct``.
        compute_dtype: Element type of the adapter's own products, ``"float32"``, ``"bfloat16"`` or ``"float16"``; None
            for that of its arrays, float32. The arrays and their gradients stay float32 in any case. In bfloat16 on a
            bfloat16 base a step keeps no float32 copies of the inputs.

    Raises:
        ValueError: if some part of the config hits nothing, a target's axes are ambiguous, a layout does not fit its
            leaf or matches none, the name is taken, ``all-linear`` would leave out every weight in ``fn``, or products
            are not computed in ``compute_dtype``.

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
    if compute_dtype is not None:
        checked_compute_dtype(compute_dtype)
    if config.layer_replication:
        params = with_replicas(params, config)
    if not isinstance(params, Handle):
        adapted = _attached(params, config, key, adapter_name, layout, fn, args)
    elif fn is None:
        adapted = _attached_to_handle(params, config, key, adapter_name, layout)
    else:
        raise ValueError("A model handle knows the axes of its leaves. Leave fn= out.")
    return adapted if compute_dtype is None else with_compute_dtype(adapted, compute_dtype, adapter_name)


def _attached_to_handle(
    handle: Handle, config: Method, key: jax.Array | None, adapter_name: str, layout: Layouts | None
) -> Handle:
    """`apply_adapter` for a model handle, whose defaults, axes and ties complete the config."""
    config, keeps_ties = with_ties(completed(config, handle), handle)

    def changes(name: str) -> bool:
        return is_target(config, name) or is_saved_module(config, name)

    handle = untied_for(handle, config, changes, keeps_ties=keeps_ties)
    layout = {**handle.layouts(), **(layout or {})}
    config = spelled_out(config, handle, layout)
    tree = _attached(
        handle.params,
        config,
        key,
        adapter_name,
        layout,
        aliases=handle.tied_modules,
        embedding=handle.input_module,
        declared=handle.declared_modules if config.counts_modules else (),
    )
    return handle.replace(tree)


def _refuse_complex(found: Sequence[Leaf]) -> None:
    """Raise ValueError that names a leaf of complex numbers, if there is one, for there is no other target."""
    for leaf in found:
        if jnp.issubdtype(getattr(leaf.value, "dtype", None) or bool, jnp.complexfloating):
            raise ValueError(
                f"Leaf '{leaf.path}' is {leaf.value.dtype}, and adapters are for matrices of real numbers. Keep its "
                "real and imaginary parts as two leaves."
            )


def _attached(
    params: PyTree,
    config: Method,
    key: jax.Array | None,
    adapter_name: str,
    layout: Layouts | None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
    aliases: Sequence[str] = (),
    embedding: str = EMBEDDING,
    declared: Sequence[str] = (),
) -> Any:
    """`apply_adapter` for a bare tree.

    ``aliases`` are other names of its leaves, ``embedding`` is the module of its input tokens, and ``declared`` are its
    modules as PyTorch has them.
    """
    check_adapter_name(adapter_name, params)
    key = jax.random.key(0) if key is None else key
    read = None if fn is None else read_program(params, fn, args, config.fan_in_fan_out)
    found = find_leaves(params, layout, config.fan_in_fan_out, read)
    config = with_own_names(config, found)
    if is_all_linear(config):
        config = _with_all_linear(config, found, read)
    every = sorted(set(module_names(found)))
    if isinstance(config, GroupedArrays) and not isinstance(config.target_modules, str | None):
        config = config.replace(target_modules=shortened_names(config.target_modules, every))
    parameters: set[str] = set()
    if config.target_parameters:
        found = with_parameters(found, config)
        parameters = parameters_of(found, config)
    modules, vectors = list[str](), list[str]()
    for leaf in found:
        if may_be_target(config, leaf):
            modules += leaf.modules
        elif is_float(leaf):
            vectors += leaf.modules
    if not modules:
        _refuse_complex(found)
    if parameters:
        modules = [name for name in modules if name not in parameters]
    modules += aliases
    modules_of_targets = {*check_targets(config, modules, every, config.patterns, parameters, vectors), *parameters}
    tokens: dict[str, tuple[int, ...]] = {}
    if config.trainable_token_indices:
        tokens = tokens_by_module(config.trainable_token_indices, modules, embedding)

    planned = plan(found, config, modules_of_targets, tokens)

    sizes = module_sizes(config, planned, declared)
    among = neighbours(planned, sizes) if isinstance(config, StartsAmongWeights) else None

    def initialize(target: Target, base: Weight) -> Any:
        names, adapted = target.leaf.names, target.adapted
        if among is not None and isinstance(config, StartsAmongWeights):
            return config.init_among(base, among(target), names, adapted, key)
        if isinstance(config, StartsFromWeight):
            return config.init_on(base, names, adapted, key)
        return *config.init(base.layout, base.shape, names, adapted, key), base

    contents_of = initial_contents(config, planned, initialize, key, sizes)
    return build(params, adapter_name, config, planned, contents_of, trainable=not config.inference_mode)


def _with_all_linear(config: Method, found: Sequence[Leaf], read: Program | None) -> Method:
    """The config with ``all-linear`` spelled out, and warnings of what it leaves out.

    Args:
        config: The config.
        found: All leaves.
        read: Facts that were read off a program, where one is given.

    Raises:
        ValueError: if it leaves out everything.
    """
    linear = found
    if read is not None:
        linear = [leaf for leaf in found if leaf.path in read.matrices or is_weight(leaf.value)]
    fitting, misfits = list[Leaf](), list[Leaf]()
    for leaf in linear:
        (fitting if _fits(config, leaf) else misfits).append(leaf)
    expanded = expand_all_linear(config, fitting, others=found)
    _warn_of_misfits(config, expanded, misfits)
    if read is not None:
        paths = not_expanded(config, expanded, found) - {leaf.path for leaf in misfits}
        is_empty = not (expanded.target_modules or expanded.target_parameters)
        report("target_modules='all-linear'", left_out(read.reading, paths), LEFT_OUT, alone=is_empty, stacklevel=5)
    return expanded


def _fits(config: Method, leaf: Leaf) -> bool:
    """Whether ``all-linear`` can mean a leaf: in no layer of it a matrix of its axes is an error."""
    return leaf.layout is None or all(config.fits(name, leaf.layout) for name in leaf.modules)


def _warn_of_misfits(asked: Method, expanded: Method, misfits: Sequence[Leaf]) -> None:
    """Warn of convolutions that ``all-linear`` leaves out; raise ValueError if it leaves out everything."""
    paths = sorted(not_expanded(asked, expanded, misfits))
    if not paths:
        return
    named = ", ".join(f"'{path}'" for path in paths)
    told = (
        f"target_modules='all-linear' leaves out convolutions whose groups do not divide the rank: {named}. Name them "
        "in target_modules, with a rank in rank_pattern that is a multiple of their groups, or in exclude_modules."
    )
    if not expanded.target_modules:
        raise ValueError(told)
    warnings.warn(told, stacklevel=5)

"""Adapters to and from PEFT's tensors in memory: keys, transposes, and which layers of a stack."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peft_jax.interop.embeddings import trained_copies, whole_embeddings, with_tables
from peft_jax.interop.entries import Entry, entries_of, entries_of_shared, shared_entries
from peft_jax.interop.extras import (
    at_the_ends,
    base_tensors,
    copied_biases,
    copied_whole,
    copies_in_layers,
    targets_embedding,
    tied_copies,
    without_copies,
    without_tied_copies,
)
from peft_jax.interop.formats import PREFIX, SHARED, Row, tensor_key
from peft_jax.interop.keys import some_of_each, without_adapter_name, wrapper_in
from peft_jax.interop.old_layouts import with_present_names

from peft_jax.adapt.infer_layouts import read_program
from peft_jax.adapters.attach import EMBEDDING
from peft_jax.adapters.build import Contents, build, carried_by, in_groups, state_beside
from peft_jax.adapters.complete import expand_all_linear, untied_for, with_model_defaults, with_replicas, with_ties
from peft_jax.adapters.fused_targets import with_fused_adapters, with_fused_targets
from peft_jax.adapters.plan import (
    Target,
    following_modules,
    matrices,
    may_be_target,
    module_sizes,
    neighbours,
    plan,
)
from peft_jax.adapters.target_parameters import check_apart, parameters_of, with_parameters
from peft_jax.core.adapted import Adapted, changed_layers, nested_adapters
from peft_jax.core.adapted_tree import adapters, check_adapter_name
from peft_jax.core.articles import article
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Program, find_leaves, module_names
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import present
from peft_jax.core.targets import is_saved_module, is_target
from peft_jax.core.weight import as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.grouped_arrays import GroupedArrays
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.packed_tensors import PackedTensors
from peft_jax.methods.roles import REPLACED, SAVED, Whole
from peft_jax.methods.shared_arrays import SharedArrays
from peft_jax.methods.starts_from_weight import Neighbours, StartsAmongWeights, StartsFromWeight
from peft_jax.methods.trainable_tokens import tokens_by_module
from peft_jax.prompts.attach_prompt import prompt_places
from peft_jax.prompts.base import PromptMethod

Tensors = Mapping[str, np.ndarray]
EMPTY = " (it is empty, as DeepSpeed's ZeRO-3 writes what it has not gathered: save the gathered model)"
WHOLE_FACTOR = " (PEFT ignores use_qalora outside GPTQ layers: load it with use_qalora=False)"
ORDERED = (
    " Its target_parameters of one module have to be listed in the order in which that declares them, and inp= of "
    "their layout= has to be the axis that PEFT takes for the inputs."
)


def get_peft_model_state_dict(
    params: PyTree, adapter_name: str = "default", *, save_embedding_layers: bool | Literal["auto"] = "auto"
) -> dict[str, np.ndarray]:
    """The tensors of an adapter under PEFT's keys.

    Args:
        params: A tree or model handle with the adapter.
        adapter_name: Which adapter.
        save_embedding_layers: Whether the base's embedding and output head are among them: ``"auto"`` those that are
            targets; True those, or both if neither is one; False none.

    Raises:
        ValueError: if there is no such adapter, or two leaves have one key.

    Example:
        >>> import peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 8))}}, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> {key: tensor.shape for key, tensor in get_peft_model_state_dict(params).items()}
        {'base_model.model.q.lora_A.weight': (2, 4), 'base_model.model.q.lora_B.weight': (8, 2)}
    """
    tree = params.params if isinstance(params, Handle) else params
    config = adapter_config(tree, adapter_name).replace(inference_mode=True)
    nodes, targets = list[Adapted](), list[Target]()
    for leaf in with_parameters(find_leaves(tree, None), config):
        node = nested_adapters(leaf.value).get(adapter_name)
        if node is not None and not _is_left_out(node):
            nodes.append(node)
            targets.append(Target(0, leaf, changed_layers(node), node.tag.role))
    of_modules = matrices(targets)
    check_apart([target.leaf for target in of_modules], config)
    adapted = set[str]()
    for target in of_modules:
        adapted.update(target.leaf.names[target.adapted])
    tensors: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    biased = following_modules(targets)
    for target, node in zip(targets, nodes, strict=True):
        leaf, role = target.leaf, target.role
        arrays = config.saved(node.params, node.state) if role is None else node.params
        for entry in entries_of(target, config, adapted, biased):
            if entry.key in owners:
                raise ValueError(
                    f"The leaves '{owners[entry.key]}' and '{leaf.path}' both have the key '{entry.key}' in a file. "
                    "Rename one of them."
                )
            owners[entry.key] = leaf.path
            whole = np.asarray(arrays[entry.role])  # sliced on the host: no program for each shape
            array = np.asarray(whole[entry.layer])[entry.place]
            array = array.astype(node.tag.dtypes.get(entry.key, array.dtype))
            tensors[entry.key] = entry.to_file(array)
        if role is None and save_embedding_layers:
            tensors |= base_tensors(leaf, config, at_the_ends(params, adapted))
        elif role == Whole(SAVED):
            copies = copied_biases(leaf, changed_layers(node), config, tensors, adapter_name)
            tensors |= present(copies, node.tag.dtypes)
    if isinstance(config, PackedTensors):
        tensors = config.unpacked_file(tensors, adapted, biased, partial(tensor_key, config.peft_type))
    if save_embedding_layers is True and not targets_embedding(config, at_the_ends(params, adapted)):
        tensors |= whole_embeddings(params, config) | trained_copies(params, config, tensors)
    if isinstance(config, SharedArrays) and config.saves_shared:
        for row in SHARED[config.peft_type]:
            shared = _shared_tensors(config, row, nodes)
            tensors |= copies_in_layers(config, row, shared, adapted) | shared
    return tensors | (tied_copies(params, config, tensors) if isinstance(params, Handle) else {})


def set_peft_model_state_dict(
    params: PyTree,
    config: Method,
    tensors: Tensors,
    *,
    adapter_name: str = "default",
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> Any:
    """A new tree or handle with an adapter made of PEFT's tensors; the config decides which layers are adapted.

    Args:
        params: The base: a tree or a model handle.
        config: The adapter's config. Fields that are None get the model's defaults, as in PEFT.
        tensors: Tensors under PEFT's keys: those that the config asks for on this base, and no others.
        adapter_name: Name to give the adapter.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.
        fn: As there. Give it where it was given when the adapter was attached: a bias that the program alone tells is
            scaled or trained with its matrix only then.
        args: As there.

    Raises:
        ValueError: if keys are missing or left over or shapes are wrong, all of which are listed.
    """
    params = with_replicas(params, config)
    check_adapter_name(adapter_name, params)
    if fn is not None and isinstance(params, Handle):
        raise ValueError("A model handle knows the axes of its leaves. Leave fn= out.")
    read = None if fn is None else read_program(params, fn, args, config.fan_in_fan_out)
    as_it_is, named = tensors, without_adapter_name(tensors, adapter_name)
    file_plan, tensors = _planned(params, config, as_it_is, layout, read)
    problems = _misfits(file_plan, tensors)
    if any(problems) and named.keys() != as_it_is.keys():  # a name may be a word that keys have anyhow
        file_plan, tensors = _planned(params, config, named, layout, read)
        problems = _misfits(file_plan, tensors)
    if any(problems):
        hint = ORDERED if config.target_parameters else ""
        made_for = f" ('{config.base_model_name_or_path}')" if config.base_model_name_or_path else ""
        advice = f" Load it on the base that it was made for{made_for}, with the config that was saved with it.{hint}"
        if all(problem.endswith(WHOLE_FACTOR) for problem in itertools.chain(*problems)):
            advice = ""  # the base is the right one
        raise ValueError(f"The adapter does not fit this base: {some_of_each(problems)}.{advice}")
    return _built(file_plan, tensors, adapter_name)


def misfits(params: PyTree, config: Method, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why `set_peft_model_state_dict` would refuse tensors of these shapes, by their keys; empty if it would not.

    The values of the base and of the tensors are not looked at, so ``params`` may be traced.

    Args:
        params: The base: a tree or a model handle.
        config: The adapter's config.
        shapes: Shape of each tensor.

    Raises:
        ValueError: if the method cannot be on such a base at all.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(r=2, target_modules=["q"])
        >>> misfits({"q": {"kernel": jnp.ones((4, 8))}}, config, {"base_model.model.q.lora_A.weight": (2, 4)})
        ['base_model.model.q.lora_B.weight is missing']
    """
    as_it_is: Tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    params = with_replicas(params, config)
    found: list[str] = []
    for tensors in (as_it_is, without_adapter_name(as_it_is, "default")):
        file_plan, tensors = _planned(params, config, tensors, None, values=False)
        found = list(itertools.chain.from_iterable(_misfits(file_plan, tensors)))
        if not found:
            break
    return found


class FilePlan(NamedTuple):
    """The plan of an adapter of a file on a base.

    ``params`` is the tree or handle that gets it, with tied modules apart if need be; ``modules`` are the names of all
    its modules, and those of ``brought`` have their base from the file. ``entries`` are the tensors of each target, in
    the order of ``targets``; ``common`` are those that all layers share. ``sizes`` are
    those of the matrices of all target modules, in PyTorch's order. ``problems`` are those of the base's tensors, and
    ``unpacked`` those of tensors that could not be packed.
    """

    params: PyTree
    config: Method
    modules: set[str]
    brought: frozenset[str]
    targets: list[Target]
    entries: list[list[Entry]]
    common: list[Entry]
    sizes: Mapping[str, tuple[int, int]]
    problems: list[str]
    unpacked: list[str]


def _planned(
    params: PyTree,
    config: Method,
    tensors: Tensors,
    layout: Layouts | None,
    read: Program | None = None,
    *,
    values: bool = True,
) -> tuple[FilePlan, Tensors]:
    """The plan of a config on a base, and the tensors of its file without copies of the base's."""
    handle = params if isinstance(params, Handle) else None
    if handle is not None:
        config, tensors = with_present_names(config, tensors, handle.moved_modules)
        tensors = with_fused_adapters(tensors, handle, config)
    config = config.of_file({key: tensor.shape for key, tensor in tensors.items()})
    if handle is None and config.on_model:
        raise ValueError(
            f"{article(config.peft_type, first=True)} adapter goes on a model handle. Give the handle, not its tree."
        )
    if handle is not None:
        config = with_model_defaults(config, handle)
        has_copies = bool(tied_copies(handle, config, tensors).keys() & tensors.keys())
        config, keeps_ties = with_ties(config, handle, has_copies=has_copies)
        if isinstance(config, PromptMethod):
            _check_trainable(config)
        tensors = without_tied_copies(handle, config, tensors)
    params, tensors, brought, problems = with_tables(params, config, tensors, layout, values=values)
    handle = params if isinstance(params, Handle) else None
    if handle is None:
        tree, layouts, embedding = params, layout, EMBEDDING
    else:
        handle = untied_for(
            handle,
            config,
            lambda name: is_target(config, name) or is_saved_module(config, name),
            keeps_ties=keeps_ties,
        )
        tree, layouts, embedding = handle.params, {**handle.layouts(), **(layout or {})}, handle.input_module
    found = find_leaves(tree, layouts, config.fan_in_fan_out, read)
    expanded = expand_all_linear(config, found, None if handle is None else handle.output_module)
    config = expanded if handle is None else with_fused_targets(expanded, config, handle, found)
    modules = set(module_names(found))
    found = with_parameters(found, config)
    if isinstance(config, PromptMethod) and handle is not None:
        adapted = prompt_places(config, found, handle)
    else:
        candidates = module_names([leaf for leaf in found if may_be_target(config, leaf)])
        adapted = {name for name in candidates if is_target(config, name)}
        adapted |= parameters_of(found, config)
    tokens: dict[str, tuple[int, ...]] = {}
    if config.trainable_token_indices:
        tokens = tokens_by_module(config.trainable_token_indices, sorted(modules), embedding, strict=False)
    targets = plan(found, config, adapted, tokens)
    check_apart([target.leaf for target in matrices(targets)], config)
    biased = following_modules(targets)
    entries = [list(entries_of(target, config, adapted, biased)) for target in targets]
    declared = handle.declared_modules if handle is not None and config.counts_modules else ()
    sizes = module_sizes(config, targets, declared)
    common = shared_entries(config, list(sizes.values()))
    unpacked: list[str] = []
    if isinstance(config, PackedTensors):
        key_of = partial(tensor_key, config.peft_type)
        unpacked = config.misfits_of_file(tensors, sizes, key_of)
        if not unpacked:
            tensors = config.packed_file(tensors, sizes, key_of)
    whole = params if handle is None else handle
    return FilePlan(whole, config, modules, brought, targets, entries, common, sizes, problems, unpacked), tensors


def _check_trainable(config: PromptMethod) -> None:
    """Raise ValueError if a prompt is to be trained on, and its file does not hold what is trained."""
    if not (config.inference_mode or config.trains_from_file):
        raise ValueError(
            f"The file of {article(config.peft_type)} adapter holds what its encoder gave, not the encoder, so "
            "it cannot be trained on. Load it without is_trainable, or train a fresh one."
        )


def _misfits(file_plan: FilePlan, tensors: Tensors) -> list[list[str]]:
    """Problems by kind: those of the base's tensors, what is missing, left over, and of another shape."""
    tensors = without_copies(file_plan.config, tensors)
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in itertools.chain(*file_plan.entries, file_plan.common):
        shapes[entry.key] = entry.tensor_shape
    if wrapped := wrapper_in(tensors, shapes.keys()):
        return [[wrapped]]
    if file_plan.unpacked:  # the names of packed arrays are not the file's
        return [file_plan.unpacked]
    general = list(file_plan.problems)
    roles = [target.role for target in file_plan.targets]
    if None not in roles and Whole(REPLACED) not in roles:
        general.append("its config names no module of this base to adapt")
    missing = [f"{key} is missing" for key in sorted(shapes.keys() - tensors.keys())]
    surplus, unlike = [], []
    for key in sorted(tensors.keys() - shapes.keys()):
        whole = copied_whole(file_plan.config, key)
        if whole in tensors and tensors[whole].shape != tensors[key].shape:
            unlike.append(f"{key} has shape {tensors[key].shape}, not {tensors[whole].shape}")
            continue
        elsewhere = key.startswith(PREFIX) and not _is_inside(key, file_plan.modules)
        reason = "this base has no such module" if elsewhere else "the config does not ask for it"
        if whole in tensors:
            reason = f"it is not equal to {whole}, of which each layer has a copy"
        surplus.append(f"{key} is left over ({reason})")
    for key, shape in shapes.items():
        if key in tensors and tensors[key].shape != shape:
            reason = EMPTY if tensors[key].size == 0 else ""
            if _is_whole_factor(file_plan.config, key, tensors[key].shape, shape):
                reason = WHOLE_FACTOR
            unlike.append(f"{key} has shape {tensors[key].shape}, not {shape}{reason}")
    return [general, missing, surplus, unlike or _unlike_copies(file_plan, tensors)]


def _is_whole_factor(config: Method, key: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor is the plain A of a QA-LoRA, which PEFT writes for layers that are not GPTQ's."""
    if not getattr(config, "use_qalora", False) or not key.endswith(".lora_A.weight"):
        return False
    return shape == (*wanted[:-1], wanted[-1] * getattr(config, "qalora_group_size", 1))


def _unlike_copies(file_plan: FilePlan, tensors: Tensors) -> list[str]:
    """The tensors of arrays that groups of layers share which are not equal to those of the group's first layer."""
    config = file_plan.config
    if not isinstance(config, GroupedArrays):
        return []
    leaders, problems = config.leaders(file_plan.sizes), []
    for target, entries in zip(file_plan.targets, file_plan.entries, strict=True):
        for entry in entries:
            if target.role is not None or entry.role not in config.carried:
                continue
            module = str(target.leaf.names[entry.layer])
            first = f"{PREFIX}{leaders[entry.role][module]}{entry.key.removeprefix(PREFIX + module)}"
            if not np.array_equal(tensors.get(entry.key, 0), tensors.get(first, 0)):
                problems.append(f"{entry.key} is not equal to {first}, which is one array with it")
    return problems


def _is_inside(key: str, modules: set[str]) -> bool:
    """Whether a key names a tensor of one of the modules."""
    path = key.removeprefix(PREFIX)
    while path:
        path = path.rpartition(".")[0]
        if path in modules:
            return True
    return False


def _common(file_plan: FilePlan, tensors: Tensors) -> dict[str, np.ndarray]:
    """The arrays that all layers share, by role; several tensors of one array are stacked."""
    whole: dict[str, np.ndarray] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for entry in file_plan.common:
        array = entry.from_file(tensors[entry.key]).astype(np.float32)
        if entry.layer:
            parts.setdefault(entry.role, []).append(array)
        else:
            whole[entry.role] = array
    for role, arrays in parts.items():
        whole[role] = np.stack(arrays)
    return whole


def _built(file_plan: FilePlan, tensors: Tensors, adapter_name: str) -> Any:
    """The tree or handle of a plan with the adapter."""
    params, config, targets = file_plan.params, file_plan.config, file_plan.targets
    entries = dict[int, list[Entry]]()
    for target, own in zip(targets, file_plan.entries, strict=True):
        entries[target.position] = own
    shared: Mapping[str, Any] = _common(file_plan, tensors)
    if isinstance(config, SharedArrays) and not config.saves_shared:
        shared = config.shared(list(file_plan.sizes.values()))
    following = following_modules(targets)
    copies = tensors.keys() - without_copies(config, tensors).keys()
    dtypes = {key: str(tensors[key].dtype) for key in copies}  # of the tensors that every leaf notes
    for entry in file_plan.common:
        dtypes[entry.key] = str(tensors[entry.key].dtype)

    among = neighbours(targets, file_plan.sizes) if isinstance(config, StartsAmongWeights) else None

    def contents_of(target: Target) -> Contents:
        own = entries[target.position]
        contents = _contents(target, file_plan, own, tensors, among)
        if target.role is None:
            contents.params.update(carried_by(config, target, targets, shared))
            beside = state_beside(config, target, following, shared, file_plan.sizes)
            contents = contents._replace(state=beside | contents.state)
            contents = in_groups(config, target, file_plan.sizes, contents)
        own_dtypes = {entry.key: str(tensors[entry.key].dtype) for entry in own}
        return contents._replace(dtypes=own_dtypes | dtypes)

    tree = params.params if isinstance(params, Handle) else params
    new = build(tree, adapter_name, config, targets, contents_of, trainable=not config.inference_mode)
    return params.replace(new) if isinstance(params, Handle) else new


def _contents(
    target: Target,
    file_plan: FilePlan,
    entries: list[Entry],
    tensors: Tensors,
    among: Callable[[Target], Neighbours] | None,
) -> Contents:
    """The arrays of a leaf, made of its tensors, and of its neighbours where the method looks at them."""
    leaf, adapted, config = target.leaf, target.adapted, file_plan.config
    base = as_weight(leaf.value, leaf.layout)
    if target.role is None:
        state = config.state(leaf.names, adapted)
        if isinstance(config, StartsFromWeight):
            # What the initialization left of the base may be in the file.
            if not file_plan.brought.issuperset(leaf.names.flat):
                base = config.rebased(base, leaf.names, adapted)
            if among is not None and isinstance(config, StartsAmongWeights):
                state |= config.state_among(base, among(target), leaf.names, adapted)
            else:
                state |= config.state_on(base, leaf.names, adapted)
        arrays = _zeros(target, entries, tensors)
    else:
        initial, state = target.role.init(config, base, leaf.names, adapted)
        arrays = jax.tree.map(np.array, initial)
    for entry in entries:
        arrays[entry.role][entry.layer][entry.place] = entry.from_file(tensors[entry.key])
    params = jax.tree.map(jnp.asarray, arrays)
    if target.role is None and isinstance(config, FrozenArrays):
        config.check_frozen({**state, **arrays}, *base.layout.sizes(base.shape), leaf.path)
        params, frozen = config.apart(params)
        state |= frozen | config.derived(frozen, base, adapted)
    return Contents(params, state, base)


def _zeros(target: Target, entries: list[Entry], tensors: Tensors) -> dict[str, np.ndarray]:
    """Arrays of zeros for the tensors of a target's matrix, as large as the largest of its layers needs.

    They are float32, and int32 where the file has whole numbers.
    """
    arrays = {}
    shapes: dict[str, list[tuple[int, ...]]] = {}
    with_fractions = set[str]()
    for entry in entries:
        shapes.setdefault(entry.role, []).append(entry.shape)
        if not np.issubdtype(tensors[entry.key].dtype, np.integer):
            with_fractions.add(entry.role)
    for role, of_layers in shapes.items():
        largest = np.max(of_layers, axis=0)[len(target.leaf.layout.unnamed) :]
        dtype = np.float32 if role in with_fractions else np.int32
        arrays[role] = np.zeros((*target.adapted.shape, *largest), dtype)
    return arrays


def adapter_config(params: PyTree, adapter_name: str = "default") -> Method:
    """The config of an adapter.

    Raises:
        ValueError: if the tree has no adapter of that name.
    """
    known = adapters(params)
    if adapter_name not in known:
        raise ValueError(f"No adapter is named '{adapter_name}'. Found: {sorted(known)}.")
    config: Method = known[adapter_name]
    return config


def _shared_tensors(config: SharedArrays, row: Row, nodes: Sequence[Adapted]) -> dict[str, np.ndarray]:
    """The tensors of an array for all layers, from the leaf that trains it or the largest of the layers' parts."""
    carriers = [node for node in nodes if row.role in node.params]
    if carriers:
        carrier = carriers[0]
        whole, dtypes = carrier.params[row.role][(0,) * len(carrier.layout.stack)], carrier.tag.dtypes
    else:
        found = [node for node in nodes if row.role in node.state]
        rank = len(config.shared_axes[row.role])
        largest = max(found, key=lambda node: int(np.prod(node.state[row.role].shape[-rank:])))
        whole, dtypes = largest.state[row.role][(0,) * len(largest.layout.stack)], largest.tag.dtypes
    array, tensors = np.asarray(whole), {}
    for entry in entries_of_shared(config, row, array.shape):
        part = np.asarray(array[entry.layer])
        tensors[entry.key] = entry.to_file(part.astype(dtypes.get(entry.key, part.dtype)))
    return tensors


def _is_left_out(node: Adapted) -> bool:
    """Whether a LoRA changes nothing of a leaf, as one that took the place of another may: it has rank 0 there."""
    return node.tag.role is None and isinstance(node.tag.config, LoraConfig) and not changed_layers(node).any()

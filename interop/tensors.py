"""Adapters to and from PEFT's tensors in memory: keys, transposes, and which layers of a stack."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from peft_jax.interop.embeddings import whole_embeddings, without_embeddings
from peft_jax.interop.extras import (
    at_the_ends,
    base_tensors,
    copied_biases,
    is_transposed,
    targets_embedding,
    tied_copies,
    without_copies,
    without_tied_copies,
)
from peft_jax.interop.formats import (
    CONVOLUTIONS,
    EXPERTS,
    FUSED,
    INNER,
    INSIDE,
    ONE,
    ONES,
    PREFIX,
    PREFIXES,
    ROWS,
    SHARED,
    TAPS,
    TOKEN_SUFFIX,
    Row,
    tensor_key,
)

from peft_jax.adapters.attach import EMBEDDING, beside_target
from peft_jax.adapters.complete import (
    expand_all_linear,
    untied_for,
    with_model_defaults,
    with_replicas,
)
from peft_jax.adapters.plan import (
    FOLLOWS,
    TOKENS,
    Choice,
    choose,
    matrix_sizes,
    may_be_target,
    modules_with_followers,
)
from peft_jax.adapters.target_parameters import (
    check_apart,
    depth,
    is_parameter,
    with_parameters,
)
from peft_jax.core.adapted import Adapted, Tag, adapters, check_adapter_name, is_adapted, tied
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Leaf, find_leaves, replace_leaves
from peft_jax.core.partition_specs import sharded_like_base
from peft_jax.core.targets import is_saved_module, is_target
from peft_jax.core.weight import as_leaf, as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.trainable_tokens import tokens_by_module, tokens_shape
from peft_jax.methods.whole import REPLACED, Part, config_of
from peft_jax.prompts.attach_prompt import prompt_places
from peft_jax.prompts.base import PromptMethod

Tensors = Mapping[str, np.ndarray]
ORDERED = (
    " Its target_parameters of one module have to be listed in the order in which that declares them, and inp= of "
    "their layout= has to be the axis that PEFT takes for the inputs."
)


class Entry(NamedTuple):
    """One tensor of a file: its key, and whose it is: ``layer`` of our array ``role``, ``shape`` unpadded.

    A slice in ``layer`` takes all experts of a parameter, which are the first axis of ``shape`` then. ``order`` has for
    each of the file's axes those of ours that it is made of: mostly one, none if we have not its length of 1.
    """

    key: str
    layer: tuple[int | slice, ...]
    role: str
    shape: tuple[int, ...]
    order: tuple[tuple[int, ...], ...]
    split: tuple[int, ...] = ()  # the shape with a convolution's input axes apart, if that is what ``order`` counts

    @property
    def parts(self) -> tuple[int, ...]:
        """The shape whose axes ``order`` counts."""
        return self.split or self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(math.prod(self.parts[axis] for axis in axes) for axes in self.order)

    @property
    def place(self) -> tuple[slice, ...]:
        """The unpadded part of the array of `layer`."""
        return tuple(map(slice, self.shape))

    def to_file(self, array: np.ndarray) -> np.ndarray:
        """Our array, without padding, as the file has it."""
        turned = np.transpose(array.reshape(self.parts), [axis for axes in self.order for axis in axes])
        return np.ascontiguousarray(turned.reshape(self.tensor_shape))

    def from_file(self, tensor: np.ndarray) -> np.ndarray:
        """The inverse of `to_file`."""
        axes = [axis for axes in self.order for axis in axes]
        turned = np.transpose(tensor.reshape([self.parts[axis] for axis in axes]), np.argsort(axes))
        return turned.reshape(self.shape)


def get_peft_model_state_dict(
    params: Any, adapter_name: str = "default", *, save_embedding_layers: bool | Literal["auto"] = "auto"
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
    nodes = [
        (leaf, node)
        for leaf in with_parameters(find_leaves(tree, None), config)
        for node in _nested(leaf, adapter_name)
    ]
    matrices = [(leaf, node) for leaf, node in nodes if not isinstance(node.tag.config, Part)]
    check_apart([leaf for leaf, _ in matrices], config)
    adapted = {name for leaf, node in matrices for name in _hits(leaf, node)}
    tensors: dict[str, np.ndarray] = {}
    owners: dict[str, str] = {}
    for leaf, node in nodes:
        role = node.tag.config.role if isinstance(node.tag.config, Part) else None
        arrays = config.saved(node.params, node.state) if role is None else node.params
        tokens = getattr(node.tag.config, "tokens", ())
        for entry in _entries(Choice(0, leaf, _hit(node), role, tokens), config, adapted):
            if entry.key in owners:
                raise ValueError(
                    f"The leaves '{owners[entry.key]}' and '{leaf.path}' both have the key '{entry.key}' in a file. "
                    "Rename one of them."
                )
            owners[entry.key] = leaf.path
            array = np.asarray(arrays[entry.role][entry.layer])[entry.place]
            array = array.astype(node.tag.dtypes.get(entry.key, array.dtype))
            tensors[entry.key] = entry.to_file(array)
        if role is None and save_embedding_layers:
            tensors |= base_tensors(leaf, config, at_the_ends(params, adapted))
        elif role == "modules_to_save":
            copies = copied_biases(leaf, _hit(node), config, tensors, adapter_name)
            tensors |= {key: array for key, array in copies.items() if key in node.tag.dtypes}
    if save_embedding_layers is True and not targets_embedding(config, at_the_ends(params, adapted)):
        tensors |= whole_embeddings(params, config)
    for row in SHARED.get(config.peft_type, ()) if config.saves_shared else ():
        tensors[row.suffix] = _shared_tensor(row, nodes)
    return tensors | (tied_copies(params, config, tensors) if isinstance(params, Handle) else {})


def set_peft_model_state_dict(
    params: Any, config: Method, tensors: Tensors, *, adapter_name: str = "default", layout: Layouts | None = None
) -> Any:
    """A new tree or handle with an adapter made of PEFT's tensors; the config decides which layers are adapted.

    Args:
        params: The base: a tree or a model handle.
        config: The adapter's config. Fields that are None get the model's defaults, as in PEFT.
        tensors: Tensors under PEFT's keys: those that the config asks for on this base, and no others.
        adapter_name: Name to give the adapter.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.

    Raises:
        ValueError: if keys are missing or left over or shapes are wrong, all of which are listed.
    """
    params = with_replicas(params, config)
    check_adapter_name(adapter_name, params)
    plan, tensors = _planned(params, config, tensors, layout)
    bases: dict[str, np.ndarray] = {}
    for choice in plan.choices:
        if choice.role is None:
            bases |= base_tensors(choice.leaf, plan.config, plan.stored)
    problems = _misfits(plan, bases, tensors)
    problems += [
        f"{key} differs from this base's"
        for key, base in bases.items()
        if key in tensors
        and tensors[key].shape == base.shape
        and not np.array_equal(tensors[key].astype(base.dtype), base)
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        hint = ORDERED if config.target_parameters else ""
        raise ValueError(
            f"The adapter does not fit this base: {shown}. Load it on the base that it was made for, with the config "
            f"that was saved with it.{hint}"
        )
    return _built(plan, tensors, adapter_name)


def misfits(params: Any, config: Method, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
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
    tensors: Tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    plan, tensors = _planned(with_replicas(params, config), config, tensors, None, values=False)
    bases: dict[str, np.ndarray] = {}
    for choice in plan.choices:
        if choice.role is None:
            bases |= base_tensors(choice.leaf, plan.config, plan.stored, values=False)
    return _misfits(plan, bases, tensors)


class Plan(NamedTuple):
    """What an adapter of a file is on a base.

    ``params`` is the tree or handle that gets it, with tied modules apart if need be; ``modules`` are the names of all
    its modules, and those that are ``stored`` may have their base's weight in the file too. ``entries`` are the tensors
    of each choice, in the order of ``choices``; ``common`` are those that all layers share.
    """

    params: Any
    config: Method
    modules: set[str]
    stored: set[str]
    choices: list[Choice]
    entries: list[list[Entry]]
    common: list[Entry]


def _planned(
    params: Any, config: Method, tensors: Tensors, layout: Layouts | None, *, values: bool = True
) -> tuple[Plan, Tensors]:
    """What a config asks for on a base, and the tensors of its file without copies of the base's."""
    handle = params if isinstance(params, Handle) else None
    if handle is None and config.on_model:
        raise ValueError(f"A {config.peft_type} adapter goes on a model handle. Give the handle, not its tree.")
    if handle is not None:
        config = with_model_defaults(config, handle)
        if isinstance(config, PromptMethod):
            _check_trainable(config)
        tensors = without_tied_copies(handle, config, tensors)
    tensors = without_embeddings(params, config, tensors, layout, values=values)
    if handle is None:
        tree, layouts, embedding = params, layout, EMBEDDING
    else:
        handle = untied_for(handle, config, lambda name: is_target(config, name) or is_saved_module(config, name))
        tree, layouts, embedding = handle.params, {**handle.layouts(), **(layout or {})}, handle.input_module
    found = find_leaves(tree, layouts, config.fan_in_fan_out)
    config = expand_all_linear(config, found, None if handle is None else handle.output_module)
    modules = {str(name) for leaf in found for name in leaf.names.flat}
    found = with_parameters(found, config)
    if isinstance(config, PromptMethod) and handle is not None:
        adapted = prompt_places(config, found, handle)
    else:
        names = {str(name) for leaf in found if may_be_target(config, leaf) for name in leaf.names.flat}
        adapted = {name for name in names if is_target(config, name) or is_parameter(config, name)}
    tokens = tokens_by_module(config.trainable_token_indices, sorted(modules), embedding, strict=False)
    choices = list(choose(found, config, adapted, tokens))
    check_apart([choice.leaf for choice in choices if choice.role is None], config)
    entries = [list(_entries(choice, config, adapted)) for choice in choices]
    common = _shared_entries(config, matrix_sizes(choices))
    whole = params if handle is None else handle
    return Plan(whole, config, modules, at_the_ends(whole, adapted), choices, entries, common), tensors


def _check_trainable(config: PromptMethod) -> None:
    """Raise ValueError if a prompt is to be trained on, and its file does not hold what is trained."""
    if not (config.inference_mode or config.trains_from_file):
        raise ValueError(
            f"The file of a {config.peft_type} adapter holds what its encoder gave, not the encoder, so it cannot be "
            "trained on. Load it without is_trainable, or train a fresh one."
        )


def _misfits(plan: Plan, bases: Tensors, tensors: Tensors) -> list[str]:
    """What is missing, left over or of another shape; the keys of ``bases`` may be there or not."""
    problems = []
    if not any(choice.role in (None, REPLACED) for choice in plan.choices):
        problems.append("its config names no module of this base to adapt")
    tensors = without_copies(plan.config, tensors)
    entries = [*(entry for some in plan.entries for entry in some), *plan.common]
    shapes = {entry.key: entry.tensor_shape for entry in entries}
    problems += [f"{key} is missing" for key in sorted(shapes.keys() - tensors.keys())]
    for key in sorted(tensors.keys() - shapes.keys() - bases.keys()):
        elsewhere = key.startswith(PREFIX) and not _is_inside(key, plan.modules)
        reason = "this base has no such module" if elsewhere else "the config does not ask for it"
        problems.append(f"{key} is left over ({reason})")
    for key, shape in {**shapes, **{key: base.shape for key, base in bases.items()}}.items():
        if key in tensors and tensors[key].shape != shape:
            problems.append(f"{key} has shape {tensors[key].shape}, not {shape}")
    return problems


def _is_inside(key: str, modules: set[str]) -> bool:
    """Whether a key names a tensor of one of the modules."""
    path = key.removeprefix(PREFIX)
    while path:
        path = path.rpartition(".")[0]
        if path in modules:
            return True
    return False


def _built(plan: Plan, tensors: Tensors, adapter_name: str) -> Any:
    """The tree or handle of a plan with the adapter."""
    config = plan.config
    sizes = matrix_sizes(plan.choices)
    biased = modules_with_followers(plan.choices)
    in_file = {entry.role: entry.from_file(tensors[entry.key]).astype(np.float32) for entry in plan.common}
    shared = in_file if config.saves_shared else config.shared(sizes)
    nodes = {}
    for choice, entries in zip(plan.choices, plan.entries, strict=True):
        keys = [entry.key for entry in (*entries, *plan.common)]
        node = _adapted(choice, config, entries, keys, shared, tensors, adapter_name)
        more = config.lone_state(choice.leaf.names, choice.hit, biased) if choice.role is None else {}
        nodes[choice.position] = dataclasses.replace(node, state={**node.state, **more})
    if isinstance(plan.params, Handle):
        return plan.params.replace(tied(replace_leaves(plan.params.params, nodes)))
    return tied(replace_leaves(plan.params, nodes))


def adapter_config(params: Any, adapter_name: str = "default") -> Method:
    """The config of an adapter.

    Raises:
        ValueError: if the tree has no adapter of that name.
    """
    known = adapters(params)
    if adapter_name not in known:
        raise ValueError(f"No adapter is named '{adapter_name}'. Found: {sorted(known)}.")
    return config_of(known[adapter_name])


def _entries(choice: Choice, config: Method, adapted: set[str]) -> Iterator[Entry]:
    """The tensors that a leaf's adapter has in a file."""
    _, leaf, hit, role, tokens = choice
    n_in, n_out = leaf.layout.sizes(leaf.value.shape)
    for index in zip(*np.nonzero(hit), strict=True) if hit.ndim else [()]:
        name = leaf.names[index]
        if role is None and is_parameter(config, name):
            if not any(index[i] for i in leaf.layout.unnamed):
                yield from _parameter_entries(choice, config, adapted, index)
        elif role is None:
            shapes = config.leaf_shapes(name, leaf.layout, leaf.value.shape)
            for row in _rows(config, leaf):
                if row.role in shapes:
                    key = tensor_key(config.peft_type, name, row.suffix)
                    ours, shape = config.axes[row.role], shapes[row.role]
                    if leaf.layout.taps and config.peft_type in CONVOLUTIONS:
                        yield Entry(key, index, row.role, shape, *_convolution(leaf, row, ours, shape))
                    else:
                        yield Entry(key, index, row.role, shape, _order(row, ours))
        elif role == TOKENS:
            ((array, shape),) = tokens_shape(tokens, name, n_in, n_out, lookup=leaf.layout.lookup).items()
            yield Entry(f"{PREFIX}{name}.{TOKEN_SUFFIX}", index, array, shape, ((0,), (1,)))
        elif role != FOLLOWS:
            inside = INSIDE[role] if role != "bias" or {name, f"{name}.weight"} & adapted else ""
            shape = (n_in, n_out) if leaf.layout.inp else (n_out,)
            prefix = PREFIXES.get(config.peft_type, PREFIX)
            key = f"{prefix}{name}{inside}.{leaf.torch_name}"
            order = tuple((axis,) for axis in range(len(shape)))
            if leaf.layout.taps:
                row = Row(role, "", ("out", "in", TAPS))
                yield Entry(key, index, role, shape, *_convolution(leaf, row, ("in", "out"), shape))
                continue
            yield Entry(key, index, role, shape, order[::-1] if is_transposed(leaf, config) else order)


def _parameter_entries(choice: Choice, config: Method, adapted: set[str], index: tuple[int, ...]) -> Iterator[Entry]:
    """Those of a parameter, all of whose experts are in one tensor."""
    leaf, name = choice.leaf, str(choice.leaf.names[index])
    unnamed = leaf.layout.unnamed
    layer = tuple(slice(None) if i in unnamed else n for i, n in enumerate(index))
    experts = tuple(choice.hit.shape[i] for i in unnamed)
    module = name.rpartition(".")[0] + INNER * depth(config, name, adapted)
    shapes = config.shapes(name, *leaf.layout.sizes(leaf.value.shape), lookup=False)
    for row in FUSED[config.peft_type] if unnamed else _rows(config, leaf):
        if row.role in shapes:
            ours = ((EXPERTS,) if unnamed else ()) + config.axes[row.role]
            key = tensor_key(config.peft_type, module, row.suffix)
            yield Entry(key, layer, row.role, (*experts, *shapes[row.role]), _order(row, ours))


def _order(row: Row, ours: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Which of our axes make each axis of the tensor."""
    parts = ((axis,) if isinstance(axis, str) else axis for axis in row.axes)
    return tuple(tuple(ours.index(one) for one in axes if one != ONE) for axes in parts)


def _convolution(
    leaf: Leaf, row: Row, ours: tuple[str, ...], shape: tuple[int, ...]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """``order`` and ``split`` of an array of a convolution's kernel, ``shape`` by axes ``ours``.

    Where it has the inputs of all groups, they are apart in front.
    """
    layout, first = leaf.layout, ours.index("in") if "in" in ours else len(ours)
    sizes = [leaf.value.shape[axis] for axis in layout.inp]
    if "in" in ours:
        sizes = [shape[first] // math.prod(sizes), *sizes]
    split = (*shape[:first], *(sizes if "in" in ours else ()), *shape[first + 1 :])
    more = len(sizes) - 1 if "in" in ours else 0
    channels = (first, *(first + 1 + i for i, axis in enumerate(layout.inp) if axis not in layout.taps))
    taps = [(first + 1 + layout.inp.index(axis),) for axis in layout.taps]
    order: list[tuple[int, ...]] = []
    for axis in row.axes:
        if axis == "in":
            order.append(channels)
        elif axis in (TAPS, ONES):
            order += taps if axis == TAPS else [()] * len(taps)
        elif axis == ONE:
            order.append(())
        else:
            at = ours.index(str(axis))
            order.append((at + more if at > first else at,))
    return tuple(order), split


def _shared_entries(config: Method, sizes: list[tuple[int, int]]) -> list[Entry]:
    """The tensors that a file has once for all layers."""
    if not config.saves_shared:
        return []
    shapes = config.shared_shapes(sizes)
    return [Entry(row.suffix, (), row.role, shapes[row.role], ((1,), (0,))) for row in SHARED.get(config.peft_type, ())]


def _shared_tensor(row: Row, nodes: list[tuple[Leaf, Adapted]]) -> np.ndarray:
    """A tensor for all layers, from the largest of the layers' parts."""
    found = [node for _, node in nodes if row.role in node.state]
    largest = max(found, key=lambda node: int(np.prod(node.state[row.role].shape[-2:])))
    part = np.asarray(largest.state[row.role][(0,) * len(largest.layout.stack)])
    return np.ascontiguousarray(part.T.astype(largest.tag.dtypes.get(row.suffix, part.dtype)))


def _rows(config: Method, leaf: Leaf) -> tuple[Row, ...]:
    rows = ROWS[config.peft_type]
    if leaf.layout.taps and config.peft_type in CONVOLUTIONS:
        return CONVOLUTIONS[config.peft_type]
    if leaf.layout.lookup not in rows:
        kind = "embedding" if leaf.layout.lookup else "matrix that is not looked up"
        raise ValueError(f"PEFT has no {config.peft_type} for an {kind}, as '{leaf.path}' is. Target other modules.")
    return rows[leaf.layout.lookup]


def _adapted(
    choice: Choice,
    config: Method,
    entries: list[Entry],
    keys: list[str],
    shared: Mapping[str, Any],
    tensors: Tensors,
    adapter_name: str,
) -> Adapted:
    """A leaf with an adapter of these ``entries``, and its parts of what all layers have ``shared``."""
    _, leaf, hit, role, _ = choice
    keys = [*keys, *(tensors.keys() - without_copies(config, tensors).keys())]
    dtypes = {key: str(tensors[key].dtype) for key in keys}
    tagged, (copies, state) = beside_target(config, choice)
    params = {name: np.array(copy) for name, copy in copies.items()}
    base = as_weight(leaf.value, leaf.layout)
    if role is None:
        base = config.rebased(base, leaf.names, hit)
        state = config.state(leaf.names, hit) | config.share(shared, leaf.layout.sizes(leaf.value.shape), hit.shape)
        for name in {entry.role: None for entry in entries}:
            largest = np.max([entry.shape for entry in entries if entry.role == name], axis=0)
            largest = largest[len(leaf.layout.unnamed) :]
            params[name] = np.zeros((*hit.shape, *largest), np.float32)
    for entry in entries:
        params[entry.role][entry.layer][entry.place] = entry.from_file(tensors[entry.key])
    arrays = {name: jnp.asarray(array) for name, array in params.items()}
    state |= {name: arrays.pop(name) for name in (config.frozen if role is None else ())}
    tag = Tag(adapter_name, tagged, dtypes)
    trainable = not config.inference_mode
    return sharded_like_base(Adapted(as_leaf(base), arrays, state, leaf.layout, tag, trainable=trainable))


def _nested(leaf: Leaf, adapter_name: str) -> Iterator[Adapted]:
    node = leaf.value
    while is_adapted(node):
        if node.tag.name == adapter_name:
            yield node
        node = node.base


def _hit(node: Adapted) -> np.ndarray:
    return np.asarray(node.state["hit"] if "hit" in node.state else node.state["rank"]) > 0


def _hits(leaf: Leaf, node: Adapted) -> list[str]:
    hit = _hit(node)
    return [str(leaf.names[index]) for index in np.ndindex(hit.shape) if hit[index]]

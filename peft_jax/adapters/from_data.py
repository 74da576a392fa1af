"""LoRA whose start looks at data: EVA at inputs of layers, CorDA at their covariance, LoRA-GA at gradients.

The data's statistics are collected here; `peft_jax.methods.lora.initializers` has what each method makes of them
(`eva`, `corda`, `lora_ga`).
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapt import adapt
from peft_jax.adapters.attach import apply_adapter
from peft_jax.adapters.statistics import (
    Gradients,
    Inputs,
    layers_of,
    observer,
    observing,
)
from peft_jax.core.adapted import Adapted, Tag
from peft_jax.core.adapted_tree import adapted_leaves, adapters, map_adapted
from peft_jax.core.finite import holds_finite
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts
from peft_jax.core.precision import ComputeDtype, checked_compute_dtype, with_compute_dtype
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import fields_of
from peft_jax.core.targets import pattern_value
from peft_jax.core.weight import as_leaf, as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.lora import dora, grouped_conv
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.lora.initializers import corda, eva, lora_ga
from peft_jax.methods.lora.initializers.base import Initialize
from peft_jax.methods.lora.initializers.stacked import initialize_layers
from peft_jax.methods.lora.initializers.table import from_data
from peft_jax.methods.lora.nested_configs import CordaConfig, EvaConfig, LoraGAConfig

T = TypeVar("T")
MOST = 1000  # batches after which EVA's components have to have been found
Sums = dict[str, jax.Array]


def apply_lora_from_data(
    params: T,
    config: LoraConfig,
    batches: Iterable[Any],
    *,
    fn: Callable[[Any, Any], Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    key: jax.Array | None = None,
    adapter_name: str = "default",
    layout: Layouts | None = None,
    compute_dtype: ComputeDtype | None = None,
) -> T:
    """`peft_jax.apply_lora` for ``init_lora_weights`` that look at data: ``"eva"``, ``"corda"`` and ``"lora_ga"``.

    ``"eva"`` takes the principal components of each target's inputs for A, and gives more rank to targets whose inputs
    they explain better: the adapter's config has the ranks, and targets that are left without one are none. It goes
    through the batches again and again until the components settle. ``"corda"`` and ``"lora_ga"`` go through them
    once, and take what the adapter starts at out of the base: the function is what it was, and
    ``path_initial_model_for_weight_conversion`` of `peft_jax.interop.save_adapter` makes the adapter one that goes on
    the base as it was.

    Args:
        params: Any pytree of arrays, or a model handle.
        config: What to attach, with its ``eva_config``, ``corda_config`` or ``lora_ga_config``.
        batches: What to run; for a handle dictionaries of its arguments.
        fn: The function that uses the leaves, as ``fn(params, batch)``, which need not know of adapters. For
            ``"lora_ga"`` it gives the loss. None, for a handle, is ``model(**batch)``.
        mask: Which tokens of a batch count for ``"eva"``, as an array of the inputs' shape without their last axis.
            None is PEFT's rule where batches are dictionaries with ``input_ids``: those that ``attention_mask`` and
            ``labels`` do not leave out; else all.
        key: As in `peft_jax.apply_adapter`, like the rest.
        adapter_name: Name of the adapter.
        layout: Axes of leaves; those that are not given are read from ``fn`` on the first batch.
        compute_dtype: As in `peft_jax.apply_adapter`; the start itself is computed in float32.

    Raises:
        ValueError: as `peft_jax.apply_adapter`; if there is no batch, a target is used in no product, the batches give
            NaN or infinity, or components do not settle.

    Example:
        >>> import peft_jax as pj
        >>> params = {"up": {"kernel": jnp.eye(4)}}
        >>> def model(params, x):
        ...     return x @ params["up"]["kernel"]
        >>> config = pj.LoraConfig(r=2, target_modules=["up"], init_lora_weights="corda")
        >>> batches = [jax.random.normal(jax.random.key(i), (16, 4)) for i in range(3)]
        >>> adapted = pj.apply_lora_from_data(params, config, batches, fn=model)
        >>> bool(jnp.allclose(pj.merge(adapted)["up"]["kernel"], jnp.eye(4), atol=1e-5))
        True
    """
    start = config.init_lora_weights
    if not starts_from_data(config):
        raise ValueError(
            f"init_lora_weights={start!r} does not look at data. Write pj.apply_lora, or one of "
            f"{', '.join(from_data())}."
        )
    if fn is None and not isinstance(params, Handle):
        raise ValueError("A tree has to be run by somebody. Give fn=, a function of the tree and a batch.")
    checked_compute_dtype(compute_dtype)
    batches = batches if isinstance(batches, (list, tuple)) else list(batches)
    if not batches:
        raise ValueError("There are no batches to look at. Give at least one.")
    run = adapt(fn) if fn is not None else lambda model, batch: model(**batch)
    reads = fn if not isinstance(params, Handle) else None
    args = () if reads is None else (batches[0],)

    def attach(params: PyTree, config: LoraConfig) -> Any:
        return apply_adapter(params, config, key=key, adapter_name=adapter_name, layout=layout, fn=reads, args=args)

    plain = config.replace(init_lora_weights=True, eva_config=None, corda_config=None, lora_ga_config=None)
    adapted = attach(params, plain)
    if start == "eva":
        ranked, components = _eva(adapted, config, batches, run, mask, adapter_name)
        started = _with_components(attach(params, ranked), config, components, adapter_name)
    elif start == "corda":
        sums = _covariances(adapted, config, batches, run, adapter_name)
        started = _taken_out(adapted, config, sums, key, adapter_name)
    else:
        sums = _gradients(adapted, config, batches, run, adapter_name)
        started = _taken_out(adapted, config, sums, key, adapter_name)
    result: T = with_compute_dtype(started, compute_dtype, adapter_name)
    return result


def starts_from_data(config: Method) -> TypeGuard[LoraConfig]:
    """Whether a fresh adapter of a config needs `apply_lora_from_data`, as its start looks at data.

    Example:
        >>> import peft_jax as pj
        >>> starts_from_data(pj.LoraConfig(init_lora_weights="eva")), starts_from_data(pj.LoraConfig())
        (True, False)
    """
    return isinstance(config, LoraConfig) and config.initializer.needs == "data"


def _outputs(run: Callable[[Any, Any], Any], tree: PyTree, batch: Any) -> jax.Array:
    """A number that all of a function's results have a part in."""
    leaves = [leaf for leaf in jax.tree.leaves(run(tree, batch)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum((jnp.sum(leaf.astype(jnp.float32)) for leaf in leaves), jnp.float32(0))


def _loss(run: Callable[[Any, Any], Any], tree: PyTree, batch: Any) -> jax.Array:
    result = run(tree, batch)
    loss: Any = getattr(result, "loss", result)
    if getattr(loss, "shape", None) != ():
        raise ValueError("init_lora_weights='lora_ga' asks for a loss. Give fn= that returns one number, or labels.")
    return jnp.asarray(loss, jnp.float32)


def _targets(adapted: Any, adapter_name: str) -> dict[str, Adapted]:
    """The leaves with an adapter's matrices, by path; of embeddings there is nothing to see."""
    found = dict(_matrices(adapted.params if isinstance(adapted, Handle) else adapted, adapter_name, lookup=False))
    for path, leaf in found.items():
        grouped_conv.check_plain(path, leaf.layout)
    return found


def _matrices(tree: PyTree, adapter_name: str, *, lookup: bool) -> Iterator[tuple[str, Adapted]]:
    for path, leaf in adapted_leaves(tree):
        if leaf.tag.name == adapter_name and leaf.tag.role is None and leaf.layout.lookup == lookup:
            yield path, leaf


def _covariances(adapted: Any, config: LoraConfig, batches: Any, run: Any, adapter_name: str) -> Sums:
    options = CordaConfig(**(config.corda_config or {}))  # type: ignore[arg-type]
    files = fields_of(options, ("cache_file", "covariance_file", "use_float16_for_covariance"))
    if kept := {name: value for name, value in files.items() if value}:
        raise ValueError(f"corda_config with {kept} is not supported. Leave it out; the covariances are made anew.")
    observe = observer(observing(adapted, adapter_name, Inputs(corda.moment)), partial(_outputs, run))
    sums = _summed(observe, batches)
    for path, total in sums.items():
        _check_used(path, total)
    return {path: total[..., :-1, :-1] / total[..., -1:, -1:] for path, total in sums.items()}


def _summed(observe: Callable[[Any, Any], Sums], batches: Iterable[Any]) -> Sums:
    sums: Sums = {}
    for batch in batches:
        for path, one in observe(batch, None).items():
            sums[path] = sums[path] + one if path in sums else one
    for path, total in sums.items():
        _check_finite(path, total)
    return sums


def _check_finite(path: str, seen: jax.Array) -> None:
    if not holds_finite(seen):
        raise ValueError(
            f"The batches give NaN or infinity at '{path}', so that no adapter can start from them. Check the batches "
            "and the base, or run it in a wider element type."
        )


def _check_used(path: str, total: jax.Array) -> None:
    if not bool(jnp.all(total[..., -1, -1] > 0)):
        raise ValueError(
            f"'{path}' meets no inputs in a product, so that there is nothing to start from. Leave it out."
        )


def _gradients(adapted: Any, config: LoraConfig, batches: Any, run: Any, adapter_name: str) -> Sums:
    if config.lora_ga_config is None:
        raise ValueError("lora_ga_config is not given. Write lora_ga_config=LoraGAConfig(), or {} in JSON.")
    for path, leaf in _targets(adapted, adapter_name).items():
        if not isinstance(leaf.base, jax.Array):
            raise ValueError(
                f"init_lora_weights='lora_ga' is for float weights, and '{path}' is none. Attach it first."
            )
    observe = observer(observing(adapted, adapter_name, Gradients()), partial(_loss, run))
    return {path: total / len(batches) for path, total in _summed(observe, batches).items()}


def _taken_out(adapted: Any, config: LoraConfig, sums: Sums, key: jax.Array | None, adapter_name: str) -> Any:
    """The adapter started at what was seen, on what that leaves of the base."""
    key = jax.random.key(0) if key is None else key

    def begin(path: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name != adapter_name:
            return leaf
        tag = retagged(leaf.tag, config)
        if path not in sums or leaf.tag.role is not None:
            return dataclasses.replace(leaf, tag=tag)
        names, hit = layers_of(path, leaf)
        base = as_weight(leaf.base, leaf.layout)
        seen = jnp.reshape(sums[path], (-1, *sums[path].shape[-2:]))
        initialize = [_initializer(config, one, bool(leaf.layout.stored_in_out)) for one in seen]
        params, base = initialize_layers(config, base, names, hit, key, initialize)
        if config.use_dora:
            params[dora.MAGNITUDE] = dora.initialize(params, leaf.state, base)
        return dataclasses.replace(leaf, base=as_leaf(base), params=params, tag=tag)

    return map_adapted(begin, adapted)


def retagged(tag: Tag, start: LoraConfig) -> Tag:
    """The tag with the start of a config, whose other fields the model has completed."""
    fields = ("init_lora_weights", "eva_config", "corda_config", "lora_ga_config")
    config = tag.config.replace(**fields_of(start, fields))
    return dataclasses.replace(tag, config=config)


def _initializer(config: LoraConfig, seen: jax.Array, stored_in_out: bool) -> Initialize:
    """The initializer of one layer, given its statistics."""
    if config.init_lora_weights == "corda":
        method = CordaConfig(**(config.corda_config or {})).corda_method  # type: ignore[arg-type]
        return lambda matrix, rank, scale, key: corda.initialize(matrix, seen, rank, scale, method)
    options = LoraGAConfig(**(config.lora_ga_config or {}))  # type: ignore[arg-type]
    return lambda matrix, rank, scale, key: lora_ga.initialize(matrix, seen, rank, scale, options, key, stored_in_out)


def language_mask(config: EvaConfig) -> Callable[[Any], Any]:
    """PEFT's rule of which tokens count, for batches that are dictionaries with ``input_ids``; None for all."""

    def mask(batch: Any) -> Any:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            return None
        counts = jnp.asarray(batch.get("attention_mask", jnp.ones_like(batch["input_ids"]))) > 0
        if config.use_label_mask and "labels" in batch:
            counts = counts & (jnp.asarray(batch["labels"]) != config.label_mask_value)
        return counts.astype(jnp.float32)

    return mask


def _eva(
    adapted: Any, config: LoraConfig, batches: Any, run: Any, mask: Any, adapter_name: str
) -> tuple[LoraConfig, Sums]:
    """The config with EVA's ranks, and A of each layer by name."""
    options = EvaConfig(**(config.eva_config or {}))  # type: ignore[arg-type]
    mask = language_mask(options) if mask is None else mask
    observe = observer(observing(adapted, adapter_name, Inputs(eva.moment)), partial(_outputs, run))
    leaves = _targets(adapted, adapter_name)

    def look(batch: Any) -> Sums:
        found: Sums = {}
        for path, total in jax.device_get(observe(batch, mask(batch))).items():
            names, hit = layers_of(path, leaves[path])
            _check_finite(path, total)
            found |= {str(names[i]): total[i] for i in np.ndindex(hit.shape) if hit[i]}
        return found

    moments = look(batches[0])
    for name, total in moments.items():
        _check_used(name, total)
    search = _search(moments, config, options)
    for number, batch in enumerate(itertools.cycle(batches)):
        if search.is_done:
            break
        if number == MOST:
            raise ValueError(
                f"EVA's components still move after {MOST} batches. Give larger ones, or a lower tau or r."
            )
        search.take(moments if number == 0 else look(batch))
    tree = adapted.params if isinstance(adapted, Handle) else adapted
    completed = adapters(tree)[adapter_name]
    assert isinstance(completed, LoraConfig)
    ranked = _ranked(completed, config, options, search, _lookups(tree, adapter_name))
    return ranked, {name: search.start(name, options.whiten) for name in moments}


def _lookups(tree: PyTree, adapter_name: str) -> list[str]:
    """Names of the adapted embeddings."""
    found = list[str]()
    for path, leaf in _matrices(tree, adapter_name, lookup=True):
        names, hit = layers_of(path, leaf)
        found += names[hit].tolist()
    return found


def _search(moments: Sums, config: LoraConfig, options: EvaConfig) -> eva.Search:
    counts, first, same_inputs = {}, dict[bytes, str](), {}
    for name, total in moments.items():
        counts[name] = round(config.rank(name) * options.rho)
        same = first.setdefault(np.asarray(total).tobytes(), name)
        if same != name:
            same_inputs[name] = same
    for name, same in same_inputs.items():
        counts[same] = max(counts[same], counts[name])
    for name, same in same_inputs.items():
        counts[name] = counts[same]
    for name, count in counts.items():
        if count > len(moments[name]) - 1:
            raise ValueError(
                f"EVA looks for r * rho = {count} components of the inputs of '{name}', which are "
                f"{len(moments[name]) - 1}. Choose a smaller r or rho."
            )
    return eva.Search(counts, options.tau, same_inputs, sum(config.rank(name) for name in moments))


def _ranked(
    completed: LoraConfig, config: LoraConfig, options: EvaConfig, search: eva.Search, others: list[str]
) -> LoraConfig:
    """The config with the ranks that were found, and scales for them; ``others`` are targets that were not seen."""
    targets, ranks, alphas = [], {}, {}
    for name in (*search.ranks, *others):
        before, alpha = config.rank(name), pattern_value(config.alpha_pattern, name, config.lora_alpha)
        rank = search.ranks.get(name, before)
        if not rank:
            continue
        if options.adjust_scaling_factors:
            alpha = alpha * rank / before
        targets.append(name)
        if rank != config.r:
            ranks[name] = rank
        if alpha != config.lora_alpha:
            alphas[name] = alpha
    return completed.replace(target_modules=sorted(targets), rank_pattern=ranks, alpha_pattern=alphas)


def _with_components(adapted: Any, config: LoraConfig, components: Sums, adapter_name: str) -> Any:
    def start(path: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name != adapter_name:
            return leaf
        tag = retagged(leaf.tag, config)
        if leaf.tag.role is not None or leaf.layout.lookup:
            return dataclasses.replace(leaf, tag=tag)
        (names, hit), a = layers_of(path, leaf), jnp.zeros_like(leaf.params["lora_A"])
        for index in np.ndindex(hit.shape):
            if hit[index]:
                one = components[str(names[index])]
                a = a.at[(*index, slice(None), slice(one.shape[1]))].set(one)
        return dataclasses.replace(leaf, params={**leaf.params, "lora_A": a}, tag=tag)

    return map_adapted(start, adapted)

"""The small network of a SHADOW adapter: a model's own backbone with few layers, which runs beside the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.paths import named_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.interop.checkpoint_rows import Row
from peft_jax.models.config import CAUSAL_LM, FEATURE_EXTRACTION, ModelConfig
from peft_jax.models.family import Family, with_leaf
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache, TwoCaches
from peft_jax.models.modules.shadow_state import Perceptron, Shadow, ShadowLayers
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import ShadowPart, ShadowSizes, active_prompts
from peft_jax.prompts.shadow import (
    BACKBONE,
    DOWN,
    NETWORK_ARRAYS,
    PROJECTION,
    UP,
    Mirrored,
    ShadowConfig,
    network_shape,
)

TABLE = "embed_tokens"  # the name of a table of tokens that PEFT takes out of the small network where it is shared
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")  # by which PEFT sets the width of the feed-forward network
BY_LAYER = ("layer_types", "no_rope_layers")  # our fields that have a value for each layer
SMALL = 0x736D616C  # what a key is folded with for the small network's own dropout: "smal"


@functools.lru_cache(maxsize=64)
def small_config(config: ModelConfig, sizes: ShadowSizes) -> ModelConfig:
    """The architecture of the small network, a bare model.

    Raises:
        ValueError: if PEFT makes none of such a model, or the sizes do not go together.

    Example:
        >>> from peft_jax.models import LlamaConfig
        >>> small_config(LlamaConfig(num_hidden_layers=6), ShadowSizes(layers=2)).num_hidden_layers
        2
    """
    if config.no_shadow:
        raise ValueError(f"SHADOW is not for {config.model_type} models, {config.no_shadow}. Take another method.")
    changes: dict[str, Any] = {"num_hidden_layers": sizes.layers, "task_type": FEATURE_EXTRACTION}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in BY_LAYER and value:
            changes[field.name] = (*value, *value[-1:] * sizes.layers)[: sizes.layers]
    if sizes.hidden is not None:
        changes["hidden_size"] = sizes.hidden
    if sizes.heads is not None:
        changes["num_attention_heads"] = sizes.heads
    if sizes.inner is not None:
        changes[_width_name(config)] = sizes.inner
    is_other_head = sizes.hidden is not None or sizes.heads is not None
    if is_other_head and getattr(config, "head_dim", None) is not None and not _has_head_dim(config):
        changes["head_dim"] = None
    small = dataclasses.replace(config, **changes)
    if small.embedding_size != small.hidden_size:
        raise ValueError(
            f"The embeddings of this {config.model_type} model have {small.embedding_size} features, and the layers of "
            f"the small network {small.hidden_size}: PEFT makes no such SHADOW. Leave shadow_hidden_size out, or take "
            "another method."
        )
    return small


def _width_name(config: ModelConfig) -> str:
    """Our name of the width of the feed-forward network."""
    for field in dataclasses.fields(config):
        if config.spelled.get(field.name, field.name) in WIDTHS:
            return field.name
    raise ValueError(
        f"shadow_intermediate_size is not for {config.model_type} models, whose configs have none of "
        f"{', '.join(WIDTHS)}. Leave it out."
    )


def _has_head_dim(config: ModelConfig) -> bool:
    """Whether transformers' config of such a model has the width of a head, which PEFT leaves as it is."""
    # Imported here: it takes seconds, and only a small network of other sizes needs it.
    from transformers import AutoConfig

    return "head_dim" in AutoConfig.for_model(config.model_type).to_dict()


def shares_table(config: ModelConfig, sizes: ShadowSizes) -> bool:
    """Whether the small network reads the model's table of tokens."""
    return sizes.shares and sizes.hidden in (None, config.hidden_size)


def mirrored(family: Family, config: ModelConfig, sizes: ShadowSizes) -> Mirrored:
    """The facts about a model that its small network is made of.

    Raises:
        ValueError: as `small_config`, or if the model is none for the next token.
    """
    if config.task_type != CAUSAL_LM or family.init_cache is None:
        raise ValueError(
            f"SHADOW is for {CAUSAL_LM} models, and this one is for {config.task_type}. Take another method."
        )
    small = small_config(config, sizes)
    shapes, unused = {}, []
    for name, row in _tensors(family, small).items():
        if row.path == _table_path(family, small) and shares_table(config, sizes):
            if name == f"{TABLE}.weight":
                continue
            unused.append(name)
        shapes[name] = row.tensor_shape

    initialize = partial(_initialized, small, tuple(shapes))
    return Mirrored(_layers(family, config), config.hidden_size, shapes, tuple(unused), small.hidden_size, initialize)


def _initialized(small: ModelConfig, names: Sequence[str], key: jax.Array) -> dict[str, jax.Array]:
    """Random arrays of a small network, by PyTorch's names."""
    family = family_of(small)
    leaves, arrays = named_leaves(family.init_params(small, key)), {}
    for row in family.rows(small):
        for layer, name in enumerate(_names(family, row)):
            leaf = leaves[row.path]
            one = leaf[layer] if row.stacked else leaf
            arrays[name] = jnp.swapaxes(one, -1, -2) if row.transposed else one
    return {name: arrays[name] for name in names}


def _layers(family: Family, config: ModelConfig) -> tuple[str, ...]:
    """Paths of the layers of a model."""
    found: dict[str, None] = {}
    for row in family.rows(config):
        if row.stacked:
            start = row.key[: row.key.index("{}") + 2]
            found.update(dict.fromkeys(start.format(number) for number in row.layers))
    return tuple(sorted(found, key=lambda path: int(path.rpartition(".")[2])))


def _names(family: Family, row: Row) -> list[str]:
    """The names of a leaf's tensors in the module that has the layers, which may be in a bare model."""
    outer = family.embedding.rpartition(".")[0]
    return [key.removeprefix(f"{outer}.") if outer else key for key in row.keys]


def _tensors(family: Family, small: ModelConfig) -> dict[str, Row]:
    """The leaf of each tensor of the small network, by its name."""
    found = {}
    for row in family.rows(small):
        found.update(dict.fromkeys(_names(family, row), row))
    return found


def _table_path(family: Family, small: ModelConfig) -> str:
    """The path of the table of tokens of a small network."""
    return f"{family.embedding_module(small)}.embedding"


def small_params(
    family: Family, config: ModelConfig, sizes: ShadowSizes, arrays: Mapping[str, jax.Array], table: Any
) -> dict[str, Any]:
    """The tree of the small network, in the element type of the model's table, as PEFT has it.

    Args:
        family: The model's architecture.
        config: The model's config.
        sizes: The sizes of the small network.
        arrays: Those of the adapter by their roles.
        table: The model's table of tokens.
    """
    small, tree = small_config(config, sizes), dict[str, Any]()
    for row in family.rows(small):
        if row.path == _table_path(family, small) and shares_table(config, sizes):
            tree = with_leaf(tree, row.path, table)
            continue
        tensors = [arrays[BACKBONE + name].astype(table.dtype) for name in _names(family, row)]
        if row.transposed:
            tensors = [jnp.swapaxes(tensor, -1, -2) for tensor in tensors]
        tree = with_leaf(tree, row.path, jnp.stack(tensors) if row.stacked else tensors[0])
    return tree


def shadow_layers(layers: Sequence[str], shadow: ShadowPart, hidden: int) -> ShadowLayers:
    """The part of a shadow in each of a model's layers, stacked; zeros of those without the adapter.

    Args:
        layers: Paths of the layers.
        shadow: The shadow.
        hidden: Features of the layers' inputs.
    """
    on = np.array([f"{layer}.{DOWN}" in shadow.arrays for layer in layers])

    def stacked(name: str) -> jax.Array:
        known = [shadow.arrays.get(f"{layer}.{name}") for layer in layers]
        like = next((array for array in known if array is not None), None)
        if like is None:  # T and G of the one layer that has the adapter, which nothing reads
            like = jnp.zeros(network_shape(name, hidden, 1))
        return jnp.stack([jnp.zeros_like(like) if array is None else array for array in known])

    arrays = [stacked(name) for name in NETWORK_ARRAYS]
    networks = Perceptron(*arrays[:4]), Perceptron(*arrays[4:])
    dropout = {}
    if shadow.dropout:
        keys = jax.vmap(partial(jax.random.fold_in, shadow.dropout["key"]))(jnp.arange(len(layers)))
        dropout = {"key": keys, "rate": jnp.broadcast_to(shadow.dropout["rate"], (len(layers),))}
    alpha = jnp.full(len(layers), shadow.alpha, jnp.float32)
    return ShadowLayers(jnp.asarray(on), alpha, stacked(DOWN), stacked(UP), *networks, dropout)


def apply_beside(
    family: Family, config: ModelConfig, params: PyTree, shadow: ShadowPart | None, inputs: ForwardInputs
) -> Any:
    """Run a model, with a small network beside it if there is one.

    Args:
        family: The architecture.
        config: The model's config.
        params: The model's parameters.
        shadow: The small network.
        inputs: The inputs of both; a cache is one of `TwoCaches` where there is a small network.
    """
    if shadow is None:
        return family.apply(config, params, inputs)
    cache = TwoCaches(None, None) if inputs.cache is None else inputs.cache
    small = small_config(config, shadow.sizes)
    if inputs.inputs_embeds is not None and inputs.inputs_embeds.shape[-1] != small.embedding_size:
        raise ValueError(
            f"inputs_embeds has {inputs.inputs_embeds.shape[-1]} features, and the small network of SHADOW takes "
            f"{small.embedding_size}. Give input_ids."
        )
    tree = small_params(family, config, shadow.sizes, shadow.arrays, family.embedding_table(config, params))
    key = inputs.dropout_key
    own = dataclasses.replace(
        inputs,
        cache=cache.first,
        output_hidden_states=False,
        output_router_logits=False,
        logits_to_keep=0,
        dropout_key=None if key is None else jax.random.fold_in(key, SMALL),
    )
    seen = family.apply(small, tree, own)
    state = seen.last_hidden_state
    if PROJECTION in shadow.arrays:
        state = state @ shadow.arrays[PROJECTION].T.astype(state.dtype)
    layers = shadow_layers(_layers(family, config), shadow, config.hidden_size)
    out = family.apply(config, params, dataclasses.replace(inputs, cache=cache.second, shadow=Shadow(state, layers)))
    filled = None if inputs.cache is None else TwoCaches(seen.cache, out.cache)
    return out._replace(cache=filled, shadow_state=state)


def cache_beside(family: Family, config: ModelConfig, params: PyTree, batch: int, positions: int, dtype: Any) -> Any:
    """An empty cache of a model, with one of the small network beside it if there is one.

    Args:
        family: The architecture, which generates.
        config: The model's config.
        params: The model's parameters with their adapters.
        batch: Rows.
        positions: Slots.
        dtype: Element type.
    """
    make: Any = family.init_cache
    base: KVCache = make(config, batch, positions, dtype)
    for leaf in active_prompts(params):
        if isinstance(leaf.tag.config, ShadowConfig):
            small = small_config(config, leaf.tag.config.sizes_of_shadow)
            return TwoCaches(make(small, batch, positions, dtype), base)
    return base

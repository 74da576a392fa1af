"""Start a prompt of keys and values as those that the model itself keeps of a text: PEFT's helpers for cartridges."""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.adapt import adapt
from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapters, map_adapted
from peft_jax.core.merge import active_adapters, disable_adapter
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.handles.peft_model import PeftModel
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache
from peft_jax.models.registry import family_of
from peft_jax.prompts.base import PROMPT, without_prompts
from peft_jax.prompts.chat_template import has_chat_template
from peft_jax.prompts.key_values import KeyValuePrompt
from peft_jax.prompts.tokenizer import Tokenizer

Layers = Iterable[Sequence[Any]]  # of each layer its key and its value, (1, heads, length, head_dim)


def prompt_embeddings_from_past_key_values(
    past_key_values: Layers, *, num_virtual_tokens: int
) -> Float[Array, "tokens features"]:
    """The first keys and values of a cache as a file of CARTRIDGE or PREFIX_TUNING has them.

    Args:
        past_key_values: Of each layer its key and its value, each ``(1, heads, length, head_dim)``, as the caches of
            transformers give them.
        num_virtual_tokens: Of how many tokens.

    Returns:
        ``(tokens, layers * 2 * heads * head_dim)``, float32.

    Raises:
        ValueError: if the cache is empty, of several rows, too short, or its layers differ.

    Example:
        >>> layer = (jnp.ones((1, 2, 5, 4)), jnp.zeros((1, 2, 5, 4)))
        >>> prompt_embeddings_from_past_key_values([layer] * 3, num_virtual_tokens=2).shape
        (2, 48)
    """
    arrays = [np.asarray(part, np.float32) for layer in past_key_values for part in tuple(layer)[:2]]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ValueError(f"past_key_values has keys and values of one shape, at least one of each, got {shapes or {}}.")
    (shape,) = shapes
    if len(shape) != 4 or shape[0] != 1:
        raise ValueError(f"past_key_values has arrays (1, heads, length, head_dim), of one row, got {shape}.")
    if shape[2] < num_virtual_tokens:
        raise ValueError(
            f"past_key_values is of {shape[2]} tokens, and num_virtual_tokens is {num_virtual_tokens}. Give a longer "
            "text, or fewer virtual tokens."
        )
    kept = np.stack([array[0, :, :num_virtual_tokens] for array in arrays])
    return jnp.asarray(kept.transpose(2, 0, 1, 3).reshape(num_virtual_tokens, -1))


def initialize_kv_prefix_from_past_key_values(
    model: PeftModel,
    *,
    adapter_name: str | None = None,
    past_key_values: Layers,
    num_virtual_tokens: int | None = None,
) -> Any:
    """The model whose CARTRIDGE or PREFIX_TUNING adapter has the first keys and values of a cache.

    PEFT changes its model and returns the array; `prompt_embeddings_from_past_key_values` gives that.

    Args:
        model: A model with such an adapter; it is not changed.
        adapter_name: Which adapter; None for the active one.
        past_key_values: As `prompt_embeddings_from_past_key_values` takes it.
        num_virtual_tokens: Must be the adapter's, where it is given.

    Raises:
        ValueError: if the adapter is another one, or the cache does not fit it.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(base, pj.CartridgeConfig(num_virtual_tokens=2))
        >>> config = model.peft_config["default"]
        >>> shape = (1, config.num_attention_heads, 5, config.token_dim // config.num_attention_heads)
        >>> cache = [(jnp.ones(shape), jnp.ones(shape))] * config.num_layers
        >>> model = initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        >>> {key: float(array.mean()) for key, array in pj.get_peft_model_state_dict(model).items()}
        {'prompt_embeddings': 1.0}
    """
    name, config = _chosen(model, adapter_name)
    count = config.slots if num_virtual_tokens is None else num_virtual_tokens
    whole = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    wanted = (config.slots, 2 * (config.num_layers or 0) * (config.token_dim or 0))
    if whole.shape != wanted:
        raise ValueError(
            f"The cache gives keys and values of the shape {whole.shape}, and adapter '{name}' has {wanted}. Take the "
            "cache of this model, and the adapter's num_virtual_tokens."
        )

    def start(_: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name != name or leaf.tag.role is not None:
            return leaf
        arrays = {PROMPT: whole.astype(leaf.params[PROMPT].dtype)}
        params, frozen = config.apart(arrays) if isinstance(config, FrozenArrays) else (arrays, {})
        return dataclasses.replace(leaf, params=params, state={**leaf.state, **frozen})

    return map_adapted(start, model)


def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Tokenizer,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Any:
    """The model whose CARTRIDGE or PREFIX_TUNING adapter starts as what the base keeps of the beginning of a text.

    Args:
        model: A causal language model with such an adapter; it is not changed.
        tokenizer: Its tokenizer.
        text: A text of at least ``num_virtual_tokens`` tokens.
        adapter_name: Which adapter; None for the active one.
        num_virtual_tokens: Must be the adapter's, where it is given.
        use_chat_template: Whether the text is laid out as a system's turn, where the tokenizer has a chat template.
        max_length: Of how many tokens the base reads at most; None for all.

    Raises:
        ValueError: if the adapter is another one, the text is too short or too long, or the model is not for it.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> from peft_jax.prompts.tokenizer import read_tokenizer
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(base, pj.CartridgeConfig(num_virtual_tokens=3))
        >>> model = initialize_kv_prefix_from_text(model, read_tokenizer(MODEL), text="one two three four five")
        >>> model.active_adapters
        ['default']
    """
    name, _ = _chosen(model, adapter_name)
    if not isinstance(model, CausalLM):
        raise ValueError(f"A text is read by causal language models, and this one is for {model.task}.")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is at least 1, got {max_length}.")
    if use_chat_template and has_chat_template(tokenizer):
        turns = [{"role": "system", "content": text}]
        ids = tokenizer.apply_chat_template(turns, tokenize=True, add_generation_prompt=False, return_dict=False)
    else:
        ids = tokenizer(text)["input_ids"]
    return initialize_kv_prefix_from_past_key_values(
        model,
        adapter_name=name,
        past_key_values=_kept_of(model, list(ids)[:max_length]),
        num_virtual_tokens=num_virtual_tokens,
    )


def _chosen(model: PeftModel, adapter_name: str | None) -> tuple[str, KeyValuePrompt]:
    """Name and config of the adapter that is meant.

    Raises:
        ValueError: if it is not there, or cannot start from a cache.
    """
    found = active_adapters(model) if adapter_name is None else [adapter_name]
    known = adapters(model.params)
    if len(found) != 1 or found[0] not in known:
        raise ValueError(f"adapter_name is one of {sorted(known)}, got {found}.")
    config = known[found[0]]
    if not isinstance(config, KeyValuePrompt):
        raise ValueError(f"Adapter '{found[0]}' is {config.peft_type}, and a cache is for CARTRIDGE and PREFIX_TUNING.")
    if getattr(config, "prefix_projection", False):
        raise ValueError(f"Adapter '{found[0]}' has prefix_projection=True, which makes its keys and values itself.")
    return found[0], config


def _kept_of(model: CausalLM, ids: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values ``(1, heads, length, head_dim)`` of each layer that the base keeps of these ids."""
    config = model.config
    longest = config.max_position_embeddings
    if not 0 < len(ids) <= longest:
        raise ValueError(f"The text has {len(ids)} tokens, and the model reads 1 to {longest}. Give max_length=.")
    family = family_of(config)
    params = without_prompts(disable_adapter(model.params))
    assert family.init_cache is not None, "causal language models have one"
    cache = family.init_cache(config, 1, len(ids), family.embedding_table(config, params).dtype)
    if not isinstance(cache, KVCache):
        raise ValueError(f"Layers of {config.model_type} models keep arrays of several shapes. Train from random ones.")
    inputs = ForwardInputs(input_ids=jnp.asarray(ids, jnp.int32)[None], cache=cache, logits_to_keep=1)
    kept: KVCache = jax.jit(adapt(partial(family.apply, config)))(params, inputs).cache
    keys, values = (np.asarray(buffer, np.float32).transpose(0, 1, 3, 2, 4) for buffer in kept.buffers)
    return list(zip(keys, values, strict=True))

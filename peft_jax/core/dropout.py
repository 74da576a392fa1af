"""Dropout on the inputs of adapters: its keys are part of the tree, so that it is a pure change of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import Adapted, map_adapted
from peft_jax.core.paths import keys_from_names, module_path, stacked_names


def with_dropout(params: Any, key: jax.Array) -> Any:
    """The tree with dropout switched on for this key; call it on the combined tree, in the loss, once a step.

    Only active adapters that are trained change, and of these the ones with a dropout rate above 0. Lookups of
    embeddings are never dropped, as in PEFT. Each layer has its own key, made from its name. In a product with a
    weight's transpose the outputs of the low-rank path are dropped, which are its inputs in the product itself.

    Args:
        params: Any tree or model handle.
        key: A JAX random key, a new one for every step.

    Example:
        >>> import peft_jax as pj
        >>> cfg = pj.LoraConfig(target_modules=["q"], lora_dropout=0.5, init_lora_weights=False)
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, cfg)
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> x = jnp.ones((1, 4))
        >>> bool(jnp.allclose(f(with_dropout(params, jax.random.key(1)), x), f(params, x)))
        False
    """

    def switch_on(path: str, leaf: Adapted) -> Adapted:
        rate, looked_up = leaf.tag.config.dropout_rate, leaf.layout.lookup
        if not rate or not (leaf.active and leaf.trainable):
            return leaf
        if looked_up and not leaf.tag.config.dropout_in_lookups:
            return leaf
        names = stacked_names(module_path(path), leaf.layout, leaf.shape)
        keys = keys_from_names(key, names)
        rates = np.full(names.shape, rate, np.float32)
        return dataclasses.replace(leaf, state={**leaf.state, "dropout": {"key": keys, "rate": jnp.asarray(rates)}})

    return map_adapted(switch_on, params)


def dropout(x: jax.Array, state: Mapping[str, Any]) -> jax.Array:
    """``x`` with elements zeroed and the rest scaled up, if dropout is switched on in an adapter's ``state``."""
    if "dropout" not in state:
        return x
    # A grouped product has one key a group, and each row of x belongs to one group: the first key serves all rows.
    key, rate = (jnp.reshape(state["dropout"][name], -1)[0] for name in ("key", "rate"))
    keep = 1 - rate
    kept = jax.random.bernoulli(key, keep, x.shape)
    return jnp.where(kept, x / keep.astype(x.dtype), 0)

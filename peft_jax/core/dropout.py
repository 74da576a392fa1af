"""Dropout: its keys are part of the tree, so that it is a pure change of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.paths import keys_from_names, leaf_names
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import without


def with_dropout(params: PyTree, key: jax.Array, *, base: bool = True) -> PyTree:
    """The tree with dropout switched on for this key; call it on the combined tree, in the loss, once a step.

    A model handle's base drops too, as its config says and as PEFT's does after ``model.train()``: weights of its
    attention, outputs of its layers and whatever else transformers drops in such a model. Functions over plain trees
    are the caller's own, and nothing in them is dropped but in adapters.

    Only active adapters that are trained change, and of these the ones with a dropout rate above 0. Lookups of
    embeddings are never dropped, as in PEFT. Each layer has its own key, made from its name. In a product with a
    weight's transpose the outputs of the low-rank path are dropped, which are its inputs in the product itself. LoHa
    and LoKr drop parts of the change itself (`drop_change`).

    Args:
        params: Any tree or model handle.
        key: A JAX random key, a new one for every step.
        base: Whether the base's own dropout is on, where the tree is a model handle.

    Example:
        >>> import peft_jax as pj
        >>> cfg = pj.LoraConfig(target_modules=["q"], lora_dropout=0.5, init_lora_weights=False)
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, cfg)
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> x = jnp.ones((1, 4))
        >>> bool(jnp.allclose(f(with_dropout(params, jax.random.key(1)), x), f(params, x)))
        False
    """
    # The names that keys are made of have had this in front in a handle: a run that goes on has the masks that it had.
    prefix = "params." if isinstance(params, Handle) else ""

    def switch_on(path: str, leaf: Adapted) -> Adapted:
        rates = {name: rate for name, rate in leaf.method.dropout_rates.items() if rate}
        if not rates or not (leaf.active and leaf.trainable):
            return leaf
        if leaf.layout.lookup and not leaf.tag.config.on_model:
            return leaf
        names = leaf_names(prefix + path, leaf.layout, leaf.shape)
        keys = keys_from_names(key, names)
        switched_on = {"key": keys}
        for name, rate in rates.items():
            switched_on[name] = jnp.asarray(np.full(names.shape, rate, np.float32))
        return dataclasses.replace(leaf, state={**leaf.state, "dropout": switched_on})

    if base and isinstance(params, Handle):
        params = params.dropping(key)
    return map_adapted(switch_on, params)


def without_dropout(params: PyTree) -> PyTree:
    """The tree with dropout switched off everywhere: the inverse of `with_dropout`.

    Args:
        params: Any tree or model handle.

    Example:
        >>> import peft_jax as pj
        >>> cfg = pj.LoraConfig(target_modules=["q"], lora_dropout=0.5)
        >>> params = with_dropout(pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, cfg), jax.random.key(1))
        >>> has_dropout(params), has_dropout(without_dropout(params))
        (True, False)
    """

    def switch_off(path: str, leaf: Adapted) -> Adapted:
        state = without(leaf.state, ["dropout"])
        return dataclasses.replace(leaf, state=state)

    return map_adapted(switch_off, params)


def has_dropout(params: PyTree) -> bool:
    """Whether `with_dropout` switched it on in any leaf of a tree."""
    return any("dropout" in leaf.state for _, leaf in adapted_leaves(params))


def dropout(x: jax.Array, state: Mapping[str, Any]) -> jax.Array:
    """``x`` with elements zeroed and the rest scaled up, if dropout is switched on in an adapter's ``state``."""
    if "rate" not in state.get("dropout", {}):  # there may be other noise alone
        return x
    # A grouped product has one key a group, and each row of x belongs to one group: the first key serves all rows.
    key = jnp.reshape(state["dropout"]["key"], -1)[0]
    keep = 1 - jnp.reshape(state["dropout"]["rate"], -1)[0]
    kept = kept_elements(key, keep, x.shape)
    return jnp.where(kept, x / keep.astype(x.dtype), 0)


def kept_elements(key: jax.Array, keep: float | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A mask of this shape, True with the probability ``keep``: what a site of dropout keeps."""
    return jax.random.bernoulli(key, keep, shape)


def drop_change(change: jax.Array, state: Mapping[str, Any], *, rescale: bool) -> jax.Array:
    """The change ``(in, out)`` of one layer's matrix, with outputs or all of it dropped if dropout is switched on.

    Args:
        change: The array that is added to the matrix.
        state: The adapter's, in whose ``"dropout"`` are probabilities: ``"outputs"`` of each of them, ``"module"``.
        rescale: Whether the outputs that are left count more, by the share of them. (Of none left PEFT makes NaN.)
    """
    if "dropout" not in state:
        return change
    rates, (outputs, module) = state["dropout"], jax.random.split(state["dropout"]["key"])
    if "outputs" in rates:
        kept = jax.random.bernoulli(outputs, 1 - rates["outputs"], change.shape[-1:]).astype(change.dtype)
        if rescale:
            kept = kept / jnp.maximum(jnp.mean(kept), 1 / kept.size)
        change = change * kept[None]
    if "module" in rates:
        change = jnp.where(jax.random.bernoulli(module, 1 - rates["module"]), change, 0)
    return change

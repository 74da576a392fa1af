"""The small network of a SHADOW adapter as a model of its own: PEFT's ``ShadowModel.unload_shadow``."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.adapted import Adapted, nested_adapters
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.weight import is_weight
from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.family import dense_table, with_leaf
from peft_jax.models.handles.base import ModelHandle
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.modules.logits_form import PLAIN
from peft_jax.models.shadow_backbone import shares_table, small_config, small_params
from peft_jax.prompts.base import without_prompts
from peft_jax.prompts.shadow import PROJECTION, ShadowConfig


def unload_shadow(model: ModelHandle, adapter_name: str | None = None) -> CausalLM:
    """The small network with the model's output head, which needs the model no more.

    It is a causal language model of the same architecture that can be saved, read by transformers, and adapted again.
    Its weights are copies. Where its features are not the model's, the projection between them goes into its head.

    Args:
        model: A model with a SHADOW adapter.
        adapter_name: The adapter; None for the active one.

    Raises:
        ValueError: if there is no such adapter, or the model bends or scales its logits, as the small network does not.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> small = unload_shadow(pj.get_peft_model(model, pj.ShadowConfig()))
        >>> small.config.num_hidden_layers, small(jnp.array([[1, 2, 3]])).logits.shape[:2]
        (1, (1, 3))
    """
    node = _adapter(model, adapter_name)
    family, config, sizes = model.family, model.config, node.tag.config.sizes_of_shadow
    if config.logits_form != PLAIN:
        raise ValueError(
            f"{config.model_type} models bend or scale their logits, which their small network was trained without. "
            "There is no such model of its own."
        )
    base = without_prompts(model.params)
    table = dense_table(family.embedding_table(config, base))
    backbone = small_params(family, config, sizes, node.params, table)
    is_tied = bool(family.tied_modules(config)) and shares_table(config, sizes)
    small = dataclasses.replace(small_config(config, sizes), task_type=CAUSAL_LM, tie_word_embeddings=is_tied)
    params: dict[str, Any] = {family.backbone: backbone}
    if not is_tied:
        weight, is_table = family.head_weight(config, base)
        kernel = _dense(weight).T if is_table else _dense(weight)
        if PROJECTION in node.params:
            kernel = jnp.matmul(node.params[PROJECTION].T, kernel.astype(jnp.float32)).astype(kernel.dtype)
        params = with_leaf(params, f"{family.heads[CAUSAL_LM]}.kernel", kernel)
        bias = family.head_bias(config, base)
        if bias is not None:
            params = with_leaf(params, f"{family.heads[CAUSAL_LM]}.bias", _dense(bias))
    copied = jax.tree.map(jnp.copy, params)
    source = dataclasses.replace(model.source, name_or_path=None)
    return CausalLM(params=copied, config=small, source=source, remat=model.remat)


def _adapter(model: ModelHandle, name: str | None) -> Adapted:
    """The leaf with the arrays of a SHADOW adapter."""
    found = {}
    for _, leaf in adapted_leaves(model.params):
        for node in nested_adapters(leaf).values():
            if isinstance(node.tag.config, ShadowConfig) and node.tag.role is None:
                if node.tag.name == name or (name is None and node.active):
                    return node
                found[node.tag.name] = node
    said = "no SHADOW adapter is active" if name is None else f"no SHADOW adapter is named '{name}'"
    raise ValueError(f"unload_shadow gives a SHADOW adapter's small network, and {said}. Found: {sorted(found)}.")


def _dense(leaf: Any) -> jax.Array:
    """A leaf as an array, with its adapters folded in."""
    array: jax.Array = leaf.dense() if is_weight(leaf) else leaf
    return array

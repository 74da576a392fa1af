"""LoftQ on a base that is quantized already: factors of what its rounding lost.

Li et al., 2023, https://arxiv.org/abs/2310.08659, algorithm 1 with the quantized weights held fixed, as PEFT 0.21.2's
``replace_lora_weights_loftq``. Factors give the same matrix whatever their scale, which they do not there.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import map_adapted
from peft_jax.core.layout import Layout
from peft_jax.core.selecting import only
from peft_jax.interop.checkpoint import Row, find_checkpoint, load_params, open_tensors
from peft_jax.interop.host_read import Cast
from peft_jax.methods.lora.initializers.from_weight import of_difference
from peft_jax.methods.lora.variants import variant_of
from peft_jax.models.checkpoint_keys import fit_keys
from peft_jax.models.family import leaf_at
from peft_jax.models.handles.base import ModelHandle
from peft_jax.quant.quantized import Quantized

M = TypeVar("M", bound=ModelHandle)


def replace_lora_weights_loftq(
    model: M,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[M, str], bool] | None = None,
) -> M:
    """The model with LoRA's factors at the best approximation of what quantizing the base has lost.

    The base keeps its quantized weights. The float weights are read again, leaf by leaf.

    Args:
        model: A model with a LoRA adapter on a quantized base.
        model_path: Folder or hub id of the float checkpoint; None for the one that the model was read from.
        adapter_name: Which adapter.
        callback: Called with the model as it would be and the path of a leaf whose factors are replaced; if it returns
            False, that leaf keeps its own. A leaf holds all layers.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if no leaf has such a LoRA on a quantized weight, or no checkpoint is named.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL, load_in_4bit=True)
        >>> model = pj.get_peft_model(base, pj.LoraConfig(target_modules=["q_proj"]))
        >>> model = replace_lora_weights_loftq(model)
        >>> bool(jax.numpy.any(model.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].params["lora_B"]))
        True
    """
    source = model_path or model.name_or_path
    if source is None:
        raise ValueError("The model was not read from a checkpoint. Name the float one in model_path=.")
    folder = find_checkpoint(source)
    tensors = fit_keys(model.family, model.config, open_tensors(folder, model.family.ignored))
    rows = {row.path: row for row in model.family.rows(model.config)}
    paths: list[str] = []

    def note(path: str, leaf: Adapted) -> Adapted:
        if _is_meant(leaf, adapter_name) and path in rows:
            paths.append(path)
        return leaf

    map_adapted(note, model.params)
    if not paths:
        raise ValueError(
            f"No leaf has a LoRA named '{adapter_name}' on a quantized weight. Load the base with load_in_4bit=True or "
            "load_in_8bit=True, and attach a LoRA."
        )
    for path in paths:
        exact = _read(tensors, rows[path])

        def replaced(at: str, leaf: Adapted, path: str = path, exact: jax.Array = exact) -> Adapted:
            return _with_factors(leaf, exact) if at == path and _is_meant(leaf, adapter_name) else leaf

        candidate = model.replace(map_adapted(replaced, model.params))
        if callback is None or callback(candidate, path):
            model = candidate
    return model


TO_FLOAT32 = Cast(lambda path: jnp.float32)  # one, so that what is compiled for it is found again


def _is_meant(leaf: Adapted, adapter_name: str) -> bool:
    """Whether an adapted leaf is a LoRA of this name on a quantized matrix that no other adapter is on."""
    if leaf.tag.name != adapter_name or not isinstance(leaf.base, Quantized):
        return False
    if leaf.tag.config.peft_type == "LORA" and (variant := variant_of(leaf.tag.config)):
        raise ValueError(f"Adapter '{adapter_name}' has {variant}, and LoftQ is for plain factors. Leave it out.")
    return {"lora_A", "lora_B"} <= leaf.params.keys() and not leaf.layout.lookup


def _read(tensors: Mapping[str, Any], row: Row) -> jax.Array:
    """A leaf in float32."""
    own = only(tensors, row.keys)
    exact: jax.Array = leaf_at(load_params(own, [row], TO_FLOAT32), row.path)
    return exact


def _with_factors(leaf: Adapted, exact: jax.Array) -> Adapted:
    """The leaf with new factors in each of the layers that the adapter is on."""
    layout: Layout = leaf.layout
    lost = layout.matrix(exact) - layout.matrix(leaf.base.dense().astype(jnp.float32))
    a, b = np.array(leaf.params["lora_A"]), np.array(leaf.params["lora_B"])
    scaling = np.broadcast_to(leaf.state["scaling"], a.shape[:-2])
    ranks = np.broadcast_to(leaf.state["rank"], a.shape[:-2])
    for layer in np.ndindex(*a.shape[:-2]):
        rank = int(ranks[layer])
        if rank == 0 or scaling[layer] == 0:
            continue
        made_a, made_b = of_difference(lost[layer], rank, float(scaling[layer]))
        a[layer][:, :rank], b[layer][:rank] = made_a, made_b
    params = {**leaf.params, "lora_A": jnp.asarray(a), "lora_B": jnp.asarray(b)}
    return dataclasses.replace(leaf, params=params)

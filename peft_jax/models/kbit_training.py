"""PEFT's preparation of a quantized model for training, as far as there is anything to prepare here."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from peft_jax.core.adapted_tree import adapters
from peft_jax.core.weight import is_weight
from peft_jax.models.handles.base import ModelHandle
from peft_jax.quant.quantized import Quantized

M = TypeVar("M", bound=ModelHandle)


def prepare_model_for_kbit_training(
    model: M,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> M:
    """The model with all arrays that are not quantized in float32, and with ``remat`` if any leaf is quantized.

    As in PEFT, call it before `peft_jax.get_peft_model`. PEFT also freezes the base and lets gradients through the
    embedding; here `peft_jax.partition` trains adapters alone, and gradients need no such permission.

    Args:
        model: A base model; it is not changed.
        use_gradient_checkpointing: Whether backward recomputes each layer of a quantized model.
        gradient_checkpointing_kwargs: Options of ``torch.utils.checkpoint``: refused unless empty.
        auto_clear_cache: Whether PyTorch's allocator is emptied: there is none, so that False is refused.

    Raises:
        ValueError: if the model has adapters already, or an option has no meaning here.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL, load_in_4bit=True)
        >>> model = prepare_model_for_kbit_training(model)
        >>> model.remat, model.params["model"]["norm"]["scale"].dtype
        (True, dtype('float32'))
    """
    if gradient_checkpointing_kwargs:
        raise ValueError(
            f"gradient_checkpointing_kwargs={dict(gradient_checkpointing_kwargs)} are options of PyTorch's "
            "checkpointing, which have no meaning here. Leave them out."
        )
    if not auto_clear_cache:
        raise ValueError("auto_clear_cache=False is about PyTorch's allocator, which is not used here. Leave it out.")
    if found := adapters(model.params):
        raise ValueError(f"The model has adapters already: {sorted(found)}. Prepare the base, and attach them then.")

    def widened(leaf: Any) -> Any:
        if is_weight(leaf) or leaf.dtype not in (jnp.float16, jnp.bfloat16):
            return leaf
        return leaf.astype(jnp.float32)

    leaves = jax.tree.leaves(model.params, is_leaf=is_weight)
    quantized = any(isinstance(leaf, Quantized) for leaf in leaves)
    params = jax.tree.map(widened, model.params, is_leaf=is_weight)
    return dataclasses.replace(model, params=params, remat=model.remat or (quantized and use_gradient_checkpointing))

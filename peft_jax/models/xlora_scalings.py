"""The scales that an X-LoRA's classifier gives the tokens of a text."""

from typing import Any

import jax

from peft_jax.models.handles.base import ModelHandle
from peft_jax.prompts.xlora import has_router


def xlora_scalings(model: ModelHandle, input_ids: Any, attention_mask: Any = None, **arrays: Any) -> jax.Array:
    """How much an X-LoRA takes of each LoRA, at each token and in each module: what PEFT keeps of its last call.

    It is before ``top_k_lora``, and before the softmax of ``enable_softmax_topk``. Modules are in the order in which
    PyTorch declares them. A log of several calls is a list of these arrays.

    Args:
        model: A model with an active X-LoRA.
        input_ids: Token ids ``(batch, length)``.
        attention_mask: 1 on tokens and 0 on padding, ``(batch, length)``.
        **arrays: More of the model's inputs, such as ``position_ids``.

    Returns:
        ``(batch, length, modules, LoRAs)``.

    Raises:
        ValueError: if no X-LoRA is active, or an input is wrong.

    Example:
        >>> import tempfile, jax.numpy as jnp, peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> lora = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["q_proj"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora.save_pretrained(folder)
        ...     model = pj.get_peft_model(base, pj.XLoraConfig(adapters={"0": folder, "1": folder}))
        >>> scalings = xlora_scalings(model, jnp.array([[1, 2, 3]]))
        >>> scalings.shape[:2], scalings.shape[3], bool(jnp.allclose(scalings.sum(axis=-1), 1))
        ((1, 3), 2, True)
    """
    if not has_router(model.params):
        raise ValueError("The model has no active X-LoRA, which would have scalings. Take pj.get_peft_model's first.")
    output = model.run(input_ids, False, attention_mask=attention_mask, **arrays)
    assert output.scalings is not None, "an X-LoRA is active"
    return output.scalings

"""A scale for each token in the product of a LoRA: X-LoRA gives it (`peft_jax.prompts.xlora`)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError

SCALES = "token_scales"  # in the state: one number for all tokens, or those of each (batch, length)


def scaled(
    inner: Float[Array, "batch length rank"], state: Mapping[str, Any], product: Product
) -> Float[Array, "batch length rank"]:
    """The product with a LoRA's first factor, times each token's scale.

    A product with the last tokens alone, as that of an output head in generation, has their scales.

    Raises:
        MergeError: if the product's rows are no tokens of a batch.
    """
    scales = state[SCALES]
    if scales.ndim == 0:
        return inner * scales.astype(inner.dtype)
    is_of_rows = (product.is_plain or product.looks_up) and state["scaling"].ndim == 0
    if not is_of_rows or inner.ndim != 3 or len(inner) != len(scales) or inner.shape[1] > scales.shape[1]:
        raise MergeError(
            f"X-LoRA scales the tokens of {scales.shape[-2:]} rows, and a module of its LoRAs multiplies others, whose "
            f"products are {inner.shape}. Take LoRAs without it among their targets."
        )
    last = scales[:, scales.shape[1] - inner.shape[1] :]
    return inner * last[..., None].astype(inner.dtype)


def check_merge(state: Mapping[str, Any]) -> None:
    """Raise MergeError if tokens have scales of their own, which no merged weight has."""
    if SCALES in state:
        raise MergeError(
            "X-LoRA scales a LoRA for each token, which no merged weight does, and a module of its LoRAs is used in "
            "another way than in a product. Take LoRAs without it among their targets."
        )

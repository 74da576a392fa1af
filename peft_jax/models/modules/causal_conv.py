"""A convolution of each channel over the last few tokens, which are kept between calls."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array, weight: jax.Array, before: jax.Array, text: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Convolve each channel of x over the tokens up to its own, in float32.

    Args:
        x: The new tokens (batch, length, channels).
        weight: PyTorch's kernel (channels, 1, taps), whose last tap is for a token itself.
        before: The tokens before x, (batch, taps - 1, channels).
        text: Numbers of texts (batch, length): a token takes in no other text than its own.

    Returns:
        The result, in the shape and dtype of x, and the last taps - 1 tokens.

    Example:
        >>> x, weight = jnp.array([1.0, 2.0, 4.0]).reshape(1, 3, 1), jnp.array([[[10.0, 1.0]]])
        >>> out, kept = causal_conv(x, weight, jnp.zeros((1, 1, 1)))
        >>> out.ravel().tolist(), kept.ravel().tolist()
        ([1.0, 12.0, 24.0], [4.0])
    """
    length, taps = x.shape[1], weight.shape[-1]
    tokens = jnp.concatenate([before.astype(x.dtype), x], axis=1)
    total = jnp.zeros(x.shape, jnp.float32)
    for tap in range(taps):
        part = tokens[:, tap : tap + length].astype(jnp.float32)
        back = taps - 1 - tap
        if text is not None and back:
            earlier = jnp.pad(text, ((0, 0), (back, 0)), mode="edge")[:, :length]
            part = jnp.where((text == earlier)[..., None], part, 0)
        total = total + part * weight[:, 0, tap].astype(jnp.float32)[None, None]
    return total.astype(x.dtype), tokens[:, length:]

"""Decoders that are not this package's, as shapes: one of einsum kernels, and a linen module whose layers are scanned.

Both have the same sizes, and both predict each next token. How a kernel is multiplied is handed to them, so that one
definition runs with plain kernels and with LoRA written by hand.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

HIDDEN, HEADS, HEAD, WIDE, VOCABULARY = 512, 8, 64, 2048, 2048
ROWS, LENGTH = 4, 256
IDS = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
KERNELS = {  # axes of the product, and of the kernel
    "q": ("btd,dnh->btnh", (HIDDEN, HEADS, HEAD)),
    "k": ("btd,dnh->btnh", (HIDDEN, HEADS, HEAD)),
    "v": ("btd,dnh->btnh", (HIDDEN, HEADS, HEAD)),
    "o": ("btnh,nhd->btd", (HEADS, HEAD, HIDDEN)),
    "gate": ("btd,df->btf", (HIDDEN, WIDE)),
    "up": ("btd,df->btf", (HIDDEN, WIDE)),
    "down": ("btf,fd->btd", (WIDE, HIDDEN)),
}
Multiply = Callable[[str, jax.Array, Any], jax.Array]
Product = Callable[[str, jax.Array], jax.Array]


def decoder_weights(layers: int) -> dict[str, Any]:
    """The tree of the decoder of einsum kernels, in bfloat16."""
    tree: dict[str, Any] = {"embedding": jnp.zeros((VOCABULARY, HIDDEN), jnp.bfloat16)}
    for number in range(layers):
        layer = {name: {"kernel": jnp.zeros(shape, jnp.bfloat16)} for name, (_, shape) in KERNELS.items()}
        tree[f"layer_{number}"] = layer
    return tree


def decoder(params: dict[str, Any], ids: jax.Array, multiply: Multiply = jnp.einsum, *, remat: bool) -> jax.Array:
    """The loss of the decoder of einsum kernels; with ``remat`` backward keeps each layer's input alone."""

    def run(x: jax.Array, layer: Any) -> jax.Array:
        return layer_of(x, lambda name, x: multiply(KERNELS[name][0], x, layer[name]["kernel"]))

    run = jax.checkpoint(run) if remat else run
    x = params["embedding"][ids]
    for number in range(len(params) - 1):
        x = run(x, params[f"layer_{number}"])
    return loss_of(x, params["embedding"], ids)


class Layer(nn.Module):
    """A layer of dense modules, for `flax.linen.scan`.

    Attributes:
        dense: Makes a module of ``(features, name)``, which maps ``(..., in)`` to ``(..., features)``.
    """

    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Map x (rows, length, hidden)."""

        def product(name: str, x: jax.Array) -> jax.Array:
            flat = x.reshape(*x.shape[:2], -1)
            features = {"gate": WIDE, "up": WIDE}.get(name, HIDDEN)
            y = self.dense(features, name=name)(flat)
            return y.reshape(*y.shape[:2], HEADS, HEAD) if name in ("q", "k", "v") else y

        return layer_of(x, product), None


class ScannedDecoder(nn.Module):
    """The linen decoder, whose kernels are stacked ``(layers, in, out)``.

    Attributes:
        layers: How many there are.
        remat: Whether backward keeps each layer's input alone.
        dense: As of `Layer`.
    """

    layers: int
    remat: bool
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """The loss."""
        embedding = self.param("embedding", nn.initializers.zeros, (VOCABULARY, HIDDEN), jnp.bfloat16)
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scanned = nn.scan(
            layer, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = scanned(self.dense, name="layers")(embedding[ids], None)
        return loss_of(x, embedding, ids)


def layer_of(x: jax.Array, product: Product) -> jax.Array:
    """A layer's output, given its products by name: attention and a gated feed-forward network."""
    h = normalized(x)
    queries, keys, values = rotated(product("q", h)), rotated(product("k", h)), product("v", h)
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys).astype(jnp.float32) / HEAD**0.5
    visible = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), -1).astype(x.dtype)
    x = x + product("o", jnp.einsum("bnts,bsnh->btnh", weights, values))
    h = normalized(x)
    return x + product("down", jax.nn.silu(product("gate", h)) * product("up", h))


def normalized(x: jax.Array) -> jax.Array:
    """Root-mean-square normalization, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of ``(rows, length, heads, head_dim)``."""
    half = HEAD // 2
    angles = jnp.arange(LENGTH)[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def loss_of(x: jax.Array, embedding: jax.Array, ids: jax.Array) -> jax.Array:
    """The loss of predicting each next token; the head is the embedding's transpose."""
    logits = jnp.einsum("btd,vd->btv", x, embedding)[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)

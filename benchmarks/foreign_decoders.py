"""Decoders that are not this package's, as shapes: one of einsum kernels, and a linen module whose layers are scanned.

Both have the same sizes, and both predict each next token. How a kernel is multiplied is handed to them, so that one
definition runs with plain kernels and with LoRA written by hand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

ROWS = 4


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, and of what it reads.

    Attributes:
        hidden: Features between layers.
        heads: Of attention.
        head: Features of a head.
        wide: Features in the feed-forward network.
        vocabulary: Tokens that there are.
        length: Tokens of a row.
    """

    hidden: int
    heads: int
    head: int
    wide: int
    vocabulary: int
    length: int

    @property
    def ids(self) -> jax.ShapeDtypeStruct:
        """The outline of the token ids."""
        return jax.ShapeDtypeStruct((ROWS, self.length), jnp.int32)

    @property
    def kernels(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """By name the axes of each product, and the kernel's shape."""
        attended = "btd,dnh->btnh", (self.hidden, self.heads, self.head)
        widened = "btd,df->btf", (self.hidden, self.wide)
        return {
            **dict.fromkeys(("q", "k", "v"), attended),
            "o": ("btnh,nhd->btd", (self.heads, self.head, self.hidden)),
            **dict.fromkeys(("gate", "up"), widened),
            "down": ("btf,fd->btd", (self.wide, self.hidden)),
        }


SIZES = {512: Sizes(512, 8, 64, 2048, 2048, 256), 2048: Sizes(2048, 16, 128, 8192, 32000, 512)}  # by hidden
Multiply = Callable[[str, jax.Array, Any], jax.Array]
Product = Callable[[str, jax.Array], jax.Array]


def decoder_weights(sizes: Sizes, layers: int) -> dict[str, Any]:
    """The tree of the decoder of einsum kernels, in bfloat16."""
    tree: dict[str, Any] = {"embedding": jnp.zeros((sizes.vocabulary, sizes.hidden), jnp.bfloat16)}
    for number in range(layers):
        layer = {name: {"kernel": jnp.zeros(shape, jnp.bfloat16)} for name, (_, shape) in sizes.kernels.items()}
        tree[f"layer_{number}"] = layer
    return tree


def decoder(
    sizes: Sizes, params: dict[str, Any], ids: jax.Array, multiply: Multiply = jnp.einsum, *, remat: bool
) -> jax.Array:
    """The loss of the decoder of einsum kernels; with ``remat`` backward keeps each layer's input alone."""
    kernels = sizes.kernels

    def run(x: jax.Array, layer: Any) -> jax.Array:
        return layer_of(x, lambda name, x: multiply(kernels[name][0], x, layer[name]["kernel"]))

    run = jax.checkpoint(run) if remat else run
    x = params["embedding"][ids]
    for number in range(len(params) - 1):
        x = run(x, params[f"layer_{number}"])
    return loss_of(x, params["embedding"], ids)


class Layer(nn.Module):
    """A layer of dense modules, for `flax.linen.scan`.

    Attributes:
        sizes: Its sizes.
        dense: Makes a module of ``(features, name)``, which maps ``(..., in)`` to ``(..., features)``.
    """

    sizes: Sizes
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Map x (rows, length, hidden)."""
        sizes = self.sizes

        def product(name: str, x: jax.Array) -> jax.Array:
            flat = x.reshape(*x.shape[:2], -1)
            features = sizes.wide if name in ("gate", "up") else sizes.hidden
            y = self.dense(features, name=name)(flat)
            return y.reshape(*y.shape[:2], sizes.heads, sizes.head) if name in ("q", "k", "v") else y

        return layer_of(x, product), None


class ScannedDecoder(nn.Module):
    """The linen decoder, whose kernels are stacked ``(layers, in, out)``.

    Attributes:
        sizes: The sizes of a layer.
        layers: How many there are.
        remat: Whether backward keeps each layer's input alone.
        dense: As of `Layer`.
    """

    sizes: Sizes
    layers: int
    remat: bool
    dense: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """The loss."""
        shape = self.sizes.vocabulary, self.sizes.hidden
        embedding = self.param("embedding", nn.initializers.zeros, shape, jnp.bfloat16)
        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer
        scanned = nn.scan(
            layer, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, length=self.layers
        )
        x, _ = scanned(self.sizes, self.dense, name="layers")(embedding[ids], None)
        return loss_of(x, embedding, ids)


def layer_of(x: jax.Array, product: Product) -> jax.Array:
    """A layer's output, given its products by name: attention and a gated feed-forward network."""
    h = normalized(x)
    queries, keys, values = rotated(product("q", h)), rotated(product("k", h)), product("v", h)
    length, size = x.shape[1], queries.shape[-1]
    scores = jnp.einsum("btnh,bsnh->bnts", queries, keys).astype(jnp.float32) / size**0.5
    visible = jnp.tril(jnp.ones((length, length), bool))
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
    length, half = x.shape[1], x.shape[-1] // 2
    angles = jnp.arange(length)[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def loss_of(x: jax.Array, embedding: jax.Array, ids: jax.Array) -> jax.Array:
    """The loss of predicting each next token; the head is the embedding's transpose."""
    logits = jnp.einsum("btd,vd->btv", x, embedding)[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)

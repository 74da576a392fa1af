"""A mixture of experts: a router, experts as fused tensors, and the layer around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.mixture_config import MixtureConfig
from peft_jax.models.modules.decoder_blocks import GatedMLP
from peft_jax.models.modules.expert_parallel import Tensors, on_devices_of_experts
from peft_jax.models.modules.grouped_products import grouped_product
from peft_jax.models.modules.kv_cache import Buffers
from peft_jax.models.modules.layer_scan import LayerCall
from peft_jax.models.modules.layers import linear_maker
from peft_jax.models.modules.remat import kept


class Handed(NamedTuple):
    """The arrays that layers hand on to one another.

    Attributes:
        cache: The cache's buffers, of all layers in one.
        router: The routers' logits so far ``(sparse layers, batch * length, experts)``; None if nobody asks for them.
    """

    cache: Buffers | None
    router: jax.Array | None


class Choice(NamedTuple):
    """The experts of each token.

    Attributes:
        logits: The router's outputs ``(tokens, experts)``.
        weights: The factors of the chosen experts' outputs ``(tokens, k)``.
        experts: Their numbers, int32 ``(tokens, k)``.
    """

    logits: jax.Array
    weights: jax.Array
    experts: jax.Array


class TopKRouter(nnx.Module):
    """Chooses the experts of the largest softmax probabilities.

    Args:
        config: The architecture.
        dtype: Element type of the parameters.
        rngs: Random streams.
        normalised: Whether the factors of a token's experts add up to 1.
        wide: Whether the factors stay in float32.
    """

    def __init__(
        self, config: MixtureConfig, dtype: DTypeLike, rngs: nnx.Rngs, *, normalised: bool, wide: bool = False
    ) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        self.kernel = nnx.Param(init(rngs.params(), (config.hidden_size, config.num_experts), dtype))
        self.top_k, self.normalised, self.wide = config.num_experts_per_tok, normalised, wide

    def __call__(self, x: jax.Array) -> Choice:
        """Choose for x (tokens, hidden)."""
        logits = x @ self.kernel[...]
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), self.top_k)
        if self.normalised:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return Choice(logits, weights if self.wide else weights.astype(logits.dtype), experts)


class Experts(nnx.Module):
    """Gated feed-forward networks in two tensors, of which each token goes through those that are chosen for it.

    Args:
        config: The architecture.
        dtype: Element type of the parameters.
        rngs: Random streams.
        inner: Features between the projections of one.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ("gate_up_proj", "down_proj")

    def __init__(self, config: MixtureConfig, dtype: DTypeLike, rngs: nnx.Rngs, *, inner: int) -> None:
        init = nnx.initializers.normal(config.initializer_range)
        hidden, experts = config.hidden_size, config.num_experts
        self.act = config.hidden_act
        self.gate_up_proj = nnx.Param(init(rngs.params(), (experts, hidden, 2 * inner), dtype))
        self.down_proj = nnx.Param(init(rngs.params(), (experts, inner, hidden), dtype))

    def networks(self, tensors: Tensors, rows: jax.Array, experts: jax.Array, sizes: jax.Array) -> jax.Array:
        """Map rows (n, hidden), sorted by expert.

        Args:
            tensors: The experts' tensors, by their names.
            rows: The rows.
            experts: The number of each row's expert, int32 (n,).
            sizes: The rows of each expert, int32 (experts,).
        """
        inner = kept(grouped_product(rows, tensors["gate_up_proj"], sizes))
        gate, up = jnp.split(inner, 2, axis=-1)
        return grouped_product(ACTIVATIONS[self.act](gate) * up, tensors["down_proj"], sizes)

    def __call__(self, x: jax.Array, choice: Choice) -> jax.Array:
        """Map x (tokens, hidden): tokens are sorted by expert, and only the chosen experts are computed."""
        tensors = {name: getattr(self, name)[...] for name in self.tensor_names}
        return on_devices_of_experts(self.summed, tensors, x, choice.weights, choice.experts).astype(x.dtype)

    def summed(self, tensors: Tensors, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
        """The sum of the experts' outputs for each token, in the element type of their factors.

        Args:
            tensors: The experts' tensors, by their names.
            x: The tokens (tokens, hidden).
            weights: The factors of the outputs (tokens, k).
            experts: The experts' numbers (tokens, k). One that is too large has no output.
        """
        count = len(tensors["down_proj"])
        chosen = experts.reshape(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=count).astype(jnp.int32)  # numbers that are too large are not counted
        out = self.networks(tensors, x[order // experts.shape[1]], jnp.minimum(chosen[order], count - 1), sizes)
        back = jnp.argsort(order)  # a gather, where adding up in place would be a scatter
        parts = jnp.where((chosen < count)[:, None], out[back], 0).reshape(*experts.shape, -1)
        weights = weights[..., None]  # of some routers float32 in any model
        return (parts.astype(weights.dtype) * weights).sum(axis=1)


class SparseMLP(nnx.Module):
    """A router and its experts; a subclass may name the router otherwise.

    Args:
        router: The router.
        experts: The experts.
    """

    router_name: ClassVar[str] = "gate"

    def __init__(self, router: nnx.Module, experts: nnx.Module) -> None:
        setattr(self, self.router_name, router)
        self.experts = experts

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x (batch, length, hidden); also gives the router's logits (batch * length, experts)."""
        rows = x.reshape(-1, x.shape[-1])
        choice = getattr(self, self.router_name)(rows)
        return self.experts(rows, choice).reshape(x.shape), choice.logits


class SharedExpertMLP(SparseMLP):
    """As the base class, with one more expert that all tokens go through, times a gate of its own.

    Args:
        router: The router.
        experts: The experts.
        config: The architecture.
        dtype: Element type of the parameters.
        rngs: Random streams.
        inner: Features between the projections of the shared expert.
    """

    def __init__(
        self,
        router: nnx.Module,
        experts: nnx.Module,
        config: MixtureConfig,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        *,
        inner: int,
    ) -> None:
        super().__init__(router, experts)
        self.shared_expert = GatedMLP(config, dtype, rngs, inner=inner, act=config.hidden_act)
        self.shared_expert_gate = linear_maker(config, dtype, rngs)(config.hidden_size, 1, use_bias=False)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Map x (batch, length, hidden); also gives the router's logits (batch * length, experts)."""
        out, logits = super().__call__(x)
        return out + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x), logits


class MixtureLayer(nnx.Module):
    """Attention and experts, or a dense feed-forward network, each normalised before and added to the stream.

    Args:
        attention: The attention.
        mlp: The feed-forward network, a `SparseMLP` or a dense one.
        make_norm: What makes a norm.
    """

    def __init__(self, attention: nnx.Module, mlp: nnx.Module, make_norm: Callable[[], nnx.Module]) -> None:
        self.self_attn, self.mlp = attention, mlp
        self.input_layernorm, self.post_attention_layernorm = make_norm(), make_norm()
        self.sparse = isinstance(mlp, SparseMLP)

    def __call__(self, x: jax.Array, call: LayerCall, handed: Handed) -> tuple[jax.Array, Handed]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        own = call._replace(place=call.layer)  # dense and sparse layers share the cache's buffers
        out, cache = self.self_attn(self.input_layernorm(x), own, handed.cache)
        x = kept(x + out.astype(x.dtype))
        out, router = self.post_attention_layernorm(x), handed.router
        if self.sparse:
            out, logits = self.mlp(out)
        else:
            out = self.mlp(out)
        if self.sparse and router is not None:
            router = jax.lax.dynamic_update_index_in_dim(router, logits.astype(router.dtype), call.place, 0)
        return x + out.astype(x.dtype), Handed(cache, router)

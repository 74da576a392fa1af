"""The Llama family in Flax NNX: Llama 1 to 3, Mistral, Qwen2 and Qwen3.

Attribute names are the module names of Hugging Face transformers (`model.layers.self_attn.q_proj.kernel`). The layers
are stacked: every leaf below `model.layers` has a leading axis of length num_hidden_layers, and the forward pass is
one `jax.lax.scan` over them, so that compile time does not grow with depth.

The model is plain Flax and knows nothing of adapters or quantization. Its numbers are those of transformers'
`LlamaForCausalLM` and kin with their default ("sdpa") attention.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from peft_jax.models.config import CAUSAL_LM, SEQ_CLS, TOKEN_CLS
from peft_jax.models.llama.config import FULL, SLIDING, LlamaConfig, RopeScaling
from peft_jax.models.llama.rotary import Context, make_context, rotate
from peft_jax.models.modules import functional
from peft_jax.models.modules.activations import ACTIVATIONS
from peft_jax.models.modules.attention import attend, attend_to
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.layers import Embed, RMSNorm, linear_maker
from peft_jax.models.modules.outputs import ModelOutput
from peft_jax.models.modules.positions import (
    Beside,
    Buffers,
    KVCache,
    Prefix,
    extend,
    filled,
    make_cache,
    put_before,
)
from peft_jax.models.modules.remat import kept, rematerialized
from peft_jax.prompts.base import Adaption

__all__ = ["KVCache", "Llama", "LlamaConfig", "RopeScaling", "apply", "init_cache", "init_params", "param_shapes"]


class LlamaAttention(nnx.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        n_q, n_kv = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
        self.head_dim = config.head_size
        self.q_proj = linear(config.hidden_size, n_q, use_bias=config.attention_bias)
        self.k_proj = linear(config.hidden_size, n_kv, use_bias=config.attention_bias)
        self.v_proj = linear(config.hidden_size, n_kv, use_bias=config.attention_bias)
        self.o_proj = linear(n_q, config.hidden_size, use_bias=bool(config.attention_out_bias))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        mask: jax.Array,
        layer: jax.Array,
        beside: Beside,
        buffers: Buffers | None,
    ) -> tuple[jax.Array, Buffers | None]:
        """Attend within x (batch, length, hidden), to this layer's prompt and its part of the cache's buffers."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q, k, v = (kept(project(x)).reshape(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, context), rotate(k, context)
        k, v, buffers = extend(buffers, k, v, layer, context.index)
        seen = attend(q, *put_before(beside.prefix, k, v), mask, causal=buffers is None)
        if beside.adaption is None:
            return self.o_proj(seen.reshape(batch, length, -1)), buffers
        seen = seen + self._attend_to(beside.adaption, q)
        return self.o_proj(seen.reshape(batch, length, -1)) + self._second_bias(beside.adaption, x), buffers

    def _attend_to(self, adaption: Adaption, q: jax.Array) -> jax.Array:
        """What q (batch, length, heads, head_dim) sees of an adaption prompt, through its gate."""
        prompt = adaption.prompts.astype(q.dtype)[None]
        heads = (1, prompt.shape[1], -1, self.head_dim)
        return attend_to(adaption, q, self.k_proj(prompt).reshape(heads), self.v_proj(prompt).reshape(heads))

    def _second_bias(self, adaption: Adaption, x: jax.Array) -> jax.Array:
        """PEFT projects what is seen of an adaption prompt by itself, so that a bias is added once more."""
        if not self.o_proj.use_bias:
            return jnp.zeros((), x.dtype)
        bias: jax.Array = self.o_proj(jnp.zeros((1, 1, self.o_proj.in_features), x.dtype))
        return jnp.where(adaption.on, bias, 0)


class LlamaMLP(nnx.Module):
    """Gated feed-forward network: down(act(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        self.hidden_act = config.hidden_act
        self.gate_proj = linear(config.hidden_size, config.intermediate_size, use_bias=config.mlp_bias)
        self.up_proj = linear(config.hidden_size, config.intermediate_size, use_bias=config.mlp_bias)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, use_bias=config.mlp_bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        gate, up = kept(self.gate_proj(x)), kept(self.up_proj(x))
        return self.down_proj(ACTIVATIONS[self.hidden_act](gate) * up)


class LlamaDecoderLayer(nnx.Module):
    """Attention and feed-forward network, each normalised before and added to the residual stream."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.self_attn = LlamaAttention(config, dtype, rngs)
        self.mlp = LlamaMLP(config, dtype, rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(
        self,
        x: jax.Array,
        context: Context,
        mask: jax.Array,
        layer: jax.Array,
        beside: Beside,
        buffers: Buffers | None,
    ) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, buffers = self.self_attn(self.input_layernorm(x), context, mask, layer, beside, buffers)
        x = kept(x + out.astype(x.dtype))
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype), buffers


class LlamaModel(nnx.Module):
    """Embedding, stacked layers, final norm."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        self.kinds = config.kinds
        self.embed_tokens = Embed(config, dtype, rngs)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.layers = nnx.vmap(lambda key: LlamaDecoderLayer(config, dtype, nnx.Rngs(key)))(keys)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(
        self, x: jax.Array, context: Context, beside: Beside, buffers: Buffers | None, keep: bool, remat: bool
    ) -> tuple[jax.Array, jax.Array | None, Buffers | None]:
        """Run all layers; keep asks for every layer's input as well, remat for recomputing layers in the backward."""
        graph, stacked = nnx.split(self.layers)
        mixed = len(set(self.kinds)) > 1
        slides = jnp.array([kind == SLIDING for kind in self.kinds])

        def body(carry: tuple[jax.Array, Buffers | None], inputs: Any) -> Any:
            state, layer, slide, prompt = inputs
            one = context.masks[self.kinds[0]]
            mask = jnp.where(slide, context.masks[SLIDING], context.masks[FULL]) if mixed else one
            out = nnx.merge(graph, state)(carry[0], context, mask, layer, prompt, carry[1])
            return out, carry[0] if keep else None

        body = rematerialized(body, whole=remat)
        layers = (stacked, jnp.arange(len(self.kinds)), slides, beside)
        (x, buffers), inputs = jax.lax.scan(body, (x, buffers), layers)
        x = self.norm(x)
        return x, jnp.concatenate([inputs, x[None].astype(inputs.dtype)]) if keep else None, buffers


class Llama(nnx.Module):
    """A model of the Llama family with the head of its task.

    Example:
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> Llama(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
        (1, 3, 16)
    """

    backbone = "model"

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.model = LlamaModel(config, dtype, rngs)
        HEAD.add(self, config, linear_maker(config, dtype, rngs))

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
        prefix: Prefix | None = None,
        adaption: Adaption | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        head: bool = True,
        remat: bool = False,
    ) -> ModelOutput:
        """Compute logits; the arguments are those of `apply`."""
        table = self.model.embed_tokens
        x = table.either(input_ids, inputs_embeds)
        context = make_context(self.config, x, attention_mask, position_ids, cache, segment_ids, prefix)
        buffers = None if cache is None else (cache.keys, cache.values)
        h, states, buffers = self.model(x, context, Beside(prefix, adaption), buffers, output_hidden_states, remat)
        output = ModelOutput(last_hidden_state=h)
        if head:
            output = HEAD.run(self, self.config, h[:, -logits_to_keep:], input_ids, table.embedding)
        return output._replace(hidden_states=states, cache=filled(buffers, context.index, x.shape[1]))


HEAD = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})


def init_params(config: LlamaConfig, key: jax.Array, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Make random parameters: normal matrices of deviation initializer_range, scales of one, biases of zero.

    Returns:
        A nested dict of arrays with the names of the Hugging Face modules. Kernels are (in, out), the embedding
        (vocab, hidden); everything below `model.layers` has a leading axis of length num_hidden_layers.

    Example:
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> init_params(config, jax.random.key(0))["model"]["layers"]["mlp"]["up_proj"]["kernel"].shape
        (2, 8, 12)
    """
    return functional.init_params(Llama, config, key, dtype)


def param_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Map each parameter's dotted path to its shape, without making the parameters.

    Example:
        >>> param_shapes(LlamaConfig())["model.norm.scale"]
        (4096,)
    """
    return functional.param_shapes(Llama, config)


def apply(
    config: LlamaConfig,
    params: dict[str, Any],
    input_ids: jax.Array | None = None,
    *,
    inputs_embeds: jax.Array | None = None,
    attention_mask: jax.Array | None = None,
    position_ids: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    cache: KVCache | None = None,
    prefix: Prefix | None = None,
    adaption: Adaption | None = None,
    output_hidden_states: bool = False,
    logits_to_keep: int = 0,
    head: bool = True,
    remat: bool = False,
) -> ModelOutput:
    """Run the model as a pure function of its parameters.

    Args:
        config: The architecture; static under `jax.jit`.
        params: A nested dict of arrays as from `init_params`. Results have the dtype of the embedding.
        input_ids: Token ids (batch, length).
        inputs_embeds: Instead of input_ids, embeddings (batch, length, hidden).
        attention_mask: 0/1 (batch, length), or with a cache (batch, index + length) up to (batch, max_len).
        position_ids: (batch, length) or (1, length). By default 0, 1, ..., counted on from the cache's index.
        segment_ids: (batch, length), the number of the text that each token belongs to, for several texts packed into
            one row: each sees itself alone, and its positions count from 0. Not with a cache.
        cache: Keys and values of earlier positions, as from `init_cache`. The caller sees to it that index + length
            does not exceed max_len (an index is an array, whose value a compiled program cannot check).
        prefix: Keys and values that all positions see before those of the inputs, each (layers, batch or 1, n_virtual,
            kv_heads, head_dim). Positions count on from n_virtual.
        adaption: Gated prompts beside each layer's attention.
        output_hidden_states: Also return the hidden states.
        logits_to_keep: Compute the logits at so many last positions only; 0 for all.
        head: Whether to compute logits; if not, the output has what goes into the head.
        remat: Keep only each layer's input for the backward pass and compute the rest again.

    Returns:
        Logits at every position asked for, and hidden states and the filled cache where asked for.

    Raises:
        ValueError: The leaves of params are not those of config, or an argument's shape does not fit.

    Example:
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> params = init_params(config, jax.random.key(0))
        >>> apply(config, params, jnp.array([[1, 2, 3]])).logits.shape
        (1, 3, 16)
    """
    output: ModelOutput = functional.apply(
        Llama,
        config,
        params,
        input_ids,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        segment_ids=segment_ids,
        cache=cache,
        prefix=prefix,
        adaption=adaption,
        output_hidden_states=output_hidden_states,
        logits_to_keep=logits_to_keep,
        head=head,
        remat=remat,
    )
    return output


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
    """Make an empty cache for max_len positions.

    Example:
        >>> init_cache(LlamaConfig(num_hidden_layers=2), batch=3, max_len=5).keys.shape
        (2, 3, 5, 32, 128)
    """
    return make_cache(config.num_hidden_layers, batch, max_len, config.kv_heads, config.head_size, dtype)

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
from peft_jax.models.llama.config import FULL, SLIDING, LlamaConfig
from peft_jax.models.llama.rotary import Context, make_context, rotate
from peft_jax.models.modules.activations import ACTIVATIONS
from peft_jax.models.modules.attention import attend, attend_to
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import CAUSAL, ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers, KVCache, extend, filled, make_cache
from peft_jax.models.modules.layers import Embed, RMSNorm, linear_maker
from peft_jax.models.modules.outputs import ModelOutput
from peft_jax.models.modules.positions import Beside, put_before
from peft_jax.models.modules.remat import kept, rematerialized
from peft_jax.prompts.base import Adaption


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
        """Attention of q (batch, length, heads, head_dim) to an adaption prompt, through its gate."""
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
        >>> Llama(config, rngs=nnx.Rngs(0))(ForwardInputs(input_ids=jnp.array([[1, 2, 3]]))).logits.shape
        (1, 3, 16)
    """

    backbone = "model"
    takes = CAUSAL

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.config = config
        self.model = LlamaModel(config, dtype, rngs)
        HEAD.add(self, config, linear_maker(config, dtype, rngs))

    def __call__(self, inputs: ForwardInputs) -> ModelOutput:
        """Compute logits, hidden states and the filled cache, where they are asked for."""
        table, cache = self.model.embed_tokens, inputs.cache
        x = table.either(inputs.input_ids, inputs.inputs_embeds)
        context = make_context(self.config, x, inputs)
        buffers = None if cache is None else (cache.keys, cache.values)
        beside = Beside(inputs.prefix, inputs.adaption)
        h, states, buffers = self.model(x, context, beside, buffers, inputs.output_hidden_states, inputs.remat)
        output = ModelOutput(last_hidden_state=h)
        if inputs.head:
            output = HEAD.run(self, self.config, h[:, -inputs.logits_to_keep :], inputs.input_ids, table.embedding)
        return output._replace(hidden_states=states, cache=filled(buffers, context.index, x.shape[1]))


HEAD = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "score"})


def init_cache(config: LlamaConfig, batch: int, max_len: int, dtype: Any = jnp.float32) -> KVCache:
    """Make an empty cache for max_len positions.

    Example:
        >>> init_cache(LlamaConfig(num_hidden_layers=2), batch=3, max_len=5).keys.shape
        (2, 3, 5, 32, 128)
    """
    return make_cache(config.num_hidden_layers, batch, max_len, config.kv_heads, config.head_size, dtype)

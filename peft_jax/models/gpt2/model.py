"""GPT-2 in Flax NNX: learned positions, one fused projection for queries, keys and values, Conv1D layers.

Attribute names are the module names of Hugging Face transformers (`transformer.h.attn.c_attn.kernel`); the layers are
stacked and scanned, as in `peft_jax.models.llama.model`. Numbers are those of transformers' `GPT2LMHeadModel` and kin
with their default ("sdpa") attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.config import CAUSAL_LM, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.gpt2.config import GPT2Config
from peft_jax.models.modules.attention import attend, attend_to, dropping_of
from peft_jax.models.modules.base_dropout import Site, dropped, key_of
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import CAUSAL, ForwardInputs
from peft_jax.models.modules.kv_cache import Buffers, extend, filled
from peft_jax.models.modules.layer_scan import stacked
from peft_jax.models.modules.layers import Embed, LayerNorm, linear_maker
from peft_jax.models.modules.outputs import ModelOutput
from peft_jax.models.modules.positions import Beside, Places, causal_places, check_room, put_before
from peft_jax.models.modules.remat import kept, rematerialized
from peft_jax.models.modules.shadow_state import beside_shadow, layers_of, with_state, without_state
from peft_jax.prompts.base import Adaption


class GPT2Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear, hidden = linear_maker(config, dtype, rngs), config.hidden_size
        self.head_dim = hidden // config.num_attention_heads
        self.scaled, self.by_layer = config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx
        self.rates = config.rates
        self.c_attn = linear(hidden, 3 * hidden)
        self.c_proj = linear(hidden, hidden)

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        layer: jax.Array,
        beside: Beside,
        buffers: Buffers | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Buffers | None]:
        """Attend within x (batch, length, hidden), to this layer's prompt and its part of the cache's buffers."""
        batch, length, _ = x.shape
        q, k, v = self._heads(x)
        adapted = None if beside.adaption is None else self._attend_to(beside.adaption, q)
        if not self.scaled:
            q = q * jnp.asarray(self.head_dim**0.5, q.dtype)  # attend divides by it
        if self.by_layer:
            q = q / (layer + 1).astype(q.dtype)
        k, v, buffers = extend(buffers, k, v, layer, places.index)
        k, v = put_before(beside.prefix, k, v)
        dropping = dropping_of(key, self.rates.attention)
        seen = attend(q, k, v, places.mask, causal=buffers is None, dropping=dropping)
        out = self.c_proj(seen.reshape(batch, length, -1))
        out = dropped(out, key, self.rates.attention_out, Site.ATTENTION_OUT)
        return out if adapted is None else out + adapted.reshape(out.shape).astype(out.dtype), buffers

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values (batch, length, heads, head_dim) of x (batch, length, hidden)."""
        q, k, v = (a.reshape(*x.shape[:2], -1, self.head_dim) for a in jnp.split(kept(self.c_attn(x)), 3, axis=-1))
        return q, k, v

    def _attend_to(self, adaption: Adaption, q: jax.Array) -> jax.Array:
        """Attention of q (batch, length, heads, head_dim) to an adaption prompt; PEFT does not project it here."""
        _, k, v = self._heads(adaption.prompts.astype(q.dtype)[None])
        return attend_to(adaption, q, k, v)


class GPT2MLP(nnx.Module):
    """Feed-forward network."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear, inner = linear_maker(config, dtype, rngs), config.n_inner or 4 * config.hidden_size
        self.act = config.activation_function
        self.c_fc = linear(config.hidden_size, inner)
        self.c_proj = linear(inner, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        return self.c_proj(ACTIVATIONS[self.act](kept(self.c_fc(x))))


class GPT2Block(nnx.Module):
    """Attention and feed-forward network, each normalised before and added to the residual stream."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.rate = config.rates.mlp_out
        self.ln_1 = LayerNorm(config.hidden_size, config.layer_norm_epsilon, dtype)
        self.attn = GPT2Attention(config, dtype, rngs)
        self.ln_2 = LayerNorm(config.hidden_size, config.layer_norm_epsilon, dtype)
        self.mlp = GPT2MLP(config, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        layer: jax.Array,
        beside: Beside,
        buffers: Buffers | None,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Buffers | None]:
        """Map x (batch, length, hidden); its dtype is kept, also where a parameter's dtype is wider."""
        out, buffers = self.attn(self.ln_1(x), places, layer, beside, buffers, key)
        x = kept(x + out.astype(x.dtype))
        return x + dropped(self.mlp(self.ln_2(x)), key, self.rate, Site.MLP_OUT).astype(x.dtype), buffers


class GPT2Model(nnx.Module):
    """Embeddings of tokens and positions, stacked layers, final norm."""

    def __init__(self, config: GPT2Config, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.wte = Embed(config, dtype, rngs)
        self.wpe = Embed(config, dtype, rngs, config.max_position_embeddings)
        self.h = stacked(partial(GPT2Block, config, dtype), config.num_hidden_layers, rngs)
        self.ln_f = LayerNorm(config.hidden_size, config.layer_norm_epsilon, dtype)

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        beside: Beside,
        handed: Any,
        keep: bool,
        remat: bool,
        key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """Run all layers; keep asks for every layer's input as well, remat for recomputing layers in the backward."""
        graph, stacked = nnx.split(self.h)

        def body(carry: tuple[jax.Array, Any], inputs: Any) -> Any:
            state, layer, prompt = inputs
            block, own = nnx.merge(graph, state), key_of(key, layer)

            def run(x: jax.Array, buffers: Buffers | None) -> tuple[jax.Array, Buffers | None]:
                return block(x, places, layer, prompt, buffers, own)

            return beside_shadow(run, prompt.shadow, *carry), carry[0] if keep else None

        body = rematerialized(body, whole=remat)
        count = jax.tree.leaves(stacked)[0].shape[0]
        (x, handed), inputs = jax.lax.scan(body, (x, handed), (stacked, jnp.arange(count), beside))
        x = self.ln_f(x)
        return x, jnp.concatenate([inputs, x[None].astype(inputs.dtype)]) if keep else None, handed


class GPT2(nnx.Module):
    """A GPT-2 with the head of its task."""

    backbone = "transformer"
    takes = CAUSAL | {"token_type_ids"}

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        self.transformer = GPT2Model(config, dtype, rngs)
        HEAD.add(self, config, linear_maker(config, dtype, rngs))

    def __call__(self, inputs: ForwardInputs) -> ModelOutput:
        """Compute logits, hidden states and the filled cache, where they are asked for."""
        inner, cache = self.transformer, inputs.cache
        x = inner.wte.either(inputs.input_ids, inputs.inputs_embeds)
        batch, length, _ = x.shape
        places = causal_places(batch, length, inputs)
        check_room(places, inputs, self.config.max_position_embeddings)
        if inputs.token_type_ids is not None:
            x = x + inner.wte(inputs.token_type_ids)
        key = inputs.dropout_key
        x = dropped(x + inner.wpe(places.positions), key, self.config.rates.embedding, Site.EMBEDDING)
        buffers = None if cache is None else (cache.keys, cache.values)
        beside = Beside(inputs.prefix, inputs.adaption, layers_of(inputs.shadow))
        handed = with_state(buffers, inputs.shadow)
        asked = inputs.output_hidden_states, inputs.remat
        h, states, handed = inner(x, places, beside, handed, *asked, key_of(key, Site.LAYERS))
        buffers = without_state(handed, inputs.shadow)
        output = ModelOutput(last_hidden_state=h)
        if inputs.head:
            last = h[:, -inputs.logits_to_keep :]
            output = HEAD.run(self, self.config, last, inputs, inner.wte.embedding)
        return output._replace(hidden_states=states, cache=filled(buffers, places.index, length))


HEAD = DecoderHead({CAUSAL_LM: "lm_head", SEQ_CLS: "score", TOKEN_CLS: "classifier", QUESTION_ANS: "qa_outputs"})

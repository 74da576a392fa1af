"""BERT and RoBERTa in Flax NNX: encoders with learned positions and token types, and the heads of five tasks.

Attribute names are the module names of Hugging Face transformers (`bert.encoder.layer.attention.self.query.kernel`);
the layers are stacked and scanned, as in `peft_jax.models.llama.model`. Numbers are those of transformers' classes with
their default ("sdpa") attention.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.bert.config import BertConfig, RobertaConfig
from peft_jax.models.bert.task_heads import add_head, run_head
from peft_jax.models.modules.attention import attend, dropping_of
from peft_jax.models.modules.base_dropout import Site, dropped, key_of
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import Prefix
from peft_jax.models.modules.layer_scan import stacked
from peft_jax.models.modules.layers import Embed, LayerNorm, linear_maker
from peft_jax.models.modules.outputs import ModelOutput
from peft_jax.models.modules.positions import check_positions, put_before, seen_slots, with_prefix
from peft_jax.models.modules.remat import kept, rematerialized


class BertEmbeddings(nnx.Module):
    """Embeddings of tokens, token types and positions, summed and normalised."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.word_embeddings = Embed(config, dtype, rngs)
        positions, untrained = config.max_position_embeddings, config.untrained_position
        self.position_embeddings = Embed(config, dtype, rngs, positions, untrained_row=untrained)
        self.token_type_embeddings = Embed(config, dtype, rngs, config.type_vocab_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)
        self.rate = config.rates.embedding
        if isinstance(config, RobertaConfig):
            self.declared = ("token_type_embeddings", "position_embeddings")

    def __call__(
        self, x: jax.Array, token_type_ids: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        """Add to the tokens' x (batch, length, hidden); ids and positions are (batch or 1, length)."""
        x = x + self.token_type_embeddings(token_type_ids) + self.position_embeddings(positions)
        return dropped(self.LayerNorm(x), key, self.rate, Site.EMBEDDING)


class BertSelfAttention(nnx.Module):
    """Queries, keys and values."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear, hidden = linear_maker(config, dtype, rngs), config.hidden_size
        self.head_dim, self.rate = hidden // config.num_attention_heads, config.rates.attention
        self.query, self.key, self.value = linear(hidden, hidden), linear(hidden, hidden), linear(hidden, hidden)

    def __call__(self, x: jax.Array, mask: jax.Array, prefix: Prefix | None, key: jax.Array | None) -> jax.Array:
        """Attend within x (batch, length, hidden) and to this layer's prefix."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (kept(linear(x)).reshape(heads) for linear in (self.query, self.key, self.value))
        k, v = put_before(prefix, k, v)
        return attend(q, k, v, mask, dropping=dropping_of(key, self.rate)).reshape(x.shape)


class BertOutput(nnx.Module):
    """A linear layer, added to the residual stream and normalised after."""

    def __init__(
        self, config: BertConfig, in_features: int, dtype: DTypeLike, rngs: nnx.Rngs, *, rate: float, site: Site
    ) -> None:
        self.rate, self.site = rate, site
        self.dense = linear_maker(config, dtype, rngs)(in_features, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps, dtype)

    def __call__(self, x: jax.Array, residual: jax.Array, key: jax.Array | None) -> jax.Array:
        """Map x (batch, length, in) and add it to the residual (batch, length, hidden), whose dtype is kept."""
        out = dropped(self.dense(x), key, self.rate, self.site)
        return self.LayerNorm(kept(out.astype(residual.dtype) + residual))


class BertAttention(nnx.Module):
    """Self-attention and its output."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.self = BertSelfAttention(config, dtype, rngs)
        rate = config.rates.attention_out
        self.output = BertOutput(config, config.hidden_size, dtype, rngs, rate=rate, site=Site.ATTENTION_OUT)

    def __call__(self, x: jax.Array, mask: jax.Array, prefix: Prefix | None, key: jax.Array | None) -> jax.Array:
        """Map x (batch, length, hidden)."""
        return self.output(self.self(x, mask, prefix, key), x, key)


class BertIntermediate(nnx.Module):
    """The first half of the feed-forward network."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.act = config.hidden_act
        self.dense = linear_maker(config, dtype, rngs)(config.hidden_size, config.intermediate_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (batch, length, hidden)."""
        return ACTIVATIONS[self.act](kept(self.dense(x)))


class BertLayer(nnx.Module):
    """Attention and feed-forward network."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = BertAttention(config, dtype, rngs)
        self.intermediate = BertIntermediate(config, dtype, rngs)
        rate = config.rates.mlp_out
        self.output = BertOutput(config, config.intermediate_size, dtype, rngs, rate=rate, site=Site.MLP_OUT)

    def __call__(self, x: jax.Array, mask: jax.Array, prefix: Prefix | None, key: jax.Array | None) -> jax.Array:
        """Map x (batch, length, hidden)."""
        x = self.attention(x, mask, prefix, key)
        return self.output(self.intermediate(x), x, key)


class BertEncoder(nnx.Module):
    """The stacked layers."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.layer = stacked(partial(BertLayer, config, dtype), config.num_hidden_layers, rngs)

    def __call__(
        self, x: jax.Array, mask: jax.Array, prefix: Prefix | None, keep: bool, remat: bool, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Run all layers; keep asks for every layer's input as well, remat for recomputing layers in the backward."""
        graph, stacked = nnx.split(self.layer)

        def body(x: jax.Array, inputs: Any) -> Any:
            state, before, layer = inputs
            return nnx.merge(graph, state)(x, mask, before, key_of(key, layer)), x if keep else None

        count = jax.tree.leaves(stacked)[0].shape[0]
        x, inputs = jax.lax.scan(rematerialized(body, whole=remat), x, (stacked, prefix, jnp.arange(count)))
        return x, jnp.concatenate([inputs, x[None]]) if keep else None


class BertPooler(nnx.Module):
    """The first token's output through one more layer."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.dense = linear_maker(config, dtype, rngs)(config.hidden_size, config.hidden_size)

    def __call__(self, h: jax.Array) -> jax.Array:
        """Map h (batch, length, hidden) to (batch, hidden)."""
        return jnp.tanh(self.dense(h[:, 0]))


class BertModel(nnx.Module):
    """Embeddings, encoder and, for some tasks, pooler."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.embeddings = BertEmbeddings(config, dtype, rngs)
        self.encoder = BertEncoder(config, dtype, rngs)
        if config.has_pooler:
            self.pooler = BertPooler(config, dtype, rngs)


class Bert(nnx.Module):
    """A BERT with the head of its task."""

    backbone = "bert"
    takes = frozenset(
        (
            "input_ids",
            "inputs_embeds",
            "attention_mask",
            "token_type_ids",
            "position_ids",
            "prefix",
            "dropout_key",
            "output_hidden_states",
            "remat",
        )
    )

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        if config.heads_first:
            self.declared = ("cls", "lm_head", "classifier", "qa_outputs", self.backbone)
        setattr(self, self.backbone, BertModel(config, dtype, rngs))
        add_head(self, config, dtype, rngs)

    def __call__(self, inputs: ForwardInputs) -> ModelOutput:
        """Compute the head's outputs, and hidden states where they are asked for."""
        inner, prefix = getattr(self, self.backbone), inputs.prefix
        x = inner.embeddings.word_embeddings.either(inputs.input_ids, inputs.inputs_embeds)
        batch, length, _ = x.shape
        positions, types = inputs.position_ids, inputs.token_type_ids
        if positions is None:
            positions = self.positions(inputs.input_ids, length, inputs.virtual)
        check_positions(positions, batch, length)
        if types is None:
            types = jnp.zeros((1, length), jnp.int32)
        mask = jnp.ones((1, 1, length), bool)
        if inputs.attention_mask is not None:
            mask = seen_slots(inputs.attention_mask, batch, length, length, False)[:, None, :]
        x = inner.embeddings(x, types, positions, inputs.dropout_key)
        asked, key = (inputs.output_hidden_states, inputs.remat), key_of(inputs.dropout_key, Site.LAYERS)
        h, states = inner.encoder(x, with_prefix(mask, prefix), prefix, *asked, key)
        pooled = inner.pooler(h) if self.config.has_pooler else None
        table = inner.embeddings.word_embeddings.embedding
        return run_head(self, self.config, h, pooled, table, inputs.dropout_key)._replace(hidden_states=states)

    def positions(self, input_ids: jax.Array | None, length: int, virtual: int) -> jax.Array:
        """Positions (batch or 1, length) where none are told: they count on from the virtual ones."""
        self.check_room(length + virtual)
        return virtual + jnp.arange(length)[None]

    def check_room(self, needed: int) -> None:
        """Raise ValueError if there are fewer positions than needed."""
        if needed > self.config.max_position_embeddings:
            raise ValueError(
                f"{needed} positions are needed, but this model has {self.config.max_position_embeddings}. "
                "Shorten the inputs."
            )


class Roberta(Bert):
    """A RoBERTa with the head of its task; its positions leave padding out."""

    backbone = "roberta"

    def positions(self, input_ids: jax.Array | None, length: int, virtual: int) -> jax.Array:
        """Positions as transformers counts them: over the tokens that are not padding, which stays at its id."""
        virtual = 0 if input_ids is None else virtual
        pad = self.config.pad_token_id or 0
        self.check_room(length + virtual + pad + 1)
        if input_ids is None:
            return pad + 1 + jnp.arange(length)[None]
        is_token = (input_ids != pad).astype(jnp.int32)
        return (jnp.cumsum(is_token, axis=1) + virtual) * is_token + pad

"""The parts of every decoder: an embedding, stacked layers, a final norm, a head, a cache.

A family's ``model.py`` has its own layers and these two classes with the names of its modules::

    class LlamaModel(DecoderBackbone):
        embedding_name = "embed_tokens"
        ...

    class Llama(Decoder):
        backbone_class, head = LlamaModel, DecoderHead(...)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.modules.base_dropout import Site, dropped, key_of
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import CAUSAL, ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache, filled, make_cache
from peft_jax.models.modules.layer_scan import Run, Stacks, run_layers, stacked
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import Embed, linear_maker
from peft_jax.models.modules.outputs import HiddenStates, ModelOutput
from peft_jax.models.modules.positions import Beside, Places, causal_places
from peft_jax.models.modules.shadow_state import layers_of, with_state, without_state

MakeLayer = Callable[[nnx.Rngs], nnx.Module]


class DecoderBackbone(nnx.Module):
    """All of a decoder but its head.

    A subclass names its modules, makes its layers and its final norm, and says what each kind of layer sees. The hooks
    `embedded`, `placed`, `per_layer`, `start`, `finish`, `routers` and `leaving` are for those that need more.
    """

    embedding_name: ClassVar[str]
    layers_name: ClassVar[str] = "layers"
    norm_name: ClassVar[str] = "norm"

    def __init__(self, config: Any, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.config = config
        setattr(self, self.embedding_name, Embed(config, dtype, rngs, width=config.embedding_size))
        self.add_embeddings(dtype, rngs)
        make = self.make_layer(dtype)
        if isinstance(make, Mapping):
            setattr(self, self.layers_name, Stacks(make, config.stacks, rngs))
        else:
            setattr(self, self.layers_name, stacked(make, config.num_hidden_layers, rngs))
        setattr(self, self.norm_name, self.make_norm(dtype))

    def add_embeddings(self, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        """Make further modules before the layers."""

    def make_layer(self, dtype: DTypeLike) -> MakeLayer | Mapping[str, MakeLayer]:
        """A function that makes a layer from random streams; by stack, where `ModelConfig.stacks` has names."""
        raise NotImplementedError

    def make_norm(self, dtype: DTypeLike) -> nnx.Module:
        """The final norm."""
        raise NotImplementedError

    def views(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> dict[str, View]:
        """The view of each kind of layer, for embeddings x (batch, length, hidden)."""
        raise NotImplementedError

    def embedded(self, inputs: ForwardInputs) -> jax.Array:
        """The embeddings (batch, length, hidden) of the inputs."""
        return self.table.either(inputs.input_ids, inputs.inputs_embeds, self.config.embedding_scale)

    def placed(self, x: jax.Array, places: Places, inputs: ForwardInputs) -> jax.Array:
        """The layers' input for embeddings x (batch, length, hidden); learned positions are added here."""
        return x

    def per_layer(self, x: jax.Array, inputs: ForwardInputs) -> Any:
        """Arrays of which each layer gets its own part, with an axis of layers in front."""
        return None

    def start(self, x: jax.Array, buffers: PyTree, inputs: ForwardInputs) -> Any:
        """The tree that the first layer is handed beside its input; `finish` takes it from the last."""
        return buffers

    def finish(self, handed: Any) -> Any:
        """The cache's buffers, from what the last layer hands on."""
        return handed

    def routers(self, handed: Any) -> jax.Array | None:
        """The routers' outputs (layers, batch * length, experts), from what the last layer hands on, if asked for."""
        return None

    def leaving(self, x: jax.Array) -> jax.Array:
        """The head's input, for the last hidden state x (batch, length, hidden) after the final norm."""
        return x

    @property
    def table(self) -> Embed:
        """The embedding of tokens."""
        embed: Embed = getattr(self, self.embedding_name)
        return embed

    def __call__(self, inputs: ForwardInputs) -> ModelOutput:
        """Run all layers; the output has last and hidden states and the filled cache."""
        x = self.embedded(inputs)
        batch, length, _ = x.shape
        places = causal_places(batch, length, inputs)
        key = inputs.dropout_key
        x = dropped(self.placed(x, places, inputs), key, self.config.rates.embedding, Site.EMBEDDING)
        run = Run(
            views=self.views(x, places, inputs),
            kinds=self.config.kinds,
            stacks=self.config.stacks,
            index=places.index,
            beside=Beside(inputs.prefix, inputs.adaption, layers_of(inputs.shadow)),
            own=self.per_layer(x, inputs),
            keep=inputs.output_hidden_states,
            remat=inputs.remat,
            key=key_of(key, Site.LAYERS),
        )
        cached = None if inputs.cache is None else inputs.cache.buffers
        first = with_state(self.start(x, cached, inputs), inputs.shadow)
        x, handed, states = run_layers(getattr(self, self.layers_name), x, first, run)
        handed = without_state(handed, inputs.shadow)
        x = self.leaving(getattr(self, self.norm_name)(x))
        all_states: HiddenStates = None
        if states is not None and x.shape[-1] == states.shape[-1]:
            all_states = jnp.concatenate([states, x[None].astype(states.dtype)])
        elif states is not None:
            all_states = (*states, x)
        cache = None if cached is None else filled(self.finish(handed), places.index, length)
        routers = self.routers(handed)
        return ModelOutput(last_hidden_state=x, hidden_states=all_states, cache=cache, router_logits=routers)


class Holder(nnx.Module):
    """A module that has others and does nothing itself."""


class Decoder(nnx.Module):
    """A decoder with the head of its task; a subclass names its backbone and its head."""

    backbone: ClassVar[str] = "model"
    backbone_class: ClassVar[type[DecoderBackbone]]
    head: ClassVar[DecoderHead]
    takes: ClassVar[frozenset[str]] = CAUSAL

    def __init__(self, config: Any, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> None:
        self.config = config
        *outer, name = self.own_backbone.split(".")
        holder: nnx.Module = self
        for part in outer:  # in a multimodal model the backbone is a part of another module
            setattr(holder, part, Holder())
            holder = getattr(holder, part)
        setattr(holder, name, self.backbone_class(config, dtype, rngs))
        self.head.add(self, config, linear_maker(config, dtype, rngs))

    @property
    def own_backbone(self) -> str:
        """The path of the backbone in the model of this task."""
        return self.config.own_backbone or self.backbone

    def __call__(self, inputs: ForwardInputs) -> ModelOutput:
        """Compute logits, hidden states and the filled cache, where they are asked for."""
        inner: Any = functools.reduce(getattr, self.own_backbone.split("."), self)
        found: ModelOutput = inner(inputs)
        if not inputs.head:
            return found
        last = found.last_hidden_state[:, -inputs.logits_to_keep :]
        output: ModelOutput = self.head.run(self, self.config, last, inputs, inner.table.embedding)
        return output._replace(hidden_states=found.hidden_states, cache=found.cache, router_logits=found.router_logits)


def decoder_cache(config: ModelConfig, batch: int, max_len: int, dtype: DTypeLike = jnp.float32) -> KVCache:
    """An empty cache for max_len positions of a decoder whose layers have one shape.

    Raises:
        ValueError: The model has a table of positions with fewer rows.

    Example:
        >>> from peft_jax.models import LlamaConfig
        >>> decoder_cache(LlamaConfig(num_hidden_layers=2), batch=3, max_len=5).keys.shape
        (2, 3, 5, 32, 128)
    """
    if config.position_rows is not None and max_len > config.position_rows:
        raise ValueError(
            f"Prompts and new tokens take {max_len} positions, but this model has {config.position_rows}. "
            "Shorten the prompts, or ask for fewer tokens (max_new_tokens)."
        )
    return make_cache(config.num_hidden_layers, batch, max_len, config.kv_heads, config.head_size, dtype)

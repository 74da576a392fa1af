"""The output of architectures."""

from typing import Any, NamedTuple

import jax

from peft_jax.models.modules.kv_cache import KVCache, MixedCache

# All layers' in one array, or one by one where the last has another width.
HiddenStates = jax.Array | tuple[jax.Array, ...] | None


class ModelOutput(NamedTuple):
    """Output of an architecture.

    Attributes:
        logits: Outputs of the head: ``(batch, length, n)``, or ``(batch, n)`` of a sequence classifier; None of a bare
            model.
        hidden_states: If asked for, ``(layers + 1, batch, length, hidden)``: the embeddings, then the output of each
            layer, the last with the final norm if there is one, as transformers lists them. A tuple of them where the
            last one has another width (OPT-350M).
        cache: The one passed in, with the new positions filled.
        last_hidden_state: ``(batch, length, hidden)``, of a bare model, or of one that is called without its head.
        pooler_output: ``(batch, hidden)``, of a bare model with a pooler.
        router_logits: If asked for, the outputs of the routers of all layers that have one,
            ``(layers, batch * length, experts)``.
        shadow_state: What the small network of a SHADOW adapter gives, ``(batch, length, hidden)``.
        scalings: Of a model with an X-LoRA, the scales of its LoRAs, ``(batch, length, modules, LoRAs)``.
    """

    logits: Any = None
    hidden_states: HiddenStates = None
    cache: KVCache | MixedCache | None = None
    last_hidden_state: Any = None
    pooler_output: jax.Array | None = None
    router_logits: jax.Array | None = None
    shadow_state: jax.Array | None = None
    scalings: jax.Array | None = None

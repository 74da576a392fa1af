"""The record of OLMoE."""

from peft_jax.models.expert_names import SHARDING, USUAL_NAMES, expert_layouts
from peft_jax.models.family import OTHERWISE, Family, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.olmoe import model
from peft_jax.models.olmoe.config import OlmoeConfig

OLMOE = Family(
    config=OlmoeConfig,
    module=model.Olmoe,
    layouts={**expert_layouts("layers"), **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.Olmoe.head.names,
    peft_defaults=dict.fromkeys(OlmoeConfig.stems, {OTHERWISE: {}}),
    sharding=SHARDING,
    single_experts=USUAL_NAMES,
    converted=("olmoe",),
    replicable=tuple(OlmoeConfig.tasks),
    init_cache=decoder_cache,
)

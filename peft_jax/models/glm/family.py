"""The record of GLM-4, in both forms."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.glm import model
from peft_jax.models.glm.config import GlmConfig
from peft_jax.models.modules.decoder import decoder_cache

GLM = Family(
    config=GlmConfig,
    module=model.Glm,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Glm.head.names,
    peft_defaults=dict.fromkeys(GlmConfig.stems, {OTHERWISE: {}}),  # PEFT has none for them
    sharding=Sharding(columns=r"(q|k|v|gate_up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(GlmConfig.tasks),
    init_cache=decoder_cache,
)

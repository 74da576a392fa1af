"""The record of Ministral and Ministral 3."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.ministral import model
from peft_jax.models.ministral.config import MinistralConfig
from peft_jax.models.modules.decoder import decoder_cache

MINISTRAL = Family(
    config=MinistralConfig,
    module=model.Ministral,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Ministral.head.names,
    peft_defaults=dict.fromkeys(MinistralConfig.stems, {OTHERWISE: {}}),  # PEFT has none for them
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(MinistralConfig.tasks),
    init_cache=decoder_cache,
)

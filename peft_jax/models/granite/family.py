"""The record of Granite."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.granite import model
from peft_jax.models.granite.config import GraniteConfig
from peft_jax.models.modules.decoder import decoder_cache

GRANITE = Family(
    config=GraniteConfig,
    module=model.Granite,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Granite.head.names,
    peft_defaults={"granite": {OTHERWISE: {}}},  # PEFT has none for it
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(GraniteConfig.tasks),
    init_cache=decoder_cache,
)

"""The record of OLMo 2 and 3."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.olmo import model
from peft_jax.models.olmo.config import OlmoConfig

OLMO = Family(
    config=OlmoConfig,
    module=model.Olmo,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Olmo.head.names,
    peft_defaults=dict.fromkeys(OlmoConfig.stems, {OTHERWISE: {}}),  # PEFT has none for them
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(OlmoConfig.tasks),
    init_cache=decoder_cache,
)

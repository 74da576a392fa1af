"""The record of SmolLM3."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.smollm3 import model
from peft_jax.models.smollm3.config import SmolLM3Config

SMOLLM3 = Family(
    config=SmolLM3Config,
    module=model.SmolLM3,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.SmolLM3.head.names,
    peft_defaults=dict.fromkeys(SmolLM3Config.stems, {OTHERWISE: {}}),  # PEFT has none for them
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(SmolLM3Config.tasks),
    init_cache=decoder_cache,
)

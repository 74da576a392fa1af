"""The record of StarCoder2."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.starcoder2 import model
from peft_jax.models.starcoder2.config import Starcoder2Config

STARCODER2 = Family(
    config=Starcoder2Config,
    module=model.Starcoder2,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Starcoder2.head.names,
    peft_defaults={"starcoder2": {OTHERWISE: {}}},  # PEFT has none for it
    sharding=Sharding(columns=r"(q|k|v)_proj|c_fc|lm_head", rows=r"(o|c)_proj", tables="embed_tokens"),
    replicable=tuple(Starcoder2Config.tasks),
    init_cache=decoder_cache,
)

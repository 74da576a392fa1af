"""The record of Phi-3 and Phi-4."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.phi3 import model
from peft_jax.models.phi3.config import Phi3Config

PHI3 = Family(
    config=Phi3Config,
    module=model.Phi3,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Phi3.head.names,
    peft_defaults={"phi3": {OTHERWISE: {}}},  # PEFT has none for it
    sharding=Sharding(columns=r"qkv_proj|gate_up_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    replicable=tuple(Phi3Config.tasks),
    init_cache=decoder_cache,
)

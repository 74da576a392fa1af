"""The record of StarCoder2."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.gguf_architecture import BIASED_FIELDS, GGUFArchitecture
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.starcoder2 import model
from peft_jax.models.starcoder2.config import Starcoder2Config

GGUF = {
    "starcoder2": GGUFArchitecture(
        model_type="starcoder2",
        fields={**BIASED_FIELDS, "attention.layer_norm_epsilon": "norm_epsilon"},
    ),
}

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
    gguf=GGUF,
)

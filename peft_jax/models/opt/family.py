"""The record of OPT."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.opt import model
from peft_jax.models.opt.config import OPTConfig

ALL = targets("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

OPT = Family(
    config=OPTConfig,
    module=model.OPT,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="decoder.embed_tokens",
    heads=model.OPT.head.names,
    peft_defaults={
        "opt": {
            OTHERWISE: targets("q_proj", "v_proj"),
            "ADALORA": ALL,
            "BEFT": targets("v_proj"),
            "IA3": targets("q_proj", "k_proj", "fc2", feedforward_modules=("fc2",)),
            "LN_TUNING": {},
            "OSF": ALL,
            "VBLORA": ALL,
        },
    },
    sharding=Sharding(columns=r"(q|k|v)_proj|fc1|lm_head", rows="out_proj|fc2", tables="embed_tokens"),
    init_cache=decoder_cache,
)

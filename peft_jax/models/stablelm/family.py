"""The record of StableLM."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.stablelm import model
from peft_jax.models.stablelm.config import StableLmConfig

NO_DEFAULT = ("ADALORA", "BEFT", "IA3", "LN_TUNING", "VBLORA")  # methods that have none in PEFT

STABLELM = Family(
    config=StableLmConfig,
    module=model.StableLm,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.StableLm.head.names,
    peft_defaults={"stablelm": {OTHERWISE: targets("q_proj", "v_proj"), **dict.fromkeys(NO_DEFAULT, {})}},
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(StableLmConfig.tasks),
    init_cache=decoder_cache,
)

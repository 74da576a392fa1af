"""The record of GPT-J."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gptj import model
from peft_jax.models.gptj.config import GPTJConfig
from peft_jax.models.modules.decoder import decoder_cache

GPTJ = Family(
    config=GPTJConfig,
    module=model.GPTJ,
    layouts=stacked_layouts("h"),
    backbone="transformer",
    embedding="wte",
    heads=model.GPTJ.head.names,
    peft_defaults={
        "gptj": {
            OTHERWISE: targets("q_proj", "v_proj"),
            "BEFT": targets("v_proj"),
            "IA3": targets("q_proj", "v_proj", "fc_out", feedforward_modules=("fc_out",)),
            "LN_TUNING": targets("ln_1", "ln_f"),
            "OSF": targets("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        },
    },
    sharding=Sharding(columns=r"(q|k|v)_proj|fc_in|lm_head", rows="out_proj|fc_out", tables="wte"),
    ignored=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),  # causal masks in old checkpoints
    init_cache=decoder_cache,
)

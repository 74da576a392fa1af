"""The record of GPT-2."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gpt2 import model
from peft_jax.models.gpt2.config import GPT2Config

GPT2 = Family(
    config=GPT2Config,
    module=model.GPT2,
    layouts=stacked_layouts("h", stored_in_out=True),
    backbone="transformer",
    embedding="wte",
    heads=model.HEAD.names,
    peft_defaults={
        "gpt2": {
            OTHERWISE: targets("c_attn"),
            "ADAPTION_PROMPT": {"target_modules": "attn"},
            "BEFT": {},
            "C3A": targets("mlp.c_proj"),
            "FOURIERFT": targets("mlp.c_proj"),
            "IA3": targets("c_attn", "mlp.c_proj", feedforward_modules=("mlp.c_proj",)),
            "LN_TUNING": targets("ln_1", "ln_2", "ln_f"),
            "WAVEFT": targets("mlp.c_proj"),
        },
    },
    sharding=Sharding(columns="c_attn|c_fc|lm_head", rows="c_proj", tables="wte"),
    adaption_carrier="c_attn",
    ignored=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),  # causal masks in old checkpoints
    init_cache=model.init_cache,
)

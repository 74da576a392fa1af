"""The record of Phi-1 to Phi-2."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.phi import model
from peft_jax.models.phi.config import PhiConfig

PHI = Family(
    config=PhiConfig,
    module=model.Phi,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Phi.head.names,
    peft_defaults={
        "phi": {
            OTHERWISE: targets("q_proj", "v_proj", "fc1", "fc2"),
            "ADALORA": {},
            "BEFT": targets("v_proj"),
            "FROD": targets("q_proj", "v_proj"),
            "IA3": targets("q_proj", "v_proj", "fc2", feedforward_modules=("fc2",)),
            "LN_TUNING": targets("input_layernorm", "final_layernorm"),
            "OSF": targets("q_proj", "k_proj", "v_proj"),
            "PVERA": targets("q_proj", "v_proj"),
            "SHIRA": targets("q_proj", "v_proj"),
            "VBLORA": {},
            "VERA": targets("q_proj", "v_proj"),
        },
    },
    sharding=Sharding(columns=r"(q|k|v)_proj|fc1|lm_head", rows=r"self_attn\.dense|fc2", tables="embed_tokens"),
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    replicable=tuple(PhiConfig.tasks),
    init_cache=decoder_cache,
)

"""The record of Mixtral."""

from peft_jax.models.expert_names import SHARDING, expert_layouts
from peft_jax.models.family import OTHERWISE, Family, stacked_layouts, targets
from peft_jax.models.mixtral import model
from peft_jax.models.mixtral.config import MixtralConfig
from peft_jax.models.modules.decoder import decoder_cache

NAMES = {
    "mlp.experts.gate_up_proj": ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    "mlp.experts.down_proj": ("block_sparse_moe.experts.{}.w2.weight",),
    "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
}

MIXTRAL = Family(
    config=MixtralConfig,
    module=model.Mixtral,
    layouts={**expert_layouts("layers"), **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.Mixtral.head.names,
    peft_defaults={
        "mixtral": {
            OTHERWISE: targets("q_proj", "v_proj"),
            "ADALORA": {},
            "BEFT": targets("v_proj"),
            "IA3": targets("k_proj", "v_proj", "w2", feedforward_modules=("w2",)),
            "LN_TUNING": {},
            "OSF": targets("q_proj", "k_proj", "v_proj", "o_proj"),
            "VBLORA": {},
        }
    },
    sharding=SHARDING,
    single_experts=NAMES,
    converted=("mixtral",),
    replicable=tuple(MixtralConfig.tasks),
    init_cache=decoder_cache,
)

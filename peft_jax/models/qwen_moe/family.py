"""The record of Qwen's mixtures of experts."""

from peft_jax.models.expert_names import SHARDING, USUAL_NAMES, expert_layouts
from peft_jax.models.family import OTHERWISE, Family, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.qwen_moe import model
from peft_jax.models.qwen_moe.config import QwenMoeConfig
from peft_jax.models.qwen_moe.gguf_experts import GGUF

QWEN_MOE = Family(
    config=QwenMoeConfig,
    module=model.QwenMoe,
    layouts={**expert_layouts("layers"), **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.QwenMoe.head.names,
    peft_defaults=dict.fromkeys(QwenMoeConfig.stems, {OTHERWISE: {}}),
    sharding=SHARDING,
    single_experts=USUAL_NAMES,
    converted=("qwen3_moe",),  # not Qwen2-MoE, which PEFT's table lacks
    replicable=tuple(QwenMoeConfig.tasks),
    init_cache=decoder_cache,
    gguf=GGUF,
)

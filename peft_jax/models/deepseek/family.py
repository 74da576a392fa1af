"""The record of DeepSeek-V2 and V3."""

from peft_jax.core.layout import Layout
from peft_jax.models.deepseek import model
from peft_jax.models.deepseek.config import DeepseekConfig
from peft_jax.models.deepseek.latent_attention import init_cache
from peft_jax.models.expert_names import SHARDING, USUAL_NAMES, expert_layouts
from peft_jax.models.family import KNOWN, OTHERWISE, Family, stacked_layouts

CORRECTION = r"(.*\.)?layers\..*\.e_score_correction_bias"
BIASES = {CORRECTION: Layout(stack=(0,), inp=(), out=(1,), source=KNOWN)}

DEEPSEEK = Family(
    config=DeepseekConfig,
    module=model.Deepseek,
    layouts={**expert_layouts("layers"), **BIASES, **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.Deepseek.head.names,
    peft_defaults=dict.fromkeys(DeepseekConfig.stems, {OTHERWISE: {}}),
    sharding=SHARDING._replace(columns=rf"{SHARDING.columns}|(q|kv)_b_proj"),
    surplus=(r"model\.layers\.61\..*",),  # DeepSeek-V3's module that predicts a second token
    single_experts=USUAL_NAMES,
    converted=tuple(DeepseekConfig.stems),
    always_float32=CORRECTION,
    replicable=tuple(DeepseekConfig.tasks),
    init_cache=init_cache,
)

"""The record of gpt-oss."""

from peft_jax.core.layout import Layout
from peft_jax.models.expert_names import SHARDING, expert_layouts
from peft_jax.models.family import KNOWN, OTHERWISE, Family, stacked_layouts
from peft_jax.models.gpt_oss import model
from peft_jax.models.gpt_oss.config import GptOssConfig
from peft_jax.models.gpt_oss.gguf_sinks import GGUF
from peft_jax.models.modules.decoder import decoder_cache

SINKS = {r"(.*\.)?layers\..*\.sinks": Layout(stack=(0,), inp=(), out=(1,), source=KNOWN)}

GPT_OSS = Family(
    config=GptOssConfig,
    module=model.GptOss,
    layouts={**expert_layouts("layers", router="router", stored_in_out=True), **SINKS, **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.GptOss.head.names,
    peft_defaults=dict.fromkeys(GptOssConfig.stems, {OTHERWISE: {}}),
    sharding=SHARDING,
    float32=r"(.*\.)?(input_layernorm|post_attention_layernorm|norm)\.scale",
    replicable=tuple(GptOssConfig.tasks),
    init_cache=decoder_cache,
    gguf=GGUF,
)

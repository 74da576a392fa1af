"""The record of the Llama family: Llama 1 to 3, Mistral, Qwen2 and Qwen3."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.llama import model
from peft_jax.models.llama.config import LlamaConfig
from peft_jax.models.llama.gguf_layout import GGUF
from peft_jax.models.modules.decoder import decoder_cache

IA3_OF_KEYS = targets("k_proj", "v_proj", "down_proj", feedforward_modules=("down_proj",))
IA3_OF_QUERIES = targets("q_proj", "v_proj", "down_proj", feedforward_modules=("down_proj",))
ADAPTION_PROMPT = {"target_modules": "self_attn"}
EVERY_MATRIX = targets("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
BOTH_NORMS = targets("input_layernorm", "post_attention_layernorm", "norm")
QWEN = {
    OTHERWISE: targets("q_proj", "v_proj"),
    "BEFT": targets("v_proj"),
    "IA3": IA3_OF_QUERIES,
    "LN_TUNING": targets("post_attention_layernorm"),
    "OSF": EVERY_MATRIX,
}

LLAMA = Family(
    config=LlamaConfig,
    module=model.Llama,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Llama.head.names,
    peft_defaults={
        "llama": {
            OTHERWISE: targets("q_proj", "v_proj"),
            "ADAPTION_PROMPT": ADAPTION_PROMPT,
            "BEFT": targets("v_proj"),
            "IA3": IA3_OF_KEYS,
            "LN_TUNING": BOTH_NORMS,
            "OSF": EVERY_MATRIX,
        },
        "mistral": {
            OTHERWISE: targets("q_proj", "v_proj"),
            "ADALORA": {},
            "ADAPTION_PROMPT": ADAPTION_PROMPT,
            "BEFT": targets("v_proj"),
            "IA3": IA3_OF_KEYS,
            "LN_TUNING": BOTH_NORMS,
            "OSF": EVERY_MATRIX,
            "VBLORA": {},
        },
        "qwen2": QWEN,
        "qwen3": QWEN,
    },
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    adaption_carrier="k_proj",
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    replicable=tuple(LlamaConfig.tasks),
    init_cache=decoder_cache,
    gguf=GGUF,
)

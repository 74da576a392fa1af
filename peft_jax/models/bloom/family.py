"""The record of BLOOM."""

from peft_jax.models.bloom import model
from peft_jax.models.bloom.config import BloomConfig
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.modules.decoder import decoder_cache

BLOOM = Family(
    config=BloomConfig,
    module=model.Bloom,
    layouts=stacked_layouts("h"),
    backbone="transformer",
    embedding="word_embeddings",
    heads=model.Bloom.head.names,
    peft_defaults={
        "bloom": {
            OTHERWISE: targets("query_key_value"),
            "BEFT": {},
            "IA3": targets("query_key_value", "mlp.dense_4h_to_h", feedforward_modules=("mlp.dense_4h_to_h",)),
            "LN_TUNING": targets("input_layernorm", "post_attention_layernorm", "ln_f"),
            "OSF": targets("query_key_value", "dense_4h_to_h"),
        },
    },
    sharding=Sharding(
        columns="query_key_value|dense_h_to_4h|lm_head",
        rows=r"self_attention\.dense|dense_4h_to_h",
        tables="word_embeddings",
    ),
    init_cache=decoder_cache,
)

"""The record of Falcon."""

from peft_jax.models.falcon import model
from peft_jax.models.falcon.config import FalconConfig
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.modules.decoder import decoder_cache

FALCON = Family(
    config=FalconConfig,
    module=model.Falcon,
    layouts=stacked_layouts("h"),
    backbone="transformer",
    embedding="word_embeddings",
    heads=model.Falcon.head.names,
    peft_defaults={
        "falcon": {
            OTHERWISE: targets("query_key_value"),
            "ADALORA": {},
            "BEFT": {},
            "IA3": targets("query_key_value", "dense_4h_to_h", feedforward_modules=("dense_4h_to_h",)),
            "LN_TUNING": targets("input_layernorm", "post_attention_layernorm", "ln_f"),
            "OSF": targets("query_key_value", "dense_4h_to_h"),
            "VBLORA": {},
        },
    },
    sharding=Sharding(
        columns="query_key_value|dense_h_to_4h|lm_head",
        rows=r"self_attention\.dense|dense_4h_to_h",
        tables="word_embeddings",
    ),
    ignored=(r".*\.rotary_emb\.inv_freq", r".*\.self_attention\.maybe_rotary\.inv_freq"),
    init_cache=decoder_cache,
)

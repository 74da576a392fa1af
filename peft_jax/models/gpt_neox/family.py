"""The record of GPT-NeoX and Pythia."""

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gpt_neox import model
from peft_jax.models.gpt_neox.config import GPTNeoXConfig
from peft_jax.models.modules.decoder import decoder_cache

GPT_NEOX = Family(
    config=GPTNeoXConfig,
    module=model.GPTNeoX,
    layouts=stacked_layouts("layers"),
    backbone="gpt_neox",
    embedding="embed_in",
    heads=model.GPTNeoX.head.names,
    peft_defaults={
        "gpt_neox": {
            OTHERWISE: targets("query_key_value"),
            "BEFT": {},
            "IA3": targets("query_key_value", "dense_4h_to_h", feedforward_modules=("dense_4h_to_h",)),
            "LN_TUNING": {},
            "OSF": targets("query_key_value", "dense_4h_to_h"),
        },
    },
    sharding=Sharding(
        columns="query_key_value|dense_h_to_4h|lm_head", rows=r"attention\.dense|dense_4h_to_h", tables="embed_in"
    ),
    # In old checkpoints: causal masks, and what is computed from the config instead.
    ignored=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
    moved={"embed_out.": "lm_head."},
    written={"lm_head.": "embed_out."},  # as transformers writes it, for earlier versions of itself
    init_cache=decoder_cache,
)

"""The record of BLOOM."""

from typing import Any

import numpy as np

from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.bloom import model
from peft_jax.models.bloom.config import BloomConfig
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gguf_architecture import GGUFArchitecture
from peft_jax.models.modules.decoder import decoder_cache


def by_heads(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """Query, key and value of each head together; llama.cpp writes all queries, all keys and all values."""
    if ".attn_qkv." not in tensor.name:
        return tensor
    in_file = np.arange(len(tensor)).reshape(3, config.num_attention_heads, -1)
    return tensor.reordered(in_file.swapaxes(0, 1).reshape(-1))


GGUF = {
    "bloom": GGUFArchitecture(
        model_type="bloom",
        fields={
            "context_length": "seq_length",
            "block_count": "n_layer",
            "embedding_length": "hidden_size",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        restore=by_heads,
    ),
}

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
    gguf=GGUF,
)

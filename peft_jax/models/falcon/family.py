"""The record of Falcon."""

from typing import Any

import numpy as np

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.falcon import model
from peft_jax.models.falcon.config import FalconConfig
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gguf_architecture import BIASED_FIELDS, GGUFArchitecture
from peft_jax.models.modules.decoder import decoder_cache


def by_groups(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """Queries, key and value of each group together; llama.cpp writes all queries, all keys and all values."""
    if ".attn_qkv." not in tensor.name:
        return tensor
    groups, heads = config.kv_heads, config.num_attention_heads
    size = len(tensor) // (heads + 2 * groups)
    rows = np.arange(len(tensor))
    queries, keys, values = np.split(rows, [heads * size, (heads + groups) * size])
    parts = [part.reshape(groups, -1) for part in (queries, keys, values)]
    return tensor.reordered(np.concatenate(parts, axis=1).reshape(-1))


def form(file: GGUFFile) -> dict[str, Any]:
    """The fields of config.json that tell Falcon-7B's form from that of the larger ones, which has two norms."""
    has_two = "blk.0.attn_norm_2.weight" in file.tensors
    return {"new_decoder_architecture": has_two, "multi_query": not has_two, "parallel_attn": True, "bias": False}


GGUF = {
    "falcon": GGUFArchitecture(
        model_type="falcon",
        fields={
            **BIASED_FIELDS,
            "feed_forward_length": "ffn_hidden_size",
            "attention.head_count_kv": "num_kv_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        more_fields=form,
        restore=by_groups,
    ),
}

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
    gguf=GGUF,
)

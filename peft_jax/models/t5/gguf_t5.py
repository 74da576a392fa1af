"""How GGUF files spell T5: the feed-forward network's form and the head's follow from the tensors."""

from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.models.gguf_architecture import GGUFArchitecture

GATE = "enc.blk.0.ffn_gate.weight"
OF_UMT5 = "enc.blk.1.attn_rel_b.weight"


def feed_forward(file: GGUFFile) -> dict[str, Any]:
    """The form of the feed-forward network; llama.cpp computes T5's relu, and its gelu where there is a gate.

    transformers takes every file for a gated one with a relu.

    Raises:
        ValueError: if the file is one of UMT5, which has relative positions in each block.
    """
    if OF_UMT5 in file.tensors:
        raise ValueError(f"'{file.path}' is a UMT5 ({OF_UMT5}), which is not supported. Take a T5, FLAN-T5 or mT5.")
    return {"feed_forward_proj": "gated-gelu" if GATE in file.tensors else "relu"}


GGUF = {
    "t5": GGUFArchitecture(
        model_type="t5",
        fields={
            "context_length": "n_positions",
            "block_count": "num_layers",
            "decoder_block_count": "num_decoder_layers",
            "feed_forward_length": "d_ff",
            "embedding_length": "d_model",
            "attention.key_length": "d_kv",
            "attention.head_count": "num_heads",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "attention.relative_buckets_count": "relative_attention_num_buckets",
            "decoder_start_token_id": "decoder_start_token_id",
        },
        more_fields=feed_forward,
    ),
}

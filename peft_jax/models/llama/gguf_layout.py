"""How GGUF files spell the Llama family: rows of heads in another order."""

from typing import Any

import numpy as np

from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.gguf_architecture import DECODER_FIELDS, GGUFArchitecture
from peft_jax.models.gguf_rope import ROPE_FACTORS, rope_fields


def halves_apart(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """Queries and keys with the halves of each head one after the other; llama.cpp writes them row by row in turn."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.kv_heads}
    module = tensor.name.split(".")[-2]
    if module not in heads:
        return tensor
    in_file = np.arange(len(tensor)).reshape(heads[module], -1, 2)
    return tensor.reordered(in_file.swapaxes(1, 2).reshape(-1))


GGUF = {
    "llama": GGUFArchitecture(
        model_type="llama",
        fields=DECODER_FIELDS,
        more_fields=rope_fields,
        restore=halves_apart,
        ignored=(ROPE_FACTORS,),
    ),
    "qwen2": GGUFArchitecture(model_type="qwen2", fields=DECODER_FIELDS, more_fields=rope_fields),
    "qwen3": GGUFArchitecture(model_type="qwen3", fields=DECODER_FIELDS, more_fields=rope_fields),
}

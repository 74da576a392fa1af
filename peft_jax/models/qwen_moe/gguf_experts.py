"""How GGUF files spell Qwen's mixtures: all experts of a layer in three tensors."""

import dataclasses
from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.gguf_architecture import DECODER_FIELDS, GGUFArchitecture
from peft_jax.models.gguf_rope import rope_fields
from peft_jax.models.qwen_moe.config import SECOND, THIRD

FIELDS = {
    **DECODER_FIELDS,
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SECOND_FIELDS = {key: field for key, field in FIELDS.items() if field != "head_dim"}
SECOND_FIELDS["expert_shared_feed_forward_length"] = "shared_expert_intermediate_size"


def with_output(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """The gate of the shared expert with its one output, an axis that llama.cpp leaves out."""
    if ".ffn_gate_inp_shexp." not in tensor.name or tensor.stored.ndim == 2:
        return tensor
    return dataclasses.replace(tensor, stored=tensor.stored[None])


def third_fields(file: GGUFFile) -> dict[str, Any]:
    """Fields of Qwen3-MoE; llama.cpp has the factors of a token's experts add up to 1 whatever the file says."""
    return {"norm_topk_prob": True, **rope_fields(file)}


GGUF = {
    "qwen2moe": GGUFArchitecture(model_type=SECOND, fields=SECOND_FIELDS, more_fields=rope_fields, restore=with_output),
    "qwen3moe": GGUFArchitecture(model_type=THIRD, fields=FIELDS, more_fields=third_fields),
}

"""How GGUF files spell Gemma 2 and 3: norms with 1 added, and facts that follow from others."""

from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.gemma.config import EVERY, SECOND, THIRD
from peft_jax.models.gguf_architecture import DECODER_FIELDS, GGUFArchitecture
from peft_jax.models.gguf_window import check_pattern

FIELDS = {**DECODER_FIELDS, "attention.sliding_window": "sliding_window"}
CAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
LOCAL_ROPE = {"rope.freq_base_swa": "rope_local_base_freq"}
MODEL_TYPES = {"gemma2": SECOND, "gemma3": THIRD}
# Files do not tell by what scores are divided. llama.cpp knows the largest models by their number of layers: it is the
# root of hidden_size / num_attention_heads there, and that of the size of a head elsewhere.
LAYERS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}


def counted_from_one(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """The scales of norms as transformers has them; llama.cpp writes what they multiply by."""
    return tensor.plus(-1.0) if tensor.name.endswith("norm.weight") else tensor


def scale_and_rope(file: GGUFFile) -> dict[str, Any]:
    """The fields of config.json for the factor of scores, and for rotary positions that are stretched.

    Raises:
        ValueError: if they are stretched in a way that is not supported, or other layers than the usual ones slide.
    """
    name = file.architecture
    check_pattern(file, EVERY[MODEL_TYPES[name]])
    kind, factor = file.get(f"{name}.rope.scaling.type", "none"), file.get(f"{name}.rope.scaling.factor")
    if kind not in ("none", "linear"):
        raise ValueError(f"'{file.path}' has rope.scaling.type={kind!r}, which is not supported. Take another model.")
    is_largest = file.get(f"{name}.block_count") == LAYERS_OF_LARGEST[name]
    width, heads = file.get(f"{name}.embedding_length"), file.get(f"{name}.attention.head_count")
    head_dim = file.get(f"{name}.attention.key_length")
    divisor = width // heads if is_largest else head_dim
    fields = {} if divisor is None else {"query_pre_attn_scalar": divisor}
    return fields if kind == "none" else {**fields, "rope_scaling": {"rope_type": "linear", "factor": factor}}


GGUF = {
    "gemma2": GGUFArchitecture(
        model_type=MODEL_TYPES["gemma2"],
        fields={**FIELDS, **CAPS},
        more_fields=scale_and_rope,
        restore=counted_from_one,
    ),
    "gemma3": GGUFArchitecture(
        model_type=MODEL_TYPES["gemma3"],
        fields={**FIELDS, **LOCAL_ROPE},
        more_fields=scale_and_rope,
        restore=counted_from_one,
    ),
}

"""How GGUF files spell gpt-oss: gates and what they gate apart, matrices of experts as ``(out, in)``.

As llama.cpp's converter (conversion/gpt_oss.py) writes them and its ``openai-moe`` reads them. transformers 5.23 is no
reference here: it fails on files whose positions are stretched, which all published ones are, as it takes the length of
a key for its value; and it leaves experts and sinks at random, as it looks for ``ffn_*_projs`` and ``attn_sinks`` where
files have ``ffn_*_exps.weight`` and ``attn_sinks.weight``.
"""

from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.gguf_architecture import DECODER_FIELDS, GGUFArchitecture
from peft_jax.models.gguf_rope import rope_fields
from peft_jax.models.gguf_window import check_pattern

FIELDS = {
    **DECODER_FIELDS,
    "attention.sliding_window": "sliding_window",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
}
EVERY = 2  # layers of which the last one sees all
# By the end of a checkpoint's key the ends of the names that llama.cpp's converter has for it.
CONVERTED = {
    "self_attn.sinks": ("self_attn.sinks.weight",),
    "experts.gate_up_proj": ("experts.gate_proj.weight", "experts.up_proj.weight"),
    "experts.gate_up_proj_bias": ("experts.gate_proj.bias", "experts.up_proj.bias"),
    "experts.down_proj": ("experts.down_proj.weight",),
    "experts.down_proj_bias": ("experts.down_proj.bias",),
}


def converted(key: str) -> tuple[str, ...]:
    """The names that llama.cpp's converter gives a checkpoint's tensor."""
    for end, names in CONVERTED.items():
        if key.endswith(end):
            return tuple(key.removesuffix(end) + name for name in names)
    return (key,)


def in_out(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """Matrices of experts as ``(in, out)``, as checkpoints of gpt-oss have them."""
    return tensor.transposed() if tensor.name.endswith("_exps.weight") else tensor


def window_and_rope(file: GGUFFile) -> dict[str, Any]:
    """The fields of config.json that follow from others in the file.

    Files do not say whether YaRN rounds its bounds to whole pairs of features. All published gpt-oss do not, and
    neither does OpenAI's program; llama.cpp rounds them whatever the model.

    Raises:
        ValueError: if rotary positions are stretched in a way that is not supported, turn a part of the heads, or other
            layers than the usual ones slide; or if the experts are of another width than ``feed_forward_length``.
    """
    check_pattern(file, EVERY)
    widths = [file.get(f"{file.architecture}.{prefix}feed_forward_length") for prefix in ("expert_", "")]
    if None not in widths and widths[0] != widths[1]:
        raise ValueError(
            f"'{file.path}' has expert_feed_forward_length={widths[0]} and feed_forward_length={widths[1]}, which are "
            "one number in a gpt-oss. Take an undamaged copy."
        )
    scaling = rope_fields(file).get("rope_scaling", {"rope_type": "default"})  # a config without any has gpt-oss' own
    return {"rope_scaling": {**scaling, "truncate": False} if scaling["rope_type"] == "yarn" else scaling}


GGUF = {
    "gpt-oss": GGUFArchitecture(
        model_type="gpt_oss",
        fields=FIELDS,
        more_fields=window_and_rope,
        restore=in_out,
        converted=converted,
    ),
}

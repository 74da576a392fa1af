"""The record of StableLM."""

from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gguf_architecture import BIASED_FIELDS, GGUFArchitecture
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.stablelm import model
from peft_jax.models.stablelm.config import StableLmConfig

NO_DEFAULT = ("ADALORA", "BEFT", "IA3", "LN_TUNING", "VBLORA")  # methods that have none in PEFT


def switches(file: GGUFFile) -> dict[str, Any]:
    """The fields of config.json that the tensors tell, and the part of a head that is turned."""
    width, heads = file.get("stablelm.embedding_length"), file.get("stablelm.attention.head_count")
    turned = file.get("stablelm.rope.dimension_count")
    part = {} if None in (width, heads, turned) else {"partial_rotary_factor": turned / (width // heads)}
    return {
        "use_qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in file.tensors,
        **part,
    }


GGUF = {
    "stablelm": GGUFArchitecture(
        model_type="stablelm",
        fields={**BIASED_FIELDS, "attention.layer_norm_epsilon": "layer_norm_eps"},
        more_fields=switches,
    ),
}

STABLELM = Family(
    config=StableLmConfig,
    module=model.StableLm,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.StableLm.head.names,
    peft_defaults={"stablelm": {OTHERWISE: targets("q_proj", "v_proj"), **dict.fromkeys(NO_DEFAULT, {})}},
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(StableLmConfig.tasks),
    init_cache=decoder_cache,
    gguf=GGUF,
)

"""The record of Phi-3 and Phi-4."""

from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.gguf_architecture import DECODER_FIELDS, GGUFArchitecture
from peft_jax.models.gguf_rope import rope_fields
from peft_jax.models.modules.decoder import decoder_cache
from peft_jax.models.phi3 import model
from peft_jax.models.phi3.config import Phi3Config

LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


def window_and_rope(file: GGUFFile) -> dict[str, Any]:
    """The fields of config.json for the window, 0 for none in the file, and for rotary positions.

    Raises:
        ValueError: if rotary positions are stretched in a way that is not supported, or turn a part of the heads.
    """
    if any(name in file.tensors for name in LONG_ROPE):
        raise ValueError(
            f"'{file.path}' stretches its rotary positions by {' and '.join(LONG_ROPE)}, which is not supported in "
            "GGUF files. Take the checkpoint that it was made from."
        )
    window = file.get("phi3.attention.sliding_window") or None
    return {**rope_fields(file), "sliding_window": window}


GGUF = {"phi3": GGUFArchitecture(model_type="phi3", fields=DECODER_FIELDS, more_fields=window_and_rope)}

PHI3 = Family(
    config=Phi3Config,
    module=model.Phi3,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Phi3.head.names,
    peft_defaults={"phi3": {OTHERWISE: {}}},  # PEFT has none for it
    sharding=Sharding(columns=r"qkv_proj|gate_up_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    replicable=tuple(Phi3Config.tasks),
    init_cache=decoder_cache,
    gguf=GGUF,
)

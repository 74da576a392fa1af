"""The record of Gemma 4's text model."""

import dataclasses

from peft_jax.core.layout import Layout
from peft_jax.models.family import KNOWN, OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.gemma4 import model
from peft_jax.models.gemma4.config import MULTIMODAL, TEXT, Gemma4Config, Gemma4MultimodalConfig

SCALARS = {r"(.*\.)?layers\..*\.layer_scalar": Layout(stack=(0,), inp=(), out=(1,), source=KNOWN)}

GEMMA4 = Family(
    config=Gemma4Config,
    module=model.Gemma4,
    layouts={**SCALARS, **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.Gemma4.head.names,
    peft_defaults={TEXT: {OTHERWISE: {}}},
    sharding=Sharding(
        columns=r"(q|k|v|gate|up)_proj|lm_head|per_layer_input_gate|per_layer_model_projection",
        rows=r"(o|down)_proj|per_layer_projection",
        tables="embed_tokens|embed_tokens_per_layer",
    ),
    # Layers that share keys and values may have projections to them nevertheless.
    surplus=(r".*layers\.\d+\.self_attn\.(k|v)_(proj|norm)\..*",),
    beside={TEXT: MULTIMODAL},
    init_cache=model.init_cache,
)

GEMMA4_MULTIMODAL = dataclasses.replace(
    GEMMA4,
    config=Gemma4MultimodalConfig,
    module=model.Gemma4Multimodal,
    backbone=model.Gemma4Multimodal.backbone,
    peft_defaults={
        MULTIMODAL: {
            OTHERWISE: {"target_modules": r".*language_model\..*\.(q_proj|v_proj)"},
            "BEFT": {},
            "IA3": {},
            "LN_TUNING": {},
            "OSF": {},
        }
    },
    ignored=(r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\..*",),
    written={f"{model.Gemma4Multimodal.backbone}.": "model."},
    beside={MULTIMODAL: TEXT},
)

"""The record of Gemma 1 and 2 and the text model of Gemma 3."""

import dataclasses

from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gemma import model
from peft_jax.models.gemma.config import FIRST, MULTIMODAL, SECOND, THIRD, Gemma3Config, GemmaConfig
from peft_jax.models.gemma.gguf_norms import GGUF
from peft_jax.models.modules.decoder import decoder_cache

DEFAULTS = {
    OTHERWISE: targets("q_proj", "v_proj"),
    "BEFT": targets("v_proj"),
    "IA3": targets("q_proj", "v_proj", "down_proj", feedforward_modules=("down_proj",)),
    "LN_TUNING": targets("input_layernorm", "post_attention_layernorm", "norm"),
    "OSF": targets("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"),
}
OF_BOTH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
SANDWICHED = {
    **DEFAULTS,
    "LN_TUNING": targets("input_layernorm", "post_attention_layernorm", *OF_BOTH, "norm"),
}

GEMMA = Family(
    config=GemmaConfig,
    module=model.Gemma,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=model.Gemma.head.names,
    peft_defaults={FIRST: DEFAULTS, SECOND: SANDWICHED, THIRD: SANDWICHED},
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    beside={THIRD: MULTIMODAL},
    replicable=tuple(GemmaConfig.tasks),
    init_cache=decoder_cache,
    gguf=GGUF,
)

GEMMA3 = dataclasses.replace(
    GEMMA,
    config=Gemma3Config,
    module=model.Gemma3,
    backbone=model.Gemma3.backbone,
    peft_defaults={MULTIMODAL: {OTHERWISE: {}}},
    ignored=(*GEMMA.ignored, r"(model\.)?(vision_tower|multi_modal_projector)\..*"),
    moved={"language_model.model.": f"{model.Gemma3.backbone}.", "language_model.lm_head.": "lm_head."},
    written={f"{model.Gemma3.backbone}.": "model."},
    beside={MULTIMODAL: THIRD},
    replicable=(),
    gguf={},
)

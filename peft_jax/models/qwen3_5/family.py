"""The record of Qwen3.5's text model."""

import dataclasses

from peft_jax.core.layout import Layout
from peft_jax.models.family import KNOWN, OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.qwen3_5 import model
from peft_jax.models.qwen3_5.config import TEXT, WHOLE, Qwen35Config, Qwen35MultimodalConfig

# Leaves of a layer that are no matrices: the convolution's kernel, and two numbers a head.
OF_CHANNELS = Layout(stack=(0,), inp=(), out=(1, 2, 3), source=KNOWN)
OF_HEADS = Layout(stack=(0,), inp=(), out=(1,), source=KNOWN)

QWEN3_5 = Family(
    config=Qwen35Config,
    module=model.Qwen35,
    layouts={
        r"(.*\.)?layers\..*\.conv1d\.weight": OF_CHANNELS,
        r"(.*\.)?layers\..*\.(A_log|dt_bias)": OF_HEADS,
        **stacked_layouts("layers"),
    },
    backbone="model",
    embedding="embed_tokens",
    heads=model.Qwen35.head.names,
    peft_defaults={TEXT: {OTHERWISE: {}}},  # PEFT 0.21 has no defaults for it
    sharding=Sharding(
        columns=r"(q|k|v|gate|up)_proj|in_proj_(qkv|z|b|a)|lm_head", rows=r"(o|down|out)_proj", tables="embed_tokens"
    ),
    ignored=(r"mtp\..*", r"model\.visual\..*"),  # as in transformers: further heads, and the model of images
    moved={"model.language_model.": "model."},
    beside={TEXT: WHOLE},
    init_cache=model.init_cache,
)

# Checkpoints with images are read as the text model, as `AutoModelForCausalLM` of transformers reads them; this is what
# the text model becomes under an adapter whose keys are those of the model with images.
QWEN3_5_MULTIMODAL = dataclasses.replace(
    QWEN3_5,
    config=Qwen35MultimodalConfig,
    module=model.Qwen35Multimodal,
    backbone=model.Qwen35Multimodal.backbone,
    peft_defaults={WHOLE: {OTHERWISE: {}}},
    moved={},
    written={f"{model.Qwen35Multimodal.backbone}.": "model."},
    beside={WHOLE: TEXT},
)

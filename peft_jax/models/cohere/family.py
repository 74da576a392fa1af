"""The record of Cohere's models."""

from peft_jax.core.layout import Layout
from peft_jax.models.cohere import model
from peft_jax.models.cohere.config import CohereConfig
from peft_jax.models.family import KNOWN, OTHERWISE, Family, Sharding, stacked_layouts
from peft_jax.models.modules.decoder import decoder_cache

SCALE_OF_HEADS = Layout(stack=(0,), inp=(), out=(1, 2), index_after=("layers",), source=KNOWN)

COHERE = Family(
    config=CohereConfig,
    module=model.Cohere,
    layouts={r".*\.(q|k)_norm\.scale": SCALE_OF_HEADS, **stacked_layouts("layers")},
    backbone="model",
    embedding="embed_tokens",
    heads=model.Cohere.head.names,
    peft_defaults=dict.fromkeys(CohereConfig.stems, {OTHERWISE: {}}),  # PEFT has none for them
    sharding=Sharding(columns=r"(q|k|v|gate|up)_proj|lm_head", rows=r"(o|down)_proj", tables="embed_tokens"),
    replicable=tuple(CohereConfig.tasks),
    init_cache=decoder_cache,
)

"""The table of architectures: a new one is its files, and one entry here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.models import gpt2, llama
from peft_jax.models.config import ModelConfig, as_dict, check_model_type
from peft_jax.models.family import Family, stacked_layouts

LLAMA = Family(
    config=llama.LlamaConfig,
    init_params=llama.init_params,
    param_shapes=llama.param_shapes,
    apply=llama.apply,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads=llama.HEAD.names,
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    init_cache=llama.init_cache,
)

GPT2 = Family(
    config=gpt2.GPT2Config,
    init_params=gpt2.init_params,
    param_shapes=gpt2.param_shapes,
    apply=gpt2.apply,
    layouts=stacked_layouts("h"),
    backbone="transformer",
    embedding="wte",
    heads=gpt2.HEAD.names,
    stored_in_out=r"(.*\.)?h\..*\.kernel",
    ignored=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),  # causal masks in old checkpoints
    init_cache=gpt2.init_cache,
)

FAMILIES = (LLAMA, GPT2)

BY_MODEL_TYPE: Mapping[str, Family] = MappingProxyType(
    {model_type: family for family in FAMILIES for model_type in family.config.stems}
)


def family_of(config: ModelConfig) -> Family:
    """The family of a config.

    Example:
        >>> family_of(llama.LlamaConfig(model_type="mistral")) is LLAMA
        True
    """
    return BY_MODEL_TYPE[config.model_type]


def read_architecture(hf: Any) -> ModelConfig:
    """The config of whatever family a Hugging Face config (dict or object) is of.

    Raises:
        ValueError: if there is no such family here, or the config asks for what is not supported.

    Example:
        >>> read_architecture({"model_type": "qwen3", "num_hidden_layers": 2}).qk_norm
        True
    """
    model_type = check_model_type(as_dict(hf).get("model_type"), BY_MODEL_TYPE)
    return BY_MODEL_TYPE[model_type].config.from_hf(hf)

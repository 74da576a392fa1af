"""The table of architectures: a new one is its files, and one entry here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.models import llama
from peft_jax.models.config import CAUSAL_LM, ModelConfig, as_dict, check_model_type
from peft_jax.models.family import Family, stacked_layouts

LLAMA = Family(
    config=llama.LlamaConfig,
    init_params=llama.init_params,
    param_shapes=llama.param_shapes,
    apply=llama.apply,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed_tokens",
    heads={CAUSAL_LM: ("lm_head",)},
    ignored=(r".*\.rotary_emb\.inv_freq",),  # in old checkpoints; computed from the config instead
    init_cache=llama.init_cache,
)

FAMILIES = (LLAMA,)

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

"""The table of architectures: a new one is a folder, and one entry here."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.core.short_errors import short_errors
from peft_jax.models.bert.family import BERT as BERT
from peft_jax.models.bert.family import ROBERTA as ROBERTA
from peft_jax.models.bloom.family import BLOOM as BLOOM
from peft_jax.models.cohere.family import COHERE as COHERE
from peft_jax.models.config import ModelConfig
from peft_jax.models.deepseek.family import DEEPSEEK as DEEPSEEK
from peft_jax.models.falcon.family import FALCON as FALCON
from peft_jax.models.family import Family
from peft_jax.models.gemma.family import GEMMA as GEMMA
from peft_jax.models.gemma.family import GEMMA3 as GEMMA3
from peft_jax.models.gemma4.family import GEMMA4 as GEMMA4
from peft_jax.models.gemma4.family import GEMMA4_MULTIMODAL as GEMMA4_MULTIMODAL
from peft_jax.models.gguf_architecture import GGUFArchitecture
from peft_jax.models.glm.family import GLM as GLM
from peft_jax.models.gpt2.family import GPT2 as GPT2
from peft_jax.models.gpt_neox.family import GPT_NEOX as GPT_NEOX
from peft_jax.models.gpt_oss.family import GPT_OSS as GPT_OSS
from peft_jax.models.gptj.family import GPTJ as GPTJ
from peft_jax.models.granite.family import GRANITE as GRANITE
from peft_jax.models.hf_config import as_dict, check_model_type
from peft_jax.models.llama.family import LLAMA as LLAMA
from peft_jax.models.ministral.family import MINISTRAL as MINISTRAL
from peft_jax.models.mixtral.family import MIXTRAL as MIXTRAL
from peft_jax.models.olmo.family import OLMO as OLMO
from peft_jax.models.olmoe.family import OLMOE as OLMOE
from peft_jax.models.opt.family import OPT as OPT
from peft_jax.models.phi.family import PHI as PHI
from peft_jax.models.phi3.family import PHI3 as PHI3
from peft_jax.models.qwen3_5.family import QWEN3_5 as QWEN3_5
from peft_jax.models.qwen3_5.family import QWEN3_5_MULTIMODAL as QWEN3_5_MULTIMODAL
from peft_jax.models.qwen_moe.family import QWEN_MOE as QWEN_MOE
from peft_jax.models.smollm3.family import SMOLLM3 as SMOLLM3
from peft_jax.models.stablelm.family import STABLELM as STABLELM
from peft_jax.models.starcoder2.family import STARCODER2 as STARCODER2
from peft_jax.models.t5.family import T5 as T5

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    GPT2,
    GEMMA,
    GEMMA3,
    GEMMA4,
    GEMMA4_MULTIMODAL,
    BERT,
    ROBERTA,
    T5,
    GRANITE,
    OLMO,
    SMOLLM3,
    STABLELM,
    GLM,
    STARCODER2,
    COHERE,
    MINISTRAL,
    PHI3,
    PHI,
    GPT_NEOX,
    OPT,
    GPTJ,
    BLOOM,
    FALCON,
    MIXTRAL,
    QWEN_MOE,
    OLMOE,
    GPT_OSS,
    DEEPSEEK,
    QWEN3_5,
    QWEN3_5_MULTIMODAL,
)

BY_MODEL_TYPE: Mapping[str, Family] = MappingProxyType(
    {model_type: family for family in FAMILIES for model_type in family.config.stems}
)

GGUF_ARCHITECTURES: Mapping[str, GGUFArchitecture] = MappingProxyType(
    {architecture: row for family in FAMILIES for architecture, row in family.gguf.items()}
)


def family_of(config: ModelConfig) -> Family:
    """The family of a config.

    Example:
        >>> from peft_jax.models import LlamaConfig
        >>> family_of(LlamaConfig(model_type="mistral")) is LLAMA
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
    with short_errors():
        model_type = check_model_type(as_dict(hf).get("model_type"), BY_MODEL_TYPE)
        return BY_MODEL_TYPE[model_type].config.from_hf(hf)

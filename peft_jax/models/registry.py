"""The table of architectures: a new one is its files, and one entry here."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.models.bert import config as bert_config
from peft_jax.models.bert import model as bert
from peft_jax.models.bert import task_heads
from peft_jax.models.config import FEATURE_EXTRACTION, MASKED_LM, SEQ_2_SEQ_LM, ModelConfig, as_dict, check_model_type
from peft_jax.models.family import EncoderDecoder, Family, stacked_layouts
from peft_jax.models.gpt2 import config as gpt2_config
from peft_jax.models.gpt2 import model as gpt2
from peft_jax.models.llama import model as llama
from peft_jax.models.t5 import forward
from peft_jax.models.t5.config import T5Config
from peft_jax.models.t5.family import HEAD, SHARED, T5Family

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
    replicable=tuple(llama.LlamaConfig.tasks),
    init_cache=llama.init_cache,
)

GPT2 = Family(
    config=gpt2_config.GPT2Config,
    init_params=gpt2.init_params,
    param_shapes=gpt2.param_shapes,
    apply=gpt2.apply,
    layouts=stacked_layouts("h", stored_in_out=True),
    backbone="transformer",
    embedding="wte",
    heads=gpt2.HEAD.names,
    ignored=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),  # causal masks in old checkpoints
    init_cache=gpt2.init_cache,
)

BERT = Family(
    config=bert_config.BertConfig,
    init_params=bert.init_params,
    param_shapes=bert.param_shapes,
    apply=bert.apply,
    layouts=stacked_layouts("layer"),
    backbone="bert",
    embedding="embeddings.word_embeddings",
    heads={MASKED_LM: "cls.predictions.decoder", **task_heads.CLASSIFIERS},
    extras=(r"(bert\.)?pooler\..*",),
    ignored=(r"(.*\.)?embeddings\.position_ids",),
    own_rows=task_heads.rows,
    replicable=tuple(bert_config.BertConfig.tasks),
)

ROBERTA = dataclasses.replace(
    BERT,
    config=bert_config.RobertaConfig,
    backbone="roberta",
    heads={MASKED_LM: "lm_head.decoder", **task_heads.CLASSIFIERS},
    extras=(r"(roberta\.)?pooler\..*",),
    replicable=(FEATURE_EXTRACTION,),
)

T5 = T5Family(
    config=T5Config,
    init_params=forward.init_params,
    param_shapes=forward.param_shapes,
    apply=forward.apply,
    layouts=stacked_layouts("block"),
    backbone="",
    embedding=SHARED,
    heads={SEQ_2_SEQ_LM: HEAD},
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),  # unused, in old ones
    float32=r".*\.wo\.kernel",
    encoder_decoder=EncoderDecoder(forward.encode, forward.init_cache, forward.decode),
)

FAMILIES = (LLAMA, GPT2, BERT, ROBERTA, T5)

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

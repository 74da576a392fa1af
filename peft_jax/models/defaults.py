"""PEFT's defaults for configs that do not say where to adapt, by method and model type (PEFT 0.21.2)."""

from collections.abc import Mapping
from typing import Any

from peft_jax.models.config import SEQ_2_SEQ_LM, ModelConfig

# For all methods but those below.
ATTENTION = {"target_modules": ("q_proj", "v_proj")}
OTHERWISE = dict.fromkeys(("t5", "mt5"), {"target_modules": ("q", "v")})
DOWN = ("down_proj",)
Fields = Mapping[str, Any]

DEFAULTS: Mapping[str, Mapping[str, Fields]] = {
    "ADALORA": {
        "mistral": {},
        "t5": {"target_modules": ("q", "k", "v", "o", "wi", "wo")},
        "mt5": {"target_modules": ("q", "k", "v", "o", "wi_0", "wi_1", "wo")},
    },
    "ADAPTION_PROMPT": {
        **dict.fromkeys(("llama", "mistral"), {"target_modules": "self_attn"}),
        "gpt2": {"target_modules": "attn"},
    },
    "BEFT": {
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), {"target_modules": ("v_proj",)}),
        **dict.fromkeys(("t5", "mt5"), {"target_modules": ("v",)}),
    },
    "LN_TUNING": {
        **dict.fromkeys(
            ("llama", "mistral"), {"target_modules": ("input_layernorm", "post_attention_layernorm", "norm")}
        ),
        **dict.fromkeys(("qwen2", "qwen3"), {"target_modules": ("post_attention_layernorm",)}),
        **dict.fromkeys(("t5", "mt5"), {"target_modules": ("layer_norm", "final_layer_norm")}),
    },
    "IA3": {
        **dict.fromkeys(
            ("llama", "mistral"), {"target_modules": ("k_proj", "v_proj", *DOWN), "feedforward_modules": DOWN}
        ),
        **dict.fromkeys(
            ("qwen2", "qwen3"), {"target_modules": ("q_proj", "v_proj", *DOWN), "feedforward_modules": DOWN}
        ),
        "t5": {"target_modules": ("k", "v", "wo"), "feedforward_modules": ("wo",)},
        "mt5": {"target_modules": ("k", "v", "wi_1"), "feedforward_modules": ()},
    },
}


ONLY = ("ADAPTION_PROMPT",)  # methods that are for the model types of their table alone


def method_defaults(peft_type: str, model_type: str) -> Fields:
    """Values of a config's fields that PEFT chooses for a model type.

    Raises:
        ValueError: if the method is not for such models.

    Example:
        >>> method_defaults("IA3", "llama")["feedforward_modules"]
        ('down_proj',)
    """
    table = DEFAULTS.get(peft_type, {})
    if peft_type in ONLY and model_type not in table:
        raise ValueError(f"{peft_type} is for {', '.join(table)} models, as in PEFT, not for {model_type}.")
    return table.get(model_type, OTHERWISE.get(model_type, ATTENTION))


def prompt_sizes(peft_type: str, config: ModelConfig) -> Fields:
    """A model's sizes, by field of the configs of prompt learning.

    Example:
        >>> from peft_jax.models import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
        >>> [prompt_sizes(name, config)["token_dim"] for name in ("P_TUNING", "PREFIX_TUNING")]
        [64, 16]
    """
    of_keys = peft_type == "PREFIX_TUNING"
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.kv_heads if of_keys else config.num_attention_heads,
        "token_dim": config.kv_heads * config.head_size if of_keys else config.hidden_size,
        "num_transformer_submodules": 2 if config.task_type == SEQ_2_SEQ_LM else 1,
    }

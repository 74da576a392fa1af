"""PEFT's defaults for configs that do not say where to adapt, by method and model type (PEFT 0.21.2)."""

from collections.abc import Iterable, Mapping
from typing import Any

from peft_jax.models.config import SEQ_2_SEQ_LM, ModelConfig

Fields = Mapping[str, Any]

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")
BERTS = ("bert", "roberta", "xlm-roberta")


def _targets(kinds: Iterable[str], *names: str, **more: Any) -> dict[str, Fields]:
    return {kind: {"target_modules": names, **more} for kind in kinds}


# Of all methods but those below.
ATTENTION: Mapping[str, Fields] = {
    **_targets(LLAMAS, "q_proj", "v_proj"),
    **_targets(["gpt2"], "c_attn"),
    **_targets(BERTS, "query", "value"),
    **_targets(["t5", "mt5"], "q", "v"),
}
NO_WINDOW = {kind: ATTENTION[kind] for kind in ("llama", "qwen2", "qwen3", "gpt2", "bert", "roberta")}
T5_ALL = _targets(["t5"], "q", "k", "v", "o", "wi", "wo")
GPT2_MLP = {**ATTENTION, **_targets(["gpt2"], "mlp.c_proj")}

# A model type that is not there has no default: the config has to name its targets.
DEFAULTS: Mapping[str, Mapping[str, Fields]] = {
    "ADALORA": {
        **NO_WINDOW,
        **_targets(["roberta"], "query", "key", "value", "dense"),
        **T5_ALL,
        **_targets(["mt5"], "q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    },
    "ADAPTION_PROMPT": {
        **dict.fromkeys(("llama", "mistral"), {"target_modules": "self_attn"}),
        "gpt2": {"target_modules": "attn"},
    },
    "BEFT": {
        **_targets(LLAMAS, "v_proj"),
        **_targets(("bert", "roberta"), "value"),
        **_targets(["t5", "mt5"], "v"),
    },
    "C3A": GPT2_MLP,
    "FOURIERFT": GPT2_MLP,
    "IA3": {
        **_targets(("llama", "mistral"), "k_proj", "v_proj", "down_proj", feedforward_modules=("down_proj",)),
        **_targets(("qwen2", "qwen3"), "q_proj", "v_proj", "down_proj", feedforward_modules=("down_proj",)),
        **_targets(["gpt2"], "c_attn", "mlp.c_proj", feedforward_modules=("mlp.c_proj",)),
        **_targets(("bert", "roberta"), "key", "value", "output.dense", feedforward_modules=("output.dense",)),
        **_targets(["t5"], "k", "v", "wo", feedforward_modules=("wo",)),
        **_targets(["mt5"], "k", "v", "wi_1", feedforward_modules=()),
    },
    "LN_TUNING": {
        **_targets(("llama", "mistral"), "input_layernorm", "post_attention_layernorm", "norm"),
        **_targets(("qwen2", "qwen3"), "post_attention_layernorm"),
        **_targets(["gpt2"], "ln_1", "ln_2", "ln_f"),
        **_targets(["t5", "mt5"], "layer_norm", "final_layer_norm"),
    },
    "VBLORA": {**NO_WINDOW, **T5_ALL},
    "WAVEFT": GPT2_MLP,
}


ONLY = ("ADAPTION_PROMPT",)  # methods that are for the model types of their table alone


def method_defaults(peft_type: str, model_type: str) -> Fields:
    """Values of a config's fields that PEFT chooses for a model type; none where it has no default.

    Raises:
        ValueError: if the method is not for such models.

    Example:
        >>> method_defaults("IA3", "llama")["feedforward_modules"]
        ('down_proj',)
    """
    table = DEFAULTS.get(peft_type, ATTENTION)
    if peft_type in ONLY and model_type not in table:
        raise ValueError(f"{peft_type} is for {', '.join(table)} models, as in PEFT, not for {model_type}.")
    return table.get(model_type, {})


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

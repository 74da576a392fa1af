"""PEFT's defaults for configs that do not say where to adapt, by method and model type (PEFT 0.21.2)."""

from collections.abc import Mapping

ATTENTION = {"target_modules": ("q_proj", "v_proj")}  # for all methods but these, on all our model types
DOWN = ("down_proj",)

DEFAULTS: Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "ADALORA": {"mistral": {}},
    "IA3": {
        **dict.fromkeys(
            ("llama", "mistral"), {"target_modules": ("k_proj", "v_proj", *DOWN), "feedforward_modules": DOWN}
        ),
        **dict.fromkeys(
            ("qwen2", "qwen3"), {"target_modules": ("q_proj", "v_proj", *DOWN), "feedforward_modules": DOWN}
        ),
    },
}


def method_defaults(peft_type: str, model_type: str) -> Mapping[str, tuple[str, ...]]:
    """Values of a config's fields that PEFT chooses for a model type.

    Example:
        >>> method_defaults("IA3", "llama")["feedforward_modules"]
        ('down_proj',)
    """
    return DEFAULTS.get(peft_type, {}).get(model_type, ATTENTION)

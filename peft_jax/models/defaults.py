"""Fields that PEFT fills in where a config leaves them open: modules to adapt, sizes of prompts."""

from peft_jax.models.config import SEQ_2_SEQ_LM, ModelConfig
from peft_jax.models.family import OTHERWISE, Fields
from peft_jax.models.registry import BY_MODEL_TYPE

ONLY = ("ADAPTION_PROMPT",)  # methods that are for the model types with an entry of theirs alone
KEYS_AND_VALUES = ("CARTRIDGE", "PREFIX_TUNING")  # prompts that are these, whose sizes are those of the keys
WITHOUT_DEFAULT = ("OSF",)  # methods without a default for the other model types


def method_defaults(peft_type: str, model_type: str) -> Fields:
    """Values of a config's fields that PEFT chooses for a model type; none where it has no default.

    Raises:
        ValueError: if the method is not for such models.

    Example:
        >>> method_defaults("IA3", "llama")["feedforward_modules"]
        ('down_proj',)
    """
    by_method = BY_MODEL_TYPE[model_type].peft_defaults[model_type]
    if peft_type in ONLY and peft_type not in by_method:
        able = [name for name, family in BY_MODEL_TYPE.items() if peft_type in family.peft_defaults[name]]
        raise ValueError(f"{peft_type} is for {', '.join(able)} models, as in PEFT, not for {model_type}.")
    otherwise = {} if peft_type in WITHOUT_DEFAULT else by_method[OTHERWISE]
    return by_method.get(peft_type, otherwise)


def prompt_sizes(peft_type: str, config: ModelConfig) -> Fields:
    """A model's sizes, by field of the configs of prompt learning.

    Raises:
        ValueError: if the method is not for such models.

    Example:
        >>> from peft_jax.models import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)
        >>> [prompt_sizes(name, config)["token_dim"] for name in ("P_TUNING", "PREFIX_TUNING")]
        [64, 16]
    """
    of_keys = peft_type in KEYS_AND_VALUES
    if of_keys and (why := config.no_prefix):
        raise ValueError(f"{peft_type} is not for {config.model_type} models, {why}.")
    return {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.kv_heads if of_keys else config.num_attention_heads,
        "token_dim": config.kv_heads * config.head_size if of_keys else config.hidden_size,
        "num_transformer_submodules": 2 if config.task_type == SEQ_2_SEQ_LM else 1,
    }


def router_sizes(config: ModelConfig) -> Fields:
    """Sizes of a model, by field of X-LoRA's config: the features of the last hidden state.

    Raises:
        ValueError: if the model is an encoder and a decoder.
    """
    if config.task_type == SEQ_2_SEQ_LM:
        raise ValueError(
            f"XLORA is not for {config.model_type} models: PEFT finds no last hidden state of an encoder and a "
            "decoder. Take a decoder alone."
        )
    return {"hidden_size": config.embedding_size}

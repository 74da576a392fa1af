"""Options of transformers' ``generate`` that are not supported: in generation_config.json and as arguments."""

from collections.abc import Mapping
from typing import Any

# Fields of generation_config.json that would change the tokens, with the values that do not.
IN_ANY_DECODING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "max_time": (),
    "guidance_scale": (1,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "watermarking_config": ({},),
    "dola_layers": (),
    "token_healing": (False,),
}
IN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}
# Further arguments of transformers' generate. In generation_config.json they do not change the tokens of greedy
# decoding and sampling, or have a meaning here (max_length, decoder_start_token_id).
ARGUMENTS = (
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "assistant_model",
    "assistant_tokenizer",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "constraints",
    "continuous_batching_config",
    "custom_generate",
    "decoder_start_token_id",
    "disable_compile",
    "diversity_penalty",
    "early_stopping",
    "force_words_ids",
    "is_assistant",
    "length_penalty",
    "logits_processor",
    "low_memory",
    "max_cache_len",
    "max_length",
    "max_matching_ngram_size",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "past_key_values",
    "position_ids",
    "prefill_chunk_size",
    "prefix_allowed_tokens_fn",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "stopping_criteria",
    "synced_gpus",
    "target_lookbehind",
    "tokenizer",
    "use_cache",
    "use_mtp",
)


# What to write instead of what people write most.
INSTEAD = {
    "num_beams": "There is no beam search: decoding is greedy, or samples with do_sample=True.",
    "num_return_sequences": "Repeat the prompts, and write do_sample=True.",
    "max_length": "Write max_new_tokens=, which counts no token of the prompt.",
    "min_length": "There is no least length.",
    "return_dict_in_generate": "The tokens are returned as an array.",
    "use_cache": "Leave it out: there is a cache in any case.",
}


def is_unsupported(name: str) -> bool:
    """Whether transformers' ``generate`` takes an argument that is not supported here."""
    return name in IN_ANY_DECODING or name in IN_SAMPLING or name in ARGUMENTS


def refuse_unsupported(generation_config: Mapping[str, Any], *, do_sample: bool) -> None:
    """Raise ValueError if generation_config.json has a field that is not supported and would change the tokens.

    Args:
        generation_config: Contents of the file; None is a field that is not set.
        do_sample: Whether tokens are drawn; fields of sampling matter only then.
    """
    harmless = dict(IN_ANY_DECODING)
    if do_sample:
        harmless |= IN_SAMPLING
    refused = {}
    for name, values in harmless.items():
        value = generation_config.get(name)
        if value is not None and value not in values:
            refused[name] = value
    if refused:
        raise ValueError(
            f"generation_config.json asks for {as_arguments(refused)}, which is not supported. Remove it there, or "
            "ignore the file: generation_config={}, on the command line --ignore-generation-config."
        )


def as_arguments(options: Mapping[str, Any]) -> str:
    """Options as they are written in a call.

    Example:
        >>> as_arguments({"do_sample": True, "top_k": 5})
        'do_sample=True, top_k=5'
    """
    return ", ".join(f"{name}={value!r}" for name, value in options.items())

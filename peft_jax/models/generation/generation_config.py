"""What ``generate`` does where it is not told: a checkpoint's generation_config.json, else transformers' defaults."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_jax.models.generation.sampling import DRAWING, Sampling, told

TOP_K = 50  # transformers' default for drawing
NEW_TOKENS = 20  # and for the length

# Fields of generation_config.json that would change the tokens, with the values that do not.
_FIXED: dict[str, tuple[Any, ...]] = {
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
_FIXED_IN_DRAWING: dict[str, tuple[Any, ...]] = {
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
}


class Generation(NamedTuple):
    """What a generation does, all choices made."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sampling: Sampling


def resolve(
    asked: Mapping[str, Any],
    found: Mapping[str, Any],
    *,
    length: int,
    positions: int,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> Generation:
    """Decide what is generated: by what was asked, else by generation_config.json, else as transformers does.

    Args:
        asked: Arguments of ``generate``; None where nothing was asked.
        found: Contents of generation_config.json.
        length: Tokens of the prompts, padding included.
        positions: The model's max_position_embeddings.
        eos_token_id: The model config's.
        pad_token_id: The model config's.

    Raises:
        ValueError: if a value is out of range, or the file has a field that is not supported and would change the
            tokens.

    Example:
        >>> found = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]}
        >>> resolve({"temperature": 0.5, "max_new_tokens": 8}, found, length=4, positions=64)[:2]
        (8, (2, 7))
    """
    asked = {name: value for name, value in asked.items() if value is not None}
    found = {name: value for name, value in found.items() if value is not None}
    both = {**found, **asked}
    drawing = bool(both.get("do_sample", False))
    if not drawing:  # what the file says of drawing does not matter then; what the call says is checked
        both = {name: value for name, value in both.items() if name not in DRAWING or name in asked}
    _refuse(found, {**_FIXED, **(_FIXED_IN_DRAWING if drawing else {})})
    top_k = both.get("top_k", TOP_K if drawing else None)
    sampling = Sampling(
        drawing,
        both.get("temperature", 1.0),
        None if top_k == 0 else top_k,
        both.get("top_p"),
        both.get("min_p"),
        both.get("repetition_penalty", 1.0),
    )
    sampling.check()
    eos = both.get("eos_token_id", eos_token_id)
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return Generation(_new_tokens(both, length, positions), ids, both.get("pad_token_id", pad_token_id), sampling)


def _new_tokens(both: Mapping[str, Any], length: int, positions: int) -> int:
    """``max_new_tokens``, else what ``max_length`` leaves, else 20 or what the positions leave."""
    if "max_new_tokens" in both:
        count = both["max_new_tokens"]
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"max_new_tokens is at least 1, got {count}.")
        return count
    if "max_length" not in both:
        return max(1, min(NEW_TOKENS, positions - length))
    if both["max_length"] <= length:
        raise ValueError(
            f"generation_config.json has max_length={both['max_length']}, but the prompt has {length} tokens already. "
            "Say max_new_tokens."
        )
    return int(both["max_length"]) - length


def _refuse(found: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    odd = {name: found[name] for name in fixed if name in found and found[name] not in fixed[name]}
    if odd:
        raise ValueError(
            f"generation_config.json asks for {told(odd)}, which is not supported. Remove it there, or leave the file "
            "aside: generation_config={}, on the command line --ignore-generation-config."
        )

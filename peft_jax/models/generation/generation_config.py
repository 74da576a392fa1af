"""The options of ``generate`` that a call leaves out: from generation_config.json, else transformers' defaults."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from peft_jax.core.field_kinds import is_kind
from peft_jax.core.selecting import not_none
from peft_jax.core.strict_json import shown
from peft_jax.models.generation.generate_options import SAMPLING_OPTIONS, GenerateOptions
from peft_jax.models.generation.sampling import Sampling
from peft_jax.models.generation.unsupported_options import refuse_unsupported

TOP_K = 50  # transformers' default in sampling
NEW_TOKENS = 20  # transformers' default length


class Generation(NamedTuple):
    """A generation with all choices made."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sampling: Sampling


def resolve(
    options: GenerateOptions,
    generation_config: Mapping[str, Any],
    *,
    length: int,
    positions: int,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> Generation:
    """Make all choices of a generation.

    Args:
        options: The options that the call gives.
        generation_config: Contents of generation_config.json, for the options that are None. ``"eos_token_id": null``
            means that no token ends a text.
        length: Tokens of the prompts, padding included.
        positions: The model's max_position_embeddings.
        eos_token_id: The model config's.
        pad_token_id: The model config's.

    Raises:
        ValueError: If a value is out of range, or the file has a field that is not supported and would change the
            tokens.

    Example:
        >>> saved = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 7]}
        >>> resolve(GenerateOptions(temperature=0.5, max_new_tokens=8), saved, length=4, positions=64)[:2]
        (8, (2, 7))
    """
    options = with_defaults(options, generation_config, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
    count = new_tokens(options, generation_config, length=length, positions=positions)
    return Generation(count, options.eos_token_ids, options.pad_token_id, options.sampling)


def with_defaults(
    options: GenerateOptions,
    generation_config: Mapping[str, Any],
    *,
    eos_token_id: int | tuple[int, ...] | None = None,
    pad_token_id: int | None = None,
) -> GenerateOptions:
    """Fill in the options that are None, but for ``max_new_tokens``, whose default depends on the prompts.

    The arguments and errors are those of `resolve`.

    Example:
        >>> options = with_defaults(GenerateOptions(do_sample=True), {"top_p": 0.9})
        >>> options.top_p, options.top_k
        (0.9, 50)
    """
    saved = not_none(generation_config)
    do_sample = bool(options.do_sample)
    if options.do_sample is None:
        do_sample = bool(saved.get("do_sample"))
    refuse_unsupported(saved, do_sample=do_sample)
    values: dict[str, Any] = {"eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if generation_config.get("eos_token_id", ()) is None:
        values["eos_token_id"] = None  # no token ends a text, whatever the model's config says
    if do_sample:
        values["top_k"] = TOP_K
    for field in dataclasses.fields(GenerateOptions):
        # Greedy decoding ignores the file's sampling options; those of the call are an error below.
        is_used = do_sample or field.name not in SAMPLING_OPTIONS
        if field.name in saved and is_used:
            values[field.name] = saved[field.name]
    values |= options.given
    values["do_sample"] = do_sample
    filled = GenerateOptions(**values)
    filled.refuse_ignored()
    return filled


def new_tokens(
    options: GenerateOptions,
    generation_config: Mapping[str, Any],
    *,
    length: int,
    positions: int,
    default: int = NEW_TOKENS,
) -> int:
    """The largest number of new tokens: ``max_new_tokens``, else as many as the file's ``max_length`` leaves.

    Where neither is given, ``default`` or as many as the positions leave. The other arguments are those of `resolve`.

    Raises:
        ValueError: If ``max_length`` leaves none.
    """
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    max_length = generation_config.get("max_length")
    if max_length is None:
        return max(1, min(default, positions - length))
    if not is_kind(max_length, int):
        raise ValueError(f"generation_config.json has max_length={shown(max_length)}. Write a whole number.")
    if max_length <= length:
        raise ValueError(
            f"generation_config.json has max_length={max_length}, but the prompt has {length} tokens already. "
            "Say max_new_tokens."
        )
    return int(max_length) - length

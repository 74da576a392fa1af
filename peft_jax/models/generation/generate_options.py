"""The options of ``generate``, which causal language models and encoder-decoders share."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from peft_jax.core.selecting import field_names, not_none, present
from peft_jax.methods.fields import check_kinds
from peft_jax.models.generation.sampling import Sampling
from peft_jax.models.generation.unsupported_options import INSTEAD, as_arguments, is_unsupported

# The options that greedy decoding ignores, with the values that have no effect in sampling either.
SAMPLING_OPTIONS: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": None, "min_p": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of `CausalLM.generate` and `Seq2SeqLM.generate`; they mean what they mean in transformers.

    An option that is None has the value in the checkpoint's generation_config.json, else transformers' default: 20 new
    tokens, greedy.

    Attributes:
        max_new_tokens: The largest number of tokens to add to a row.
        do_sample: Whether to draw tokens instead of taking the most likely one.
        temperature: Divides the logits before a token is drawn.
        top_k: Draw from the ``top_k`` most likely tokens only; 0 for all. The default is 50.
        top_p: Draw from the fewest most likely tokens whose probability reaches ``top_p``.
        min_p: Draw from tokens whose probability is at least ``min_p`` times that of the most likely one.
        repetition_penalty: Above 1, divides the positive logits of tokens that a row has already, and multiplies the
            negative ones. An encoder-decoder counts the decoder's tokens.
        eos_token_id: The token that ends a row, or several of them.
        pad_token_id: The token that fills a row after its end. The default is the first ``eos_token_id``.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> GenerateOptions(max_new_tokens=8, do_sample=True, top_k=0).sampling.top_k is None
        True
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        count = self.max_new_tokens
        if count is not None and (not isinstance(count, int) or count < 1):
            raise ValueError(f"max_new_tokens is at least 1, got {count}.")
        check_kinds(self)  # so that what is compared are finite numbers
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature is above 0, got {self.temperature}. For greedy leave do_sample out.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is at least 1, or 0 for all tokens, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is in (0, 1], got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is in [0, 1], got {self.min_p}.")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty is above 0, got {self.repetition_penalty}. 1 is no penalty.")

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not None."""
        return not_none(vars(self))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a row."""
        if self.eos_token_id is None:
            return ()
        if isinstance(self.eos_token_id, int):
            return (self.eos_token_id,)
        return tuple(self.eos_token_id)

    @property
    def sampling(self) -> Sampling:
        """How the next token is chosen; greedily by default."""
        chosen = present(self.given, Sampling._fields)
        if self.top_k == 0:
            del chosen["top_k"]
        return Sampling(**chosen)

    def refuse_ignored(self) -> None:
        """Raise ValueError if decoding is greedy and an option of sampling is given."""
        if self.do_sample:
            return
        ignored = {}
        for name, neutral in SAMPLING_OPTIONS.items():
            value = getattr(self, name)
            if value is not None and value != neutral:
                ignored[name] = value
        if ignored:
            raise ValueError(
                f"{as_arguments(ignored)} asks for sampling. Write do_sample=True, or leave the other fields out."
            )


class GenerateKeywords(TypedDict, total=False):
    """`GenerateOptions` as keyword arguments of ``generate``, for type checkers, which read no dataclass as such."""

    max_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None


def from_keywords(keywords: GenerateKeywords, generate: Callable[..., Any]) -> GenerateOptions:
    """The options that a call of ``generate`` gives.

    Args:
        keywords: The keyword arguments that are not parameters of their own.
        generate: The method that is called, for the parameters that an error names.

    Raises:
        TypeError: If a keyword is no option.
        ValueError: If a value is out of range.

    Example:
        >>> from_keywords({"top_p": 0.9}, generate=print).given
        {'top_p': 0.9}
    """
    options = field_names(GenerateOptions)
    for name, value in keywords.items():
        if name not in options:
            raise TypeError(_refusal(name, value, options, generate))
    return GenerateOptions(**keywords)


def _refusal(name: str, value: Any, options: Sequence[str], generate: Callable[..., Any]) -> str:
    """The line on an argument that ``generate`` has not."""
    parameters = inspect.signature(generate).parameters.values()
    others = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    known = f"Its arguments are {', '.join([*others, *options])}."
    if not is_unsupported(name):
        return f"generate has no argument {name}. {known}"
    instead = f" {name}={value!r}: {INSTEAD[name]}" if name in INSTEAD else ""
    return f"generate does not support transformers' {name}. {known}{instead}"

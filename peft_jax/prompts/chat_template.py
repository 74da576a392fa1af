"""A tokenizer's chat template: rendering messages, and the token with which it ends a turn."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peft_jax.core.time_limit import TEMPLATE_SECONDS, time_limit
from peft_jax.prompts.tokenizer import Tokenizer

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\b")
# A chat of which the end of the answer is looked for. Its words are in no template.
_QUESTION, _ANSWER = "peftjax asks", "peftjax answers"


class Marked(NamedTuple):
    """A rendered chat.

    Attributes:
        text: The chat.
        spans: First and last character (exclusive) of what stands between ``{% generation %}`` marks.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class TemplateError(ValueError):
    """A chat template refuses messages, or fails on them."""


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> from peft_jax.prompts.tokenizer import read_tokenizer
        >>> has_chat_template(read_tokenizer(MODEL))
        False
    """
    return bool(getattr(tokenizer, "chat_template", None))


def chosen_template(tokenizer: Tokenizer, tools: Tools = ()) -> str:
    """The text of the chat template, of several the one that transformers takes.

    Raises:
        TemplateError: If the tokenizer has several and none is the default.
    """
    try:
        return str(tokenizer.get_chat_template(None, _listed(tools)))
    except ValueError as error:  # of several templates, none is named default
        raise TemplateError(str(error)) from error


def has_generation_marks(tokenizer: Tokenizer, tools: Tools = ()) -> bool:
    """Whether the template marks the assistant's text with ``{% generation %}``."""
    return bool(_GENERATION.search(chosen_template(tokenizer, tools)))


def render(messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Tools = (), prompt: bool = False) -> str:
    """The text of a chat.

    Args:
        messages: The turns.
        tokenizer: A tokenizer with a chat template.
        tools: Schemas of the functions that the model may call.
        prompt: Whether to add what stands before the assistant's next answer.

    Raises:
        TemplateError: If the template refuses the messages, or fails.
    """
    try:
        with time_limit(TEMPLATE_SECONDS):
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tools=_listed(tools), tokenize=False, add_generation_prompt=prompt
                )
            )
    except Exception as error:  # a template is a program of the checkpoint, which may raise any error
        raise TemplateError(str(error) or type(error).__name__) from error


def render_marked(messages: Sequence[Message], tokenizer: Tokenizer, *, tools: Tools = ()) -> Marked:
    """The text of a chat, and which parts of it the template marks with ``{% generation %}``.

    These are the characters that transformers' ``return_assistant_tokens_mask`` goes by.

    Raises:
        TemplateError: If the template refuses the messages, or fails.
    """
    from transformers.utils.chat_template_utils import render_jinja_template  # takes seconds to import

    template = chosen_template(tokenizer, tools)
    render_all: Any = render_jinja_template  # annotated as returning the texts alone, which it does not
    try:
        with time_limit(TEMPLATE_SECONDS):
            texts, spans = render_all(
                conversations=[list(messages)],
                tools=_listed(tools),
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
    except Exception as error:  # as in render
        raise TemplateError(str(error) or type(error).__name__) from error
    return Marked(texts[0], tuple((int(start), int(end)) for start, end in spans[0]))


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids of special tokens: those with a role, and those that were added as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if token.special}
    return frozenset(special | set(getattr(tokenizer, "all_special_ids", ())))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template writes behind an answer.

    Returns:
        Its id; None without a template, or where none stands there.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> from peft_jax.prompts.tokenizer import read_tokenizer
        >>> tokenizer = read_tokenizer(MODEL)
        >>> tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        >>> end_of_turn(tokenizer) == tokenizer.eos_token_id
        True
    """
    if not has_chat_template(tokenizer):
        return None
    chat = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(chat, tokenizer)
    except TemplateError:  # the chats themselves are refused by the caller, with the reason
        return None
    found = text.rfind(_ANSWER)
    if found < 0:
        return None
    special = special_ids(tokenizer)
    behind = tokenizer(text[found + len(_ANSWER) :], add_special_tokens=False, verbose=False)["input_ids"]
    return next((number for number in behind if number in special), None)


def _listed(tools: Tools) -> list[Any] | None:
    """Tools as transformers takes them: of none, templates speak of None."""
    return list(tools) or None

"""Chats as token ids, and which of them are learned: the assistant's turns, to the mark that ends each.

Where the template has ``{% generation %}`` marks, they say what is learned, as in TRL's ``assistant_only_loss``.
Otherwise a chat is rendered up to each answer and behind it: what the answer adds to the text is learned. That is
sound where these texts are beginnings of the whole chat's. An answer that the template renders differently when others
follow, such as one whose thinking is dropped then, is not learned.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.prompts.chat_template import (
    Message,
    TemplateError,
    end_of_turn,
    has_chat_template,
    has_generation_marks,
    render,
    render_marked,
    special_ids,
)
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.records import Chat
from peft_jax.train.data.token_rows import common_start

Span = tuple[int, int]
MARKS, TURNS, LAST = "generation marks", "turn by turn", "last answer"


class RenderedChat(NamedTuple):
    """A chat as text.

    Attributes:
        text: The text.
        spans: First and last character (exclusive) of each part that is learned.
        rule: How the parts were found: `MARKS`, `TURNS`, or `LAST` where not every answer could be.
        left_out: How many answers are not learned because the template changes with what follows.
    """

    text: str
    spans: tuple[Span, ...]
    rule: str
    left_out: int = 0


@dataclasses.dataclass
class ChatMasks:
    """A report on what was learned of the chats of a data set; `encode` adds to it.

    Attributes:
        rules: The number of chats by the rule of their mask.
        left_out: How many answers are not learned because the template changes with what follows.
        ends: The special tokens that end learned turns.
    """

    rules: dict[str, int] = dataclasses.field(default_factory=dict)
    left_out: int = 0
    ends: set[int] = dataclasses.field(default_factory=set)


def encode_chats(
    chats: Sequence[RenderedChat], tokenizer: Tokenizer, masks: ChatMasks | None = None
) -> list[tuple[list[int], list[bool]]]:
    """Token ids of chats, and for each token whether it is learned.

    White space behind the mark that ends a turn is not learned, unless the template's own marks include it. A chat
    whose last learned turn has no such mark ends with the end-of-sequence token instead.

    Args:
        chats: The chats.
        tokenizer: Their tokenizer, which has to be a fast one.
        masks: Gets the counts and the end marks.

    Raises:
        ValueError: If the tokenizer does not say which characters its tokens stand for.
    """
    if not chats:
        return []
    texts = [chat.text for chat in chats]
    try:
        found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise ValueError(
            "the tokenizer does not say which characters its tokens stand for, so the answers of chats cannot be found."
            " Save it as a fast tokenizer (tokenizer.json)."
        ) from error
    special = special_ids(tokenizer)
    ends = {end_of_turn(tokenizer), tokenizer.eos_token_id} - {None}
    encoded = []
    for chat, ids, offsets in zip(chats, found["input_ids"], found["offset_mapping"], strict=True):
        trained = _within(chat.spans, offsets)
        if chat.rule != MARKS:
            _without_space(ids, trained, tokenizer, special)
        _with_ends(ids, trained, ends)
        encoded.append(_ended(list(ids), trained, tokenizer, special))
        if masks is not None:
            masks.rules[chat.rule] = masks.rules.get(chat.rule, 0) + 1
            masks.left_out += chat.left_out
            masks.ends |= _last_marks(*encoded[-1], tokenizer, special)
    return encoded


def render_chat(chat: Chat, tokenizer: Tokenizer, where: str) -> RenderedChat:
    """The text of a chat, and which parts of it are learned.

    Args:
        chat: The chat.
        tokenizer: A tokenizer with a chat template.
        where: Names the chat in errors.

    Raises:
        ValueError: If there is no template, it refuses the chat, or nothing of the chat is learned.
    """
    if not has_chat_template(tokenizer):
        raise ValueError(
            "the tokenizer has no chat template, which messages need. Put chat_template.jinja beside the weights, or "
            "give data with prompt and completion."
        )
    answers = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
    try:
        if has_generation_marks(tokenizer, chat.tools):
            rendered = _by_marks(chat, answers, tokenizer, where)
        else:
            rendered = _by_turns(chat, answers, tokenizer, where)
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template refuses {where}: {error}.") from error
    spans = tuple(span for span in rendered.spans if span[0] < span[1])
    if not spans:
        raise ValueError(f"nothing of {where} is learned. Leave it out, or let one of its answers be learned.")
    return rendered._replace(spans=spans)


def _by_marks(chat: Chat, answers: Sequence[int], tokenizer: Tokenizer, where: str) -> RenderedChat:
    text, spans = render_marked(chat.messages, tokenizer, tools=chat.tools)
    if not chat.given:
        return RenderedChat(text, spans, MARKS)
    if len(spans) != len(answers):
        raise ValueError(
            f"the chat template marks {len(spans)} parts of {where} with {{% generation %}}, which has {len(answers)} "
            "answers, so those that are not to be learned cannot be found. Split the chat."
        )
    learned = tuple(span for span, index in zip(spans, answers, strict=True) if index not in chat.given)
    return RenderedChat(text, learned, MARKS)


def _by_turns(chat: Chat, answers: Sequence[int], tokenizer: Tokenizer, where: str) -> RenderedChat:
    """A chat, of which an answer is learned where the texts up to it and behind it are beginnings of the whole."""
    full = render(chat.messages, tokenizer, tools=chat.tools)
    spans, changed = [], []
    for index in answers:
        if index in chat.given:
            continue
        try:
            span = _span(chat, index, full, tokenizer)
        except TemplateError:  # the template takes the whole chat, and not its beginning
            span = None
        if span is None:
            changed.append(index)
        else:
            spans.append(span)
    if spans or not changed:
        return RenderedChat(full, tuple(spans), LAST if changed else TURNS, len(changed))
    if changed[-1] == answers[-1] and (last := _last_answer(chat, answers[-1], tokenizer)):
        return last._replace(left_out=len(changed) - 1)
    raise ValueError(
        f"the chat template lays out message {changed[0] + 1} of {where} differently when others follow, so the trained"
        " tokens cannot be found. Mark the assistant's text in it with {% generation %}."
    )


def _span(chat: Chat, index: int, full: str, tokenizer: Tokenizer) -> Span | None:
    """The characters of a chat's text that an answer adds; None if it reads differently without what follows."""
    messages = chat.messages
    after = render(messages[: index + 1], tokenizer, tools=chat.tools)
    if not full.startswith(after):
        return None
    if index == 0:  # nothing stands before it that could be rendered
        return max(0, full.find(_content(messages[0]))), len(after)
    before = render(messages[:index], tokenizer, tools=chat.tools, prompt=True)
    start = common_start(before, after)
    if start < len(before):
        # The prompt may hold more than stands before this answer, such as the opening of a thought that it has not.
        given = render(messages[:index], tokenizer, tools=chat.tools)
        if start < len(given) or not before.startswith(given):
            return None
    return start, len(after)


def _last_answer(chat: Chat, index: int, tokenizer: Tokenizer) -> RenderedChat | None:
    """The prompt of a chat's last answer, as it is rendered to generate it, and the answer; None if it is not found."""
    messages = chat.messages
    try:
        prompt = render(messages[:index], tokenizer, tools=chat.tools, prompt=True)
        after = render(messages[: index + 1], tokenizer, tools=chat.tools)
    except TemplateError:
        return None
    answer, question = _content(messages[index]), _content(messages[index - 1])
    found = after.rfind(answer)
    if index == 0 or not answer or found < 0:
        return None
    start = max(range(found + 1), key=lambda stop: _common_end(prompt, after[:stop]))
    common = _common_end(prompt, after[:start])
    if not common or question not in prompt[len(prompt) - common :]:
        return None
    text = prompt + after[start:]
    return RenderedChat(text, ((len(prompt), len(text)),), LAST)


def _content(message: Message) -> str:
    """The stripped text of a message; empty where its content is no text."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _common_end(one: str, other: str) -> int:
    """How many characters two texts end with in common."""
    return common_start(one[::-1], other[::-1])


def _within(spans: Sequence[Span], offsets: Sequence[Span]) -> list[bool]:
    """For each token whether its characters are, in part, those of a span."""
    starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
    trained = np.zeros(len(starts), bool)
    for first, last in spans:
        trained |= (starts < last) & (first < ends)
    found: list[bool] = trained.tolist()
    return found


def _without_space(ids: Sequence[int], trained: list[bool], tokenizer: Tokenizer, special: frozenset[int]) -> None:
    """Leave the white space between an end mark and the end of a learned part out of it."""
    for position in _part_ends(trained):
        mark = _mark(ids, position, tokenizer)
        if ids[mark] in special:
            trained[mark + 1 : position + 1] = [False] * (position - mark)


def _with_ends(ids: Sequence[int], trained: list[bool], ends: set[int]) -> None:
    """Learn the end mark directly behind a learned part that has none."""
    for position in _part_ends(trained):
        if position + 1 < len(ids) and ids[position + 1] in ends and ids[position] not in ends:
            trained[position + 1] = True


def _ended(
    ids: list[int], trained: list[bool], tokenizer: Tokenizer, special: frozenset[int]
) -> tuple[list[int], list[bool]]:
    """The ids with EOS behind the last learned token, if no special token ends that part."""
    last = max((position for position, one in enumerate(trained) if one), default=-1)
    if last < 0 or ids[_mark(ids, last, tokenizer)] in special:
        return ids, trained
    return [*ids[: last + 1], tokenizer.eos_token_id], [*trained[: last + 1], True]


def _last_marks(ids: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer, special: frozenset[int]) -> set[int]:
    """The special tokens that end learned parts."""
    marks = {ids[_mark(ids, position, tokenizer)] for position in _part_ends(trained)}
    return marks & special


def _part_ends(trained: Sequence[bool]) -> list[int]:
    """The positions of the last token of each run of learned tokens."""
    padded = np.append(np.asarray(trained, bool), False)
    found: list[int] = np.flatnonzero(padded[:-1] & ~padded[1:]).tolist()
    return found


def _mark(ids: Sequence[int], position: int, tokenizer: Tokenizer) -> int:
    """The position of the last token up to this one that is not white space."""
    while position > 0 and not tokenizer.decode([ids[position]]).strip():
        position -= 1
    return position

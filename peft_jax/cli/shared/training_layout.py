"""The file beside an adapter that says how its training data were laid out, and what lays out prompts by it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_jax.core.text_files import parse_object, read_text
from peft_jax.models.resize import LAYOUT_FILE, RULE
from peft_jax.prompts.chat_template import has_chat_template
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.template import CHAT, RAW, ChatLayout, Layout, PromptTemplate, load_layout

ANSWERS, EVERYTHING = "answers", "prompts and answers"


@dataclasses.dataclass(frozen=True)
class NamedLayout:
    """A layout, and its name: ``chat``, ``raw``, ``short``, ``alpaca`` or that of a file."""

    name: str
    layout: Layout

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer's chat template lays prompts out."""
        return isinstance(self.layout, ChatLayout)


@dataclasses.dataclass(frozen=True)
class TrainingLayout:
    """How the data of a run were laid out.

    Attributes:
        used: The layout.
        learned: `ANSWERS` or `EVERYTHING`.
        template: The SHA-256 of the chat template, of a chat layout.
        end_of_turn: The tokens that end learned turns.
        chat_masks: The number of chats by the rule that found their answers.
        answers_left_out: How many answers of chats are not learned, as the template changes with what follows.
        tokens: How many tokens the model has, which may be fewer than the tokenizer's; None where it is not known.
    """

    used: NamedLayout
    learned: str = ANSWERS
    template: str | None = None
    end_of_turn: tuple[str, ...] = ()
    chat_masks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    answers_left_out: int = 0
    tokens: int | None = None


CHATS, TEXTS = NamedLayout("chat", CHAT), NamedLayout("raw", RAW)


def choose_layout(
    given: str | None, recorded: TrainingLayout | None, tokenizer: Tokenizer, *, chats: bool
) -> NamedLayout:
    """The layout of instructions and prompts.

    Args:
        given: The one that the command line names.
        recorded: That of an adapter's training.
        tokenizer: The tokenizer, whose chat template is the default where it has one.
        chats: Whether the model continues chats.

    Raises:
        FileNotFoundError: If none is named so.
        ValueError: If its file is damaged, or it is for chats and the model is not.
    """
    if given is not None:
        layout = load_layout(given)
        if isinstance(layout, ChatLayout) and not chats:
            raise ValueError("--prompt-template chat is for CAUSAL_LM. Give short, alpaca, raw or a JSON file.")
        return NamedLayout(given, layout)
    if recorded is not None:
        return recorded.used
    if chats and has_chat_template(tokenizer):
        return CHATS
    return NamedLayout("short", load_layout("short"))


def clash(recorded: TrainingLayout | None, used: Sequence[NamedLayout], tokenizer: Tokenizer) -> str | None:
    """A line on prompts that are laid out otherwise than an adapter's training data; None if all agree.

    Args:
        recorded: The layout of training, if it is known.
        used: The layouts of the prompts.
        tokenizer: Their tokenizer.
    """
    if recorded is None:
        return None
    others = [one.name for one in used if one.layout != recorded.used.layout]
    if others:
        return (
            f"The adapter was trained with the layout {recorded.used.name}, and the layout here is {others[0]}: expect "
            "worse answers. Without --prompt-template, texts and instructions are laid out as in training."
        )
    if recorded.used.is_chat and recorded.template not in (None, template_digest(tokenizer)):
        return (
            "The adapter was trained with another chat template than the tokenizer has here: expect worse answers. Use "
            "the tokenizer's files that finetune wrote beside the adapter."
        )
    return None


def template_digest(tokenizer: Tokenizer) -> str | None:
    """The SHA-256 of a tokenizer's chat template; None without one."""
    if not has_chat_template(tokenizer):
        return None
    return hashlib.sha256(json.dumps(tokenizer.chat_template, sort_keys=True).encode()).hexdigest()


def layout_text(layout: TrainingLayout) -> str:
    """The contents of the file."""
    fields: dict[str, Any] = {"prompt_template": layout.used.name}
    if isinstance(layout.used.layout, PromptTemplate):
        fields |= dataclasses.asdict(layout.used.layout)
    fields |= {"learned": layout.learned, "end_of_turn": list(layout.end_of_turn), "tokens": layout.tokens}
    if layout.used.is_chat:
        fields |= {
            "chat_template_sha256": layout.template,
            "chat_masks": dict(layout.chat_masks),
            "answers_left_out": layout.answers_left_out,
        }
    return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"


def read_layout(adapter: Path | None) -> TrainingLayout | None:
    """The layout beside an adapter; None if there is no adapter, or none was written.

    Raises:
        ValueError: If the file is damaged.

    Example:
        >>> layout = TrainingLayout(NamedLayout("short", load_layout("short")), end_of_turn=("</s>",))
        >>> Path(LAYOUT_FILE).write_text(layout_text(layout)) > 0
        True
        >>> read_layout(Path(".")) == layout
        True
    """
    if adapter is None or not (adapter / LAYOUT_FILE).is_file():
        return None
    file = adapter / LAYOUT_FILE
    found = parse_object(read_text(file, LAYOUT_FILE, RULE), f"'{file}'", RULE)
    name, ends = found.get("prompt_template"), found.get("end_of_turn", [])
    texts = [found.get("prompt_input"), found.get("prompt_no_input")]
    layout: Layout = CHAT
    if name != CHATS.name:
        layout = PromptTemplate(*map(str, texts))
    is_whole = isinstance(name, str) and isinstance(ends, list) and found.get("learned") in (ANSWERS, EVERYTHING)
    if not is_whole or (name != CHATS.name and not all(isinstance(text, str) for text in texts)):
        raise ValueError(f"'{file}' is damaged: it lacks a prompt_template, its texts or learned. {RULE}")
    return TrainingLayout(
        NamedLayout(str(name), layout),
        str(found["learned"]),
        found.get("chat_template_sha256"),
        tuple(map(str, ends)),
        found.get("chat_masks") or {},
        found.get("answers_left_out") or 0,
        found.get("tokens"),
    )

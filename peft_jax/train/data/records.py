"""Records of training data: instructions, prompts with completions, chats, plain texts and labelled texts.

`peft_jax.train.data.record_forms` makes them of the forms that people's files have.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Label = str | int | float | tuple[str | int | float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Fields that records of all formats may have.

    Attributes:
        task_id: The number of the record's task, for prompts that have several; as the file has it.
    """

    task_id: Any = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True)
class Record(Asked):
    """One instruction and its answer, with alpaca's field names.

    Attributes:
        instruction: What to do.
        input: What to do it with; may be empty.
        output: The answer.
        system: A text for the model that stands before the conversation; may be empty.
        history: Earlier questions and their answers, which are given and not learned.
    """

    instruction: str
    input: str
    output: str
    system: str = dataclasses.field(default="", repr=False)
    history: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False)

    @property
    def prompt(self) -> str:
        """The text before the answer, without the ``Input`` section when `input` is empty.

        A system prompt and earlier questions with their answers stand before it.

        Example:
            >>> print(Record(instruction="Reverse.", input="abc", output="cba").prompt)
            ### Instruction:
            Reverse.
            <BLANKLINE>
            ### Input:
            abc
            <BLANKLINE>
            ### Response:
            <BLANKLINE>
        """
        before = [self.system] if self.system else []
        for question, answer in self.history:
            before.append(f"### Instruction:\n{question}\n\n### Response:\n{answer}")
        given = f"### Input:\n{self.input}\n\n" if self.input else ""
        return "\n\n".join([*before, f"### Instruction:\n{self.instruction}\n\n{given}### Response:\n"])


@dataclasses.dataclass(frozen=True)
class Completion(Asked):
    """A prompt and what follows it, as they are: nothing is put between them.

    Attributes:
        prompt: The given text.
        completion: The text to learn.
    """

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Chat(Asked):
    """A conversation, to be laid out by the tokenizer's chat template.

    Attributes:
        messages: Turns, each with a role and its content. The turns of role ``assistant`` are learned.
        tools: The tools that the model may call, as JSON schemas that transformers' chat templates take.
        given: Positions of the assistant's turns that are context alone and are not learned.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    given: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class PlainText(Asked):
    """A text that is learned from its beginning to its end, for continued pretraining.

    Attributes:
        text: The text.
    """

    text: str


@dataclasses.dataclass(frozen=True)
class Labelled(Asked):
    """A text, or two, and its class, its classes or its number.

    Attributes:
        text: The text.
        label: Its class, by name or number; a tuple of several classes, or of none; a float for a regression, or a
            tuple of them.
        text_pair: What stands beside the text, as a hypothesis beside its premise; empty for none.
    """

    text: str
    label: Label
    text_pair: str = ""


@dataclasses.dataclass(frozen=True)
class Tagged(Asked):
    """The words of a text, and the class of each.

    Attributes:
        words: The words.
        tags: Their classes, by name or number.
    """

    words: tuple[str, ...]
    tags: tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Question(Asked):
    """A question, a text, and the parts of the text that answer the question.

    Attributes:
        question: The question.
        context: The text.
        answers: Each answer, and the place of its first character in the text; none if the text does not answer.
    """

    question: str
    context: str
    answers: tuple[tuple[str, int], ...]


AnyRecord = Record | Completion | Chat | PlainText | Labelled | Tagged | Question
Kind = TypeVar("Kind", Record, Completion, Chat, PlainText, Labelled, Tagged, Question)

_NAMES: dict[type, str] = {
    Record: "instruction and output",
    Completion: "prompt and completion",
    Chat: "messages",
    PlainText: "text",
    Labelled: "text and label",
    Tagged: "tokens and tags",
    Question: "question, context and answers",
}


def named(*kinds: type) -> str:
    """The fields of records of these classes.

    Example:
        >>> named(Record, Completion)
        'instruction and output, or prompt and completion'
    """
    return ", or ".join(_NAMES[kind] for kind in kinds)


def all_of(records: Sequence[AnyRecord], kind: type[Kind], learner: str) -> list[Kind]:
    """The records as what they are.

    Args:
        records: The records.
        kind: The class of all of them.
        learner: Who learns from them, as an error says it.

    Raises:
        ValueError: If one is of another class.

    Example:
        >>> all_of([Completion("1, 2,", " 3")], Completion, "A model learns")
        [Completion(prompt='1, 2,', completion=' 3')]
    """
    found: list[Kind] = []
    for number, record in enumerate(records, 1):
        if not isinstance(record, kind):
            raise ValueError(f"record {number} has {named(type(record))}. {learner} from {named(kind)}.")
        found.append(record)
    return found

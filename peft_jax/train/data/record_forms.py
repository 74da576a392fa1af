"""The forms that records have in people's files, and how each becomes a record.

A form is a row of `FORMS`. Each field of a record is used, or refused by name where leaving it out would change what
the record says, or reported as unused.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from peft_jax.core.articles import article
from peft_jax.core.field_kinds import is_kind
from peft_jax.core.selecting import not_none
from peft_jax.core.short_errors import short_errors
from peft_jax.train.data.conversations import parsed, to_chat
from peft_jax.train.data.records import AnyRecord, Completion, Labelled, PlainText, Question, Record, Tagged

FORMATS = (
    "instruction and output (and perhaps input), or prompt and completion, or messages, or text and label, or "
    "question and answer, or conversations, or text"
)
ADVICE = "--columns instruction=question names columns anew."


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of records.

    Attributes:
        signs: Fields by any of which it is known.
        needed: Fields that it must have.
        optional: Fields that it may have.
        make: Makes a record of these fields' values and the name of the record.
        rule: Describes the fields, for errors.
        together: Fields without which the signs say nothing, as other forms have them too.
    """

    signs: tuple[str, ...]
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[Mapping[str, Any], str], AnyRecord]
    rule: str
    together: tuple[str, ...] = ()

    def is_of(self, fields: Mapping[str, Any]) -> bool:
        """Whether fields are those of a record of this form."""
        return not fields.keys().isdisjoint(self.signs) and set(self.together) <= fields.keys()

    @property
    def name(self) -> str:
        """The fields that it must have, in words."""
        return " and ".join(self.needed)


class Parsed(NamedTuple):
    """Records of one source, and the names of their fields that are not used."""

    records: list[AnyRecord]
    unused: list[str]


def _alpaca(value: Mapping[str, Any], where: str) -> Record:
    texts = _texts(value, ("instruction", "input", "output", "system"), where, "instruction and output")
    return Record(**texts, history=_history(value.get("history"), where))


def _question(value: Mapping[str, Any], where: str) -> Record:
    texts = _texts(value, ("question", "answer", "system"), where, "question and answer")
    return Record(texts["question"], "", texts["answer"], texts["system"])


def _completion(value: Mapping[str, Any], where: str) -> AnyRecord:
    prompt, completion = value["prompt"], value["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return to_chat(answer, where, given=given, tools=value.get("tools"))
    if value.get("tools"):
        raise ValueError(
            f"{where} has tools and a prompt that is text. Give prompt and completion as lists of messages."
        )
    return Completion(**_texts(value, ("prompt", "completion"), where, "prompt and completion"))


def _chat(value: Mapping[str, Any], where: str) -> AnyRecord:
    messages = value.get("messages", value.get("conversations"))
    system = _text(value, "system", where, "messages")
    return to_chat(messages, where, system=system, tools=value.get("tools"), functions=value.get("functions"))


def _labelled(value: Mapping[str, Any], where: str) -> Labelled:
    texts = _texts(value, ("text", "text_pair"), where, "text and label")
    label = value["label"]
    if isinstance(label, list):
        return _several(value, label, where)
    if not _is_label(label):
        raise ValueError(
            f"{where} has the label {label!r}. Give the name of a class, or its number from 0 on; for a regression a "
            "number with a decimal point; for several classes a list."
        )
    return Labelled(texts["text"], label, texts["text_pair"])


def _labels(value: Mapping[str, Any], where: str) -> Labelled:
    return _several(value, parsed(value["labels"], "labels", where), where)


def _several(value: Mapping[str, Any], labels: Any, where: str) -> Labelled:
    """A text with a list of labels."""
    texts = _texts(value, ("text", "text_pair"), where, "text and labels")
    if not isinstance(labels, list) or not all(_is_label(label) for label in labels):
        raise ValueError(
            f"{where} has the labels {labels!r}. Give a list of the text's classes, by name or by number from 0 on."
        )
    return Labelled(texts["text"], tuple(labels), texts["text_pair"])


def _is_label(label: Any) -> bool:
    """Whether a value names or numbers a class, or is a finite number to predict."""
    if isinstance(label, float):
        return math.isfinite(label)
    return _is_class(label)


def _tagged(name: str) -> Callable[[Mapping[str, Any], str], Tagged]:
    """A function that makes records of words and their classes in the field of this name."""

    def make(value: Mapping[str, Any], where: str) -> Tagged:
        words, tags = parsed(value["tokens"], "tokens", where), parsed(value[name], name, where)
        if not isinstance(words, list) or not words or not is_kind(words, list[str]):
            raise ValueError(f"{where} has tokens that are no list of words. Give the words of a text as a list.")
        if not isinstance(tags, list) or not all(_is_class(tag) for tag in tags):
            raise ValueError(f"{where} has {name} that are no list of classes. Give each word's, by name or number.")
        if len(words) != len(tags):
            raise ValueError(f"{where} has {len(words)} tokens and {len(tags)} {name}. Give one for each token.")
        return Tagged(tuple(words), tuple(tags))

    return make


def _with_context(value: Mapping[str, Any], where: str) -> Question:
    texts = _texts(value, ("question", "context"), where, "question and context")
    answers = parsed(value["answers"], "answers", where)
    if isinstance(answers, Mapping):  # the form of data sets on the hub: lists of texts and of places
        found_texts, starts = answers.get("text"), answers.get("answer_start")
        if not (isinstance(found_texts, list) and isinstance(starts, list) and len(found_texts) == len(starts)):
            raise ValueError(f"{where} has answers without a text and an answer_start each. Give both, as SQuAD does.")
        answers = [{"text": text, "answer_start": start} for text, start in zip(found_texts, starts, strict=True)]
    if not isinstance(answers, list):
        raise ValueError(f"{where} has answers that are no list. Give each a text and an answer_start, as SQuAD does.")
    if _truth(value.get("is_impossible", False), "is_impossible", where):
        answers = []
    found = [_answer(one, texts["context"], where) for one in answers]
    return Question(**texts, answers=tuple(found))


def _truth(value: Any, name: str, where: str) -> bool:
    """A truth value, which tables have as text."""
    said = str(value).lower()
    if said in ("true", "1", "1.0"):
        return True
    if said in ("false", "0", "0.0", ""):
        return False
    raise ValueError(f"{where} has {name}={value!r}. Give true or false.")


def _answer(answer: Any, context: str, where: str) -> tuple[str, int]:
    """An answer and its place, which are checked against the text."""
    text, start = (answer.get("text"), answer.get("answer_start")) if isinstance(answer, Mapping) else (None, None)
    if not isinstance(text, str) or not isinstance(start, int) or isinstance(start, bool) or not text:
        raise ValueError(f"{where} has the answer {answer!r}. Give each a text and an answer_start, as SQuAD does.")
    if start < 0 or context[start : start + len(text)] != text:
        raise ValueError(
            f"{where} has the answer {text!r}, which is not at character {start} of its context. Correct answer_start."
        )
    return text, start


def _is_class(label: Any) -> bool:
    return isinstance(label, str | int) and not isinstance(label, bool)


def _plain(value: Mapping[str, Any], where: str) -> PlainText:
    return PlainText(_text(value, "text", where, "text"))


# The first form that a record has a sign of is its form.
FORMS = (
    Form(("messages",), ("messages",), ("system", "tools", "functions"), _chat, "messages"),
    Form(("conversations",), ("conversations",), ("system", "tools", "functions"), _chat, "conversations"),
    Form(("completion", "prompt"), ("prompt", "completion"), ("tools",), _completion, FORMATS),
    Form(
        ("instruction", "output"),
        ("instruction", "output"),
        ("input", "system", "history"),
        _alpaca,
        "the fields instruction and output, and may have input, system and history",
    ),
    Form(("label",), ("text", "label"), ("text_pair",), _labelled, "the fields text and label, and may have text_pair"),
    Form(
        *(("answers",), ("question", "context", "answers"), ("is_impossible",), _with_context),
        "the fields question, context and answers, and may have is_impossible",
        together=("question", "context"),
    ),
    Form(
        *(("tokens",), ("tokens", "tags"), (), _tagged("tags")),
        "the fields tokens and tags",
        together=("tags",),
    ),
    Form(
        *(("tokens",), ("tokens", "ner_tags"), (), _tagged("ner_tags")),
        "the fields tokens and ner_tags",
        together=("ner_tags",),
    ),
    Form(
        *(("labels",), ("text", "labels"), ("text_pair",), _labels),
        "the fields text and labels, and may have text_pair",
        together=("text",),
    ),
    Form(("question", "answer"), ("question", "answer"), ("system",), _question, "the fields question and answer"),
    Form(("text",), ("text",), (), _plain, "the field text"),
)

# Fields that say more than texts do. A record that has one which its form does not use is refused.
MEANT = (
    *("system", "history", "tools", "functions", "weight", "train", "chosen", "rejected", "label", "reward"),
    *("images", "image", "videos", "video", "audio", "audios", "documents", "context", "text_pair"),
    *("chat_template_kwargs", "chat_template"),
)
EMPTY: tuple[Any, ...] = ("", [], {}, ())


def to_records(objects: Sequence[Any], source: str) -> list[AnyRecord]:
    """Turn parsed objects into records; ``source`` names where they come from in errors.

    Raises:
        ValueError: If there are none, they are of no known format or of several, or have a field that changes their
            meaning and cannot be used.

    Example:
        >>> to_records([{"question": "1 + 1?", "answer": "2"}], "here")
        [Record(instruction='1 + 1?', input='', output='2')]
    """
    return parse_records(objects, source).records


@short_errors()
def parse_records(objects: Sequence[Any], source: str) -> Parsed:
    """As `to_records`, with the names of the fields that are not used.

    Raises:
        ValueError: As `to_records` does.

    Example:
        >>> parse_records([{"text": "A text.", "url": "u"}], "here")
        Parsed(records=[PlainText(text='A text.')], unused=['url'])
    """
    if not objects:
        raise ValueError(f"{source} holds no records. Give at least one with {FORMATS}.")
    objects = in_rows(objects)
    form = form_of(objects[0], f"record 1 of {source}")
    unused: dict[str, None] = {}
    records = []
    for number, value in enumerate(objects, 1):
        where = f"record {number} of {source}"
        records.append(to_record(value, form, where))
        unused |= dict.fromkeys(unused_fields(value, form))
    return Parsed(records, list(unused))


def in_rows(objects: Sequence[Any]) -> Sequence[Any]:
    """The questions of a file in SQuAD's own form, in which they are in paragraphs of articles; else the objects.

    Example:
        >>> article = {"paragraphs": [{"context": "A text.", "qas": [{"question": "What?", "answers": []}]}]}
        >>> in_rows([{"version": "2.0", "data": [article]}])
        [{'question': 'What?', 'answers': [], 'context': 'A text.'}]
    """
    if len(objects) == 1 and isinstance(objects[0], dict) and isinstance(objects[0].get("data"), list):
        objects = objects[0]["data"]
    if not objects or not all(map(_has_paragraphs, objects)):
        return objects
    rows = []
    for one in objects:
        for paragraph in one["paragraphs"]:
            for question in paragraph.get("qas", ()):
                rows.append({**question, "context": paragraph.get("context")})
    return rows


def _has_paragraphs(article: Any) -> bool:
    return isinstance(article, dict) and isinstance(article.get("paragraphs"), list)


def form_of(value: Any, where: str) -> Form:
    """The form of a parsed object.

    Raises:
        ValueError: If it has none.
    """
    found = _form(_fields(value, where))
    if found is None:
        has = _said_fields(value)
        raise ValueError(f"{where} lacks instruction and output; it has {has}. Each record needs {FORMATS}. {ADVICE}")
    return found


def to_record(value: Any, form: Form, where: str) -> AnyRecord:
    """Make a record of a parsed object of a form.

    Raises:
        ValueError: If it is of another form, or has a field that cannot be used.
    """
    fields = _fields(value, where)
    missing = [name for name in form.needed if name not in fields]
    if missing:
        has, is_other = _said_fields(value), _form(fields) is not form
        if is_other:
            raise ValueError(
                f"{where} lacks {' and '.join(missing)}, which the first one has; it has {has}. Give one format a file."
            )
        raise ValueError(f"{where} lacks {' and '.join(missing)}; it has {has}. Each record needs {form.rule}.")
    for name in MEANT:
        is_used = name in (*form.needed, *form.optional)
        if not is_used and fields.get(name, "") not in EMPTY:
            raise ValueError(
                f"{where} has a field {name}, which records with {form.name} have no use for here. Remove it, or name "
                "the columns by --columns."
            )
    record = form.make(fields, where)
    if "task_id" in fields:
        return dataclasses.replace(record, task_id=fields["task_id"])
    return record


def _said_fields(value: Mapping[str, Any]) -> str:
    said = [name if field is not None else f"{name} (null)" for name, field in value.items()]
    return ", ".join(said) or "no fields"


def said_of_unused(source: str, unused: Iterable[str]) -> str:
    """A sentence on the fields of a source that are not used.

    Example:
        >>> said_of_unused("data.csv", ["", "url"])
        'Not used of data.csv: a column without a name, url.'
    """
    return f"Not used of {source}: {', '.join(name or 'a column without a name' for name in unused)}."


def unused_fields(value: Mapping[str, Any], form: Form) -> list[str]:
    """The fields of a parsed object that its record does not have."""
    used = (*form.needed, *form.optional, "task_id", *MEANT)
    return [name for name in value if name not in used]


def _fields(value: Any, where: str) -> dict[str, Any]:
    """The fields that have a value; tables have nulls where a row has none."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is of type {type(value).__name__}, not an object. Each record needs {FORMATS}.")
    return not_none(value)


def _form(fields: Mapping[str, Any]) -> Form | None:
    return next((form for form in FORMS if form.is_of(fields)), None)


def _texts(value: Mapping[str, Any], names: Sequence[str], where: str, form: str) -> dict[str, str]:
    return {name: _text(value, name, where, form) for name in names}


def _text(value: Mapping[str, Any], name: str, where: str, form: str) -> str:
    """A field's text; empty where the record does not have the field."""
    content = value.get(name, "")
    if not isinstance(content, str):
        raise ValueError(
            f"{where} has {article(name)} of type {type(content).__name__}, not text. "
            f"Each record needs texts in {form}."
        )
    return content


def _history(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    pairs = parsed(value or [], "history", where)
    for pair in pairs:
        if not is_kind(pair, tuple[str, str]):
            raise ValueError(f'{where} has a history that is no list of pairs such as [["Hello", "Hi"]].')
    return tuple((question, answer) for question, answer in pairs)

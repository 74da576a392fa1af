"""Conversations in the forms that people's files have, made into turns that transformers' chat templates take.

Turns are OpenAI's (``role``, ``content``) or ShareGPT's (``from``, ``value``). Contents may be lists of text parts, or
null beside tool calls. ``weight`` and ``train`` of a turn say whether it is learned.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peft_jax.core.selecting import not_none, present
from peft_jax.core.strict_json import JSONError, parse_json
from peft_jax.train.data.records import Chat

RULE = 'Messages are a list of objects like {"role": "user", "content": "Hello"}.'

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}

# Fields of a turn that would change what it says.
REFUSED = ("images", "image", "videos", "video", "audio", "audios", "files", "chosen", "rejected", "refusal")

THOUGHTS = ("reasoning_content", "thinking")  # many templates leave thoughts out on purpose


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn as a chat template takes it.

    Attributes:
        message: Its role, its content, and what else it has.
        is_given: Whether it is context alone, which is not learned.
    """

    message: dict[str, Any]
    is_given: bool


def to_chat(
    messages: Any, where: str, *, given: Any = (), system: str = "", tools: Any = None, functions: Any = None
) -> Chat:
    """Make a conversation of parsed JSON.

    Args:
        messages: The turns that are learned where they are the assistant's.
        where: The name of the record, for errors.
        given: Turns before them that are context alone.
        system: A system prompt for conversations that have none.
        tools: Schemas of tools, or JSON of them.
        functions: The same in OpenAI's earlier form.

    Raises:
        ValueError: If it is no conversation, nothing in it is learned, or it has a field that cannot be used.

    Example:
        >>> chat = to_chat([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0},
        ...                 {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "See you"}], "record 1")
        >>> chat.messages[1], chat.given
        ({'role': 'assistant', 'content': 'Hello'}, (1,))
    """
    before = _turns(given, where) if given else []
    turns = [dataclasses.replace(turn, is_given=True) for turn in before] + _turns(messages, where)
    if system:
        if turns[0].message["role"] == "system":
            raise ValueError(f"{where} has a field system and a turn of role system. Remove one of them.")
        turns.insert(0, Turn({"role": "system", "content": system}, is_given=True))
    answers = [number for number, turn in enumerate(turns) if turn.message["role"] == "assistant"]
    context = tuple(number for number in answers if turns[number].is_given)
    if not answers:
        raise ValueError(f"{where} has no message of role assistant, so there is nothing to learn in it. {RULE}")
    if len(context) == len(answers):
        raise ValueError(f"{where} has no turn of the assistant that is to be learned. Remove the record.")
    return Chat(tuple(turn.message for turn in turns), tools=_tools(tools, functions, where), given=context)


def parsed(value: Any, name: str, where: str) -> Any:
    """A list or an object that a table holds as JSON text; other values as they are.

    Raises:
        ValueError: If such a text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except JSONError as error:
        raise ValueError(
            f"{where} has text in its {name}, which is not JSON ({error}). Give a list or an object."
        ) from error


def _turns(messages: Any, where: str) -> list[Turn]:
    messages = parsed(messages, "turns", where)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where} has messages that are no list, or an empty one. {RULE}")
    return [_turn(message, f"message {number} in {where}") for number, message in enumerate(messages, 1)]


def _turn(message: Any, where: str) -> Turn:
    wrong = ValueError(f"{where} lacks a role or a content that is text. {RULE}")
    if not isinstance(message, dict):
        raise wrong
    fields = not_none(message)  # tables fill rows up with nulls
    role, content = fields.pop("role", None), fields.pop("content", None)
    if role is None and content is None:
        role, content = fields.pop("from", None), fields.pop("value", None)
    if not isinstance(role, str):
        raise wrong
    for name in REFUSED:
        if fields.get(name):
            raise ValueError(f"{where} has {name}, and text alone is learned. Remove the field, or the record.")
    if "reasoning" in fields:  # as some servers call it
        fields["reasoning_content"] = fields.pop("reasoning")
    is_given = _is_given(fields, role, where)
    if role == "function_call":  # ShareGPT's turn that is nothing but a call
        role, fields["function_call"], content = "assistant", parsed(content, "function_call", where), None
    role = ROLES.get(role, role)
    calls = _calls(fields, where)
    if calls:
        fields["tool_calls"] = calls
    has_more = role == "assistant" and any(fields.get(name) for name in ("tool_calls", *THOUGHTS))
    text = _text(content, where)
    if text is None and not has_more:
        raise wrong
    return Turn({"role": role, "content": text or "", **fields}, is_given)


def _text(content: Any, where: str) -> str | None:
    """The text of a content, whose parts are joined as chat templates join them; None for no content."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} has a content of type {type(content).__name__}, not text. {RULE}")
    parts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "str") or not isinstance(text, str):
            raise ValueError(f"{where} has a content with a part of type {kind}, and text alone is learned. Remove it.")
        parts.append(text)
    return "".join(parts)


def _is_given(fields: dict[str, Any], role: str, where: str) -> bool:
    """Take ``weight`` and ``train`` out of a turn's fields; return whether they say that it is not learned."""
    is_given = False
    for name in ("weight", "train"):
        if name not in fields:
            continue
        value = fields.pop(name)
        if value not in (0, 1):
            raise ValueError(
                f"{where} has the {name} {value!r}. Give 1 for a turn that is learned and 0 for one that is not."
            )
        if value and ROLES.get(role, role) not in ("assistant", "function_call"):
            raise ValueError(
                f"{where} has the {name} {value!r} and the role {role}, and turns of the assistant alone are learned. "
                "Remove the field."
            )
        is_given = is_given or not value
    return is_given


def _calls(fields: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The tool calls of a turn in the form that chat templates take, with arguments that are objects."""
    calls = parsed(fields.pop("tool_calls", None), "tool_calls", where)
    call = fields.pop("function_call", None)
    if calls is None:
        calls = []
    if call is not None:
        calls = [*calls, *(call if isinstance(call, list) else [call])]
    return [_call(one, where) for one in calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'{where} has a tool call without a name. Give {{"name": "f", "arguments": {{}}}}.')
    arguments = parsed(function.get("arguments") or {}, "tool call's arguments", where)
    more = not_none(present(call, ["id"]))
    return {**more, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(tools: Any, functions: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    found = parsed(tools, "tools", where) or []
    found = [*found, *({"type": "function", "function": one} for one in parsed(functions, "functions", where) or [])]
    for tool in found:
        if not isinstance(tool, dict):
            raise ValueError(f"{where} has a tool of type {type(tool).__name__}, not an object with its JSON schema.")
    return tuple(found)


def check_written(chat: Chat, template: str, where: str) -> None:
    """Raise ValueError for tools and tool calls that a chat template does not write.

    Args:
        chat: The conversation.
        template: The source of the template.
        where: The name of the conversation, for the error.

    Example:
        >>> chat = Chat(({"role": "assistant", "content": "4"},), tools=({"type": "function"},))
        >>> check_written(chat, "{{ messages[0].content }}", "chat 1")
        Traceback (most recent call last):
        ValueError: chat 1 has tools, which the tokenizer's chat template does not write. Remove the field, or give...
    """
    has = {"tools": bool(chat.tools), "tool_calls": _have(chat.messages, "tool_calls")}
    for name, is_there in has.items():
        if is_there and name not in template:
            raise ValueError(
                f"{where} has {name}, which the tokenizer's chat template does not write. Remove the field, or give "
                "the tokenizer a template that writes it."
            )


def unwritten_thoughts(chats: Sequence[Chat], template: str) -> dict[str, int]:
    """The fields of thoughts that a chat template does not write, and how many chats have them.

    Example:
        >>> chat = Chat(({"role": "assistant", "content": "4", "reasoning_content": "2 + 2"},))
        >>> unwritten_thoughts([chat], "{{ messages[0].content }}")
        {'reasoning_content': 1}
    """
    found: dict[str, int] = {}
    for name in THOUGHTS:
        if name not in template:
            having = [chat for chat in chats if _have(chat.messages, name)]
            if having:
                found[name] = len(having)
    return found


def _have(messages: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Whether a field has a value in one of some messages."""
    return any(message.get(name) for message in messages)

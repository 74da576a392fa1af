"""Rows of the commands: how long they are, and what is said of the examples that are longer."""

from collections.abc import Sequence
from typing import Any

from peft_jax.cli.shared.data_options import DataFileOptions
from peft_jax.cli.shared.progress_bar import watched_encoding
from peft_jax.cli.shared.task import RowOptions
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.conversations import unwritten_thoughts
from peft_jax.train.data.encode import Encoded
from peft_jax.train.data.records import AnyRecord, Chat
from peft_jax.train.data.template import Layout

LONGEST = 2048  # tokens of an example where --cutoff-len is not given

USUAL_ROLES = ("system", "developer", "user", "assistant", "tool")


def row_options(options: DataFileOptions, config: Any, layout: Layout, *, virtual: int, **more: Any) -> RowOptions:
    """How records become rows.

    Args:
        options: The command's options.
        config: The model's config, which says how many positions there are.
        layout: Lays out alpaca's fields.
        virtual: How many of them an adapter takes.
        **more: Further fields.
    """
    longest = options.cutoff_len
    if longest is None:
        longest = max(1, min(LONGEST, config.room - virtual))
    return RowOptions(
        longest, layout, long=options.long, stride=options.stride, virtual=virtual, watch=watched_encoding, **more
    )


def said_of_chats(records: Sequence[AnyRecord], tokenizer: Tokenizer) -> list[str]:
    """Sentences on thoughts in chats that the chat template leaves out, and on turns of unusual roles."""
    chats = [record for record in records if isinstance(record, Chat)]
    found = unwritten_thoughts(chats, str(tokenizer.chat_template)) if chats else {}
    said = [f"The chat template does not write {name}, which {count} chats have." for name, count in found.items()]
    roles = {str(message["role"]): None for chat in chats for message in chat.messages}
    if others := [role for role in roles if role not in USUAL_ROLES]:
        said.append(
            f"Turns of the role {', '.join(others)} are given to the chat template as they are, and not learned."
        )
    return said


def said_of_length(encoded: Encoded, options: RowOptions) -> str:
    """A sentence on the examples that are longer than a row.

    Example:
        >>> from peft_jax.train.data.template import CHAT
        >>> said_of_length(Encoded([], 2, 5), RowOptions(64, CHAT, long="truncate"))
        '5 longer than 64 tokens cut to that. 2 with nothing to learn in that left out.'
    """
    over = f"longer than {options.cutoff_len} tokens"
    said = []
    if encoded.shortened and options.long == "split":
        said.append(f"{encoded.shortened} {over} split.")
    elif encoded.shortened:
        said.append(f"{encoded.shortened} {over} cut to that.")
    if encoded.too_long and options.long == "drop":
        said.append(f"{encoded.too_long} {over} left out.")
    elif encoded.too_long:
        said.append(f"{encoded.too_long} with nothing to learn in that left out.")
    return " ".join(said) or "None was too long."

"""Uploads to the Hugging Face hub, with the model card that it reads."""

import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from peft_jax.core.adapted_tree import adapters
from peft_jax.core.handle import Handle
from peft_jax.core.selecting import not_none
from peft_jax.core.summary import trainable_parameters
from peft_jax.interop.formats import PEFT_VERSION

CARD = "README.md"


class PushOptions(TypedDict, total=False):
    """Arguments of ``push_to_hub``; they mean what they mean in transformers.

    Attributes:
        selected_adapters: Names of the adapters to write; None for all.
        token: Access token; None for the one that is logged in.
        private: Whether a repository that is made is private; None for the owner's default.
        revision: Branch to commit to.
        commit_message: Its message.
        commit_description: Its description.
        create_pr: Whether to open a pull request instead.
    """

    selected_adapters: Sequence[str] | None
    token: str | bool | None
    private: bool | None
    revision: str | None
    commit_message: str | None
    commit_description: str | None
    create_pr: bool


def push(repo_id: str, write: Callable[[str], str], options: Mapping[str, Any]) -> str:
    """Write files into a folder, with a card beside them if they have none, and upload it.

    Args:
        repo_id: The repository.
        write: Writes the files into a folder, and gives the card.
        options: Those of `PushOptions` that are for the hub.

    Returns:
        The address of the commit.

    Raises:
        FileNotFoundError: if the hub cannot be reached, or refuses.
        TypeError: if there is no such option.
    """
    import huggingface_hub  # takes a while, and is for the hub alone

    if unknown := sorted(options.keys() - PushOptions.__annotations__.keys()):
        raise TypeError(
            f"push_to_hub has no argument {unknown[0]}. Its options are {', '.join(PushOptions.__annotations__)}."
        )
    given: dict[str, Any] = not_none(options)
    private, token = given.pop("private", None), given.pop("token", None)
    given.setdefault("commit_message", "Upload model")
    with tempfile.TemporaryDirectory() as folder:
        card = write(folder)
        file = pathlib.Path(folder) / CARD
        if not file.exists():
            file.write_text(card, encoding="utf-8")
        try:
            huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            commit = huggingface_hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token, **given)
        except (OSError, ValueError) as error:  # the hub's errors are kinds of these
            raise FileNotFoundError(
                f"'{repo_id}' cannot be written on the Hugging Face hub ({type(error).__name__}). Check the name "
                "'owner/name', the network, and that your access token may write."
            ) from error
    return str(commit.commit_url)


def adapter_card(handle: Handle) -> str:
    """The model card of a handle's adapters, with PEFT's fields in its header."""
    configs = adapters(handle)
    base = handle.name_or_path or next((config.base_model_name_or_path for config in configs.values()), None)
    tags = ["transformers"]
    if any(config.peft_type == "LORA" for config in configs.values()):
        tags.append("lora")
    header: dict[str, Any] = {"library_name": "peft"}
    if base:
        header["base_model"] = base
        tags.append(f"base_model:adapter:{base}")
    header["tags"] = sorted(tags)
    if handle.task_type == "CAUSAL_LM":
        header["pipeline_tag"] = "text-generation"
    lines = [f"- `{name}`: {config.peft_type}" for name, config in configs.items()]
    lines += ["", trainable_parameters(handle.params), "", "### Framework versions", "", f"- PEFT {PEFT_VERSION}"]
    title = f"Adapters on {base or 'a model without a name'}, in PEFT's format"
    return _card(header, title, lines)


def model_card(handle: Handle) -> str:
    """The model card of a whole model."""
    header: dict[str, Any] = {"library_name": "transformers"}
    if handle.task_type == "CAUSAL_LM":
        header["pipeline_tag"] = "text-generation"
    name = handle.name_or_path or "a model without a name"
    return _card(header, f"A checkpoint made from {name}, in transformers' format", [])


def _card(header: Mapping[str, Any], title: str, lines: Sequence[str]) -> str:
    """A card: its header, a heading, and lines."""
    import huggingface_hub  # takes a while, and is for the hub alone

    front = huggingface_hub.ModelCardData(**header).to_yaml().strip()
    return "\n".join(["---", front, "---", "", f"# {title}", "", *lines, ""])

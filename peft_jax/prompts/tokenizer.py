"""Reads tokenizers. Code in their folder never runs, even if its files ask for it or the user answers yes."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import huggingface_hub

from peft_jax.core.config_ranges import check_raw
from peft_jax.core.file_names import is_path_below
from peft_jax.core.gguf_metadata import open_gguf
from peft_jax.prompts.gguf_tokenizer import tokenizer_of

LONGEST_TEMPLATE, LONGEST_NUMBER = 1_000_000, 7  # characters


class Tokenizer(Protocol):
    """The members of a tokenizer of `transformers` that are used. Chats need its ``apply_chat_template`` too."""

    eos_token_id: Any
    bos_token_id: Any
    eos_token: Any
    chat_template: Any
    special_tokens_map: Any

    def __len__(self) -> int:
        """The number of tokens, added ones included."""

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        """Token ids of a text, or of each of several, under the key ``input_ids``."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation as text or as token ids."""

    def get_chat_template(self, chat_template: Any, tools: Any) -> str:
        """The text of the chat template, of several the one for these tools."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of token ids."""

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """The texts of rows of token ids."""

    def get_vocab(self) -> dict[str, int]:
        """Ids by token."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write the tokenizer's files."""


def read_tokenizer(name_or_path: str | os.PathLike[str], **options: Any) -> Tokenizer:
    """The tokenizer in a folder, or on the Hugging Face hub.

    Args:
        name_or_path: Folder, or id on the hub.
        **options: For transformers' ``AutoTokenizer.from_pretrained``; ``trust_remote_code`` is False in any case.
            ``gguf_file`` names a GGUF file, whose metadata alone are read then.

    Raises:
        ValueError: If there is none that can be read, or none without running code of its own.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> read_tokenizer(MODEL)("List")["input_ids"] != []
        True
    """
    from transformers import AutoTokenizer  # takes seconds to import
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name, has_code = os.fspath(name_or_path), False
    if (gguf_file := options.pop("gguf_file", None)) is not None:
        return _read_gguf(name, gguf_file)
    options.pop("trust_remote_code", None)
    try:
        with _never_asking():
            tokenizer_config = get_tokenizer_config(name, **options)
            has_code = "auto_map" in tokenizer_config
            _check_names(tokenizer_config, _model_config(name, options))
            tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
            _check_class(type(tokenizer), type(tokenizer).__name__)
            _check_template(tokenizer)
            found: Tokenizer = tokenizer
            return found
    except Exception as error:  # damaged files raise many kinds, and tokenizers a bare Exception
        if has_code:
            raise ValueError(
                f"no tokenizer can be read from {name} without running the code that its auto_map names, and such code "
                "is never run. Save the tokenizer with a class of transformers, such as PreTrainedTokenizerFast."
            ) from error
        reason = f" ({error})" if isinstance(error, _Refused) else ""
        raise ValueError(
            f"no tokenizer can be read from {name}{reason}. Put tokenizer.json and tokenizer_config.json beside the "
            "weights."
        ) from error


def _read_gguf(name: str, gguf_file: str) -> Any:
    """The tokenizer that a GGUF file of a folder, or of an id on the hub, describes."""
    try:
        folder = name if os.path.isdir(name) else huggingface_hub.snapshot_download(name, allow_patterns=[gguf_file])
    except (OSError, ValueError) as error:  # the hub's errors are kinds of these
        raise ValueError(f"no folder and no id on the hub is named '{name}', where {gguf_file} would be.") from error
    file = open_gguf(folder, gguf_file)
    try:
        return tokenizer_of(file)
    except Exception as error:  # damaged metadata raise many kinds, and tokenizers a bare Exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"no tokenizer can be made of the metadata of '{file.path}' ({reason}). Take a file with a tokenizer."
        ) from error


def _model_config(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of config.json; an adapter's folder has none."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **options)
    except OSError:
        return {}
    try:
        check_raw(config)  # transformers makes an object of it, with lists of as many entries as it says
    except ValueError as error:
        raise _Refused(f"its config.json: {str(error).rstrip('.')}") from error
    return config


class _Refused(ValueError):
    """The error of a file that asks for code to be run."""


def _check_names(tokenizer_config: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse the name of a class that is no tokenizer.

    transformers takes any of its own classes, and hands ``trust_remote_code`` to none of them: ``AutoProcessor`` or
    ``RagTokenizer`` would ask anew, and ``AutoModel`` would read weights.
    """
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    by_type = TOKENIZER_MAPPING_NAMES.get(str(config.get("model_type")))
    for name in (tokenizer_config.get("tokenizer_class"), config.get("tokenizer_class"), by_type):
        if name is not None:
            _check_class(tokenizer_class_from_name(name), name)
            _check_class(tokenizer_class_from_name(name.removesuffix("Fast")), name)  # which is looked up too
    for file in tokenizer_config.get("fast_tokenizer_files") or ():
        if not is_path_below(file):
            raise _Refused(f"its fast_tokenizer_files name {file}, which is not below the folder")


def _check_class(found: Any, name: str) -> None:
    """Refuse what is no class of tokenizers; a name that transformers does not have, None here, it replaces itself."""
    from transformers import PreTrainedTokenizerBase

    is_tokenizer = isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)
    if found is not None and not is_tokenizer:
        raise _Refused(f"{name} is not a class of tokenizers")


def _check_template(tokenizer: Any) -> None:
    """Refuse a chat template with powers or large numbers: a single operation on them may take forever.

    Its loops are bounded where it is used, by `peft_jax.core.time_limit`.
    """
    import jinja2

    found = getattr(tokenizer, "chat_template", None)
    for template in found.values() if isinstance(found, Mapping) else (found,):
        if template is None:
            continue
        if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
            raise _Refused(f"its chat template is no text of at most {LONGEST_TEMPLATE} characters")
        try:
            tokens = list(jinja2.Environment().lex(template))
        except jinja2.TemplateError:
            continue  # said where it is used
        for _, kind, value in tokens:
            if value == "**" or (kind in ("integer", "float") and len(value) > LONGEST_NUMBER):
                raise _Refused(f"its chat template computes with '{value[:LONGEST_NUMBER]}'")


@contextlib.contextmanager
def _never_asking() -> Iterator[None]:
    """Let transformers raise where it would ask on standard input whether to run code: what it has for its own tests.

    ``trust_remote_code=False`` does not reach every call that it makes.
    """
    from transformers import dynamic_module_utils as module

    before = module.TIME_OUT_REMOTE_CODE
    module.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        module.TIME_OUT_REMOTE_CODE = before

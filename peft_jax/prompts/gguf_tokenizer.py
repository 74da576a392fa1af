"""The tokenizer that a GGUF file's metadata describe, chat template included, as transformers makes it.

transformers' own way to it, ``AutoTokenizer.from_pretrained(folder, gguf_file=...)``, imports PyTorch to read the
metadata. What it makes of them does not.
"""

from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.core.selecting import not_none

SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def tokenizer_of(file: GGUFFile) -> Any:
    """The tokenizer; no file beside this one is read.

    Raises:
        ValueError: If the metadata describe none that transformers can make; damaged ones raise other kinds too.
    """
    from transformers import PreTrainedTokenizerFast  # takes seconds to import
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    described = _values(file, GGUF_TOKENIZER_MAPPING["tokenizer"])
    if "tokens" not in described:
        raise ValueError("its metadata have no tokenizer.ggml.tokens")
    told = _values(file, GGUF_TOKENIZER_MAPPING["tokenizer_config"])
    if described.get("tokenizer_type") == "llama":  # SentencePiece, which begins texts with BOS unless a file says no
        told = {"add_bos_token": True, **told}
    for name, key in SPECIAL.items():
        number = file.get(f"tokenizer.ggml.{key}_token_id")
        told[name] = None if number is None else described["tokens"][number]
    backend, more = convert_gguf_tokenizer(file.architecture, described)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **told, **more)


def _values(file: GGUFFile, names: dict[str, str]) -> dict[str, Any]:
    """The metadata under ``tokenizer.`` that there are, by transformers' names of them."""
    return not_none({name: file.get(f"tokenizer.{key}") for key, name in names.items()})

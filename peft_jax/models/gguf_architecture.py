"""The record of an architecture as GGUF files name it: a row of a family's table."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.core.selecting import without
from peft_jax.interop.gguf_file import GGUFTensor

# Keys of a decoder's metadata behind the architecture's name, and the fields of config.json that they are.
DECODER_FIELDS: Mapping[str, str] = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}

# The fields of decoders whose norms have a bias, but for what config.json calls the epsilon of these.
BIASED_FIELDS: Mapping[str, str] = without(DECODER_FIELDS, ["attention.layer_norm_rms_epsilon"])


def as_stored(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """The tensor as the file has it."""
    return tensor


def as_named(key: str) -> tuple[str, ...]:
    """A checkpoint's key as it is."""
    return (key,)


def no_more_fields(file: GGUFFile) -> dict[str, Any]:
    """No fields beside those of the table."""
    return {}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class GGUFArchitecture:
    """How files of a ``general.architecture`` spell a model type of a family.

    Which tensor is which, the package gguf tells by the names that the modules have in llama.cpp's converter. Most of
    them are transformers'.

    Attributes:
        model_type: transformers' name of it.
        fields: Fields of config.json by metadata key, without the architecture's name in front.
        more_fields: Further fields of config.json, from the file; raises ValueError for what is not supported.
        restore: ``restore(tensor, config)`` undoes what llama.cpp does to a tensor on writing it.
        converted: The names that the converter gives a checkpoint's tensor. Several are those of tensors of all experts
            whose outputs take turns in it.
        ignored: GGUF's names of tensors that are no weights.
    """

    model_type: str
    fields: Mapping[str, str]
    more_fields: Callable[[GGUFFile], Mapping[str, Any]] = no_more_fields
    restore: Callable[[GGUFTensor, Any], GGUFTensor] = as_stored
    converted: Callable[[str], tuple[str, ...]] = as_named
    ignored: tuple[str, ...] = ()

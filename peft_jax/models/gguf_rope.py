"""Rotary positions in GGUF files: their scaling in the metadata, or as a tensor."""

from typing import Any

import numpy as np

from peft_jax.core.gguf_metadata import GGUFFile
from peft_jax.core.selecting import not_none
from peft_jax.interop.gguf_file import read_tensors
from peft_jax.models.modules.rope_parameters import RopeParameters
from peft_jax.models.modules.rotary import inverse_frequencies

ROPE_FACTORS = "rope_freqs.weight"
# Keys of YaRN behind "rope.scaling.", and the parameters of transformers that they are.
YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Keys by which llama.cpp multiplies what YaRN computes, and the values that change nothing.
YARN_FACTORS = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}
PRETRAINED = 8192  # positions that Llama 3.1 and later ones were pretrained on; files do not have it


def rope_fields(file: GGUFFile) -> dict[str, Any]:
    """The fields of config.json for rotary positions that are stretched.

    Raises:
        ValueError: if they are stretched in a way that is not supported, or turn a part of the heads.
    """
    name = file.architecture
    kind, factor = file.get(f"{name}.rope.scaling.type", "none"), file.get(f"{name}.rope.scaling.factor")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"'{file.path}' has rope.scaling.type={kind!r}, which is not supported. Take another model.")
    _check_whole(file)
    if kind == "yarn":
        return {"rope_scaling": {"rope_type": "yarn", **_yarn(file)}}
    factors = read_tensors(file).get(ROPE_FACTORS)
    if factors is not None:
        return _stretched(file, np.asarray(factors, np.float32))
    return {} if kind == "none" or factor is None else {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _yarn(file: GGUFFile) -> dict[str, Any]:
    """The parameters of YaRN; those that a file does not have are the same in llama.cpp and transformers."""
    found = {key: file.get(f"{file.architecture}.rope.scaling.{key}") for key in (*YARN, *YARN_FACTORS)}
    for key, neutral in YARN_FACTORS.items():
        if found[key] not in (None, neutral):
            raise ValueError(
                f"'{file.path}' has rope.scaling.{key}={found[key]:g}, which is not supported, only {neutral:g}. Take "
                "the checkpoint that it was made from."
            )
    for key in ("factor", "original_context_length"):
        if found[key] is None:
            raise ValueError(
                f"'{file.path}' has rope.scaling.type='yarn' and no rope.scaling.{key}. Take an undamaged copy."
            )
    return not_none({field: found[key] for key, field in YARN.items()})


def _check_whole(file: GGUFFile) -> None:
    name = file.architecture
    heads, width = file.get(f"{name}.attention.head_count"), file.get(f"{name}.embedding_length")
    turned = file.get(f"{name}.rope.dimension_count")
    size = file.get(f"{name}.attention.key_length") or (width // heads if heads and width else turned)
    if turned not in (None, size):
        raise ValueError(
            f"'{file.path}' turns {turned} of a head's {size} features (rope.dimension_count), and only all of them "
            "are supported. Take another model."
        )


def _stretched(file: GGUFFile, factors: np.ndarray) -> dict[str, Any]:
    """The scaling that has these factors, which divide the frequencies."""
    factor = float(factors.max())
    if factor == 1:
        return {}
    theta = float(file.get(f"{file.architecture}.rope.freq_base", 10000.0))
    plain = RopeParameters(rope_theta=theta)
    scaling = RopeParameters(
        rope_type="llama3", rope_theta=theta, factor=factor, original_max_position_embeddings=PRETRAINED
    )
    head_dim = 2 * len(factors)
    fast, slow = (inverse_frequencies(rope, head_dim, PRETRAINED) for rope in (plain, scaling))
    if not np.allclose(fast / slow, factors, rtol=1e-4):
        raise ValueError(
            f"'{file.path}' stretches its rotary positions ({ROPE_FACTORS}) in another way than rope_type 'llama3' "
            f"with original_max_position_embeddings={PRETRAINED}. Take the checkpoint that it was made from."
        )
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": PRETRAINED,
        }
    }

"""The leaves of a checkpoint that are quantized while it is read, and their format."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.core.layout import Layout, conventional_layout
from peft_jax.core.paths import leaf_names
from peft_jax.interop.checkpoint import Row
from peft_jax.models.config import ModelConfig
from peft_jax.models.registry import family_of
from peft_jax.quant.bitsandbytes_config import BitsAndBytesConfig
from peft_jax.quant.kinds import Quantizer


class LoadRounding(NamedTuple):
    """A format, and the axes of the leaves that are rounded to it, by path."""

    quantizer: Quantizer
    layouts: tuple[tuple[str, Layout], ...]

    def layout(self, path: str) -> Layout | None:
        """Axes of a leaf that is to be rounded; None for the others."""
        return dict(self.layouts).get(path)


def load_rounding(
    model: ModelConfig,
    rows: Sequence[Row],
    *,
    load_in_8bit: bool,
    load_in_4bit: bool,
    quantization_config: BitsAndBytesConfig | None,
) -> LoadRounding | None:
    """The leaves to round while reading, and their format; None for no rounding.

    The matrices of the layers are rounded, without embeddings. Where ``llm_int8_skip_modules`` is given, the matrices
    outside of the layers are rounded too unless it names them, as in transformers.

    Raises:
        ValueError: if options exclude each other, or some layers of a stacked leaf are to stay in float.
    """
    config = quantization_config
    if config is not None and not isinstance(config, BitsAndBytesConfig):
        raise ValueError(
            f"quantization_config is a {type(config).__module__}.{type(config).__name__}, which is not supported. "
            "Write quantization_config=pj.BitsAndBytesConfig(...)."
        )
    if [load_in_8bit, load_in_4bit, config is not None].count(True) > 1:
        raise ValueError(
            "load_in_8bit, load_in_4bit and quantization_config exclude each other. Give one of them; "
            "BitsAndBytesConfig has fields of these names."
        )
    if config is None:
        if not load_in_8bit and not load_in_4bit:
            return None
        quantizer, skipped = Quantizer("int8" if load_in_8bit else "nf4"), None
    else:
        asked = config.quantizer()
        if asked is None:
            raise ValueError(
                "quantization_config quantizes nothing. Write load_in_4bit=True or load_in_8bit=True in it, or leave "
                "it out."
            )
        quantizer, skipped = asked, config.llm_int8_skip_modules
    layouts = []
    for row in rows:
        layout = matrix_layout(model, row, outside=skipped is not None)
        if layout is not None and not _is_skipped(row, layout, skipped or ()):
            layouts.append((row.path, layout))
    return LoadRounding(quantizer, tuple(layouts))


def matrix_layout(model: ModelConfig, row: Row, *, outside: bool) -> Layout | None:
    """Axes of a matrix that may be in few bits; None for other leaves, embeddings and routers.

    Args:
        model: The architecture.
        row: The leaf.
        outside: Whether a matrix outside of the layers may be.
    """
    layout = family_of(model).layout(model, row.path) or conventional_layout(row.path, row.shape)
    if layout is None or not layout.inp:
        return None
    if layout.parameter and not layout.is_experts:  # a router: bitsandbytes quantizes no module but linear layers
        return None
    return layout if layout.stack or (outside and not layout.lookup) else None


def _is_skipped(row: Row, layout: Layout, patterns: Sequence[str]) -> bool:
    """Whether patterns name all modules of a leaf."""
    names = leaf_names(row.path, layout, row.shape)
    hit = np.array([_is_named(patterns, name) for name in names.flat])
    if hit.any() and not hit.all():
        raise ValueError(
            f"llm_int8_skip_modules={list(patterns)} names {hit.sum()} of the {hit.size} layers of '{row.path}'. Name "
            "all of them or none: a leaf has one format."
        )
    return bool(hit.any())


def _is_named(patterns: Sequence[str], module: str) -> bool:
    """Whether transformers takes a module for one that ``llm_int8_skip_modules`` names (``should_convert_module``)."""
    for pattern in patterns:
        if module.endswith(pattern) or re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module):
            return True
    return False

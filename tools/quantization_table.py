"""Write docs/quantization.md: the formats of weights, bytes per weight, and the reference that each equals.

    python tools/quantization_table.py docs/quantization.md

Bytes are counted on a matrix of 4096 x 4096, scales included; nothing in the table is typed by hand but its words.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from peft_jax.core.layout import Layout
from peft_jax.quant import Quantizer

SIDE = 4096
HEAD = """# Quantized bases

A base's matrices can be kept in few bits; an adapter on them is trained in float. Written by `make quantization`.

| format | what to write | bytes per weight | trains | what its values equal |
|---|---|---|---|---|
"""
TAIL = """
Any adapter method goes on any of these. The backward pass keeps the packed arrays and no dequantized copy
(`tests/test_blockwise.py`, `tests/test_int8.py`). `load_in_4bit=True` and `--load-in-4bit` mean nf4 in blocks of 64
without double quantization; `quantization_config=pj.BitsAndBytesConfig(...)` has transformers' fields, names and
defaults.

Where 64 does not divide the inputs of a matrix, blocks of nf4 and fp4 run on from one output channel to the next, as in
bitsandbytes; groups of int4 and int8 do not, the last one of a channel is shorter.

An adapter that was trained on a quantized base is merged into the float weights (`peft-jax merge`), which rounds once,
or into the quantized ones (`pj.merge_quantized`), which reports what rounding loses for each leaf.
"""


class Format(NamedTuple):
    """A row: a format, what a user writes for it, and the reference of its values."""

    name: str
    quantizer: Quantizer
    written: str
    reference: str


BITSANDBYTES = "bitsandbytes 0.50.2, to the last bit (`tests/test_bitsandbytes.py`)"
DOUBLE = (
    f"{BITSANDBYTES}, given its mean of the scales; the mean itself is to 3e-7, and of our own rounding each scale "
    "gets the nearest of the 256 values, as bitsandbytes' definition in Python does"
)
NEAREST = "NumPy: within half a step (`tests/test_blockwise.py`)"
FORMATS = (
    Format("nf4, blocks of 64", Quantizer("nf4"), '`load_in_4bit=True`, `kind="nf4"`', BITSANDBYTES),
    Format(
        "nf4, double quantization",
        Quantizer("nf4", double_quant=True),
        "`bnb_4bit_use_double_quant=True`, `double_quant=True`",
        DOUBLE,
    ),
    Format(
        "fp4, blocks of 64", Quantizer("fp4"), '`BitsAndBytesConfig(load_in_4bit=True)`, `kind="fp4"`', BITSANDBYTES
    ),
    Format("int4, groups of 128", Quantizer("int4"), '`kind="int4"`', NEAREST),
    Format(
        "int8, per output channel",
        Quantizer("int8"),
        '`load_in_8bit=True`, `kind="int8"`',
        "NumPy: within half a step (`tests/test_int8.py`)",
    ),
    Format("int8, groups of 128", Quantizer("int8", 128), '`kind="int8", group_size=128`', NEAREST),
)


def bytes_per_weight(quantizer: Quantizer) -> float:
    """Bytes that a large matrix takes in a format, divided by its elements."""
    weight = jax.eval_shape(lambda: quantizer(jnp.zeros((SIDE, SIDE)), Layout()))
    total = 0
    for array in jax.tree.leaves(weight):
        total += array.size * array.dtype.itemsize
    return total / SIDE**2


def table() -> str:
    """The whole page."""
    lines = []
    for row in FORMATS:
        size = f"{bytes_per_weight(row.quantizer):.4f}"
        lines.append(f"| {row.name} | {row.written} | {size} | yes | {row.reference} |\n")
    return HEAD + "".join(lines) + TAIL


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(table(), encoding="utf-8")

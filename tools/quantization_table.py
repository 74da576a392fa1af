"""Write docs/quantization.md: formats of weights and of files, bytes per weight, and the reference that each equals.

    python tools/quantization_table.py docs/quantization.md

Bytes are counted on a matrix of 4096 x 4096, scales included, and steps are measured on this machine; nothing in the
table is typed by hand but its words.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from peft_jax.interop.packed_codes import Codes, Form, Kept, kept_weight
from quantized_steps import LENGTH, RANK, ROUNDS, ROWS, SHAPE, shares

from peft_jax.core.layout import Layout
from peft_jax.quant import Quantizer

SIDE = 4096
HEAD = """# Quantized bases

A base's matrices can be kept in few bits; an adapter on them is trained in float. Written by `make quantization`.

| format | what to write | bytes per weight | trains | step, of bf16's | memory, of bf16's | what its values equal |
|---|---|---|---|---|---|---|
"""
TAIL = """
Any adapter method goes on any of these but KaSA (`kasa_config`): attach that to the float model, then quantize. The
backward pass keeps the packed arrays and no dequantized copy (`tests/test_blockwise.py`, `tests/test_int8.py`).
`load_in_4bit=True` and `--load-in-4bit` mean nf4 in blocks of 64
without double quantization; `quantization_config=pj.BitsAndBytesConfig(...)` has transformers' fields, names and
defaults.

Where 64 does not divide the inputs of a matrix, blocks of nf4 and fp4 run on from one output channel to the next, as in
bitsandbytes; groups of int4 and int8 do not, the last one of a channel is shorter.

An adapter that was trained on a quantized base is merged into the float weights (`peft-jax merge`), which rounds once,
or into the quantized ones (`pj.merge_quantized`), which reports what rounding loses for each leaf.
"""

READ_HEAD = """
## Quantized checkpoints and GGUF files

All of these are read, with the values of the reference, and dequantized tensor by tensor by default.
`keep_quantized=True` (`--keep-quantized`) keeps them in their own bits, as transformers does by default, where a weight
above holds them exactly. The others are then dequantized as before, and a warning says how many, in how many bytes, and
which. The kept values are those of the dequantized ones to the last bit, rounded to the element type of the file first
(`tests/test_kept_quantized.py`). It excludes `load_in_8bit`, `load_in_4bit` and `quantization_config`, which quantize a
dequantized checkpoint anew.

| file | read | kept as | bytes per weight | exact against |
|---|---|---|---|---|
"""
READ_TAIL = """
Bytes are those of a kept matrix with float16 scales in the file, which are float32 here, and 8-bit zero points. A leaf
is kept if all of its layers are of one form, and their matrices are those of plain layers; embeddings, and experts in
one tensor, are dequantized. Of act-order, runs of inputs of one group are kept, and other orders are dequantized.
Formats that quantize activations too are read as weights alone.
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


class File(NamedTuple):
    """A row: a format of files, the form that it is kept in if there is one, and the reference of its values."""

    name: str
    read: str
    form: Form | None
    reference: str


HALF = np.dtype(np.float16)
KEPT_AS = {
    ("nf4", False): "`NF4`, `FP4`",
    ("int4", False): "`Int4`",
    ("int8", False): "`Int8Groups`",
    ("int8", True): "`Int8`",
}
BY_128 = "groups of 128"
FILES = (
    File("bitsandbytes nf4, fp4", "yes", Form("nf4", 64, HALF), "bitsandbytes"),
    File("the same, double quantization", "yes", Form("nf4", 64, HALF, is_nested=True), "bitsandbytes"),
    File("bitsandbytes int8", "yes", Form("int8", None, np.dtype(np.float32)), "bitsandbytes"),
    File(f"GPTQ, 2 to 4 bits, {BY_128}", "yes", Form("int4", 128, HALF, has_zeros=True), "its formula, in PyTorch"),
    File(f"GPTQ, 8 bits, {BY_128}", "yes", Form("int8", 128, HALF, has_zeros=True), "its formula, in PyTorch"),
    File("GPTQ, act-order", "yes", None, "its formula, in PyTorch"),
    File(f"AWQ (gemm), {BY_128}", "yes", Form("int4", 128, HALF, has_zeros=True), "its formula, in PyTorch"),
    File(f"compressed-tensors, int1 to int4, {BY_128}", "yes", Form("int4", 128, HALF), "compressed-tensors"),
    File("compressed-tensors, int5 to int8, by channel", "yes", Form("int8", SIDE, HALF), "compressed-tensors"),
    File("compressed-tensors, fp8", "yes", None, "compressed-tensors"),
    File("fp8 by blocks, rows or tensors", "yes", None, "transformers; FBGEMM's: its formula"),
    File("mxfp4", "yes", None, "transformers"),
    File("torchao int8, by channel", "yes", Form("int8", SIDE, HALF), "torchao"),
    File("torchao Int4Tensor", "yes", None, "its formula, in PyTorch"),
    File("GGUF Q4_0", "yes", Form("int4", 32, np.dtype(np.float32)), "gguf"),
    File("GGUF Q8_0", "yes", Form("int8", 32, np.dtype(np.float32)), "gguf"),
    File("GGUF Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, MXFP4", "yes", None, "gguf, transformers"),
    File("GGUF, the other kinds that gguf dequantizes: IQ, TQ, NVFP4", "yes", None, "gguf"),
)


def per_weight(weight: object) -> float:
    """Bytes of a matrix's arrays, divided by its elements."""
    total = 0
    for array in jax.tree.leaves(weight):
        total += array.size * array.dtype.itemsize
    return total / SIDE**2


def bytes_per_weight(quantizer: Quantizer) -> float:
    """Bytes that a large matrix takes in a format, divided by its elements."""
    return per_weight(jax.eval_shape(lambda: quantizer(jnp.zeros((SIDE, SIDE)), Layout())))


def kept_bytes_per_weight(form: Form) -> float:
    """Bytes that a large matrix of a file takes if it is kept, divided by its elements."""

    def array(shape: tuple[int, ...], dtype: object) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    groups = SIDE // (form.group_size or SIDE)
    codes = Codes(
        numbers=array((SIDE, SIDE), np.int8),
        scale=array((groups, SIDE) if form.group_size else (SIDE,), np.uint8 if form.is_nested else np.float32),
        zeros=array((groups, SIDE), np.uint8) if form.has_zeros else None,
        largest=array((groups * SIDE // 256,), np.float32) if form.is_nested else None,
        offset=array((), np.float32) if form.is_nested else None,
    )
    kept = Kept(form, Layout(), HALF)
    return per_weight(jax.eval_shape(lambda codes: kept_weight(codes, kept), codes))


def measured_words() -> str:
    """What the columns of a step mean, and how they were measured."""
    layers, width = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
    return f"""
A step is the loss and its gradient by LoRA r={RANK} on all linear layers of a Llama with {layers} layers of width
{width}, on {ROWS} x {LENGTH} tokens in bfloat16; each layer is recomputed in the backward pass. The columns divide by a
step on a bfloat16 base: the processor time, which other work on the machine changes less than the time of day, all
steps run in turn in one process, the median of {ROUNDS} rounds; and the bytes of arguments, outputs and temporaries of
the compiled program. They are of JAX's backend `{jax.default_backend()}`, and not those of an accelerator: a CPU's
compiler writes dequantized matrices to memory. What the compilers of TPUs and of the H100 say of memory is in
[Compiled ahead of time](lowering.md); step times on those have not been measured.
"""


def table() -> str:
    """The whole page."""
    lines = []
    measured = shares([row.quantizer for row in FORMATS])
    for row, share in zip(FORMATS, measured, strict=True):
        size = f"{bytes_per_weight(row.quantizer):.4f}"
        cells = (row.name, row.written, size, "yes", f"{share.time:.2f}", f"{share.memory:.2f}", row.reference)
        lines.append(f"| {' | '.join(cells)} |\n")
    read = []
    for file in FILES:
        is_gguf = file.name.startswith("GGUF")
        size = "4 (float32), or what --dtype takes" if is_gguf else "2 (bfloat16)"
        kept = "no: dequantized"
        if file.form is not None:
            size, kept = (
                f"{kept_bytes_per_weight(file.form):.4f}",
                KEPT_AS[file.form.kind, file.form.group_size is None],
            )
        read.append(f"| {file.name} | {file.read} | {kept} | {size} | {file.reference} |\n")
    return HEAD + "".join(lines) + measured_words() + TAIL + READ_HEAD + "".join(read) + READ_TAIL


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(table(), encoding="utf-8")

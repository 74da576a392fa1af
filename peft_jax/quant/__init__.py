"""Quantized leaves and their products."""

from peft_jax.quant.int8 import Int8 as Int8
from peft_jax.quant.int8 import nbytes as nbytes
from peft_jax.quant.int8 import quantize_array as quantize_array
from peft_jax.quant.quantize import quantize as quantize

"""Quantized leaves and their products."""

from peft_jax.quant.bitsandbytes_config import BitsAndBytesConfig as BitsAndBytesConfig
from peft_jax.quant.double_scale import DoubleScale as DoubleScale
from peft_jax.quant.fp4 import FP4 as FP4
from peft_jax.quant.int4 import Int4 as Int4
from peft_jax.quant.int8 import Int8 as Int8
from peft_jax.quant.int8 import quantize_array as quantize_array
from peft_jax.quant.int8_groups import Int8Groups as Int8Groups
from peft_jax.quant.kinds import Quantizer as Quantizer
from peft_jax.quant.merge_quantized import merge_quantized as merge_quantized
from peft_jax.quant.nf4 import NF4 as NF4
from peft_jax.quant.quantize import quantize as quantize
from peft_jax.quant.quantized import Quantized as Quantized
from peft_jax.quant.quantized import nbytes as nbytes

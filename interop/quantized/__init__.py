"""Quantized checkpoints of Hugging Face models, by the ``quant_method`` of their ``quantization_config``.

==================  ==============================================================  =================================
quant_method        read                                                            dequantized to
==================  ==============================================================  =================================
bitsandbytes        nf4 and fp4 in blocks of any size, absmax in 8 bits or floats   the type that its quant_state names
bitsandbytes        int8 by rows                                                    float32
gptq                2, 3, 4 and 8 bits, v1 and v2 zero points, groups, act-order    the type of its scales
awq                 the layout "gemm"                                               the type of its scales
compressed-tensors  pack-quantized (int1 to int8), int-quantized, float-quantized   the type of its scales
                    and naive-quantized, by tensor, channel, group and block
fp8, fbgemm_fp8     scales by block, row or tensor, as floats or exponents          float32
mxfp4               experts as blocks and scales                                    bfloat16
torchao             Int8Tensor, IntxUnpackedToInt8Tensor, Int4Tensor                the type that the header names
==================  ==============================================================  =================================

Other layouts are refused by name. A weight stays packed, a `QuantizedTensor` under the key that it has in a checkpoint
which is not quantized, until it is read as an array: then it is dequantized, and none of it is kept. One that has a
`form` may be read as its numbers and scales instead (``keep_quantized=True``). Modules that were not converted are what
they are. Formats that round activations too are read as weights alone.
"""

from peft_jax.interop.quantized.base import QuantizedTensor as QuantizedTensor
from peft_jax.interop.quantized.open_quantized import check_quant_method as check_quant_method
from peft_jax.interop.quantized.open_quantized import fit_quantized as fit_quantized
from peft_jax.interop.quantized.open_quantized import notice as notice
from peft_jax.interop.quantized.open_quantized import open_quantized as open_quantized
from peft_jax.interop.quantized.open_quantized import read_quantized as read_quantized

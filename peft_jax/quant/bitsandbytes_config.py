"""The options of quantized loading as transformers spells them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from peft_jax.quant.kinds import FLOATS, Quantizer

NO_MEANING = {
    "llm_int8_threshold": (6.0, "activations are not quantized, so that there are no outliers to treat apart"),
    "llm_int8_enable_fp32_cpu_offload": (False, "weights are not offloaded"),
    "llm_int8_has_fp16_weight": (False, "an int8 weight has no 16-bit copy"),
}


@dataclasses.dataclass(frozen=True)
class BitsAndBytesConfig:
    """How a base is quantized while it is read; fields, names and defaults are those of transformers.

    Attributes:
        load_in_8bit: Int8 with one scale per output channel.
        load_in_4bit: FP4 or NF4 in blocks of 64.
        llm_int8_threshold: 6.0; anything else is refused.
        llm_int8_skip_modules: Modules that stay in float, in 4 bits too: by names as transformers matches them. None
            for the output head; a list without it has the head quantized too, as there.
        llm_int8_enable_fp32_cpu_offload: False; anything else is refused.
        llm_int8_has_fp16_weight: False; anything else is refused.
        bnb_4bit_compute_dtype: Element type of products with 4-bit weights; None for float32, as in transformers.
        bnb_4bit_quant_type: ``"fp4"`` or ``"nf4"``.
        bnb_4bit_use_double_quant: Whether the scales are rounded to 8 bits too.
        bnb_4bit_quant_storage: ``"uint8"``, or None, which means it; anything else is refused.

    Raises:
        ValueError: if an option has no meaning here, or two of them exclude each other.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=config)
        >>> type(model.params["model"]["layers"]["mlp"]["up_proj"]["kernel"]).__name__
        'NF4'
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: Sequence[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = None

    def __post_init__(self) -> None:
        for name, (only, why) in NO_MEANING.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"BitsAndBytesConfig({name}={getattr(self, name)!r}) has no meaning here: {why}. Leave it out."
                )
        if self.bnb_4bit_quant_storage is not None and jnp.dtype(self.bnb_4bit_quant_storage) != jnp.uint8:
            raise ValueError(
                f"BitsAndBytesConfig(bnb_4bit_quant_storage={self.bnb_4bit_quant_storage!r}) has no meaning here: two "
                "numbers are in a byte. Leave it out."
            )
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError(
                "load_in_4bit and load_in_8bit are both True, but only one can be used at the same time. Remove one."
            )
        if self.bnb_4bit_quant_type not in FLOATS:
            raise ValueError(
                f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r} is not supported. Write one of {', '.join(FLOATS)}."
            )
        if isinstance(self.llm_int8_skip_modules, str):
            raise ValueError(
                f"llm_int8_skip_modules={self.llm_int8_skip_modules!r} is a text. Write a list of modules' names."
            )
        compute = jnp.dtype("float32" if self.bnb_4bit_compute_dtype is None else self.bnb_4bit_compute_dtype)
        if compute not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(
                f"bnb_4bit_compute_dtype={self.bnb_4bit_compute_dtype!r} is not supported. Write one of float32, "
                "bfloat16, float16."
            )

    def quantizer(self) -> Quantizer | None:
        """The format; None if there is nothing to quantize.

        Example:
            >>> BitsAndBytesConfig(load_in_4bit=True).quantizer().kind
            'fp4'
        """
        if self.load_in_8bit:
            return Quantizer("int8")
        if not self.load_in_4bit:
            return None
        compute = jnp.dtype("float32" if self.bnb_4bit_compute_dtype is None else self.bnb_4bit_compute_dtype)
        return Quantizer(self.bnb_4bit_quant_type, None, self.bnb_4bit_use_double_quant, compute)

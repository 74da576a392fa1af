"""Adapters and checkpoints to and from Hugging Face's formats."""

from peft_jax.interop.adapter import load_adapter as load_adapter
from peft_jax.interop.adapter import save_adapter as save_adapter
from peft_jax.interop.cartridges import compose_cartridge_adapters as compose_cartridge_adapters
from peft_jax.interop.hotswap import hotswap_adapter as hotswap_adapter
from peft_jax.interop.hotswap import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
from peft_jax.interop.nearest_lora import convert_to_lora as convert_to_lora
from peft_jax.interop.nearest_lora import lora_conversion_errors as lora_conversion_errors
from peft_jax.interop.nearest_lora import save_as_lora as save_as_lora
from peft_jax.interop.tensors import get_peft_model_state_dict as get_peft_model_state_dict
from peft_jax.interop.tensors import set_peft_model_state_dict as set_peft_model_state_dict

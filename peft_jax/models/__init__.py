"""Flax NNX models that read Hugging Face checkpoints, and handles on them."""

from peft_jax.models.auto import AutoModelForCausalLM as AutoModelForCausalLM
from peft_jax.models.causal_lm import CausalLM as CausalLM
from peft_jax.models.llama import LlamaConfig as LlamaConfig
from peft_jax.models.peft_model import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from peft_jax.models.peft_model import PeftModel as PeftModel
from peft_jax.models.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
from peft_jax.models.peft_model import get_peft_model as get_peft_model

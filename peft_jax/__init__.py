"""peft_jax: parameter-efficient fine-tuning in JAX, as pure functions over parameter pytrees."""

from peft_jax import interop as interop
from peft_jax.adapt import adapt as adapt
from peft_jax.adapt import explain as explain
from peft_jax.core.dropout import with_dropout as with_dropout
from peft_jax.core.layout import Layout as Layout
from peft_jax.core.merge import delete_adapter as delete_adapter
from peft_jax.core.merge import disable_adapter as disable_adapter
from peft_jax.core.merge import merge as merge
from peft_jax.core.merge import set_adapter as set_adapter
from peft_jax.core.merge import unload as unload
from peft_jax.core.partition import combine as combine
from peft_jax.core.partition import partition as partition
from peft_jax.core.partition import trainable_labels as trainable_labels
from peft_jax.core.partition import trainable_mask as trainable_mask
from peft_jax.core.summary import summary as summary
from peft_jax.interop import get_peft_model_state_dict as get_peft_model_state_dict
from peft_jax.interop import set_peft_model_state_dict as set_peft_model_state_dict
from peft_jax.methods import LoraConfig as LoraConfig
from peft_jax.methods import PeftConfig as PeftConfig
from peft_jax.methods import apply_adapter as apply_adapter
from peft_jax.methods import apply_lora as apply_lora
from peft_jax.models import AutoModelForCausalLM as AutoModelForCausalLM
from peft_jax.models import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from peft_jax.models import PeftModel as PeftModel
from peft_jax.models import get_peft_model as get_peft_model
from peft_jax.quant import quantize as quantize

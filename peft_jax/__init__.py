"""peft_jax: parameter-efficient fine-tuning in JAX, as pure functions over parameter pytrees."""

from peft_jax.adapt import adapt as adapt
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
from peft_jax.methods import LoraConfig as LoraConfig
from peft_jax.methods import PeftConfig as PeftConfig
from peft_jax.methods import apply_adapter as apply_adapter
from peft_jax.methods import apply_lora as apply_lora
from peft_jax.quant import quantize as quantize

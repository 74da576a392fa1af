"""Operations on trees with adapters: attach, build, combine, scale, initialize from data."""

from peft_jax.adapters.attach import apply_adapter as apply_adapter
from peft_jax.adapters.attach import apply_lora as apply_lora
from peft_jax.adapters.combine.weighted_lora import add_weighted_adapter as add_weighted_adapter
from peft_jax.adapters.from_data import apply_lora_from_data as apply_lora_from_data
from peft_jax.adapters.input_ids import with_invocations as with_invocations
from peft_jax.adapters.intruders import reduce_intruder_dimension as reduce_intruder_dimension
from peft_jax.adapters.kappa import find_kappa_target_modules as find_kappa_target_modules
from peft_jax.adapters.nnx_trainers import nnx_module as nnx_module
from peft_jax.adapters.per_row import with_adapter_rows as with_adapter_rows
from peft_jax.adapters.scale import scale_adapter as scale_adapter
from peft_jax.adapters.task_ids import with_task_ids as with_task_ids

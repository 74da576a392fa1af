"""Adapter methods, one file each."""

from peft_jax.methods.adalora import AdaLoraConfig as AdaLoraConfig
from peft_jax.methods.alora import with_invocations as with_invocations
from peft_jax.methods.attach import apply_adapter as apply_adapter
from peft_jax.methods.attach import apply_lora as apply_lora
from peft_jax.methods.base import PeftConfig as PeftConfig
from peft_jax.methods.beft import BeftConfig as BeftConfig
from peft_jax.methods.boft import BOFTConfig as BOFTConfig
from peft_jax.methods.combine import add_weighted_adapter as add_weighted_adapter
from peft_jax.methods.hira import HiraConfig as HiraConfig
from peft_jax.methods.hra import HRAConfig as HRAConfig
from peft_jax.methods.ia3 import IA3Config as IA3Config
from peft_jax.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from peft_jax.methods.loha import LoHaConfig as LoHaConfig
from peft_jax.methods.lokr import LoKrConfig as LoKrConfig
from peft_jax.methods.lora import LoraConfig as LoraConfig
from peft_jax.methods.lora_options import LoftQConfig as LoftQConfig
from peft_jax.methods.miss import MissConfig as MissConfig
from peft_jax.methods.oft import OFTConfig as OFTConfig
from peft_jax.methods.rows import with_adapter_rows as with_adapter_rows
from peft_jax.methods.scale import scale_adapter as scale_adapter
from peft_jax.methods.task_type import TaskType as TaskType
from peft_jax.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from peft_jax.methods.vera import VeraConfig as VeraConfig

"""Adapter methods, one file each."""

from peft_jax.methods.adalora.config import AdaLoraConfig as AdaLoraConfig
from peft_jax.methods.base import PeftConfig as PeftConfig
from peft_jax.methods.beft import BeftConfig as BeftConfig
from peft_jax.methods.boft import BOFTConfig as BOFTConfig
from peft_jax.methods.c3a import C3AConfig as C3AConfig
from peft_jax.methods.delora import DeloraConfig as DeloraConfig
from peft_jax.methods.fourierft import FourierFTConfig as FourierFTConfig
from peft_jax.methods.gralora import GraloraConfig as GraloraConfig
from peft_jax.methods.hira import HiraConfig as HiraConfig
from peft_jax.methods.hra import HRAConfig as HRAConfig
from peft_jax.methods.ia3 import IA3Config as IA3Config
from peft_jax.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from peft_jax.methods.loha import LoHaConfig as LoHaConfig
from peft_jax.methods.lokr import LoKrConfig as LoKrConfig
from peft_jax.methods.lora.config import LoraConfig as LoraConfig
from peft_jax.methods.lora.nested_configs import CordaConfig as CordaConfig
from peft_jax.methods.lora.nested_configs import EvaConfig as EvaConfig
from peft_jax.methods.lora.nested_configs import LoftQConfig as LoftQConfig
from peft_jax.methods.lora.nested_configs import LoraGAConfig as LoraGAConfig
from peft_jax.methods.miss import MissConfig as MissConfig
from peft_jax.methods.oft import OFTConfig as OFTConfig
from peft_jax.methods.road import RoadConfig as RoadConfig
from peft_jax.methods.shira import ShiraConfig as ShiraConfig
from peft_jax.methods.task_type import TaskType as TaskType
from peft_jax.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from peft_jax.methods.vera import VeraConfig as VeraConfig

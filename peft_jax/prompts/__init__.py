"""Prompt methods, one file each: what they add to the embeddings, to keys and values, or beside the attention."""

from peft_jax.prompts.adaption_prompt import AdaptionPromptConfig as AdaptionPromptConfig
from peft_jax.prompts.attach_prompt import attach_prompt as attach_prompt
from peft_jax.prompts.cartridge import CartridgeConfig as CartridgeConfig
from peft_jax.prompts.cpt import CPTConfig as CPTConfig
from peft_jax.prompts.multitask_prompt_tuning import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
from peft_jax.prompts.multitask_prompt_tuning import MultitaskPromptTuningInit as MultitaskPromptTuningInit
from peft_jax.prompts.p_tuning import PromptEncoderConfig as PromptEncoderConfig
from peft_jax.prompts.p_tuning import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
from peft_jax.prompts.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from peft_jax.prompts.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from peft_jax.prompts.prompt_tuning import PromptTuningInit as PromptTuningInit
from peft_jax.prompts.shadow import ShadowConfig as ShadowConfig
from peft_jax.prompts.xlora import XLoraConfig as XLoraConfig
from peft_jax.prompts.xlora import set_xlora_options as set_xlora_options

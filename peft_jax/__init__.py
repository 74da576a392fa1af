"""peft_jax: parameter-efficient fine-tuning in JAX, as pure functions over parameter pytrees."""

from typing import TYPE_CHECKING

from peft_jax.core.lazy_names import import_lazily

if TYPE_CHECKING:  # the list of public names; each is imported on first use
    from peft_jax import interop as interop
    from peft_jax.adapt import adapt as adapt
    from peft_jax.adapt import explain as explain
    from peft_jax.adapters import add_weighted_adapter as add_weighted_adapter
    from peft_jax.adapters import apply_adapter as apply_adapter
    from peft_jax.adapters import apply_lora as apply_lora
    from peft_jax.adapters import apply_lora_from_data as apply_lora_from_data
    from peft_jax.adapters import find_kappa_target_modules as find_kappa_target_modules
    from peft_jax.adapters import nnx_module as nnx_module
    from peft_jax.adapters import reduce_intruder_dimension as reduce_intruder_dimension
    from peft_jax.adapters import scale_adapter as scale_adapter
    from peft_jax.adapters import with_adapter_rows as with_adapter_rows
    from peft_jax.adapters import with_invocations as with_invocations
    from peft_jax.adapters import with_task_ids as with_task_ids
    from peft_jax.core.dropout import with_dropout as with_dropout
    from peft_jax.core.dropout import without_dropout as without_dropout
    from peft_jax.core.layout import Layout as Layout
    from peft_jax.core.merge import active_adapters as active_adapters
    from peft_jax.core.merge import delete_adapter as delete_adapter
    from peft_jax.core.merge import disable_adapter as disable_adapter
    from peft_jax.core.merge import merge as merge
    from peft_jax.core.merge import set_adapter as set_adapter
    from peft_jax.core.merge import set_requires_grad as set_requires_grad
    from peft_jax.core.merge import unload as unload
    from peft_jax.core.partition import combine as combine
    from peft_jax.core.partition import partition as partition
    from peft_jax.core.partition import trainable_labels as trainable_labels
    from peft_jax.core.partition import trainable_mask as trainable_mask
    from peft_jax.core.summary import summary as summary
    from peft_jax.interop import compose_cartridge_adapters as compose_cartridge_adapters
    from peft_jax.interop import convert_to_lora as convert_to_lora
    from peft_jax.interop import get_peft_model_state_dict as get_peft_model_state_dict
    from peft_jax.interop import hotswap_adapter as hotswap_adapter
    from peft_jax.interop import lora_conversion_errors as lora_conversion_errors
    from peft_jax.interop import prepare_model_for_compiled_hotswap as prepare_model_for_compiled_hotswap
    from peft_jax.interop import save_as_lora as save_as_lora
    from peft_jax.interop import set_peft_model_state_dict as set_peft_model_state_dict
    from peft_jax.methods import *  # noqa: F403  # the configs of all methods, as that package lists them
    from peft_jax.models import AutoModel as AutoModel
    from peft_jax.models import AutoModelForCausalLM as AutoModelForCausalLM
    from peft_jax.models import AutoModelForMaskedLM as AutoModelForMaskedLM
    from peft_jax.models import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
    from peft_jax.models import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
    from peft_jax.models import AutoModelForSequenceClassification as AutoModelForSequenceClassification
    from peft_jax.models import AutoModelForTokenClassification as AutoModelForTokenClassification
    from peft_jax.models import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from peft_jax.models import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from peft_jax.models import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from peft_jax.models import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from peft_jax.models import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from peft_jax.models import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from peft_jax.models import PeftModel as PeftModel
    from peft_jax.models import PeftModelForCausalLM as PeftModelForCausalLM
    from peft_jax.models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from peft_jax.models import PeftModelForMaskedLM as PeftModelForMaskedLM
    from peft_jax.models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from peft_jax.models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from peft_jax.models import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from peft_jax.models import PeftModelForTokenClassification as PeftModelForTokenClassification
    from peft_jax.models import create_arrow_model as create_arrow_model
    from peft_jax.models import get_layer_status as get_layer_status
    from peft_jax.models import get_model_status as get_model_status
    from peft_jax.models import get_peft_model as get_peft_model
    from peft_jax.models import (
        initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
    )
    from peft_jax.models import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
    from peft_jax.models import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from peft_jax.models import prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values
    from peft_jax.models import replace_lora_weights_loftq as replace_lora_weights_loftq
    from peft_jax.models import unload_shadow as unload_shadow
    from peft_jax.models import xlora_scalings as xlora_scalings
    from peft_jax.prompts import AdaptionPromptConfig as AdaptionPromptConfig
    from peft_jax.prompts import CartridgeConfig as CartridgeConfig
    from peft_jax.prompts import CPTConfig as CPTConfig
    from peft_jax.prompts import MultitaskPromptTuningConfig as MultitaskPromptTuningConfig
    from peft_jax.prompts import MultitaskPromptTuningInit as MultitaskPromptTuningInit
    from peft_jax.prompts import PrefixTuningConfig as PrefixTuningConfig
    from peft_jax.prompts import PromptEncoderConfig as PromptEncoderConfig
    from peft_jax.prompts import PromptEncoderReparameterizationType as PromptEncoderReparameterizationType
    from peft_jax.prompts import PromptTuningConfig as PromptTuningConfig
    from peft_jax.prompts import PromptTuningInit as PromptTuningInit
    from peft_jax.prompts import ShadowConfig as ShadowConfig
    from peft_jax.prompts import XLoraConfig as XLoraConfig
    from peft_jax.prompts import set_xlora_options as set_xlora_options
    from peft_jax.quant import BitsAndBytesConfig as BitsAndBytesConfig
    from peft_jax.quant import merge_quantized as merge_quantized
    from peft_jax.quant import quantize as quantize

import_lazily(__name__)

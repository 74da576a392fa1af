"""Flax NNX models that read Hugging Face checkpoints, and handles on them."""

from peft_jax.models.arrow_model import create_arrow_model as create_arrow_model
from peft_jax.models.bert.config import BertConfig as BertConfig
from peft_jax.models.bert.config import RobertaConfig as RobertaConfig
from peft_jax.models.gemma.config import GemmaConfig as GemmaConfig
from peft_jax.models.gemma4.config import Gemma4Config as Gemma4Config
from peft_jax.models.gpt2.config import GPT2Config as GPT2Config
from peft_jax.models.handles.adapter_status import TunerLayerStatus as TunerLayerStatus
from peft_jax.models.handles.adapter_status import TunerModelStatus as TunerModelStatus
from peft_jax.models.handles.adapter_status import get_layer_status as get_layer_status
from peft_jax.models.handles.adapter_status import get_model_status as get_model_status
from peft_jax.models.handles.auto import AutoModel as AutoModel
from peft_jax.models.handles.auto import AutoModelForCausalLM as AutoModelForCausalLM
from peft_jax.models.handles.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
from peft_jax.models.handles.auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
from peft_jax.models.handles.auto import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
from peft_jax.models.handles.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
from peft_jax.models.handles.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
from peft_jax.models.handles.auto_peft import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from peft_jax.models.handles.auto_peft import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
from peft_jax.models.handles.auto_peft import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
from peft_jax.models.handles.auto_peft import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from peft_jax.models.handles.auto_peft import (
    AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification,
)
from peft_jax.models.handles.auto_peft import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
from peft_jax.models.handles.causal_lm import CausalLM as CausalLM
from peft_jax.models.handles.peft_model import PeftModel as PeftModel
from peft_jax.models.handles.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
from peft_jax.models.handles.peft_model import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
from peft_jax.models.handles.peft_model import PeftModelForMaskedLM as PeftModelForMaskedLM
from peft_jax.models.handles.peft_model import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
from peft_jax.models.handles.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from peft_jax.models.handles.peft_model import PeftModelForSequenceClassification as PeftModelForSequenceClassification
from peft_jax.models.handles.peft_model import PeftModelForTokenClassification as PeftModelForTokenClassification
from peft_jax.models.handles.peft_model import get_peft_model as get_peft_model
from peft_jax.models.handles.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
from peft_jax.models.kbit_training import prepare_model_for_kbit_training as prepare_model_for_kbit_training
from peft_jax.models.kv_prefix import (
    initialize_kv_prefix_from_past_key_values as initialize_kv_prefix_from_past_key_values,
)
from peft_jax.models.kv_prefix import initialize_kv_prefix_from_text as initialize_kv_prefix_from_text
from peft_jax.models.kv_prefix import prompt_embeddings_from_past_key_values as prompt_embeddings_from_past_key_values
from peft_jax.models.llama.config import LlamaConfig as LlamaConfig
from peft_jax.models.loftq_replacement import replace_lora_weights_loftq as replace_lora_weights_loftq
from peft_jax.models.modules.lazy_logits import LazyLogits as LazyLogits
from peft_jax.models.t5.config import T5Config as T5Config
from peft_jax.models.unload_shadow import unload_shadow as unload_shadow
from peft_jax.models.xlora_scalings import xlora_scalings as xlora_scalings

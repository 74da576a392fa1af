"""Flax NNX models that read Hugging Face checkpoints, and handles on them."""

from peft_jax.models.auto import AutoModel as AutoModel
from peft_jax.models.auto import AutoModelForCausalLM as AutoModelForCausalLM
from peft_jax.models.auto import AutoModelForMaskedLM as AutoModelForMaskedLM
from peft_jax.models.auto import AutoModelForQuestionAnswering as AutoModelForQuestionAnswering
from peft_jax.models.auto import AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM
from peft_jax.models.auto import AutoModelForSequenceClassification as AutoModelForSequenceClassification
from peft_jax.models.auto import AutoModelForTokenClassification as AutoModelForTokenClassification
from peft_jax.models.bert_config import BertConfig as BertConfig
from peft_jax.models.bert_config import RobertaConfig as RobertaConfig
from peft_jax.models.causal_lm import CausalLM as CausalLM
from peft_jax.models.gpt2 import GPT2Config as GPT2Config
from peft_jax.models.llama import LlamaConfig as LlamaConfig
from peft_jax.models.peft_model import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
from peft_jax.models.peft_model import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
from peft_jax.models.peft_model import PeftModel as PeftModel
from peft_jax.models.peft_model import PeftModelForCausalLM as PeftModelForCausalLM
from peft_jax.models.peft_model import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
from peft_jax.models.peft_model import get_peft_model as get_peft_model
from peft_jax.models.seq2seq_lm import Seq2SeqLM as Seq2SeqLM
from peft_jax.models.t5_config import T5Config as T5Config

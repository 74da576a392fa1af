"""Pure pieces of a training run: data, loss, steps and the loss curve."""

from peft_jax.train.data import Batch as Batch
from peft_jax.train.data import Record as Record
from peft_jax.train.data import Tokens as Tokens
from peft_jax.train.data import evaluation_batches as evaluation_batches
from peft_jax.train.data import read_records as read_records
from peft_jax.train.data import tokenize as tokenize
from peft_jax.train.data import tokenize_prompts as tokenize_prompts
from peft_jax.train.data import training_batches as training_batches
from peft_jax.train.loop import train as train
from peft_jax.train.loss import cross_entropy as cross_entropy
from peft_jax.train.plot import plot_losses as plot_losses
from peft_jax.train.step import evaluate as evaluate
from peft_jax.train.step import make_evaluation_step as make_evaluation_step
from peft_jax.train.step import make_optimizer as make_optimizer
from peft_jax.train.step import make_training_step as make_training_step

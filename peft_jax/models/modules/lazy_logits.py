"""Logits that are not computed yet: what goes into the head of a language model, and the head."""

import dataclasses
from functools import partial
from typing import Any

import jax

from peft_jax.adapt import adapt
from peft_jax.models.modules.heads import project
from peft_jax.models.modules.logits_form import PLAIN, LogitsForm
from peft_jax.models.modules.router_load import RouterLoad

FACTORS = ("hidden", "weight", "bias", "load", "beside")


@partial(jax.tree_util.register_dataclass, data_fields=FACTORS, meta_fields=("tied", "form", "factor"))
@dataclasses.dataclass(frozen=True)
class LazyLogits:
    """The two factors of logits, for a loss that never holds their product (`peft_jax.train.cross_entropy`).

    Attributes:
        hidden: What goes into the head, ``(batch, length, hidden)``.
        weight: The head, an array or a quantized or adapted leaf: ``(hidden, vocabulary)``, or if it is tied the
            embedding, ``(vocabulary, hidden)``.
        tied: Whether it is the embedding.
        bias: The head's bias, ``(vocabulary,)``, if it has one.
        form: What is done to the logits afterwards.
        load: The load of the model's experts, where the training loss has that of the routers.
        beside: More logits, of the small network of a SHADOW adapter, whose loss the training loss has too.
        factor: What their loss is multiplied by.

    Example:
        >>> import peft_jax as pj
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model, ids = pj.AutoModelForCausalLM.from_pretrained(MODEL), jax.numpy.array([[1, 2, 3]])
        >>> lazy = model(ids, lazy_logits=True).logits
        >>> lazy.shape == lazy.compute().shape == model(ids).logits.shape
        True
    """

    hidden: jax.Array
    weight: Any
    tied: bool
    bias: Any = None
    form: LogitsForm = PLAIN
    load: RouterLoad | None = None
    beside: "LazyLogits | None" = None
    factor: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the logits, ``(batch, length, vocabulary)``."""
        return (*self.hidden.shape[:-1], self.weight.shape[0 if self.tied else 1])

    def compute(self) -> jax.Array:
        """The logits."""
        head = partial(head_logits, tied=self.tied, form=self.form)
        return adapt(head)(self.weight, self.bias, self.hidden)


def head_logits(weight: jax.Array, bias: jax.Array | None, hidden: jax.Array, *, tied: bool, form: LogitsForm) -> Any:
    """The logits (batch, length, vocabulary) of what goes into a head, as `LazyLogits` has it."""
    logits = project(hidden, weight.T if tied else weight)
    if bias is not None:
        logits = logits + bias[None, None].astype(logits.dtype)
    return form(logits)

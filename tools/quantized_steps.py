"""Measure training steps on quantized bases beside one on a bfloat16 base: processor time in turn, and bytes."""

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import peft_jax as pj
from peft_jax.models import LlamaConfig
from peft_jax.quant import Quantizer
from peft_jax.train import cross_entropy

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
ROWS, LENGTH, RANK, ROUNDS = 2, 128, 8, 7


class Share(NamedTuple):
    """What a step on a quantized base takes, relative to bfloat16: processor time, and bytes of the program."""

    time: float
    memory: float


def shares(quantizers: Sequence[Quantizer]) -> list[Share]:
    """The share of each format; steps of all formats and of bfloat16 run in turn, `ROUNDS` times, and medians count."""
    programs = [_program(quantizer) for quantizer in (None, *quantizers)]
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(ROUNDS):
        for (step, args), times in zip(programs, seconds, strict=True):
            begin = time.process_time()
            jax.block_until_ready(step(*args))
            times.append(time.process_time() - begin)
    plain_time, *times = [statistics.median(one) for one in seconds]
    plain_bytes, *sizes = [_bytes(step) for step, _ in programs]
    return [Share(one / plain_time, size / plain_bytes) for one, size in zip(times, sizes, strict=True)]


def _program(quantizer: Quantizer | None) -> tuple[Any, tuple[Any, ...]]:
    """A compiled step, which has run once, and its arguments: the loss and its gradient by the adapter."""
    model = pj.AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype="bfloat16", remat=True)
    if quantizer is not None:
        model = pj.quantize(
            model,
            kind=quantizer.kind,
            group_size=quantizer.group_size,
            double_quant=quantizer.double_quant,
        )
    model = pj.get_peft_model(model, pj.LoraConfig(r=RANK, target_modules="all-linear"))
    trainable, frozen = pj.partition(model)
    ids = jnp.ones((ROWS, LENGTH), jnp.int32)

    def loss(trainable: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        logits = pj.combine(trainable, frozen)(input_ids=ids, attention_mask=ids).logits
        total, count = cross_entropy(logits, ids)
        return total / count

    args = (trainable, frozen, ids)
    step = jax.jit(jax.value_and_grad(loss)).lower(*args).compile()
    jax.block_until_ready(step(*args))
    return step, args


def _bytes(step: Any) -> int:
    """Arguments, outputs and temporaries of a compiled program."""
    memory = step.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    return int(sum(sizes) - memory.alias_size_in_bytes)

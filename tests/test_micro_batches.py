"""Micro batches of their own lengths, several texts to a row: the same training as a text to a row."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_jax as pj
from peft_jax.cli.shared.forward_pass import apply_lazily as apply
from peft_jax.train import (
    MicroLayout,
    Padded,
    evaluate,
    evaluation_batches,
    init_optimizer,
    make_accumulating_step,
    make_evaluation_step,
    make_training_step,
    micro_batches,
    micro_layout,
    training_batches,
)
from peft_jax.train.data.encode import IGNORE, Example
from peft_jax.train.data.micro_layout import fine_widths

INVOCATION = [5, 9]


@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40), rows=st.integers(1, 8), packed=st.booleans())
@settings(deadline=None)
def test_every_example_is_laid_out_once(lengths: list[int], rows: int, packed: bool) -> None:
    layout = MicroLayout(rows, fine_widths(100), packed)
    laid = layout.lay_out(lengths)
    assert sorted(number for one in laid for row in one.rows for number in row) == list(range(len(lengths)))
    for one in laid:
        assert len(one.rows) == rows and any(one.rows) and one.width in layout.widths
        assert all(sum(lengths[number] for number in row) <= one.width for row in one.rows)
        assert packed or all(len(row) <= 1 for row in one.rows)


@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    batch_size=st.integers(1, 16),
    multiple=st.sampled_from([1, 2, 3]),
)
@settings(deadline=None)
def test_each_width_has_one_number_of_rows(lengths: list[int], batch_size: int, multiple: int) -> None:
    layout = micro_layout(lengths, batch_size, packed=False, multiple=multiple)
    found = dict(zip(layout.widths, layout.rows_by_width, strict=True))
    laid = layout.lay_out(lengths)
    assert sorted(number for one in laid for row in one.rows for number in row) == list(range(len(lengths)))
    for one in laid:
        assert len(one.rows) == found[one.width] <= layout.rows and any(one.rows)
        assert len(one.rows) % multiple == 0
        assert all(lengths[number] <= one.width for row in one.rows for number in row)


@pytest.mark.parametrize(
    ("spread", "batch_size", "together", "packed", "most"),
    [
        ("lognormal", 128, 4, True, 1.02),
        ("lognormal", 16, 4, True, 1.18),
        ("lognormal", 16, None, True, 1.18),
        ("uniform", 16, None, True, 1.22),
        ("uniform", 8, None, True, 1.20),
        ("lognormal", 128, 4, False, 1.35),
        ("lognormal", 16, 4, False, 1.35),
        ("lognormal", 16, None, False, 1.35),
    ],
)
def test_few_computed_tokens_are_padding(
    spread: str, batch_size: int, together: int | None, packed: bool, most: float
) -> None:
    lengths = DRAWS[spread](np.random.default_rng(0), 4096).tolist()
    layout = micro_layout(lengths, batch_size, packed=packed, micro_batch_size=together, hidden_size=2048)
    computed, programs = 0, set()
    for start in range(0, len(lengths), batch_size):
        for one in layout.lay_out(lengths[start : start + batch_size]):
            computed += len(one.rows) * one.width
            programs.add((len(one.rows), one.width))
    assert computed / sum(lengths) < most
    if not packed:  # in which each width may have its own number of rows
        assert len(programs) <= 8


DRAWS = {
    "lognormal": lambda rng, count: np.clip(rng.lognormal(np.log(97) - 0.4, 0.9, count), 4, 512).astype(int),
    "uniform": lambda rng, count: rng.integers(20, 512, count),
    "short": lambda rng, count: np.clip(rng.lognormal(3.2, 0.5, count), 4, 512).astype(int),
}


@pytest.mark.parametrize("spread", DRAWS)
@pytest.mark.parametrize("batch_size", [4, 16, 64])
def test_a_sample_has_the_rows_of_all_data(spread: str, batch_size: int) -> None:
    """But for a few data sets whose mean is near a bound; so most programs are known from a sample."""
    alike = []
    for seed in range(5):
        lengths = DRAWS[spread](np.random.default_rng(seed), 20000)
        sample = np.concatenate([np.sort(lengths)[-4:], lengths[::40]])
        whole, part = (micro_layout(one.tolist(), batch_size, packed=True) for one in (lengths, sample))
        alike.append(whole.rows == part.rows)
    assert sum(alike) >= 4


def test_narrow_rows_are_taken_where_attention_costs_much() -> None:
    lengths = [500, *[30] * 40]
    wide, narrow = MicroLayout(2, (64, 128, 512), packed=True), MicroLayout(2, (64, 128, 512), True, (), 64)
    assert {one.width for one in wide.lay_out(lengths)} == {512, 128}
    assert {one.width for one in narrow.lay_out(lengths)} == {512, 64}
    assert narrow.cost([lengths]) < MicroLayout(2, (512,), True, (), 64).cost([lengths])


def test_the_widths_end_at_the_longest() -> None:
    assert fine_widths(512) == (32, 64, 96, 128, 192, 256, 384, 512)
    assert micro_layout([100, 90], 2, packed=False, longest=100).widths == (32, 64, 96, 100)
    assert micro_layout([100, 90], 2, packed=True, multiple=4).rows == 4
    assert set(micro_layout([100] * 50, 16, packed=False).rows_by_width[-1:]) == {16}  # one length: nothing to gain
    with pytest.raises(ValueError, match="an example of 40 tokens, in rows of at most 32"):
        MicroLayout(2, (32,), packed=True).lay_out([40])


METHODS = {
    "LORA": pj.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    "aLoRA": pj.LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        alora_invocation_tokens=INVOCATION,
        task_type="CAUSAL_LM",
    ),
    "OFT": pj.OFTConfig(oft_block_size=4, target_modules=["q_proj"], init_weights=False),
    "IA3": pj.IA3Config(
        target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "PREFIX_TUNING": pj.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "ADALORA": pj.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=2, target_modules=["q_proj"]),
}


def examples(count: int = 13) -> list[Example]:
    """Texts of random lengths, of which most hold the invocation, some twice and some not at all."""
    rng, found = np.random.default_rng(3), []
    for number in range(count):
        ids = rng.integers(10, 60, rng.integers(6, 40)).astype(np.int32)
        for place in rng.choice(len(ids) - 2, number % 3, replace=False):
            ids[place : place + 2] = INVOCATION
        labels = np.where(rng.random(len(ids)) < 0.7, ids, IGNORE).astype(np.int32)
        labels[0] = IGNORE
        found.append(Example(ids, labels))
    return found


@pytest.mark.parametrize("name", METHODS)
def test_packed_micro_batches_train_as_a_padded_batch(tiny_llama: Path, name: str) -> None:
    """Loss, gradient norm and trained arrays of three steps; AdaLoRA's schedule and penalty among them."""
    model = pj.get_peft_model(pj.AutoModelForCausalLM.from_pretrained(tiny_llama), METHODS[name])
    data = Padded(examples())
    layout = micro_layout([example.length for example in data.examples], 8, packed=True, micro_batch_size=2)
    optimizer, found = optax.sgd(20.0), []  # gradients of a random model are small
    for rows in (None, layout):
        trainable, frozen = pj.partition(jax.tree.map(jnp.copy, model))
        before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(trainable)]
        state, metrics = init_optimizer(optimizer, model), []
        make = make_training_step if rows is None else make_accumulating_step
        step = make(apply, optimizer)
        batches = training_batches(data, 8, seed=0) if rows is None else training_batches(data, 8, seed=0, layout=rows)
        for number in range(3):
            trainable, state, one = step(trainable, state, frozen, batches[number], jax.random.key(0))
            metrics.append([float(one.loss), float(one.grad_norm), float(one.tokens)])
        found.append(([np.asarray(leaf) for leaf in jax.tree.leaves(trainable)], metrics, float(one.computed)))
    (padded, losses, computed), (packed, others, fewer) = found
    assert max(np.abs(new - old).max() for new, old in zip(padded, before, strict=True)) > 1e-3, "the adapter is alive"
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    for one, other in zip(padded, packed, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert fewer < computed


def test_evaluation_does_not_depend_on_the_layout(tiny_llama: Path) -> None:
    model = pj.AutoModelForCausalLM.from_pretrained(tiny_llama)
    data, step = Padded(examples()), make_evaluation_step(apply)
    want = evaluate(step, model, evaluation_batches(data, 4))
    for packed in (True, False):
        layout = MicroLayout(3, (32, 64), packed)
        np.testing.assert_allclose(evaluate(step, model, evaluation_batches(data, 4, layout)), want, rtol=1e-6)


def test_no_token_of_one_text_sees_another(tiny_llama: Path) -> None:
    """A changed text changes its own logits in a row, and no others."""
    model = pj.AutoModelForCausalLM.from_pretrained(tiny_llama)
    rows = list(Padded(examples(6)))
    layout = MicroLayout(1, (192,), packed=True)
    [batch] = micro_batches(rows, layout)
    changed: Any = [dict(row) for row in rows]
    changed[2]["input_ids"] = changed[2]["input_ids"] + 1
    [other] = micro_batches(changed, layout)
    touched = np.any(batch["input_ids"] != other["input_ids"], axis=0)
    segment = np.unique(batch["segment_ids"][0, touched])
    logits = [
        np.asarray(model(b["input_ids"], attention_mask=b["attention_mask"], segment_ids=b["segment_ids"]).logits)
        for b in (batch, other)
    ]
    differs = np.any(logits[0][0] != logits[1][0], axis=-1)
    assert len(segment) == 1
    np.testing.assert_array_equal(differs, batch["segment_ids"][0] == segment[0])

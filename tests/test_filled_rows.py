"""Prompts that take rows over as answers end: each answer is that of a batch of its own."""

from typing import Any

import jax
import numpy as np
import pytest
from cases import ARCHITECTURES
from test_decoder_commands import DECODERS

import peft_jax as pj
from peft_jax.cli.generate.generate import up_to_end
from peft_jax.cli.generate.prompt_input import pad
from peft_jax.models.generation.filled_rows import SPARE, FilledRows, can_fill, shared_start
from peft_jax.models.generation.generation_config import Generation
from peft_jax.models.generation.row_decoder import programs
from peft_jax.models.generation.sampling import Sampling
from peft_jax.models.registry import read_architecture

ALWAYS = ["llama", "gemma", "bloom"]  # positions that turn, windows, and distances in the scores
CANNOT = ("gemma4_text", "qwen3_5_text")  # whose layers keep more than keys and values
ROWS, MOST = 3, 40


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``name`` is each row that is always tested; with ``--grid`` every decoder."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", DECODERS if metafunc.config.getoption("--grid") else ALWAYS)


def random_model(name: str, **more: Any) -> Any:
    """A tiny model of a row with random weights, large enough that its tokens vary."""
    row = ARCHITECTURES[name]
    kind, options = next(iter(row.switches.values()), (next(iter(row.model_types)), {}))
    fields = {**row.sizes, **row.model_types[kind], **options, "max_position_embeddings": 256, **more}
    model = pj.AutoModelForCausalLM.from_config(read_architecture({"model_type": kind, **fields}))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    loud = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, loud)


def random_prompts(vocabulary: int, count: int, begin: int = 0) -> list[list[int]]:
    """Prompts of several lengths, which begin with the same tokens."""
    random = np.random.default_rng(0)
    first = random.integers(3, vocabulary, begin).tolist()
    return [first + random.integers(3, vocabulary, random.integers(1, 20)).tolist() for _ in range(count)]


def in_one_batch(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Greedy answers of the model's own `generate`, as long as they may be."""
    length = max(map(len, prompts))
    ids, mask = pad(prompts, len(prompts), length)
    ends = {"eos_token_id": (), "pad_token_id": 0, "generation_config": {}}
    tokens = model.generate(ids, mask, max_new_tokens=MOST, **ends, **options)
    answers: list[list[int]] = np.asarray(tokens)[:, length:].tolist()
    return answers


def filled(model: Any, generation: Generation, rows: int = ROWS, seed: int = 0) -> FilledRows:
    """Rows for the answers of a model."""
    return FilledRows(model.config, model.params, generation, rows, jax.random.key(seed))


def test_answers_are_those_of_a_batch(name: str) -> None:
    model = random_model(name)
    assert can_fill(model.config, model.params) == (name not in CANNOT)
    if name in CANNOT:
        return
    prompts = random_prompts(model.config.vocab_size, 8, begin=35)
    assert len(shared_start(prompts)) == 32
    wanted = in_one_batch(model, prompts)
    ends = tuple(answer[3 + 4 * number] for number, answer in enumerate(wanted[:6]))  # so that lengths differ
    stopped = [up_to_end(answer, ends) for answer in wanted]
    assert len(set(map(len, stopped))) > 2
    rows = filled(model, Generation(MOST, ends, 0, Sampling()))
    assert list(rows.answers(prompts)) == stopped
    batches = [stopped[start : start + ROWS] for start in range(0, len(stopped), ROWS)]
    assert rows.steps < sum(max(map(len, batch)) for batch in batches), "no fewer than batch by batch"


def test_rows_move_to_the_front_as_often_as_slots_run_out() -> None:
    model = random_model("llama")
    prompts = random_prompts(model.config.vocab_size, 9)
    wanted = in_one_batch(model, prompts, repetition_penalty=1.2)
    generation = Generation(MOST, (), 0, Sampling(repetition_penalty=1.2))
    rows = filled(model, generation, rows=2)
    assert list(rows.answers(prompts)) == wanted
    assert rows.steps == 5 * MOST > MOST + 2 * SPARE, "slots ran out, more than once"
    ends = (wanted[1][0], wanted[3][1], wanted[5][9])
    rows = filled(model, generation._replace(eos_token_ids=ends), rows=2)
    assert list(rows.answers(prompts)) == [up_to_end(answer, ends) for answer in wanted]


def test_draws_for_a_prompt_depend_on_the_key_and_its_number_alone() -> None:
    model = random_model("llama")
    prompts = random_prompts(model.config.vocab_size, 5)
    generation = Generation(12, (), 0, Sampling(do_sample=True, temperature=2.0))
    first = list(filled(model, generation, rows=2).answers(prompts))
    assert first == list(filled(model, generation, rows=5).answers(prompts))
    assert first != list(filled(model, generation, rows=5, seed=1).answers(prompts))
    same = list(filled(model, generation, rows=2).answers(prompts[:1] * 4))
    assert same[0] == first[0] and len({tuple(answer) for answer in same}) == 4


def test_adapters_quantized_bases_and_few_programs() -> None:
    model = random_model("llama")
    config = pj.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    adapted = pj.get_peft_model(pj.quantize(model), config)
    prompts = random_prompts(model.config.vocab_size, 7)
    wanted = in_one_batch(adapted, prompts)
    assert wanted != in_one_batch(model, prompts)
    ends = (wanted[0][5], wanted[1][9])
    generation = Generation(MOST, ends, 0, Sampling())
    assert list(filled(adapted, generation).answers(prompts)) == [up_to_end(answer, ends) for answer in wanted]
    compiled = programs(adapted.config, generation, widened=False)
    list(filled(adapted, generation).answers(prompts[::-1]))
    assert compiled.take._cache_size() == 2 and compiled.proceed._cache_size() == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "more",
    [
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
    ],
    ids=["dynamic", "linear"],
)
def test_rows_that_depend_on_one_another_cannot(more: dict[str, Any]) -> None:
    model = random_model("llama", **more)
    assert can_fill(model.config, model.params) == (more["rope_parameters"]["rope_type"] == "linear")


def test_a_table_of_positions_is_used_to_its_end() -> None:
    model = random_model("gpt2", max_position_embeddings=MOST + 35)
    prompts = random_prompts(model.config.vocab_size, 6)
    prompts[2] = (prompts[2] * 35)[:35]
    rows = filled(model, Generation(MOST, (), 0, Sampling()), rows=2)
    assert list(rows.answers(prompts)) == in_one_batch(model, prompts)


def test_a_lily_of_other_rows_cannot() -> None:
    model = random_model("llama")
    adapted = pj.get_peft_model(model, pj.LilyConfig(r=2, target_modules=["q_proj"]))
    assert not can_fill(adapted.config, adapted.params)
    assert can_fill(adapted.config, pj.disable_adapter(adapted.params))


def test_prompts_of_adapters_cannot() -> None:
    model = random_model("llama")
    adapted = pj.get_peft_model(model, pj.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert not can_fill(adapted.config, adapted.params)
    config = pj.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3, 4])
    adapted = pj.get_peft_model(model, config)
    assert not can_fill(adapted.config, adapted.params)

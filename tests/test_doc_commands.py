"""Every command of README.md and docs/ is run as it stands, on a tiny model, or a table names its test or the reason.

That the words of a command exist is checked by test_doc_pages.py.
"""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from doc_pages import PAGES, ROOT, commands
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax.cli.demo_data import MODEL
from peft_jax.cli.main import main
from peft_jax.models.registry import read_architecture

# What another test runs, by its name.
BY_A_TEST = {
    "peft-jax demo": "test_cli.py::test_the_demo_says_what_it_does_and_compiles_each_program_once",
    "make demo": "test_cli.py::test_the_demo_says_what_it_does_and_compiles_each_program_once",
    "make docs": "test_doc_pages.py::test_the_site_is_built_without_warnings",
    "make models": "test_docs.py::test_the_page_of_models_is_written_from_the_registry",
    "make bench": "test_benchmarks.py::test_a_program_runs_and_records",
    "make bench-chip": "test_chip.py::test_contenders_are_timed_in_turn_and_laid_out",
    "make test-models": "test_decoder_commands.py::test_the_commands_run",
    ".venv/bin/python benchmarks/training_step.py --size 8b --dtype bfloat16": (
        "test_benchmarks.py::test_a_program_runs_and_records"
    ),
    ".venv/bin/python benchmarks/adapt_overhead.py": ("test_adapt.py::test_a_decoder_costs_what_lora_by_hand_costs"),
    "python examples/classify_docstrings.py": (
        "test_examples.py::test_a_frozen_bert_learns_classes_with_lora_and_with_a_prefix"
    ),
    "python examples/prompt_tune_t5.py": ("test_examples.py::test_a_frozen_t5_learns_from_a_prompt_what_it_is_asked"),
    # Two processes with these flags and a mesh of all their devices.
    "peft-jax finetune --model my-llama --data alpaca.json --output my-adapter --mesh fsdp=8,tensor=2"
    " --coordinator-address 10.0.0.1:1234 --num-processes 2 --process-id 0": (
        "test_processes.py::test_two_processes_end_in_the_numbers_of_one"
    ),
}
# What continuous integration runs, by the line of .ci/run.
BY_CONTINUOUS_INTEGRATION = {
    "make test": "make test\n",
    "make test 'ARGS=-k HIRA'": "make test\n",
    "make test-newest": 'make test-newest ARGS="--sample 16 --sample-tests 3"\n',
}
INSTALLS = "it installs from the network; `make dist` installs the wheel into an empty environment"
SERVER = "a program of others, which is not installed; its page says that it was not run"
NOT_RUN = {
    "make conformance": "`make test-slow` runs its tests; test_conformance.py compares the table with them",
    "make lowering": "it needs the TPU's compiler and 15 minutes; test_lowering.py tests what reads the programs",
    "pip install .": INSTALLS,
    "pip install '.[examples]'": INSTALLS,
    "pip install '.[datasets,arrow]'": INSTALLS,
    "pip install 'jax[cuda12]'": INSTALLS,
    "pip install 'jax[tpu]'": INSTALLS,
    "python3 -m venv .venv": "the tests run in an environment that this made",
    ".venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu": INSTALLS,
    "peft-jax finetune --model my-llama --data alpaca.json --output /shared/my-adapter --mesh fsdp=16 --batch-size 32"
    " --distributed": "it needs a cluster that JAX knows",
    ".venv-aot/bin/python benchmarks/int8_residuals.py --target tpu": "it needs the TPU's compiler, in .venv-aot",
    "vllm serve my-llama --enable-lora --lora-modules my-adapter=./my-adapter": SERVER,
    "LORA_ADAPTERS=my-adapter=./my-adapter text-generation-launcher --model-id my-llama": SERVER,
    "curl http://localhost:8000/v1/completions": SERVER,
    "curl http://localhost:3000/generate": SERVER,
}
# Runs that take long, by what no other has. Like kinds of them are in test_streaming.py and test_mesh_training.py.
SLOW = ("--remat", "--streaming", "XLA_FLAGS=")
FIRST = shlex.join(shlex.split(commands("README.md")[1]))  # the one command of the README; the fixture runs it
DEVICES = "XLA_FLAGS=--xla_force_host_platform_device_count=8"


def plain(command: str) -> str:
    """A command without its comment, with one space between words; a request is named by its address alone."""
    words = shlex.split(command, comments=True)
    return shlex.join(words[:2] if words[0] == "curl" else words)


ALL = sorted({plain(command) for page in PAGES for command in commands(page)})
NAMED = {**BY_A_TEST, **BY_CONTINUOUS_INTEGRATION, **NOT_RUN}
RUN = [command for command in ALL if command not in NAMED]


def rows() -> list[object]:
    """The commands that are run, some of them marked slow."""
    slow = [any(part in command for part in SLOW) for command in RUN]
    return [
        pytest.param(command, marks=pytest.mark.slow) if is_slow else command
        for command, is_slow in zip(RUN, slow, strict=True)
    ]


def record(number: int) -> dict[str, str]:
    return {"instruction": "Name the number.", "input": str(number), "output": f"It is {number}."}


def write_lines(file: Path, records: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(one) + "\n" for one in records))


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the data that the documents name, and the adapter of their first command."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("documents")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 1152}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = read_architecture({**json.loads((Path(MODEL) / "config.json").read_text()), **sizes, **heads})
    pj.AutoModelForCausalLM.from_config(config, key=jax.random.key(0)).save_pretrained(folder / "my-llama")
    for file in Path(MODEL).glob("token*"):
        shutil.copy(file, folder / "my-llama")
    few, many = [record(number) for number in range(40)], [record(number) for number in range(510)]
    (folder / "alpaca.json").write_text(json.dumps(few))
    (folder / "held-out.json").write_text(json.dumps(few[:8]))
    write_lines(folder / "questions.jsonl", [{name: one[name] for name in ("instruction", "input")} for one in few[:4]])
    write_lines(folder / "big.jsonl", many)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), folder / "bigger.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(shlex.split(FIRST)[1:]) == 0
    return folder


@pytest.fixture
def workplace(finetuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of that folder as the current one, and JAX's own settings."""
    shutil.copytree(finetuned, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield tmp_path / "work"


def check_run(folder: Path) -> None:
    """A run's losses are finite, and each matrix of its adapter was trained."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(map(math.isfinite, losses))
    adapter = load_file(folder / "adapter_model.safetensors")
    assert adapter and all(np.abs(tensor).max() > 0 for tensor in adapter.values())


@pytest.mark.parametrize("command", rows())
def test_a_command_runs_as_it_stands(command: str, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *words = shlex.split(command.removeprefix(DEVICES).strip())
    if command.startswith(DEVICES):
        assert jax.device_count() == 8, "conftest.py sets the same"
    if program == "python":
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    if command == FIRST:
        check_run(workplace / "my-adapter")
        return
    assert program == "peft-jax", f"{command}: name the test that runs it, or the reason why none does"
    if words[0] == "finetune":
        shutil.rmtree("my-adapter")
    capsys.readouterr()
    assert main(words) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    if words[0] == "finetune":
        check_run(workplace / "my-adapter")
    elif words[0] == "merge":
        before, after = (load_file(workplace / name / "model.safetensors") for name in ("my-llama", "my-merged-llama"))
        assert before.keys() == after.keys() and any(not np.array_equal(before[key], after[key]) for key in before)


def test_what_is_not_run_here_is_named_once_and_still_in_the_documents() -> None:
    assert len(NAMED) == len(BY_A_TEST) + len(BY_CONTINUOUS_INTEGRATION) + len(NOT_RUN)
    assert NAMED.keys() - set(ALL) == set(), "no page has these commands any more"
    assert len(RUN) > 10, RUN


@pytest.mark.parametrize("command", BY_A_TEST)
def test_the_test_that_is_named_exists(command: str) -> None:
    file, _, function = BY_A_TEST[command].partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), flags=re.MULTILINE)


def test_continuous_integration_runs_what_is_said_of_it() -> None:
    lines = (ROOT / ".ci" / "run").read_text()
    for line in BY_CONTINUOUS_INTEGRATION.values():
        assert f"\n{line}" in lines

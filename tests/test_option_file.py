"""`--config`: each option of a file is the flag's, a run's own file makes the run again, and wrong ones are named."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from test_finetune import RECORDS

from peft_jax.cli.finetune.options import FREE, Finetune, each, settings
from peft_jax.cli.main import main, parse
from peft_jax.cli.shared.command_line import Parameter, option_groups
from peft_jax.cli.shared.option_file import write_options
from peft_jax.methods.base import by_name, names

NEEDED = {"model": "m", "data": "d", "output": "o"}
PARAMETERS = [one for _, group in option_groups(Finetune) for one in group if one.name != "config"]


def sample(one: Parameter) -> Any:
    """A value of an option, as a file has it."""
    if one.choices:
        return one.choices[-1]
    if one.type is tuple:
        return ["first", "second"]
    return {bool: True, int: 7, float: 0.00025}.get(one.type, "a text: with # marks")


@pytest.mark.parametrize("one", PARAMETERS, ids=lambda one: one.name)
def test_each_option_of_a_file_is_the_flag(one: Parameter, tmp_path: Path) -> None:
    file, value = tmp_path / "run.yaml", sample(one)
    parts = value if isinstance(value, list) else [value]
    typed = {**NEEDED, one.name: None}
    words = [word for name, text in typed.items() if text is not None for word in (f"--{name}", text)]
    if one.option.repeatable:
        given = [word for part in parts for word in (one.flags[0], part)]
    else:
        given = [one.flags[0]] if value is True else [one.flags[0], *map(str, parts)]
    wanted = parse(["finetune", *words, *given])
    for name in (one.name, one.flags[-1].removeprefix("--")):
        write_options({**typed, name: value}, file)
        found = parse(["finetune", "--config", str(file)])
        assert isinstance(found, Finetune) and found.run.config == file
        assert dataclasses.replace(found, run=dataclasses.replace(found.run, config=None)) == wanted
    if one.name not in FREE:
        write_options({**settings(found), "output": "o"}, file)
        assert [pair for pair in each(parse(["finetune", "--config", str(file)])) if pair[0] != "config"] == [
            pair for pair in each(found) if pair[0] != "config"
        ]


def test_flags_count_more_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    write_options({**NEEDED, "max_steps": 5, "lr": 0.5, "dtype": "float16"}, file)
    found = parse(["finetune", "--config", str(file), "--output", "other", "--max-steps", "None", "--bf16"])
    assert isinstance(found, Finetune)
    assert (str(found.run.output), found.training.max_steps, found.training.learning_rate) == ("other", None, 0.5)
    assert found.base.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_stepz: 3", "has max_stepz, which is no option of finetune. Did you mean --max-steps?"),
        ("config: other.yaml", "has config, which is no option of finetune."),
        ("max_steps: 3\nmax_steps: 4", "has max_steps twice. Write it once."),
        ("lr: 3\nlearning_rate: 4", "has learning_rate by two names. Write it once."),
        ("packing: 1", "packing in run.yaml is 1. Write true or false."),
        ("max_steps: true", "max_steps in run.yaml is true. Write INT."),
        ("max_steps: [1, 2]", "max_steps in run.yaml is [1, 2]. Write one value."),
        ("max_steps: many", "--max-steps is 'many'. Give a whole number."),
        ("dtype: fp16", "--dtype is 'fp16'. Give one of float32"),
        ("- max_steps", "run.yaml holds no options but list."),
        ("max_steps: [", "run.yaml is not YAML: while parsing"),
        ("", "run.yaml holds no options but NoneType."),
    ],
)
def test_a_wrong_file_is_one_line(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(text)
    assert main(["finetune", "--config", "run.yaml", "--model", "m", "--data", "d", "--output", "o"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert main(["finetune", "--config", "none.yaml"]) == 2
    assert "no file of options at none.yaml." in capsys.readouterr().err


def test_a_run_can_be_run_again_by_its_own_file(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, "model")
    Path("data.json").write_text(json.dumps(RECORDS))
    options = {
        "model": "model",
        "data": "data.json",
        "output": "out",
        "max_steps": 2,
        "batch_size": 4,
        "val_size": 2,
        "peft": "PREFIX_TUNING",
        "peft_config": {"num_virtual_tokens": 3},
        "seed": 3,
    }
    Path("mine.yaml").write_text(yaml.safe_dump(options))
    assert main(["finetune", "--config", "mine.yaml"]) == 0
    assert "Learning rate 0.01, which suits PREFIX_TUNING; --learning-rate sets another." in capsys.readouterr().out
    written = yaml.safe_load(Path("out/run.yaml").read_text())
    assert written["learning_rate"] == 0.01 and written["batch_size"] == 4 and written["peft"] == "PREFIX_TUNING"
    assert not set(written) & set(FREE), "what may differ between a run and its resumption"
    assert main(["finetune", "--config", "out/run.yaml"]) == 2
    assert "--output" in capsys.readouterr().err
    assert main(["finetune", "--config", "out/run.yaml", "--output", "again"]) == 0
    one, other = (load_file(Path(folder) / "adapter_model.safetensors") for folder in ("out", "again"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert Path("again/metrics.jsonl").read_bytes() == Path("out/metrics.jsonl").read_bytes()
    assert main(["finetune", "--config", "out/run.yaml", "--output", "out", "--resume"]) == 0


PROMPTS = (
    "CARTRIDGE",
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "CPT",
    "ADAPTION_PROMPT",
)


def test_prompts_learn_at_10_to_100_times_the_rate_of_lora() -> None:
    rates = {name: by_name(name).learning_rate for name in names()}
    assert rates["LORA"] == 3e-4
    for name, rate in rates.items():
        is_prompt = name in PROMPTS
        assert 10 <= round(rate / rates["LORA"], 6) <= 100 if is_prompt else rate < 5e-3, name

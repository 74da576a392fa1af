"""`peft-jax finetune --peft NAME`: every method trains, its result is what the other commands and PEFT read."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import every_method
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax.cli.finetune.adapter_config import make_config
from peft_jax.cli.finetune.options import AdapterOptions
from peft_jax.cli.main import main
from peft_jax.methods import base
from peft_jax.train.metrics import MetricsLog

RECORDS = [
    {"instruction": "Say the number.", "input": str(n), "output": f"number {n}", "task_id": n % 2} for n in range(8)
]
WORDS = "finetune --model model --data data.json --batch-size 4 --learning-rate 0.02 --cutoff-len 64".split()
FIELDS = {name: dict(row.finetune) for name, row in every_method().items()}


@pytest.fixture(autouse=True)
def workplace(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model and data."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def losses(folder: str) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def of_two_loras() -> dict[str, Any]:
    """The fields of an X-LoRA over two LoRAs, which are made."""
    model = pj.AutoModelForCausalLM.from_pretrained("model")
    for number in range(2):
        config = pj.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        pj.get_peft_model(model, config, key=jax.random.key(number)).save_pretrained(f"lora-{number}")
    return {"adapters": {"0": "lora-0", "1": "lora-1"}, "layerwise_scalings": True}


@pytest.mark.parametrize("name", base.names())
def test_each_method_trains_by_its_name(name: str) -> None:
    fields = json.dumps(FIELDS[name] if name != "XLORA" else of_two_loras())
    assert main([*WORDS, "--max-steps", "3", "--output", "out", "--peft", name.lower(), "--peft-config", fields]) == 0
    written = json.loads(Path("out/adapter_config.json").read_text())
    assert written["peft_type"] == name and written["task_type"] == "CAUSAL_LM"
    assert {field: written[field] for field in json.loads(fields)} == json.loads(fields)
    found = losses("out")
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", [name for name, row in every_method().items() if row.name_is_enough])
def test_a_name_is_enough(name: str) -> None:
    assert make_config(AdapterOptions(peft=name)).peft_type == name


@pytest.mark.parametrize("name", [name for name, row in every_method().items() if not row.name_is_enough])
def test_what_a_method_needs_beside_its_name_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=next(iter(every_method()[name].needed))):
        make_config(AdapterOptions(peft=name))


def test_a_prompt_has_no_place_in_packed_rows(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--max-steps", "3", "--output", "out", "--peft", "P_TUNING", "--packing"]
    assert main([*words, "--peft-config", '{"num_virtual_tokens": 4}']) == 2
    assert "P_TUNING puts its tokens at the head of a row, where --packing has" in capsys.readouterr().err
    assert not Path("out").exists()


def test_virtual_tokens_take_positions(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, "--max-steps", "3", "--output", "out", "--peft", "PREFIX_TUNING", "--peft-config"]
    assert main([*words, '{"num_virtual_tokens": 240}']) == 2
    said = capsys.readouterr().err
    assert "after 240 virtual ones exceed the model's 256 positions. Give --cutoff-len 16 or less." in said


def results(folder: str) -> dict[str, bytes]:
    """What a run writes, without its checkpoints, which hold the time of day."""
    files = [file for file in Path(folder).rglob("*") if file.is_file() and "checkpoints" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT's, of every AdaLoRA's file
@pytest.mark.parametrize("load", ["--load-in-8bit", pytest.param("--load-in-4bit", marks=pytest.mark.slow)])
def test_adalora_narrows_by_itself_resumes_bit_for_bit_and_is_read_by_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: str
) -> None:
    Path("fields.json").write_text(json.dumps({**FIELDS["ADALORA"], "deltaT": 2}))
    words = [*WORDS, "--max-steps", "8", "--peft", "ADALORA", "--peft-config", "fields.json", "--val-size", "2"]
    words += ["--eval-steps", "3", load]
    assert main([*words, "--output", "whole"]) == 0
    write = MetricsLog.write

    def interrupted(self: MetricsLog, row: Any) -> None:
        write(self, row)
        if row["step"] == 5 and "loss" in row:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", interrupted)
        assert main([*words, "--output", "out"]) == 130
    assert main([*words, "--output", "out", "--resume"]) == 0
    assert results("out") == results("whole")

    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["total_step"] == 8
    pattern = config["rank_pattern"]
    assert len(pattern) == 4 and sum(map(sum, pattern.values())) == 8, "a rank of two on average"
    tensors = load_file("out/adapter_model.safetensors")
    for module, kept in pattern.items():
        assert len(kept) == 4 and tensors[f"base_model.model.{module}"].shape == (sum(kept), 1)

    capsys.readouterr()
    assert main(["inspect", "out"]) == 0
    assert "ADALORA" in capsys.readouterr().out
    assert main(["generate", "--adapter", "out", "--max-new-tokens", "2", "Say the number."]) == 0
    assert main(["merge", "--adapter", "out", "--output", "merged"]) == 0
    said = []
    for options in (["--adapter", "out"], ["--model", "merged"]):
        capsys.readouterr()
        assert main(["eval", *options, "--data", "data.json"]) == 0
        said.append(capsys.readouterr().out.split())
    assert said[0] == said[1]

    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    import peft_jax as pj

    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32), "out")
    ours = pj.AutoPeftModelForCausalLM.from_pretrained("out", dtype="float32")
    ids = np.array([[5, 17, 2, 40, 9]])
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(ours(ids).logits, want, atol=1e-5 * np.abs(want).max())


WRONG: dict[str, tuple[list[str], str]] = {
    "a method": (["--peft", "LORRA"], "peft_type 'LORRA' is not supported. Supported: ADALORA, "),
    "a field": (
        ["--peft", "ADALORA", "--peft-config", '{"rank": 4}'],
        "--peft-config has rank, which ADALORA has not. Its fields, for --peft-config: target_r, init_r, tinit",
    ),
    "a field of its own": (["--peft-config", '{"inference_mode": true}'], "--peft-config has inference_mode, which"),
    "a value": (["--peft-config", '{"r": "four"}'], "LoraConfig has r='four'. Give it a value of: int"),
    "a value that cannot work": (["--peft", "HRA", "--peft-config", '{"r": 0}'], "HRA needs ranks of at least 1"),
    "an option": (["--peft", "IA3", "--lora-alpha", "3"], "IA3 has no --lora-alpha. Its fields, for --peft-config:"),
    "an unused option": (["--peft", "ADALORA", "--r", "3"], "ADALORA has no --r. Its fields, for --peft-config:"),
    "both": (["--r", "4", "--peft-config", '{"r": 4}'], "--r and r in --peft-config say the same. Give one of them"),
    "no JSON": (["--peft-config", '{"r": }'], "--peft-config is not JSON: Expecting value"),
    "no file": (["--peft-config", "fields.json"], "no --peft-config at fields.json. Give fields, such as"),
    "no fields": (["--peft-config", "data.json"], "the --peft-config data.json is not a JSON object"),
    "two descriptions": (["--adapter-config", "a", "--peft", "IA3"], "--adapter-config and --peft exclude each other"),
    "an adapter and fields": (["--adapter", "a", "--peft-config", "{}"], "--adapter and --peft-config exclude"),
    "a schedule that is too long": (
        ["--peft", "ADALORA", "--peft-config", '{"tinit": 5}'],
        "tinit=5 and tfinal=0 leave no step of total_step=3",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_one_is_one_line_and_leaves_nothing(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    words, said = WRONG[case]
    assert main([*WORDS, "--max-steps", "3", "--output", "out", *words]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1 and said in errors[0], errors
    assert not Path("out").exists()


def test_options_and_fields_go_together() -> None:
    options = AdapterOptions(peft="lora", r=3, target_modules=("all-linear",), peft_config='{"use_rslora": true}')
    config = make_config(options)
    assert config is not None and config.peft_type == "LORA"
    fields = config.to_dict()
    assert [fields[name] for name in ("r", "lora_alpha", "target_modules", "use_rslora")] == [3, 16, "all-linear", True]


def test_a_poly_of_several_tasks_is_told_which(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of several texts have no one task, and a prompt that is continued has to say its."""
    fields = ["--peft", "POLY", "--peft-config", '{"n_tasks": 2, "init_weights": false, "r": 16}']
    assert main([*WORDS, "--max-steps", "3", "--output", "out", *fields, "--packing"]) == 2
    assert "POLY has one task for a row, where --packing has several texts" in capsys.readouterr().err
    assert main([*WORDS, "--max-steps", "1", "--output", "out", *fields]) == 0
    assert 'inputs["task_ids"] = torch.tensor([0])' in Path("out/README.md").read_text()
    capsys.readouterr()
    words = ["generate", "--model", "model", "--adapter", "out", "--max-new-tokens", "4", "Say the number."]
    assert main(words) == 2
    assert "--task-id is not given, and the adapter has 2 tasks. Give 0 to 1." in capsys.readouterr().err
    assert main([*words, "--task-id", "1"]) == 0

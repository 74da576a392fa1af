"""Every option of `peft-jax finetune` does something, and the wrong ones say what to write."""

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

from peft_jax.cli.finetune import finetune as finetune_module
from peft_jax.cli.finetune.options import check
from peft_jax.cli.finetune.steps import Plan, make_plan
from peft_jax.cli.main import main, parse
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.train.optimizer import make_optimizer, make_schedule

RECORDS = [{"instruction": "Say the number.", "input": str(n), "output": f"number {n}"} for n in range(12)]
BASE = {"model": "model", "data": "data.json", "output": "out", "max_steps": 3, "batch_size": 2, "learning_rate": 0.01}


def words(**changes: Any) -> list[str]:
    """The words of a short run, with some options changed; an option of value None is left out."""
    found = ["finetune"]
    for name, value in (BASE | changes).items():
        if value is not None:
            values = [] if value is True else value if isinstance(value, list) else [value]
            found += [f"--{name.replace('_', '-')}", *map(str, values)]
    return found


def run(**changes: Any) -> dict[str, np.ndarray]:
    """The tensors that a run writes."""
    shutil.rmtree("out", ignore_errors=True)
    assert main(words(**changes)) == 0
    return load_file("out/adapter_model.safetensors")


def metrics(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def plain(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with a model and data, and what the short run writes without any change."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(tiny_llama, folder / "model")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, run()


@pytest.fixture(autouse=True)
def workplace(plain: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder as the current one."""
    shutil.copytree(plain[0], tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


CHANGES: list[dict[str, Any]] = [
    {"lora_dropout": 0.5},
    {"dtype": "bfloat16"},
    {"prompt_template": "alpaca"},
    {"train_on_inputs": True},
    {"packing": True},
    {"val_size": 0.5},
    {"lr_scheduler": "cosine"},
    {"warmup_steps": 2},
    {"weight_decay": 1},
    {"max_grad_norm": 0.001},
    {"optimizer": "sgd"},
    {"optimizer": "lion"},
    {"optimizer": "adafactor"},
    {"max_steps": None, "epochs": 0.4},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: "-".join(map(str, change)))
def test_no_option_is_ignored(plain: tuple[Path, dict[str, np.ndarray]], change: dict[str, Any]) -> None:
    changed = run(**change)
    assert plain[1].keys() == changed.keys() and not same(plain[1], changed)
    assert all(np.isfinite(value).all() for value in changed.values())


def test_micro_batches_draw_their_own_dropout() -> None:
    whole, parts = run(lora_dropout=0.5), run(lora_dropout=0.5, micro_batch_size=1)
    assert not same(whole, parts)
    for name in whole:
        assert np.abs(whole[name] - parts[name]).max() < 0.1


def test_the_base_drops_as_its_config_says_unless_it_is_switched_off(plain: tuple[Path, dict[str, np.ndarray]]) -> None:
    shutil.copytree("model", "dropping", dirs_exist_ok=True)
    config = json.loads(Path("dropping/config.json").read_text())
    Path("dropping/config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    assert not same(run(model="dropping"), plain[1])
    assert same(run(model="dropping", no_base_dropout=True), plain[1])


def test_epochs_count_steps_and_the_last_batch_may_be_small(capsys: pytest.CaptureFixture[str]) -> None:
    run(max_steps=None, epochs=2, batch_size=5)
    assert "6 steps, 3 an epoch." in capsys.readouterr().out
    rows = metrics()
    assert [row["epoch"] for row in rows] == [n / 3 for n in range(1, 7)]
    assert rows[2]["tokens"] < min(rows[0]["tokens"], rows[1]["tokens"])
    assert all(row["grad_norm"] > 0 for row in rows)
    wanted = [float(make_schedule(0.01, 6, warmup_steps=0)(n)) for n in range(6)]
    # As one program the schedule's product and sum are one operation, which rounds once.
    assert [row["learning_rate"] for row in rows] == pytest.approx(wanted, rel=1e-6)


def test_remat_and_mesh_reach_the_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(options: Any, task: Any, model: Any, data: Any, mesh: Any) -> Any:
        plan, state, frozen = make_plan(options, task, model, data, mesh)
        program = jax.make_jaxpr(plan.step)(state.trainable, state.opt_state, frozen, plan.batches[0], state.key)
        seen.append((str(program).count("policy=None"), mesh and dict(mesh.shape)))
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module, "make_plan", stop)
    assert [main(words(output="a", **more)) for more in ({}, {"remat": True}, {"mesh": "data=1"})] == [130] * 3
    assert seen[0] == (0, None) and seen[1][0] > 0
    assert seen[2] == (0, {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1})


def test_a_start_looks_at_the_batches_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def stop(base: Any, config: Any, batches: list[Any], **options: Any) -> Any:
        seen.append(len(batches))
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_jax.apply_lora_from_data", stop)
    eva = {"output": "a", "peft_config": '{"init_lora_weights": "eva"}'}
    assert [main(words(**eva, **more)) for more in ({}, {"start_batches": 2})] == [130] * 2
    assert seen == [6, 2] and "starts from 2 batches of 2 rows (eva)" in capsys.readouterr().out


def test_compute_dtype_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[set[Any]] = []

    def stop(options: Any, task: Any, model: Any, data: Any, mesh: Any) -> Any:
        found.append({leaf.compute_dtype for _, leaf in adapted_leaves(model)})
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune_module, "make_plan", stop)
    assert [main(words(output="a", **more)) for more in ({}, {"compute_dtype": "bfloat16"})] == [130] * 2
    assert found == [{None}, {jnp.dtype("bfloat16")}]


@pytest.mark.parametrize("load", ["load_in_8bit", pytest.param("load_in_4bit", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_same_adapter_and_takes_over_a_run(
    plain: tuple[Path, dict[str, np.ndarray]], capsys: pytest.CaptureFixture[str], load: str
) -> None:
    tensors = run(mesh="data=2,tensor=2", **{load: True}, val_size=2, packing=True)
    assert main(words(output="one", **{load: True}, val_size=2, packing=True)) == 0
    alone = load_file("one/adapter_model.safetensors")
    for name, value in tensors.items():
        np.testing.assert_allclose(value, alone[name], atol=1e-5)
    for one, other in zip(metrics("one"), metrics(), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)
    shutil.rmtree("one")
    shutil.copytree(plain[0] / "out", "one")
    assert main(words(output="one", resume=True, mesh="data=2,tensor=2")) == 0, capsys.readouterr().err
    assert same(load_file("one/adapter_model.safetensors"), plain[1])  # nothing was left to do


def test_an_adapter_config_in_pefts_format_is_taken() -> None:
    from peft import LoraConfig

    LoraConfig(
        r=3, lora_alpha=5, target_modules=["k_proj"], rank_pattern={"layers.1.self_attn.k_proj": 2}, inference_mode=True
    ).save_pretrained("peft")
    tensors = run(adapter_config="peft/adapter_config.json")
    written = json.loads(Path("out/adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (3, 5, "model")
    assert sorted(value.shape[0] for name, value in tensors.items() if "lora_A" in name) == [2, 3]
    assert all(np.abs(value).max() > 0 for value in tensors.values())


def test_a_warm_start_goes_on_from_an_adapter(plain: tuple[Path, dict[str, np.ndarray]]) -> None:
    shutil.copytree("out", "before")
    tensors = run(adapter="before", learning_rate=1e-9, max_steps=1)
    assert not same(tensors, plain[1])
    for name, value in tensors.items():
        np.testing.assert_allclose(value, plain[1][name], atol=1e-6)
    assert json.loads(Path("out/adapter_config.json").read_text())["lora_alpha"] == 16


@pytest.mark.parametrize("kind", ["completion", "chat", "hub"])
def test_other_formats_train(
    plain: tuple[Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "completion":  # the same texts, laid out by hand
        prompts = [
            f"### Instruction:\n{r['instruction']}\n\n### Input:\n{r['input']}\n\n### Response:\n" for r in RECORDS
        ]
        rows = [{"prompt": p, "completion": r["output"]} for p, r in zip(prompts, RECORDS, strict=True)]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert same(run(data="rows.jsonl"), plain[1])
    elif kind == "hub":
        fake = types.ModuleType("datasets")

        def load_dataset(name: str, *, split: str, trust_remote_code: bool) -> list[dict[str, str]]:
            assert trust_remote_code is False
            return {("me/mine", "train"): RECORDS}[name, split]

        fake.load_dataset = load_dataset  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", fake)
        assert same(run(data="me/mine"), plain[1])
    else:
        template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        Path("model/chat_template.jinja").write_text(template)
        turns = [
            [{"role": "user", "content": r["input"]}, {"role": "assistant", "content": r["output"]}] for r in RECORDS
        ]
        Path("chats.json").write_text(json.dumps([{"messages": messages} for messages in turns]))
        assert not same(run(data="chats.json"), plain[1])


def test_early_stopping_keeps_the_best(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.5}
    monkeypatch.setattr(Plan, "validation", lambda self, state, frozen: {"eval_loss": losses[state.step]})
    final = run(max_steps=10, val_size=3, eval_steps=2, early_stopping=2, save_steps=3, save_total_limit=3)
    assert [(row["step"], row["eval_loss"]) for row in metrics() if "eval_loss" in row] == list(losses.items())[:4]
    assert sorted(file.name for file in Path("out/checkpoints").iterdir()) == ["3", "6", "8"]
    said = capsys.readouterr().out
    assert "12 examples, 3 of them for validation" in said and "Stopped early at step 8 of 10" in said
    assert "Validation loss 1.000, at its best 1.000 (step 4, in best/)." in said
    assert "| best validation loss | 1.0000 (step 4, in `best/`) |" in Path("out/README.md").read_text()
    assert not same(load_file("out/best/adapter_model.safetensors"), final)
    assert main([*words(max_steps=10, val_size=3, eval_steps=2, early_stopping=2, save_steps=3), "--resume"]) == 0
    assert same(load_file("out/adapter_model.safetensors"), final)  # it stays stopped


def test_evaluations_and_checkpoints_come_when_asked_and_at_the_end() -> None:
    run(max_steps=5, val_size=3, eval_steps=3, save_steps=2, save_total_limit=1)
    assert [row["step"] for row in metrics() if "eval_loss" in row] == [3, 5]
    assert [file.name for file in Path("out/checkpoints").iterdir()] == ["5"]
    run(max_steps=5, val_size=3, save_steps=2)
    assert [row["step"] for row in metrics() if "eval_loss" in row] == [5]  # an epoch
    assert sorted(file.name for file in Path("out/checkpoints").iterdir()) == ["4", "5"]


def test_the_best_adapter_is_the_one_of_its_step() -> None:
    run(max_steps=4, val_size=3, eval_steps=2, lr_scheduler="constant", learning_rate=1.0, max_grad_norm=0)
    rows = {row["step"]: row["eval_loss"] for row in metrics() if "eval_loss" in row}
    step = min(rows, key=lambda number: rows[number])
    best = load_file("out/best/adapter_model.safetensors")
    assert same(best, load_file("out/adapter_model.safetensors")) == (step == 4)


def test_tensorboard_gets_the_metrics() -> None:
    from tensorboardX.proto.event_pb2 import Event

    run(tensorboard=True)
    [file] = Path("out/tensorboard").iterdir()
    data, found = file.read_bytes(), {}
    while data:  # records of TFRecord: length, checksum, content, checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        data = data[16 + size :]
    for row in metrics():
        np.testing.assert_allclose(found["loss", row["step"]], row["loss"], rtol=1e-6)
        assert ("tokens_per_second", row["step"]) in found


def test_tensorboard_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(words(output="new", tensorboard=True)) == 2
    assert "pip install '.[tensorboard]'" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("new").exists()


def test_the_model_card_names_base_data_and_settings() -> None:
    run(seed=3)
    card = Path("out/README.md").read_text()
    assert card.startswith("---\nbase_model: model\nlibrary_name: peft\n")
    for part in (
        "`data.json`",
        "| `--seed` | 3 |",
        "| `--r` | 8 |",
        "trainable params: 1,792",
        "An answer ends with token 1.",
        "| `--target-modules` |",
    ):
        assert part in card


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two lengths of a run": ({"epochs": 1}, "--epochs and --max-steps exclude each other"),
    "a config and options": ({"adapter_config": "c.json", "r": 4}, "--adapter-config and --r exclude each other"),
    "an adapter and options": ({"adapter": "out", "lora_alpha": 4}, "--adapter and --lora-alpha exclude each other"),
    "no such config": ({"adapter_config": "c.json"}, "no adapter config at c.json"),
    "a config that is no JSON": ({"adapter_config": "model/model.safetensors"}, "is not UTF-8 text. Give"),
    "a config of something else": ({"adapter_config": "model/config.json"}, "peft_type"),
    "no such adapter": ({"adapter": "none"}, "none"),
    "a micro batch that does not divide": ({"batch_size": 4, "micro_batch_size": 3}, "does not divide --batch-size 4"),
    "steps of evaluation without data": ({"eval_steps": 2}, "--eval-steps needs examples for validation"),
    "patience without data": ({"early_stopping": 2}, "--early-stopping needs examples for validation"),
    "nothing left to train on": ({"val_size": 12}, "keeps 12 of 12 examples"),
    "nothing to validate on": ({"val_size": 0.01}, "keeps 0 of 12 examples"),
    "a share above one": ({"val_size": 1.5}, "a share below 1 or a whole number"),
    "a warm-up longer than the run": ({"warmup_steps": 9}, "a warm-up of 9 steps does not fit into 3"),
    "an unknown optimizer": ({"optimizer": "adm"}, "--optimizer"),
    "no such template": ({"prompt_template": "chatml"}, "no prompt template 'chatml'"),
    "a template for data with a layout": (
        {"prompt_template": "alpaca", "data": "rows.jsonl"},
        "is for instruction data",
    ),
    "mixed formats": ({"data": "mixed.jsonl"}, "Give one format a file"),
    "not JSON": ({"data": "model/model.safetensors"}, "Give a JSON or JSONL file"),
    "chats without a template": ({"data": "chats.jsonl"}, "no chat template, which messages need"),
    "nothing under the cutoff": ({"cutoff_len": 4}, "none of 12 examples fits into 4 tokens. Raise --cutoff-len to"),
    "a dataset without the package": ({"data": "me/mine"}, "pip install '.[datasets]'"),
    "a mesh for other machines": ({"mesh": "data=64"}, "the mesh data=64 needs 64 devices, but there are 8"),
    "rows that do not split": ({"mesh": "data=4"}, "--batch-size 2 cannot be split over data x fsdp = 4 devices"),
    "a mesh of another kind": ({"mesh": "model=2"}, "--mesh is 'model=2'. Give sizes of data, fsdp, tensor"),
    "no number": ({"lora_alpha": float("nan")}, "--lora-alpha is nan. Give a finite number"),
    "a huge seed": ({"seed": 2**40}, "--seed is 1099511627776. Give a number below 2**32"),
    "no rows": ({"batch_size": 0}, "--batch-size is 0. Give a number above 0"),
    "no checkpoints": ({"save_steps": 0}, "--save-steps is 0"),
    "a folder under a file": ({"output": "data.json/new"}, "data.json/new cannot be written"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    row, chat = {"prompt": "a", "completion": "b"}, {"messages": [{"role": "assistant", "content": "a"}]}
    Path("rows.jsonl").write_text(json.dumps(row))
    Path("chats.jsonl").write_text(json.dumps(chat))
    Path("mixed.jsonl").write_text(f"{json.dumps(RECORDS[0])}\n{json.dumps(row)}")
    before = sorted(Path.cwd().rglob("*"))
    change, said = WRONG[case]
    capfd.readouterr()
    assert main(words(**({"output": "new"} | change))) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1 and errors[0].startswith("peft-jax: error: ") and said in errors[0], errors
    assert sorted(Path.cwd().rglob("*")) == before


def test_an_adapter_of_another_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("out", "other")
    tensors = load_file("other/adapter_model.safetensors")
    save_file({name: value[:, :-1].copy() for name, value in tensors.items()}, "other/adapter_model.safetensors")
    assert main(words(output="new", adapter="other")) == 2
    assert "does not fit this base" in capsys.readouterr().err


def test_schedules_are_what_their_names_say() -> None:
    peak, steps, warmup = 0.5, 20, 4
    for name, wanted in {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + np.cos(np.pi * x)),
        "constant": lambda x: 1.0,
    }.items():
        rate = make_schedule(peak, steps, schedule=name, warmup_steps=warmup)
        found = [float(rate(n)) for n in range(steps)]
        rising = [peak * (n + 1) / (warmup + 1) for n in range(warmup)]
        np.testing.assert_allclose(found, rising + [peak * wanted(n / 16) for n in range(16)], rtol=1e-5)
    with pytest.raises(ValueError, match="no schedule is named 'step'. Take one of linear, cosine, constant"):
        make_schedule(peak, steps, schedule="step", warmup_steps=0)


def test_optimizers_decay_and_clip() -> None:
    params, gradients = {"a": jnp.full((2, 3), 2.0)}, {"a": jnp.full((2, 3), 4.0)}

    def update(**options: Any) -> np.ndarray:
        optimizer = make_optimizer(lambda step: 0.1, **options)
        with jax.numpy_dtype_promotion("standard"):
            return np.asarray(optimizer.update(gradients, optimizer.init(params), params)[0]["a"])

    np.testing.assert_allclose(update(optimizer="sgd", max_grad_norm=0), -0.4, rtol=1e-6)
    np.testing.assert_allclose(update(optimizer="sgd", max_grad_norm=1), -0.1 / np.sqrt(6), rtol=1e-6)
    for name in ("adamw", "lion", "adafactor", "sgd"):
        decay = update(optimizer=name, weight_decay=0.5) - update(optimizer=name)
        np.testing.assert_allclose(decay, -0.1 * 0.5 * 2.0, rtol=1e-4)
    wanted = optax.adamw(0.1, weight_decay=0.0)
    with jax.numpy_dtype_promotion("standard"):
        adam, _ = wanted.update(gradients, wanted.init(params), params)
    np.testing.assert_allclose(update(max_grad_norm=0), adam["a"], rtol=1e-6)
    with pytest.raises(ValueError, match="no optimizer is named 'adam'. Take one of adamw"):
        make_optimizer(0.1, 3, optimizer="adam")


def test_check_is_silent_on_what_works() -> None:
    options = parse(words(val_size=0.1, eval_steps=5, micro_batch_size=1))
    assert isinstance(options, finetune_module.Finetune)
    check(options)

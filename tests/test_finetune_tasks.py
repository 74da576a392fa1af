"""The commands on encoder-decoders and classifiers of texts, on prompts of several tasks and starts that look at data.

Each run is killed and resumed to the same bits, and PEFT finds its loss on the same rows.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from peft_jax.cli.finetune import initialize
from peft_jax.cli.main import main
from peft_jax.train.metrics import MetricsLog

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

PAIRS = [{"prompt": f"say {n}", "completion": f" {'number ' * (n % 3)}{n}", "task_id": n % 2} for n in range(12)]
TEXTS = [{"text": f"number {n} " * (1 + n % 3), "label": ("even", "odd", "third")[n % 3]} for n in range(12)]
PLAIN = [row if n % 3 else {**row, "text_pair": "or not"} for n, row in enumerate(TEXTS)]
SIZES = {"vocab_size": 288, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "Seq2SeqLM",
        {"vocab_size": 288, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 2, "pad_token_id": 2, "eos_token_id": 1},
    ),
    "bert": ("MaskedLM", {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 2}),
    "gpt2": ("CausalLM", {**SIZES, "n_positions": 64, "pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 1}),
}
ENDS = {  # what a model's tokenizer puts around a text, and around two
    "t5": {"single": "$A </s>"},
    "bert": {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1"},
}
RUNS: dict[str, tuple[str, str, list[dict[str, Any]], list[str]]] = {  # task, model, data and options
    "answers": ("SEQ_2_SEQ_LM", "t5", PAIRS, []),
    "classes": ("SEQ_CLS", "bert", PLAIN, ["--task", "SEQ_CLS"]),
    "tasks": (
        *("SEQ_2_SEQ_LM", "t5", PAIRS),
        [
            *("--peft", "MULTITASK_PROMPT_TUNING", "--peft-config", '{"num_virtual_tokens": 3, "num_tasks": 2}'),
            *("--learning-rate", "0.1"),
        ],
    ),
    "eva": (
        *("SEQ_CLS", "gpt2", TEXTS),
        ["--task", "SEQ_CLS", "--peft-config", '{"init_lora_weights": "eva"}', "--start-batches", "1"],
    ),
    "corda": ("SEQ_2_SEQ_LM", "t5", PAIRS, ["--peft-config", '{"init_lora_weights": "corda"}']),
    "lora_ga": (
        *("CAUSAL_LM", "gpt2", PAIRS),
        ["--peft-config", '{"init_lora_weights": "lora_ga", "lora_ga_config": {}, "target_modules": ["c_proj"]}'],
    ),
}
HEADS = {"SEQ_2_SEQ_LM": "Seq2SeqLM", "SEQ_CLS": "SequenceClassification", "CAUSAL_LM": "CausalLM"}
KEPT = 5  # rows for validation


def save_tokenizer(folder: Path, **ends: str) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "</s>", "<pad>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["say a number"], trainer)
    if ends:
        ids = [(token, number) for number, token in enumerate(special)]
        tokenizer.post_processor = processors.TemplateProcessing(**ends, special_tokens=ids)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models, which have no head for classes and, as a masked language model, no pooler."""
    import transformers

    folder = tmp_path_factory.mktemp("bases")
    for name, (head, options) in MODELS.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **options, initializer_range=0.2)
        getattr(transformers, f"AutoModelFor{head}").from_config(config).save_pretrained(folder / name)
        save_tokenizer(folder / name, **ENDS.get(name, {}))
    for name, rows in {"pairs": PAIRS, "texts": TEXTS, "plain": PLAIN}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def trained(bases: Path) -> Callable[[str], Path]:
    """A function from a run's name to its folder; it is made by two runs, of which one is stopped and resumed."""

    def make(name: str) -> Path:
        if not (bases / name).exists():
            words = [*words_of(name), "--output"]
            assert main([*words, f"{name}-whole"]) == 0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(MetricsLog, "write", interrupted)
                assert main([*words, name]) == 130
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(initialize, "started", None)  # what started from data does not start again
                assert main([*words, name, "--resume"]) == 0
        return bases / name

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bases)
        yield make


def words_of(name: str) -> list[str]:
    _, model, rows, options = RUNS[name]
    data = {id(PAIRS): "pairs", id(TEXTS): "texts", id(PLAIN): "plain"}[id(rows)]
    words = f"finetune --model {model} --data {data}.json --max-steps 3 --batch-size 4 --learning-rate 0.02"
    return [*words.split(), "--val-size", str(KEPT), *options]


write = MetricsLog.write


def interrupted(self: MetricsLog, row: Any) -> None:
    write(self, row)
    if row["step"] == 2 and "loss" in row:
        os.kill(os.getpid(), signal.SIGINT)


def results(folder: Path) -> dict[str, bytes]:
    """What a run writes, without its checkpoints, which hold the time of day."""
    files = [file for file in folder.rglob("*") if file.is_file() and "checkpoints" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def torch_batch(task: str, model: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as transformers' users make them."""
    tokenizer = tokenizer_of(model)
    if task == "SEQ_CLS":
        pairs = any("text_pair" in row for row in rows)
        texts = [(row["text"], row["text_pair"]) if "text_pair" in row else row["text"] for row in rows]
        each = [tokenizer(*([one] if isinstance(one, str) else one), return_token_type_ids=pairs) for one in texts]
        batch = tokenizer.pad({name: [one[name] for one in each] for name in each[0]}, return_tensors="pt")
        labels = torch.tensor([("even", "odd", "third").index(row["label"]) for row in rows])
        return {**batch, "labels": labels}
    if task == "SEQ_2_SEQ_LM":
        batch = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
        labels = tokenizer(text_target=[row["completion"] for row in rows], padding=True, return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        return dict(batch)
    whole = [f"{row['prompt']}{row['completion']}</s>" for row in rows]
    batch = tokenizer(whole, padding=True, return_tensors="pt")
    starts = torch.tensor([[len(tokenizer(row["prompt"])["input_ids"])] for row in rows])
    places = torch.arange(batch["input_ids"].shape[1])[None]
    answer = (places >= starts) & (batch["attention_mask"] == 1)
    return {**batch, "labels": batch["input_ids"].masked_fill(~answer, -100)}


def in_peft(name: str, folder: Path) -> Any:
    """A run's adapter in PEFT, on the base as it was."""
    import transformers

    task, model, _, _ = RUNS[name]
    more = {"num_labels": 3} if task == "SEQ_CLS" else {}
    base = getattr(transformers, f"AutoModelFor{HEADS[task]}").from_pretrained(model, **more)
    return peft.PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize(
    "name",
    [
        *("classes", "tasks"),
        pytest.param("answers", marks=pytest.mark.slow),
        pytest.param("eva", marks=pytest.mark.slow),
        pytest.param("corda", marks=pytest.mark.slow),
        pytest.param("lora_ga", marks=pytest.mark.slow),
    ],
)
def test_a_run_resumes_bit_for_bit_and_peft_finds_its_loss(name: str, trained: Callable[[str], Path]) -> None:
    out = trained(name)
    found = results(out)
    assert found == results(out.with_name(f"{name}-whole"))
    task, model, rows, _ = RUNS[name]
    config = json.loads(found["adapter_config.json"])
    assert config["task_type"] == task and json.loads((out / "best/adapter_config.json").read_text()) == config
    kept = sorted(np.random.default_rng(0).permutation(len(rows))[:KEPT])
    batch = torch_batch(task, model, [rows[n] for n in kept])
    tasks = {"task_ids": torch.tensor([rows[n]["task_id"] for n in kept])} if name == "tasks" else {}
    theirs = in_peft(name, out)
    with torch.no_grad():
        output = theirs(**batch, **tasks)
        with theirs.disable_adapter():
            before = theirs(**batch).loss.item()
    last = [row for row in map(json.loads, found["metrics.jsonl"].splitlines()) if "eval_loss" in row][-1]
    assert last["step"] == 3
    np.testing.assert_allclose(last["eval_loss"], output.loss.item(), rtol=1e-5)
    assert abs(output.loss.item() - before) > 1e-2, "the adapter is dead"
    if task == "SEQ_CLS":
        right = (output.logits.argmax(-1) == batch["labels"]).float().mean().item()
        np.testing.assert_allclose(last["eval_accuracy"], right, rtol=1e-6)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_are_those_of_peft_also_after_a_merge(
    trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, theirs = trained("answers"), in_peft("answers", trained("answers"))
    batch, tokenizer = torch_batch("SEQ_2_SEQ_LM", "t5", PAIRS), tokenizer_of("t5")
    with torch.no_grad():
        want = theirs(**batch)
    shutil.rmtree("merged", ignore_errors=True)
    assert main(["merge", "--adapter", out.name, "--output", "merged"]) == 0
    from transformers import AutoModelForSeq2SeqLM

    with torch.no_grad():
        merged = AutoModelForSeq2SeqLM.from_pretrained("merged")(**batch)
    np.testing.assert_allclose(merged.logits, want.logits, atol=1e-5 * float(want.logits.abs().max()))
    for model in (["--adapter", out.name], ["--model", "merged"]):
        (found,) = told(capsys, "eval", *model, "--data", "pairs.json")
        np.testing.assert_allclose(found["loss"], want.loss.item(), rtol=1e-5)
        assert found["target_tokens"] == int((batch["labels"] >= 0).sum()) and found["examples"] == 12
    tokens = theirs.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4)
    answers = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    found = told(capsys, "generate", "--adapter", out.name, "--file", "pairs.json", "--max-new-tokens", "4")
    assert [row["text"] for row in found] == answers and any(answers)


def test_an_answer_is_that_of_its_task(trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    out, theirs, tokenizer = trained("tasks"), in_peft("tasks", trained("tasks")), tokenizer_of("t5")
    (found,) = told(capsys, "eval", "--adapter", out.name, "--data", "pairs.json")
    task_ids = torch.tensor([row["task_id"] for row in PAIRS])
    with torch.no_grad():
        want = theirs(**torch_batch("SEQ_2_SEQ_LM", "t5", PAIRS), task_ids=task_ids).loss.item()
        other = theirs(**torch_batch("SEQ_2_SEQ_LM", "t5", PAIRS), task_ids=1 - task_ids).loss.item()
    np.testing.assert_allclose(found["loss"], want, rtol=1e-5)
    assert abs(want - other) > 1e-3, "tasks are alike"
    ids = tokenizer(["say 3"], return_tensors="pt")["input_ids"]
    tokens = theirs.generate(input_ids=ids, task_ids=torch.tensor([1]), max_new_tokens=4)
    words = ["generate", "--adapter", out.name, "--prompt-template", "raw", "--max-new-tokens", "4", "say 3"]
    (found,) = told(capsys, *words, "--task-id", "1")
    assert found["text"] == tokenizer.decode(tokens[0], skip_special_tokens=True)
    assert main(words) == 2
    assert "--task-id is not given, and the adapter has 2 tasks. Give 0 to 1." in capsys.readouterr().err
    _run_card(out)


def _run_card(out: Path) -> None:
    """Run the program in a model card where its base is."""
    card = (out / "README.md").read_text()
    program = card.split("```python\n")[1].split("```")[0]
    assert 'folder = "."' in program and "is a path from the folder that `peft-jax finetune` ran in" in card
    exec(compile(program.replace('folder = "."', f"folder = {str(out)!r}"), "README.md", "exec"), {})


def test_classes_keep_their_names(trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    out, batch = trained("classes"), torch_batch("SEQ_CLS", "bert", PLAIN)
    names = {"0": "even", "1": "odd", "2": "third"}
    assert json.loads((out / "labels.json").read_text())["id2label"] == names
    assert json.loads((out / "adapter_config.json").read_text())["modules_to_save"][0] == "bert.pooler.dense"
    card = (out / "README.md").read_text()
    assert "AutoPeftModelForSequenceClassification" in card and "num_labels=3" in card and "accuracy" in card
    _run_card(out)
    shutil.rmtree("merged", ignore_errors=True)
    assert main(["merge", "--adapter", out.name, "--output", "merged"]) == 0
    assert json.loads(Path("merged/config.json").read_text())["id2label"] == names
    with torch.no_grad():
        want = in_peft("classes", out)(**batch)
        merged = AutoModelForSequenceClassification.from_pretrained("merged")(**batch)
    np.testing.assert_allclose(merged.logits, want.logits, atol=1e-5 * float(want.logits.abs().max()))
    right = (want.logits.argmax(-1) == batch["labels"]).float().mean().item()
    for model in (["--adapter", out.name], ["--model", "merged"]):
        (found,) = told(capsys, "eval", *model, "--data", "plain.json")
        assert found["examples"] == 12 and found.keys() == {"loss", "accuracy", "examples", "too_long"}
        np.testing.assert_allclose([found["loss"], found["accuracy"]], [want.loss.item(), right], rtol=1e-5)
    assert main(["generate", "--adapter", out.name, "say 3"]) == 2
    assert "classes tells classes of texts, and writes none. Give it to peft-jax eval" in capsys.readouterr().err


def _headless(rows: list[dict[str, Any]], *words: str) -> tuple[list[dict[str, Any]], list[str]]:
    return rows, ["--model", "bert", "--task", "SEQ_CLS", *words]


TASKLESS = [{name: value for name, value in row.items() if name != "task_id"} for row in PAIRS]
MULTITASK = ["--peft", "MULTITASK_PROMPT_TUNING", "--peft-config", '{"num_virtual_tokens": 3, "num_tasks": 2}']
WRONG: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "no task": (TEXTS, ["--model", "bert"], "a BertForMaskedLM, which has no head for a task"),
    "no such task": (PAIRS, ["--model", "bert", "--task", "CAUSAL_LM"], "A bert model for CAUSAL_LM is not supported"),
    "another task": (TEXTS, ["--model", "t5"], "SEQ_2_SEQ_LM is learned from instruction and output, or prompt and"),
    "texts without labels": (*_headless(PAIRS), "SEQ_CLS is learned from text and label, and the data has prompt"),
    "packed answers": (PAIRS, ["--model", "t5", "--packing"], "--packing is for CAUSAL_LM"),
    "learned prompts": (PAIRS, ["--model", "t5", "--train-on-inputs"], "--train-on-inputs is for CAUSAL_LM"),
    "one class": (*_headless(TEXTS[:1]), "all records have the label 'even'. Give records of two classes or more"),
    "names and numbers": (*_headless([*TEXTS, {"text": "a", "label": 1}]), "names ('even') and numbers (1)"),
    "a label of another kind": (*_headless([{"text": "a", "label": True}]), "has the label True. Give the name of a"),
    "a class of its own": (
        [*TEXTS, {"text": "a", "label": "x"}],
        ["--adapter", "classes"],
        "the model's are even, odd",
    ),
    "a task against the adapter": (
        *(TEXTS, ["--task", "CAUSAL_LM", "--adapter", "classes"]),
        "--task CAUSAL_LM, but the adapter's config has the task_type SEQ_CLS. Drop --task",
    ),
    "no room": (
        *_headless([{**row, "text": "word " * 30} for row in TEXTS], "--cutoff-len", "256"),
        "exceed the model's 64 positions",
    ),
    "no ids of tasks": (
        TASKLESS,
        ["--model", "t5", *MULTITASK],
        "record 1 has no task_id, and the adapter has 2 tasks",
    ),
    "another id": (
        *([{**PAIRS[0], "task_id": 2}], ["--model", "t5", *MULTITASK]),
        "record 1 has the task_id 2, and the adapter has 2 tasks. Give 0 to 1",
    ),
    "a start for other data": (
        *(PAIRS, ["--model", "t5", "--peft-config", '{"init_lora_weights": "eva"}']),
        "an encoder-decoder has two. Take corda or lora_ga",
    ),
    "batches of no start": (PAIRS, ["--model", "t5", "--start-batches", "2"], "--start-batches is for a LoRA with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_combination_is_one_line_and_leaves_nothing(
    case: str, trained: Callable[[str], Path], bases: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows, words, said = WRONG[case]
    if "--adapter" in words:
        trained("classes")
        words = ["--model", "bert", *words]
    Path("wrong.json").write_text(json.dumps(rows))
    capfd.readouterr()
    assert main(["finetune", "--data", "wrong.json", "--output", "new", "--max-steps", "1", *words]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(errors) == 1 and said in errors[0], errors
    assert not Path("new").exists()


def test_a_random_head_is_not_evaluated(trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(trained("classes"), "headless", dirs_exist_ok=True))
    from safetensors.numpy import load_file, save_file

    file = out / "adapter_model.safetensors"
    save_file({name: array for name, array in load_file(file).items() if "pooler" not in name}, file)
    config = json.loads((out / "adapter_config.json").read_text())
    text = json.dumps(config | {"modules_to_save": config["modules_to_save"][1:]})
    (out / "adapter_config.json").write_text(text)
    assert main(["eval", "--adapter", "headless", "--data", "plain.json"]) == 2
    assert "bert has no bert.pooler.dense, and no adapter has them, so what came out" in capsys.readouterr().err

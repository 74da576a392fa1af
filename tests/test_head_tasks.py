"""The commands on heads of other labels: numbers, several classes of a text, classes of words, and spans.

Each run's losses and scores are found again by transformers and PEFT, on batches that are made as users make them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from test_finetune_tasks import ENDS, SIZES, save_tokenizer

from peft_jax.cli.main import main
from peft_jax.cli.preview import _shown
from peft_jax.cli.shared.class_numbers import by_names_of
from peft_jax.cli.shared.data_options import DataFileOptions
from peft_jax.cli.shared.data_sources import Loaded, NamedClasses, load_records
from peft_jax.cli.shared.head_labels import HeadLabels, id2label_of, labels_of_texts, named_by_data, with_names
from peft_jax.train.answers_found import normalized, word_f1
from peft_jax.train.data.class_names import class_names_of_schema
from peft_jax.train.data.encode import Example
from peft_jax.train.data.label_kinds import label_array, names_of, problem_of
from peft_jax.train.data.record_forms import to_records
from peft_jax.train.data.records import Labelled, Question, Tagged
from peft_jax.train.data.spans import encode_spans
from peft_jax.train.data.tags import encode_tags
from peft_jax.train.entities import entities

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
KEPT = 5  # rows for validation
SCORES = [{"text": f"number {n} " * (1 + n % 3), "label": n / 2 if n % 2 else n} for n in range(14)]
TOPICS = [{"text": f"number {n} " * (1 + n % 3), "labels": ["even"][n % 2 :] + ["third"][n % 3 :]} for n in range(14)]

KINDS_OF_WORDS = ("O", "B-NUM", "I-NUM", "O", "B-END", "I-END", "I-NUM")
WORDS = [{"tokens": f"say number {n} say the end now".split()[: 4 + n % 4]} for n in range(14)]
WORDS = [{**row, "ner_tags": list(KINDS_OF_WORDS[: len(row["tokens"])])} for row in WORDS]

NAMES = sorted(set(KINDS_OF_WORDS))
NUMBERED = [{**row, "ner_tags": [NAMES.index(tag) for tag in row["ner_tags"]]} for row in WORDS]

FACTS = [
    f"{'So ' * (n % 4)}Ada wrote note {n} in {1800 + n}, {'as we say, ' * (6 * (n == 3))}and not before."
    for n in range(14)
]
ASKED = [{"question": "When?", "context": text} for text in FACTS]
for number, row in enumerate(ASKED):
    year = str(1800 + number)
    known = {
        "text": [year, f"in {year}"],
        "answer_start": [FACTS[number].index(year), FACTS[number].index(f"in {year}")],
    }
    row["answers"] = {"text": [], "answer_start": []} if number % 5 == 4 else known


class Run(NamedTuple):
    """A run: its task by PEFT's name, the model, the data and further options."""

    task: str
    model: str
    rows: Rows
    options: tuple[str, ...] = ()


RUNS = {
    "regression": Run("SEQ_CLS", "bert", SCORES, ("--problem-type", "regression")),
    "topics": Run("SEQ_CLS", "gpt2", TOPICS),
    "spans": Run("QUESTION_ANS", "bert", ASKED, ("--cutoff-len", "60")),
    "words": Run("TOKEN_CLS", "bert", NUMBERED, ("--label-names", *NAMES)),
    "words after a prompt": Run(
        *("TOKEN_CLS", "gpt2", NUMBERED),
        ("--peft", "PROMPT_TUNING", "--peft-config", '{"num_virtual_tokens": 3}'),
    ),
}
DESCRIBED = "words after a prompt"  # whose names of classes stand in the data file
HEADS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
KINDS = {"regression": "regression"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models that have no heads, in which the tests run."""
    import transformers

    folder = tmp_path_factory.mktemp("bases")
    common = {"pad_token_id": 2, "initializer_range": 0.2}
    sizes = {**SIZES, "num_hidden_layers": 1, **common}
    made = {
        "bert": ("MaskedLM", {**sizes, "intermediate_size": 48, "max_position_embeddings": 64}),
        "gpt2": ("CausalLM", {**sizes, "n_positions": 64, "eos_token_id": 1, "bos_token_id": 1}),
    }
    for name, (head, options) in made.items():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(name, **options)
        getattr(transformers, f"AutoModelFor{head}").from_config(config).save_pretrained(folder / name)
        save_tokenizer(folder / name, **ENDS.get(name, {}))
    return folder


def file_of(name: str) -> str:
    """The data file of a run."""
    return f"{name}.parquet" if name == DESCRIBED else f"{name}.json"


def write_described(file: Path, rows: Rows, names: list[str], column: str = "ner_tags") -> Path:
    """Write a Parquet or an Arrow file in the manner of the package datasets, which describes columns of classes."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    feature: Any = {"names": names, "_type": "ClassLabel"}
    if isinstance(rows[0][column], list):
        feature = {"feature": feature, "_type": "List"}
    features = {"tokens": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}, column: feature}
    table = arrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    if file.suffix == ".parquet":
        parquet.write_table(table, file)
        return file
    with arrow.OSFile(str(file), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return file


@pytest.fixture(scope="module")
def trained(bases: Path) -> Callable[[str], Path]:
    """A function from a run's name to its folder."""

    def make(name: str) -> Path:
        if not (bases / name).exists():
            run = RUNS[name]
            if name == DESCRIBED:
                write_described(Path(file_of(name)), run.rows, NAMES)
            else:
                Path(file_of(name)).write_text(json.dumps(run.rows))
            words = f"finetune --model {run.model} --task {run.task} --max-steps 2 --batch-size 4"
            rate = ["--learning-rate", "0.5" if "--peft" in run.options else "0.02"]
            more = [*rate, "--val-size", str(KEPT), *run.options, "--data", file_of(name), "--output", name]
            assert main([*words.split(), *more]) == 0
        return bases / name

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bases)
        yield make


def in_peft(name: str, folder: Path) -> Any:
    """A run's adapter in PEFT, on the base as it was."""
    import transformers

    run, more = RUNS[name], {}
    if run.task != "QUESTION_ANS":
        labels = json.loads((folder / "labels.json").read_text())
        more = {"num_labels": len(labels["id2label"])}
        more |= {key: labels[key] for key in ("problem_type",) if key in labels}
    base = getattr(transformers, f"AutoModelFor{HEADS[run.task]}").from_pretrained(run.model, **more)
    return peft.PeftModel.from_pretrained(base, folder).eval()


def said_by_eval(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    assert main(["eval", *words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def kept_rows(rows: Rows) -> Rows:
    """The rows that a run keeps for validation."""
    return [rows[n] for n in sorted(np.random.default_rng(0).permutation(len(rows))[:KEPT])]


def compare(
    name: str,
    out: Path,
    want: Callable[[Any, Rows], dict[str, float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run's validation, `eval` of its adapter and of the merged model against the numbers of transformers and PEFT.

    Args:
        name: The run.
        out: Its folder.
        want: From a model in PyTorch and rows the loss and the scores.
        capsys: pytest's.
    """
    rows, theirs = RUNS[name].rows, in_peft(name, out)
    with torch.no_grad():
        validation, everything = want(theirs, kept_rows(rows)), want(theirs, rows)
        if "--peft" in RUNS[name].options:  # PEFT cannot switch off a prompt of a classifier of words
            before = want(theirs.get_base_model(), rows)["loss"]
        else:
            with theirs.disable_adapter():
                before = want(theirs, rows)["loss"]
    assert abs(everything["loss"] - before) > 1e-2, "the adapter is dead"
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    last = [row for row in lines if "eval_loss" in row][-1]
    assert last.pop("step") == 2
    assert last == pytest.approx({f"eval_{key}": value for key, value in validation.items()}, rel=1e-5, abs=1e-6)
    for words in _models(name, out):
        cut = RUNS[name].options if "--cutoff-len" in RUNS[name].options else ()
        found = said_by_eval(capsys, *words, *cut, "--data", file_of(name), "--batch-size", "3")
        assert found["examples"] >= len(rows) and found["too_long"] == 0
        assert {key: found[key] for key in everything} == pytest.approx(everything, rel=1e-5, abs=1e-6)
        assert found.keys() - {"shortened"} == {*everything, "examples", "too_long"}


def _models(name: str, out: Path) -> list[list[str]]:
    """The options of `eval` for an adapter, and for a regression's merged model."""
    if name != "regression":
        return [["--adapter", out.name]]
    assert main(["merge", "--adapter", out.name, "--output", "merged"]) == 0
    return [["--adapter", out.name], ["--model", "merged"]]


def run_card(out: Path) -> None:
    """Run the program in a model card where its base is."""
    program = (out / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(compile(program.replace('folder = "."', f"folder = {str(out)!r}"), "README.md", "exec"), {})


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def text_scores(name: str) -> Callable[[Any, Rows], dict[str, float]]:
    """What transformers computes of labelled texts, and scikit-learn and SciPy of its logits."""

    def want(model: Any, rows: Rows) -> dict[str, float]:
        metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
        batch = tokenizer_of(RUNS[name].model)([row["text"] for row in rows], padding=True, return_tensors="pt")
        batch.pop("token_type_ids", None)
        if name in KINDS:
            labels = torch.tensor([row["label"] for row in rows], dtype=torch.float32)
        else:
            labels = torch.tensor([[float(n in row["labels"]) for n in ("even", "third")] for row in TOPICS])
            labels = labels[[TOPICS.index(row) for row in rows]]
        output = model(**batch, labels=labels)
        assert model.config.problem_type == KINDS.get(name, "multi_label_classification")
        logits, known = output.logits.double().numpy(), labels.numpy().reshape(len(rows), -1)
        if name in KINDS:
            pairs = list(zip(logits.T, known.T, strict=True))
            pearson = np.mean([stats.pearsonr(*pair)[0] for pair in pairs])
            spearman = np.mean([stats.spearmanr(*pair)[0] for pair in pairs])
            return {"loss": output.loss.item(), "pearson": pearson, "spearman": spearman}
        f1 = {each: metrics.f1_score(known, logits > 0, average=each, zero_division=0) for each in ("micro", "macro")}
        exact = metrics.accuracy_score(known, logits > 0)
        return {"loss": output.loss.item(), "f1": f1["micro"], "f1_macro": f1["macro"], "exact_match": exact}

    return want


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.task == "SEQ_CLS"])
def test_texts_with_numbers_and_several_classes(
    name: str, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(name)
    compare(name, out, text_scores(name), capsys)
    labels = json.loads((out / "labels.json").read_text())
    assert labels["problem_type"] == KINDS.get(name, "multi_label_classification")
    if name == "topics":
        assert labels["id2label"] == {"0": "even", "1": "third"}
    run_card(out)
    shown = ["preview", "--model", RUNS[name].model, "--data", f"{name}.json", "--task", "SEQ_CLS", *RUNS[name].options]
    capsys.readouterr()
    assert main(shown) == 0
    assert {"topics": "class even=1, third=1", "regression": "class LABEL_0=0.5"}[name] in capsys.readouterr().out


CLASSES = {0: "even", 1: "third"}
ARRAYS: dict[str, tuple[Any, str, list[float] | str]] = {  # a label, the kind, and the array or the error
    "classes by number": ((1,), "multi_label_classification", [0, 1]),
    "no class": ((), "multi_label_classification", [0, 0]),
    "a mark a class": ((1.0, 0.0), "multi_label_classification", [1, 0]),
    "two numbers": ((0.5, -3), "regression", [0.5, -3]),
    "a class twice": ((0, 1, 0), "multi_label_classification", "which name a class twice"),
    "an unknown class": (
        ("odd",),
        "multi_label_classification",
        "has the label 'odd', and the model's are even, third",
    ),
    "too few marks": ((1.0,), "multi_label_classification", "and the model has 2 classes"),
    "a name for a number": ("even", "regression", "and the model predicts numbers"),
    "one number of two": (0.5, "regression", "has 1 numbers, and the model predicts 2"),
    "two classes of one": (("even", "third"), "single_label_classification", "and the model predicts one class"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_a_label_is_the_array_that_the_loss_takes(case: str) -> None:
    label, problem, want = ARRAYS[case]
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            label_array(label, problem, CLASSES, 7)
        return
    found = label_array(label, problem, CLASSES, 7)
    assert found.dtype == np.float32 and found.tolist() == want


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a", 0.5], "names .'a'. and decimal numbers"),
        (["a", ("a", "b")], "one label and lists of labels"),
        ([(), ()], "no record has a label"),
        ([(0.5,), (0.5, 1.5)], "lists of 1, 2 numbers"),
        ([0, -1], "has the label -1. Number classes from 0 on"),
    ],
)
def test_labels_of_several_kinds_are_refused(labels: list[Any], said: str) -> None:
    records = [Labelled("text", label) for label in labels]
    with pytest.raises(ValueError, match=said):
        names_of(records, problem_of(records))


def word_scores(model_name: str, virtual: int) -> Callable[[Any, Rows], dict[str, float]]:
    """What transformers computes of words, aligned by places in the text, and seqeval of its guesses."""

    def want(model: Any, rows: Rows) -> dict[str, float]:
        seqeval = pytest.importorskip("seqeval.metrics")
        names, tokenizer = sorted(set(KINDS_OF_WORDS)), tokenizer_of(model_name)
        texts = [" ".join(row["tokens"]) for row in rows]
        batch = tokenizer(texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
        places = batch.pop("offset_mapping")
        batch.pop("token_type_ids", None)
        labels = torch.full(batch["input_ids"].shape, -100)
        for number, row in enumerate(rows):
            place = 0
            for word, tag in zip(row["tokens"], row["ner_tags"], strict=True):
                starts = (place - 1, place)  # the space before a word is in its first token
                found = [n for n, (start, end) in enumerate(places[number].tolist()) if end and start in starts]
                labels[number, found[0]] = tag if isinstance(tag, int) else names.index(tag)
                place += len(word) + 1
        output = model(**batch, labels=None if virtual else labels)  # PEFT's labels lack the virtual tokens
        logits = output.logits[:, -labels.shape[1] :]
        assert output.logits.shape[1] - labels.shape[1] in (0, virtual)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) if virtual else output.loss
        guesses, known = logits.argmax(-1), labels
        ours, theirs = [], []
        for guess, label in zip(guesses.tolist(), known.tolist(), strict=True):
            asked = [n for n, tag in enumerate(label) if tag != -100]
            ours.append([names[guess[n]] for n in asked])
            theirs.append([names[label[n]] for n in asked])
        scores = {name: getattr(seqeval, f"{name}_score")(theirs, ours) for name in ("f1", "precision", "recall")}
        return {"loss": loss.item(), "accuracy": seqeval.accuracy_score(theirs, ours), **scores}

    return want


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.task == "TOKEN_CLS"])
def test_words_have_classes(name: str, trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    out, virtual = trained(name), 3 * (name != "words")
    compare(name, out, word_scores(RUNS[name].model, virtual), capsys)
    names = {str(number): tag for number, tag in enumerate(sorted(set(KINDS_OF_WORDS)))}
    assert json.loads((out / "labels.json").read_text()) == {
        "id2label": names,
        "label2id": {tag: int(number) for number, tag in names.items()},
    }
    if not virtual:
        run_card(out)
        return
    turned = [{**row, "ner_tags": [len(NAMES) - 1 - tag for tag in row["ner_tags"]]} for row in NUMBERED]
    write_described(Path("turned.parquet"), turned, NAMES[::-1])
    found = [said_by_eval(capsys, "--adapter", out.name, "--data", file) for file in (file_of(name), "turned.parquet")]
    assert found[0] == found[1], "classes have other numbers there, and the same names"


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_names_of_classes_stand_in_the_schema(tmp_path: Path, ending: str) -> None:
    rows = [{"text": f"number {n}", "kind": n % 2} for n in range(4)]
    file = write_described(tmp_path / f"data.{ending}", rows, ["even", "odd", "neither"], "kind")
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "a", "kind": 1}))
    options = DataFileOptions(data=(str(file), str(plain)), columns=("label=kind",))
    loaded = load_records(options)
    assert loaded.class_names == ("even", "odd", "neither")
    assert [record.label for record in loaded.records] == [0, 1, 0, 1, 1]
    found = labels_of_texts(str(write_config(tmp_path)), loaded.records)
    assert named_by_data(found, loaded.class_names).id2label == {0: "even", 1: "odd", 2: "neither"}
    assert load_records(DataFileOptions(data=(str(plain),), columns=("label=kind",))).class_names == ()
    other = write_described(tmp_path / f"other.{ending}", rows, ["odd", "even"], "kind")
    with pytest.raises(
        ValueError, match="numbers the classes even, odd, neither, and .* numbers odd, even. Write both"
    ):
        load_records(DataFileOptions(data=(str(file), str(other)), columns=("label=kind",)))


def test_a_data_file_that_names_two_classes_alike() -> None:
    with pytest.raises(ValueError, match="the data names two classes a. Name each class once, or give --label-names"):
        named_by_data(HeadLabels({0: "LABEL_0", 1: "LABEL_1"}), ["a", "a"])


def write_config(folder: Path) -> Path:
    """A checkpoint without a head, of which the config alone is read."""
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    return folder


SCHEMAS: dict[str, tuple[bytes, dict[str, tuple[str, ...]] | str]] = {
    "another description": (b"[1]", {}),
    "no features": (b'{"info": {}}', {}),
    "a list as it was written before": (
        b'{"info": {"features": {"tags": [{"names": ["a"], "_type": "ClassLabel"}]}}}',
        {"tags": ("a",)},
    ),
    "no classes": (b'{"info": {"features": {"text": {"dtype": "string", "_type": "Value"}, "x": null}}}', {}),
    "names that are numbers": (b'{"info": {"features": {"label": {"names": [1], "_type": "ClassLabel"}}}}', {}),
    "no JSON": (b"{", "the description of columns in data.parquet .* is not JSON"),
    "no text": (b"\xff", "the description of columns in data.parquet .* is not JSON"),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_descriptions_of_columns(case: str) -> None:
    described, want = SCHEMAS[case]
    if isinstance(want, str):
        with pytest.raises(ValueError, match=want):
            class_names_of_schema({b"huggingface": described}, "data.parquet")
    else:
        assert class_names_of_schema({b"huggingface": described}, "data.parquet") == want
    assert class_names_of_schema(None, "data.parquet") == {}


@pytest.mark.parametrize(
    ("names", "known", "labels", "note"),
    [
        (("a", "b"), {0: "a", 1: "b"}, [0, (1, 0), 0.5], ""),
        (("a", "b"), {0: "LABEL_0", 1: "LABEL_1"}, [0, (1, 0), 0.5], ""),
        (
            ("a", "b"),
            {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"},
            [0, (1, 0), 0.5],
            "The data names 2 classes, and there are 3: its names are not used.",
        ),
        (("a", "b"), {0: "c", 1: "b", 2: "a"}, ["a", ("b", "a"), 0.5], ""),
        (("a", "b"), {0: "c", 1: "d"}, [0, (1, 0), 0.5], "The data has the classes a, b, and the model c, d: taken by"),
        (
            ("a",),
            {0: "c", 1: "a"},
            r"record 2 of a has the label 1, and that file names 1 classes \(a\). Remove the record",
            "",
        ),
    ],
)
def test_classes_of_other_numbers_are_found_by_name(
    names: tuple[str, ...], known: dict[int, str], labels: Any, note: str
) -> None:
    records = [Labelled("x", 0), Labelled("x", (1, 0)), Labelled("x", 0.5)]
    classes = (NamedClasses("a", names), NamedClasses("b", ()))
    loaded = Loaded([*records, Labelled("x", 1)], (3, 1), None, (), classes=classes)
    if isinstance(labels, str):
        with pytest.raises(ValueError, match=labels):
            by_names_of(loaded, known)
        return
    found = by_names_of(loaded, known)
    assert [record.label for record in found.records] == [*labels, 1], "b numbers classes without names"
    assert [said.startswith(note) for said in found.notes] == [True] * bool(note)


def test_entities_are_those_of_seqeval() -> None:
    labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    draws = np.random.default_rng(0)
    tags = ["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B"]
    for _ in range(500):
        text = draws.choice(tags, draws.integers(1, 12)).tolist()
        assert entities(text) == [(kind, int(first), int(last)) for kind, first, last in labeling.get_entities(text)]


def test_long_words_are_split_cut_or_left_out(bases: Path) -> None:
    tokenizer = tokenizer_of(str(bases / "bert"))
    words = tuple("say a number".split() * 6)
    records = [Tagged(words, tuple(range(len(words)))), Tagged(words[:2], (0, 1))]
    options = {"cutoff_len": 10, "id2label": dict(enumerate(map(str, range(18))))}
    split = encode_tags(records, tokenizer, long="split", **options)
    labels = [example.labels[example.labels >= 0].tolist() for example in split.examples]
    assert sum(labels[:-1], []) == list(range(18)) and labels[-1] == [0, 1] and split.shortened == 1
    assert split.records == (0,) * (len(labels) - 1) + (1,)
    assert all(example.input_ids[0] == 0 and example.input_ids[-1] == 1 for example in split.examples)
    for stride in (1, 3):  # as transformers shares tokens
        shared = encode_tags(records, tokenizer, long="split", stride=stride, **options)
        found = [example.labels[example.labels >= 0].tolist() for example in shared.examples]
        assert sum(found[:-1], []) == list(range(18)) and len(found) > len(labels)
        for one, other in zip(shared.examples[:-2], shared.examples[1:-1], strict=True):
            assert one.input_ids[-1 - stride : -1].tolist() == other.input_ids[1 : 1 + stride].tolist()
    for stride, long, said in (
        (-1, "split", "stride is -1. Give 0 or a number above"),
        (8, "split", "stride is 8, and a row has 8 tokens of a text. Give a number below that"),
        (1, "truncate", "--stride is for several rows of a text, and --long truncate keeps one. Give --long split"),
        (1, "drop", "--long drop leaves out what --stride reads in windows. Give one of them"),
    ):
        with pytest.raises(ValueError, match=said):
            encode_tags(records, tokenizer, long=long, stride=stride, **options)
    cut = encode_tags(records, tokenizer, long="truncate", **options)
    assert [len(example.input_ids) for example in cut.examples][0] == 10 and len(cut.examples) == 2
    left_out = encode_tags(records, tokenizer, long="drop", **options)
    assert len(left_out.examples) == 1 and left_out.too_long == 1 and left_out.records == (1,)
    with pytest.raises(ValueError, match="record 1 has the tag 'x', and the model's are"):
        encode_tags([Tagged(("a",), ("x",))], tokenizer, **options)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": ["a"], "ner_tags": [0, 1]}, "has 1 tokens and 2 ner_tags. Give one for each token"),
        ({"tokens": "[]", "tags": []}, "has tokens that are no list of words"),
        ({"tokens": ["a"], "tags": [0.5]}, "has tags that are no list of classes"),
        ({"text": "a", "labels": ["x", None]}, "has the labels ['x', None]. Give a list of the text's classes"),
    ],
)
def test_wrong_fields_of_labels_are_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        to_records([row], "here")


def test_windows_share_as_many_tokens_as_those_of_transformers(bases: Path) -> None:
    tokenizer = tokenizer_of(str(bases / "bert"))
    question, context = "which number", "say a number of " * 30
    for stride in (0, 5, 20):
        options = {"truncation": "only_second", "max_length": 50, "stride": stride, "return_overflowing_tokens": True}
        wanted = tokenizer(question, context, **options)["input_ids"]
        found = encode_spans([Question(question, context, ())], tokenizer, cutoff_len=50, stride=stride).examples
        assert [example.input_ids.tolist() for example in found] == wanted and len(wanted) > 2
    with pytest.raises(ValueError, match="--long drop leaves out what --stride reads in windows"):
        encode_spans([Question(question, context, ())], tokenizer, cutoff_len=50, stride=1, long="drop")


@pytest.mark.parametrize(
    ("labels", "names", "wanted"),
    [
        (HeadLabels({0: "LABEL_0", 1: "LABEL_1"}), ("O", "B-A", "I-A"), {0: "O", 1: "B-A", 2: "I-A"}),
        (HeadLabels({0: "LABEL_0", 1: "LABEL_1"}), ("O",), "has 1 names, and there are 2 classes. Name each"),
        (HeadLabels({0: "LABEL_0", 1: "LABEL_1"}), ("O", "O"), "has O twice. Name each class once"),
        (HeadLabels({0: "no", 1: "yes"}), ("O", "A"), "names classes that have numbers, and these are no, yes."),
        (
            HeadLabels({0: "LABEL_0", 1: "LABEL_1"}, is_held=True),
            ("O", "A", "B"),
            "has 3 names, and the checkpoint's head has 2 classes. Name these.",
        ),
        (HeadLabels({0: "LABEL_0"}, "regression"), ("O",), "is for classes, and numbers are predicted here"),
    ],
)
def test_names_are_given_to_classes_that_have_numbers(
    labels: HeadLabels, names: tuple[str, ...], wanted: dict[int, str] | str
) -> None:
    if isinstance(wanted, str):
        with pytest.raises(ValueError, match=wanted):
            with_names(labels, names)
    else:
        assert with_names(labels, names).id2label == wanted


Setting = tuple[str | None, list[str], int]  # problem_type, names of classes, rows
NUMBERS = [{"text": f"number {n}", "label": n % 2} for n in range(4)]
SENTENCE = [{"tokens": [str(n) for n in range(16)], "tags": [n % 2 for n in range(16)]}]
SPLIT = ("--cutoff-len", "10", "--long", "split")
SET_BY: dict[str, tuple[Rows, tuple[str, ...], tuple[str, ...], Setting]] = {  # data, words, words of the option
    "task": (NUMBERS, (), ("--task", "SEQ_CLS"), (None, ["LABEL_0", "LABEL_1"], 4)),
    "problem_type": (NUMBERS, ("--task", "SEQ_CLS"), ("--problem-type", "regression"), ("regression", ["LABEL_0"], 4)),
    "label_names": (NUMBERS, ("--task", "SEQ_CLS"), ("--label-names", "no", "yes"), (None, ["no", "yes"], 4)),
    "stride": (
        SENTENCE,
        ("--task", "TOKEN_CLS", *SPLIT),
        ("--stride", "3"),
        (None, ["LABEL_0", "LABEL_1"], 7),
    ),  # of 37 tokens
}


@pytest.mark.parametrize("option", SET_BY)
def test_finetune_sets_up_the_head_that_is_asked_for(
    option: str, bases: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, words, given, wanted = SET_BY[option]
    found: list[Setting] = []

    def stop(options: Any, task: Any, model: Any, data: Any, mesh: Any) -> Any:
        found.append((model.config.problem_type, [*id2label_of(model).values()], len(data.training)))
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_jax.cli.finetune.finetune.make_plan", stop)
    monkeypatch.chdir(bases)
    Path("set.json").write_text(json.dumps(rows))
    run = ["finetune", "--model", "bert", "--data", "set.json", "--output", "set", "--max-steps", "1", *words]
    main(run)
    assert main([*run, *given]) == 130, capsys.readouterr().err
    assert found[-1] == wanted and wanted not in found[:-1]


def span_answers(model: Any, rows: Rows) -> dict[str, float]:
    """What transformers computes of each window alone, and the answers of the highest logits of all pairs of tokens."""
    tokenizer, losses, exact, f1 = tokenizer_of("bert"), [], [], []
    some_are_none = any(not row["answers"]["text"] for row in ASKED)
    for row in rows:
        options = {"truncation": "only_second", "max_length": 60, "stride": 15, "return_overflowing_tokens": True}
        more = {"return_offsets_mapping": True, "return_token_type_ids": True}
        windows = tokenizer(row["question"], row["context"], **more, **options)
        assert (len(windows["input_ids"]) > 1) == (row is ASKED[3])
        found, none = [], []
        for number, ids in enumerate(windows["input_ids"]):
            places, parts = windows["offset_mapping"][number], windows.sequence_ids(number)
            inside = [n for n, part in enumerate(parts) if part == 1]
            start = end = 0  # the first token stands for no answer
            if row["answers"]["text"]:
                first = row["answers"]["answer_start"][0]
                last = first + len(row["answers"]["text"][0])
                starts = [n for n in inside if places[n][0] <= first < places[n][1]]
                ends = [n for n in inside if places[n][0] < last <= places[n][1]]
                if starts and ends:
                    start, end = starts[0], ends[0]
            types = windows["token_type_ids"][number]
            batch = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
            # Not `model` itself: PeftModelForQuestionAnswering takes token_type_ids and does not hand them on.
            output = model.base_model(**batch, start_positions=torch.tensor([start]), end_positions=torch.tensor([end]))
            losses.append(output.loss.item())
            one, other = output.start_logits[0], output.end_logits[0]
            none.append((one[0] + other[0]).item())
            for n in inside:
                for m in inside:
                    if n <= m < n + 30:
                        found.append(((one[n] + other[m]).item(), row["context"][places[n][0] : places[m][1]]))
        score, answer = max(found)
        answer = "" if some_are_none and min(none) > score else answer
        known = row["answers"]["text"] or [""]
        exact.append(max(normalized(answer) == normalized(text) for text in known))
        f1.append(max(word_f1(answer, text) for text in known))
    return {"loss": np.mean(losses), "exact_match": np.mean(exact), "f1": np.mean(f1)}


def test_spans_answer_questions(trained: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = trained("spans")
    compare("spans", out, span_answers, capsys)
    assert not (out / "labels.json").exists()
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "QUESTION_ANS"
    run_card(out)
    capsys.readouterr()
    assert (
        main(["preview", "--model", "bert", "--data", "spans.json", "--task", "QUESTION_ANS", "--examples", "1"]) == 0
    )
    assert "[[1800]]" in capsys.readouterr().out
    assert main(["generate", "--adapter", "spans", "say 3"]) == 2
    assert "spans tells spans of texts, and writes none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answer", "known", "f1"),
    [  # worked out by hand from SQuAD's evaluation script
        ("the Red house!", "a red house", 1.0),
        ("red house", "the house of Ada", 0.4),
        ("red red", "red", 2 / 3),
        ("", "red", 0.0),
        ("the", "", 1.0),
    ],
)
def test_scores_of_answers_are_those_of_squad(answer: str, known: str, f1: float) -> None:
    assert word_f1(answer, known) == pytest.approx(f1)


def test_squad_files_in_both_forms_are_the_same_records() -> None:
    answers = [{"text": "Ada", "answer_start": 0}]
    nested = {"context": "Ada wrote.", "qas": [{"id": "1", "question": "Who?", "answers": answers}]}
    flat = {"question": "Who?", "context": "Ada wrote.", "answers": {"text": ["Ada"], "answer_start": [0]}}
    found = to_records([{"version": "1.1", "data": [{"title": "t", "paragraphs": [nested]}]}], "here")
    assert found == to_records([flat], "here") == [Question("Who?", "Ada wrote.", (("Ada", 0),))]
    none = {**flat, "is_impossible": True}
    assert to_records([none], "here") == [Question("Who?", "Ada wrote.", ())]
    for said, count in (("True", 0), ("1", 0), ("False", 1), ("0", 1), ("", 1)):
        assert len(to_records([{**flat, "is_impossible": said}], "here")[0].answers) == count, said
    with pytest.raises(ValueError, match="has is_impossible='no'. Give true or false"):
        to_records([{**flat, "is_impossible": "no"}], "here")
    with pytest.raises(ValueError, match="has the answer 'Ada', which is not at character 4 of its context"):
        to_records([{**flat, "answers": {"text": ["Ada"], "answer_start": [4]}}], "here")


def test_a_preview_shows_numbers_of_outputs_where_a_text_has_as_many_tokens() -> None:
    example = Example(np.arange(3, dtype=np.int32), np.array([0, 1, 0], np.float32))
    tokenizer: Any = SimpleNamespace(decode=lambda ids, **_: "x")
    shown = _shown(example, tokenizer, {0: "a", 1: "b", 2: "c"})
    assert shown.label == "a=0, b=1, c=0"

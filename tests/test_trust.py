"""Folders that nobody vouches for: no code in them runs, no name in them leads out of them, no character rules the
terminal."""

import ast
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from peft_jax.interop import save_adapter
from test_house import FILES, ROOT

import peft_jax as pj
from peft_jax.cli.generate.printer import Printer
from peft_jax.cli.main import main
from peft_jax.cli.shared.terminal import Escaping, escaped_output, verbatim
from peft_jax.prompts.tokenizer import read_tokenizer

CHATS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
RECORDS = [{"instruction": "Say a.", "output": "a"}] * 4
TRAIN = "--data data.json --max-steps 1 --batch-size 2 --cutoff-len 64 --r 2 --target-modules q_proj".split()


class Planted:
    """Code that leaves a mark where it runs, in every form in which a folder can hold some.

    Args:
        mark: The file that it makes.
    """

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.source = (
            f"open({str(mark)!r}, 'w').close()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
            "class Tokenizer(PreTrainedTokenizerFast): pass\n"
            "class Config(LlamaConfig): model_type = 'planted'\n"
            "class Model(LlamaForCausalLM): config_class = Config\n"
        )
        reach = "cycler.__init__.__globals__.__builtins__.open"
        self.template = "{{ " + f"{reach}({str(mark)!r}, 'w').close()" + " }}"

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)

    def ran(self) -> bool:
        """Whether it ran; forgets it."""
        found = self.mark.exists()
        self.mark.unlink(missing_ok=True)
        return found

    def into(self, folder: Path, *, template: bool = True) -> None:
        """Write it wherever some program would look for it, but in what names the tokenizer's class."""
        for name in ("planted.py", "tokenization.py", "modeling.py", "folder.py", "__init__.py", "setup.py"):
            (folder / name).write_text(self.source)
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(self.source)
        (folder / "generation_config.json").write_text(json.dumps({"custom_generate": "generate", **AUTO_MAP}))
        if template:
            (folder / "chat_template.jinja").write_text(self.template)
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
            (folder / name).write_bytes(pickle.dumps(self))
        np.save(folder / "adapter_model.npy", np.array([self], object), allow_pickle=True)
        if (folder / "config.json").exists():
            edit(folder / "config.json", **AUTO_MAP)


AUTO_MAP = {
    "auto_map": {
        "AutoConfig": "planted.Config",
        "AutoModel": "planted.Model",
        "AutoModelForCausalLM": "planted.Model",
        "AutoProcessor": "planted.Tokenizer",
        "AutoTokenizer": [None, "planted.Tokenizer"],
    }
}

# What tokenizer_config.json and config.json say, and whether a tokenizer is found in spite of it.
ASKING: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "a class of its own": ({**AUTO_MAP, "tokenizer_class": "Mine"}, {"model_type": "planted"}, True),
    "no class": ({**AUTO_MAP, "tokenizer_class": None}, {"model_type": "planted"}, True),
    "a class of its own, of a list": (
        {"auto_map": [None, "planted.Tokenizer"], "tokenizer_class": "Mine"},
        {"model_type": "planted"},
        True,
    ),
    "AutoProcessor": ({**AUTO_MAP, "tokenizer_class": "AutoProcessor"}, {}, True),
    "AutoProcessorFast": ({**AUTO_MAP, "tokenizer_class": "AutoProcessorFast"}, {}, True),
    "AutoModelForCausalLMFast": ({"tokenizer_class": "AutoModelForCausalLMFast"}, {"model_type": "planted"}, True),
    "AutoProcessor in config.json": ({"tokenizer_class": None}, {"tokenizer_class": "AutoProcessor"}, True),
    "AutoTokenizer": ({**AUTO_MAP, "tokenizer_class": "AutoTokenizer"}, {"model_type": "planted"}, True),
    "AutoModelForCausalLM": ({"tokenizer_class": "AutoModelForCausalLM"}, {"model_type": "planted"}, True),
    "RagTokenizer": ({"tokenizer_class": "RagTokenizer"}, {}, True),
    "a model type whose tokenizer asks anew": ({"tokenizer_class": None}, {"model_type": "rag"}, True),
    "a class that there is": ({**AUTO_MAP, "tokenizer_class": "PreTrainedTokenizerFast"}, {}, False),
}


def edit(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    found = {**json.loads(file.read_text()), **fields} if file.exists() else fields
    file.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.fixture(scope="module")
def clean(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an adapter that has the tokenizer beside it, and data."""
    folder = tmp_path_factory.mktemp("clean")
    shutil.copytree(tiny_llama, folder / "model")
    model = pj.AutoModelForCausalLM.from_pretrained(tiny_llama)
    config = pj.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", base_model_name_or_path="model", init_lora_weights=False
    )
    pj.get_peft_model(model, config).save_pretrained(folder / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, folder / "adapter" / name)
    (folder / "data.json").write_text(json.dumps(RECORDS))
    (folder / "chats.json").write_text(json.dumps(CHATS))
    return folder


@pytest.fixture
def workplace(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(clean, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def planted(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planted]:
    """Code that must not have run, nor been asked about, when the test is over; whoever asks hears yes."""
    asked = list[str]()

    def yes(prompt: str = "") -> str:
        asked.append(prompt)
        return "yes"

    monkeypatch.setattr("builtins.input", yes)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # where transformers puts that folder
    code = Planted(tmp_path / "ran")
    yield code
    assert not code.ran()
    assert asked == []


def test_what_is_planted_runs_where_it_is_trusted(planted: Planted) -> None:
    import jinja2
    from transformers import AutoTokenizer

    planted.into(Path("model"))
    edit(Path("model/tokenizer_config.json"), **AUTO_MAP)
    edit(Path("model/config.json"), model_type="planted")
    AutoTokenizer.from_pretrained("model", trust_remote_code=True)
    assert planted.ran()
    jinja2.Environment().from_string(Path("model/chat_template.jinja").read_text()).render()
    assert planted.ran()
    pickle.loads(Path("model/pytorch_model.bin").read_bytes())
    assert planted.ran()
    np.load("model/adapter_model.npy", allow_pickle=True)
    assert planted.ran()


@pytest.mark.parametrize("case", ASKING)
def test_no_tokenizer_brings_its_code(case: str, planted: Planted, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer_config, config, is_refused = ASKING[case]
    planted.into(Path("adapter"), template=False)
    for name in ("question_encoder_tokenizer", "generator_tokenizer"):  # where a RagTokenizer looks
        shutil.copytree("adapter", Path("adapter", name))
        edit(Path("adapter", name, "tokenizer_config.json"), **AUTO_MAP)
    edit(Path("adapter/tokenizer_config.json"), **tokenizer_config)
    edit(Path("adapter/config.json"), **{"model_type": "llama", **AUTO_MAP, **config})
    assert main(["generate", "--adapter", "adapter", "--max-new-tokens", "1", "a"]) == (2 if is_refused else 0)
    said = capsys.readouterr().err
    if is_refused:
        assert "no tokenizer can be read from adapter" in said and len(said.splitlines()) == 1
        assert "code" in said or "is not a class of tokenizers" in said


def test_a_tokenizer_that_cannot_be_read_says_why(planted: Planted) -> None:
    edit(Path("adapter/tokenizer_config.json"), tokenizer_class="AutoModel")
    with pytest.raises(ValueError, match=r"from adapter \(AutoModel is not a class of tokenizers\)\. Put tokenizer"):
        read_tokenizer("adapter")
    Path("model/tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"from model\. Put tokenizer.json and tokenizer_config.json beside"):
        read_tokenizer("model")


def test_nothing_else_of_an_adapter_or_a_base_runs(planted: Planted, capsys: pytest.CaptureFixture[str]) -> None:
    adapted, base, short = ["--adapter", "adapter"], ["--model", "model"], ["--prompt-template", "short"]
    commands: list[tuple[int, list[str]]] = [
        (0, ["inspect", "adapter", *base]),
        (0, ["generate", *adapted, "--max-new-tokens", "1", "--ignore-generation-config", *short, "a"]),
        (2, ["generate", *adapted, "--prompt-template", "chat", "a"]),
        (2, ["generate", *base, "--prompt-template", "chat", "a"]),
        (0, ["eval", *adapted, "--data", "data.json", *short]),
        (0, ["merge", *adapted, "--output", "merged"]),
        (0, ["finetune", *base, *TRAIN, *short, "--output", "out"]),
        (2, ["finetune", *base, *TRAIN, "--data", "chats.json", "--output", "other"]),
    ]
    for folder in ("adapter", "model"):
        planted.into(Path(folder))
    for code, words in commands:
        assert main(words) == code, (words, capsys.readouterr().err)
        assert not planted.ran(), words
    resume = ["finetune", *base, *TRAIN, *short, "--output", "out", "--resume"]
    for folder in ("out", "out/checkpoints"):
        planted.into(Path(folder))
    assert main(resume) == 0, capsys.readouterr().err
    for folder in ("out/checkpoints/1", "out/checkpoints/1/state"):
        planted.into(Path(folder))
    assert main(resume) == 2 and "its files are not those" in capsys.readouterr().err
    assert not planted.ran()


def test_pickled_weights_are_not_read(planted: Planted, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, file in (("adapter", "adapter_model.safetensors"), ("model", "model.safetensors")):
        planted.into(Path(folder))
        Path(folder, file).unlink()
    assert main(["inspect", "adapter"]) == 0
    assert "a pickled file, which is not read" in capsys.readouterr().out
    for words in (["generate", "--adapter", "adapter", "a"], ["generate", "--model", "model", "a"]):
        assert main([*words, "--prompt-template", "short"]) == 2
    assert "load it in PyTorch and save it anew" in capsys.readouterr().err
    shutil.copy("adapter/adapter_model.npy", "adapter/adapter_model.safetensors")
    assert main(["generate", "--adapter", "adapter", "--prompt-template", "short", "a"]) == 2


def test_the_tokenizer_of_a_prompts_config_brings_no_code(planted: Planted) -> None:
    model = pj.AutoModelForCausalLM.from_pretrained("model")
    planted.into(Path("adapter"))
    edit(Path("adapter/tokenizer_config.json"), tokenizer_class="Mine", **AUTO_MAP)
    edit(Path("adapter/config.json"), model_type="planted", **AUTO_MAP)
    config = pj.PromptTuningConfig(
        num_virtual_tokens=2,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a",
        tokenizer_name_or_path="adapter",
        tokenizer_kwargs={"trust_remote_code": True},
    )
    with pytest.raises(ValueError, match="without running the code that its auto_map names"):
        pj.get_peft_model(model, config)


def from_transformers(tree: ast.AST) -> set[str]:
    """The names that a file imports from transformers, and the package's own."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
    return {"transformers", *(alias.asname or alias.name for node in nodes for alias in node.names)}


def readers(file: Path) -> Iterator[ast.Call]:
    """The calls of a file that let transformers or datasets read a folder."""
    tree = ast.parse(file.read_text())
    theirs = from_transformers(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value).split(".")[0]
            if node.func.attr == "load_dataset" or (owner in theirs and node.func.attr == "from_pretrained"):
                yield node


def test_every_reader_of_transformers_is_told_to_run_no_code() -> None:
    files = [*FILES, *(ROOT / "examples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    found = {f"{file.name}:{call.lineno}": call for file in files for call in readers(file)}
    assert len(found) >= 6
    for place, call in found.items():
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", place


OUTSIDE = ["../outside.safetensors", "/outside.safetensors", "sub/../../outside.safetensors", "..\\outside.safetensors"]
OUTSIDE += ["C:outside.safetensors", "..", "", ".", "a\0b", "./model.safetensors", "sub//model.safetensors"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_names_nothing_outside_its_folder(name: str, workplace: Path) -> None:
    outside = workplace / "outside.safetensors"
    shutil.move("model/model.safetensors", outside)
    weights = pj.interop.checkpoint.open_tensors
    for place in (name, str(outside)):
        Path("model/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
        with pytest.raises(ValueError, match="which are not below its folder"):
            weights("model")


def test_shards_may_be_links_and_lie_in_folders_below(workplace: Path) -> None:
    Path("model/sub").mkdir()
    shutil.move("model/model.safetensors", "blob")
    Path("model/sub/one.safetensors").symlink_to(Path("blob").absolute())  # as in the hub's cache
    index = {"weight_map": {"lm_head.weight": "sub/one.safetensors"}}
    Path("model/model.safetensors.index.json").write_text(json.dumps(index))
    assert list(pj.interop.checkpoint.open_tensors("model")) == ["lm_head.weight"]


def test_a_tokenizers_files_are_below_its_folder(workplace: Path) -> None:
    shutil.copy("model/tokenizer.json", "tokenizer.4.0.0.json")
    edit(Path("model/tokenizer_config.json"), fast_tokenizer_files=["../tokenizer.4.0.0.json"])
    with pytest.raises(ValueError, match="which is not below the folder"):
        read_tokenizer("model")


NAMES = ["../x", "..", ".", "", "/x", "a/b", "a/", "..\\x", "C:x", "a\0b", "a\x1b[31m", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapters_name_is_that_of_a_folder(name: str, tmp_path: Path) -> None:
    base = {"q": {"kernel": jnp.ones((4, 4))}}
    config = pj.LoraConfig(r=2, target_modules=["q"])
    inside = tmp_path / "inside"
    good = pj.apply_lora(base, config, adapter_name="v1.0-good name é")
    save_adapter(good, inside, adapter_name="v1.0-good name é")
    assert [file.name for file in inside.iterdir()] == ["v1.0-good name é"]
    ways: list[Callable[[], Any]] = [
        lambda: pj.apply_lora(base, config, adapter_name=name),
        lambda: pj.interop.load_adapter(base, inside / "v1.0-good name é", adapter_name=name),
        lambda: pj.add_weighted_adapter(good, ["v1.0-good name é"], [1.0], name),
    ]
    for way in ways:
        with pytest.raises(ValueError, match="cannot be named") as raised:
            way()
        assert "\n" not in str(raised.value) and "\x1b" not in str(raised.value)
    assert [file.name for file in tmp_path.rglob("*.safetensors")] == ["adapter_model.safetensors"]


def test_a_prompts_name_is_that_of_a_folder(workplace: Path) -> None:
    model = pj.AutoModelForCausalLM.from_pretrained("model")
    with pytest.raises(ValueError, match="cannot be named"):
        pj.get_peft_model(model, pj.PromptTuningConfig(num_virtual_tokens=2), adapter_name="../x")


BAD = "\x1b[31m\x07\x9b2J\x7f\r\u202e\u2066\u200f\u2028"  # colours, rings, clears, overwrites, turns the text round


def controls(text: str) -> set[str]:
    """The characters of a text that a terminal obeys."""
    return set(text) & set(BAD) - set("[312Jm")


def test_names_and_fields_are_printed_escaped(workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.move("model", f"model{BAD}")
    edit(Path("adapter/adapter_config.json"), peft_version=BAD, revision=BAD)
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file({**tensors, f"{BAD}\nTaken by\n  vLLM  yes": np.ones(1)}, "adapter/adapter_model.safetensors")
    edit(Path("adapter/config.json"), model_type=BAD)
    shutil.move("adapter", f"adapter{BAD}")
    for words in (
        ["inspect", f"adapter{BAD}", "--model", f"model{BAD}"],
        ["inspect", f"adapter{BAD}", "--model", f"model{BAD}", "--json"],
        ["inspect", f"none{BAD}"],
        ["generate", "--adapter", f"adapter{BAD}", "a"],
        ["generate", "--model", f"none{BAD}", "a"],
        ["merge", "--adapter", f"adapter{BAD}", "--output", f"merged{BAD}"],
        ["finetune", "--model", f"model{BAD}", "--output", f"out{BAD}", "--data", f"data{BAD}.json"],
        [f"--{BAD}"],
    ):
        main(words)
        said = capfd.readouterr()
        assert not controls(said.err) - set("\r") and not controls(said.out), words
        assert "\\x07" in said.out + said.err or "\\u0007" in said.out, words
        assert "\n  vLLM  yes" not in said.out
        if "--json" in words:
            assert json.loads(said.out)["config"]["revision"] == BAD


def test_what_is_logged_is_escaped_too(capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    handler = logging.StreamHandler()
    logger = logging.getLogger("peft_jax_tests")
    logger.addHandler(handler)
    stream = handler.stream
    with escaped_output():
        logger.warning(BAD)
        print(BAD)
        print(BAD, file=sys.stderr)
    logger.removeHandler(handler)
    said = capfd.readouterr()
    assert not controls(said.out) and controls(said.err) == {"\r"}  # which progress bars need
    assert said.err.count("\\x1b[31m") == 2
    assert handler.stream is stream


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Bytes:
    """A tokenizer whose tokens are code points."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_a_generated_text_is_escaped_on_a_terminal_alone(file: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", file)
    text = f"a\tb\n\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-3}é{BAD}"
    with escaped_output():
        printer = Printer(Bytes(), verbatim())
        for character in text:
            printer.put(np.array([ord(character)]))
        printer.end()
    spelled = r"\x1b[31m\x07\x9b2J\u007f\x0d\u202e\u2066\u200f\u2028"
    assert file.getvalue() == (text.replace(BAD, spelled) if file.isatty() else text) + "\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_generate_heeds_where_its_text_goes(
    is_terminal: bool, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr("peft_jax.cli.generate.generate.text_of", lambda tokens, tokenizer: f"said {BAD}")
    monkeypatch.setattr("peft_jax.cli.generate.printer.text_of", lambda tokens, tokenizer: f"said {BAD}")
    for prompts in (["a"], [f"a{BAD}", "b"]):
        assert main(["generate", "--model", "model", "--max-new-tokens", "1", *prompts]) == 0
        assert (f"said {BAD}" in file.getvalue()) is not is_terminal
        assert ("said \\x1b[31m" in file.getvalue()) is is_terminal
    assert "[1] a\\x1b[31m" in file.getvalue(), "a prompt is not what was asked for"


def test_bytes_that_are_no_text_are_escaped() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    print("caf\udce9", file=Escaping(file), flush=True)
    assert file.buffer.getvalue() == b"caf\\udce9\n"  # type: ignore[attr-defined]


def test_a_wrong_option_is_printed_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--wr\x1b[31mong"]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[31m" in said and "\x1b" not in said

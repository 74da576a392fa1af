"""What is fuzzed: sound folders of each kind, and what reads them."""

import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import ARCHITECTURES
from tokenizers import Tokenizer, models, pre_tokenizers

import peft_jax as pj
from peft_jax.cli.generate.prompt_input import read_prompts
from peft_jax.cli.main import main
from peft_jax.cli.shared.task import TASKS, RowOptions
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.models.generation.generation_config import resolve
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.registry import family_of, read_architecture
from peft_jax.models.weights_io import read_generation_config, read_model, save_model
from peft_jax.prompts.tokenizer import read_tokenizer
from peft_jax.train import load_template, read_data, start
from peft_jax.train.metrics import MetricsLog, read_metrics
from peft_jax.train.run_state import Checkpoints

TRUNK = "llama"
GENERATION = {"do_sample": True, "temperature": 0.6, "top_k": 5, "top_p": 0.9, "eos_token_id": [1, 2], "max_length": 40}
RECORDS: dict[str, list[dict[str, Any]]] = {
    "alpaca.json": [{"instruction": "Say a.", "input": "b", "output": "a"}, {"instruction": "Say b.", "output": "b"}],
    "completions.jsonl": [{"prompt": "1, 2,", "completion": " 3"}, {"prompt": "a", "completion": "b"}],
    "chats.jsonl": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}],
    "labels.json": [{"text": "good", "label": "yes"}, {"text": "bad", "label": "no", "text_pair": "x"}],
}
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}</s>"
    "{% else %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endif %}{% endfor %}"
)


class Subject(NamedTuple):
    """A kind of folder.

    Attributes:
        make: Writes sound folders below a folder and returns them.
        read: Reads one as users do, and returns what was accepted, or None.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], Any]


def zeros(config: Any) -> Any:
    """Parameters of an architecture; their values do not matter here."""
    shapes = jax.eval_shape(lambda key: family_of(config).init_params(config, key), jax.random.key(0))
    dice = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(dice.normal(0, 0.3, leaf.shape), leaf.dtype), shapes)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of letters."""
    from transformers import PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate("<s> </s> a b c 1 2 3 , . : ?".split())}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT)
    fast.save_pretrained(folder)


def write_base(folder: Path, kind: str) -> Path:
    """A tiny checkpoint of an architecture, with tokenizer and generation config."""
    from transformers import AutoConfig

    row = ARCHITECTURES[kind]
    model_type = next(iter(row.model_types))
    hf = AutoConfig.for_model(model_type, **{**row.sizes, **row.model_types[model_type]}).to_dict()
    config = read_architecture({**hf, "model_type": model_type})
    save_model(zeros(config), config, folder, generation_config=GENERATION)
    write_tokenizer(folder)
    return folder


def make_bases(folder: Path, kinds: tuple[str, ...] = (TRUNK, "gpt2", "t5", "gemma3", "bert")) -> list[Path]:
    """Checkpoints of some architectures."""
    return [write_base(folder / kind, kind) for kind in kinds if kind in ARCHITECTURES]


def read_base(folder: Path) -> Any:
    """Read weights, tokenizer and generation config, and trace the model."""
    tokenizer_error = None
    try:
        read_tokenizer(folder)
    except ValueError as error:
        tokenizer_error = error
    found = read_model(folder)
    options = {"eos_token_id": found.config.eos_token_id, "pad_token_id": found.config.pad_token_id}
    resolve(GenerateOptions(), read_generation_config(folder), length=2, positions=found.config.room, **options)
    ids = jnp.ones((1, 2), jnp.int32)
    more = {"decoder_input_ids": ids} if found.config.task_type == "SEQ_2_SEQ_LM" else {}
    inputs = ForwardInputs(input_ids=ids, **more)
    jax.eval_shape(lambda params: family_of(found.config).apply(found.config, params, inputs), found.params)
    if tokenizer_error is not None:
        raise tokenizer_error
    return found


ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: pj.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 3},
        alpha_pattern={"v_proj": 1},
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    ),
    "saved": lambda: pj.LoraConfig(
        target_modules=".*down_proj",
        r=1,
        use_rslora=True,
        modules_to_save=["lm_head"],
        layers_to_transform=None,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    ),
    "dora": lambda: pj.LoraConfig(r=2, target_modules=["o_proj"], use_dora=True, init_lora_weights=False),
    "ia3": lambda: pj.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: pj.LoHaConfig(r=2, alpha=3, target_modules=["q_proj"], init_weights=False),
    "oft": lambda: pj.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj"], init_weights=False),
    "prompt": lambda: pj.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: pj.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
}


class Trunk:
    """The base that adapters are put on, read once."""

    folder: Path
    model: Any


def make_adapters(folder: Path) -> list[Path]:
    """Adapters of several methods for one base."""
    Trunk.folder = write_base(folder / "base", TRUNK)
    Trunk.model = pj.AutoModelForCausalLM.from_pretrained(Trunk.folder)
    folders = []
    for name, make in ADAPTERS.items():
        config = make().replace(base_model_name_or_path=str(Trunk.folder))
        pj.get_peft_model(Trunk.model, config).save_pretrained(folder / name)
        folders.append(folder / name)
    return folders


def read_adapter(folder: Path) -> Any:
    """Describe an adapter by the command, and put it on the base."""
    run_command("inspect", str(folder), "--model", str(Trunk.folder))
    run_command("inspect", str(folder), "--json")
    return pj.PeftModel.from_pretrained(Trunk.model, folder)


def run_command(*words: str) -> None:
    """Run a command in this process: it ends by 0, or by 2 and one line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(words)
    lines = said.getvalue().splitlines()
    errors = [line for line in lines if line.startswith("peft-jax: error:")]
    if code not in (0, 2) or (code == 2) != (len(errors) == 1) or len(said.getvalue()) > 4000:
        raise AssertionError(f"{words[0]} ended by {code} and said {said.getvalue()[:500]!r}")


def make_data(folder: Path) -> list[Path]:
    """A folder of data files, a template and prompts."""
    data = folder / "data"
    data.mkdir(parents=True)
    for name, records in RECORDS.items():
        rows = [json.dumps(record) for record in records]
        text = "\n".join(rows) if name.endswith("jsonl") else json.dumps(records)
        (data / name).write_text(text)
    (data / "template.json").write_text(
        json.dumps({"prompt_input": "{instruction} {input}:", "prompt_no_input": "{instruction}:", "description": "x"})
    )
    (data / "prompts.json").write_text(
        json.dumps(["a", {"instruction": "b"}, {"prompt": "c"}, *RECORDS["chats.jsonl"]])
    )
    write_tokenizer(folder / "tokenizer")
    Letters.tokenizer = read_tokenizer(folder / "tokenizer")
    return [data]


class Letters:
    """The tokenizer of the data, read once."""

    tokenizer: Any


def read_all_data(folder: Path) -> Any:
    """Read and encode each file of a folder; the last error is raised when all are read."""
    errors: list[Exception] = []

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:
            errors.append(error)
            return None

    template = attempt(lambda: load_template(folder / "template.json")) or load_template("short")
    attempt(lambda: read_prompts([], folder / "prompts.json", io.StringIO()))
    layout = RowOptions(64, template)
    for name in RECORDS:
        records = attempt(lambda name=name: read_data(folder / name))
        if records and name != "labels.json":
            attempt(lambda records=records: TASKS["CAUSAL_LM"].encode(records, Letters.tokenizer, None, layout))
    for error in errors:
        check(error)
    if errors:
        raise errors[-1]
    return folder


def make_runs(folder: Path) -> list[Path]:
    """The folder of a run: checkpoints and metrics."""
    run = folder / "run"
    state, _ = start(_small(), optax.adam(0.1), seed=0)
    Checkpoints(run / "checkpoints", keep=2).save(state, {"data": "a.json", "options": {"r": 1}})
    with MetricsLog(run / "metrics.jsonl") as log:
        for step in range(4):
            log.write({"step": step, "loss": 2.5, "grad_norm": 1.0})
    Run.state, Run.found = state, Checkpoints(run / "checkpoints", keep=2).restore(state)
    return [run]


class Run:
    """The state of the run, and as it is restored from a sound folder."""

    state: Any
    found: Any


def _small() -> Any:
    return pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(r=1, target_modules=["q"]))


def read_run(folder: Path) -> Any:
    """Restore a run: what is accepted is what was saved."""
    error = None
    try:
        read_metrics(folder / "metrics.jsonl")
    except (ValueError, OSError) as found:
        check(found)
        error = found
    state, notes = Checkpoints(folder / "checkpoints", keep=2).restore(Run.state)
    old, old_notes = Run.found
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), state.trainable, old.trainable)
    if notes != old_notes or not all(jax.tree.leaves(same)):
        raise AssertionError("a damaged checkpoint was restored with other values")
    if error is not None:
        raise error
    return state


def check(error: BaseException) -> None:
    """Raise AssertionError unless an error is the project's own, short and of one line.

    It is raised by a line of the project, so that neither an exception of Python's nor of a library comes through.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = last.tb_frame.f_code.co_filename if last is not None else ""
    own = "/peft_jax/" in place or "/interop/" in place
    text = str(error)
    is_kind = isinstance(error, ValueError | OSError) and not isinstance(error, UnicodeError)
    if not own or not is_kind or not text or len(text) > 2000 or len(text.splitlines()) > 1:
        raise AssertionError(f"{type(error).__name__} from {place}: {text[:300]}") from error


SUBJECTS = {
    "adapter": Subject(make_adapters, read_adapter),
    "base": Subject(make_bases, read_base),
    "data": Subject(make_data, read_all_data),
    "run": Subject(make_runs, read_run),
}


def one_of(folders: list[Path], dice: random.Random) -> Path:
    """One of the sound folders."""
    return dice.choice(folders)

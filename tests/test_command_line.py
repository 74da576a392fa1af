"""The command line's help, flags, aliases and errors, and that none of them waits for JAX."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from peft_jax.cli.finetune.options import AdapterOptions, DataOptions, ModelOptions, TrainingOptions
from peft_jax.cli.main import COMMANDS, main, parse
from peft_jax.cli.shared.command_line import Parameter, option_groups
from peft_jax.cli.shared.task import TASKS
from peft_jax.methods.base import names
from peft_jax.methods.lora.initializers.table import from_data
from peft_jax.train.data.template import TEMPLATES
from peft_jax.train.optimizer import OPTIMIZERS, SCHEDULES

NEEDED = {
    "finetune": ["--model", "m", "--data", "d", "--output", "o"],
    "preview": ["--model", "m", "--data", "d"],
    "generate": [],
    "eval": ["--data", "d"],
    "merge": ["--adapter", "a", "--output", "o"],
    "inspect": ["folder"],
    "demo": [],
}


def parameters(command: str) -> dict[str, Parameter]:
    groups = option_groups(COMMANDS[command])
    return {parameter.name: parameter for _, group in groups for parameter in group}


def flat(options: Any) -> dict[str, Any]:
    """The value of each option, those in groups too."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        found |= flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return found


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code
    out, err = capsys.readouterr()
    assert not err
    return out


# ---------------------------------------------------------------- help

PRINT_ALL_HELP = """
import sys
from peft_jax.cli.main import COMMANDS, main

for words in (["--help"], *([command, "--help"] for command in COMMANDS)):
    try:
        main(words)
    except SystemExit:
        pass
assert main(["finetune", "--modle", "x"]) == 2
heavy = {"jax", "flax", "transformers", "orbax", "optax", "grain", "matplotlib", "numpy", "safetensors"}
print("imported:", sorted(heavy & sys.modules.keys()))
"""


def test_help_and_errors_import_nothing_that_takes_long() -> None:
    run = subprocess.run([sys.executable, "-c", PRINT_ALL_HELP], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "imported: []"
    assert run.stdout.count("usage: ") == 1 + len(COMMANDS)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_prose_in_the_terminals_width(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = page(capsys, command, "--help")
    assert max(map(len, text.splitlines())) <= columns
    for raw in ("None", "False", "MISSING", "<", "PosixPath"):
        assert raw not in text
    assert not re.search(r"[-_/]$", text, flags=re.MULTILINE), "a flag is broken at a hyphen"
    # A line of prose is broken only where the next word would not fit.
    for line, after in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if line.startswith(" " * 26) and after.startswith(" " * 26):
            assert len(f"{line} {after.split()[0]}") > columns - 2, f"broken too early: {line}"
    prose = " ".join(text.split())
    for parameter in parameters(command).values():
        assert parameter.help and parameter.help in prose
        assert all(flag in text for flag in (*parameter.flags, *parameter.option.presets))


def test_help_is_in_named_groups(capsys: pytest.CaptureFixture[str]) -> None:
    def titles(command: str) -> list[str]:
        return re.findall(r"^(\w+):$", page(capsys, command, "--help"), flags=re.MULTILINE)

    assert titles("finetune") == ["Model", "Adapter", "Data", "Training", "Devices", "Compilation", "Output", "Help"]
    assert titles("generate") == ["Prompts", "Model", "Decoding", "Compilation", "Output", "Help"]
    assert titles("eval") == ["Model", "Compilation", "Evaluation", "Help"]


def test_help_names_defaults_and_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(page(capsys, "finetune", "--help").split())
    assert text.startswith("usage: peft-jax finetune --model MODEL --data DATA --output PATH [OPTIONS]")
    assert "Peak of the schedule; by default what suits the method, which the run says: 3e-4 for LORA" in text
    assert "in docs/models.md. (required)" in text
    assert "Decoupled weight decay of the adapter. (default: 0)" in text
    assert (
        "Recompute each layer in the backward pass instead of keeping its activations: less memory, more time. " in text
    )
    assert "usage: peft-jax generate [OPTIONS] [PROMPT ...]" in page(capsys, "generate", "--help")
    overview = " ".join(page(capsys, "--help").split())
    assert all(f"{name} {' '.join(str(command.__doc__).split())}" in overview for name, command in COMMANDS.items())


# ---------------------------------------------------------------- what the options say is what the package has


def choices(group: type, field: str) -> set[str]:
    """The strings in an option's type."""
    hint, found = get_type_hints(group)[field], set()
    for part in (hint, *get_args(hint)):
        found |= {value for value in get_args(part) if isinstance(value, str)}
    return found


def test_options_have_the_names_that_the_package_has() -> None:
    assert choices(ModelOptions, "task") == set(TASKS)
    assert choices(TrainingOptions, "optimizer") == set(OPTIMIZERS)
    assert choices(TrainingOptions, "lr_scheduler") == set(SCHEDULES)
    found = parameters("finetune")
    methods = found["peft"].help.partition("(LORA by default): ")[2].removesuffix(".")
    assert re.split(", | or ", methods) == names()
    assert "in docs/models.md" in found["model"].help  # which a house rule compares with the registry
    *first, last = from_data()
    assert f"init_lora_weights is {', '.join(first)} or {last}" in found["start_batches"].help
    for command in ("finetune", "generate", "eval"):
        assert f"{', '.join(TEMPLATES)}, or a JSON file" in parameters(command)["prompt_template"].help
    assert DataOptions(data=("d",)).prompt_template is None
    assert AdapterOptions() == parse(["finetune", *NEEDED["finetune"]]).adapter  # type: ignore[union-attr]


# ---------------------------------------------------------------- flags


def typed(parameter: Parameter) -> tuple[list[str], Any]:
    """Words for an option's value, and that value; none that is a default."""
    if parameter.type is bool:
        return [], True
    if parameter.choices:
        return [parameter.choices[-1]], parameter.choices[-1]
    if parameter.option.repeatable:
        return ["one"], ("one",)
    if parameter.type is tuple:
        return ["one", "two"], ("one", "two")
    return {int: (["12"], 12), float: (["1.5e-3"], 0.0015), str: (["text"], "text"), Path: (["a/b"], Path("a/b"))}[
        parameter.type
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_sets_its_option_and_no_other(command: str) -> None:
    plain = flat(parse([command, *NEEDED[command]]))
    for parameter in parameters(command).values():
        if parameter.name == "config":  # its file is read at once: tests/test_option_file.py
            continue
        words, value = typed(parameter)
        if parameter.option.repeatable and parameter.flags[0] in NEEDED[command]:
            value = (*plain[parameter.name], *value)
        for flag in parameter.flags:
            spellings = {flag, f"--{flag[2:].replace('-', '_')}"}
            for spelling in spellings:
                changed = flat(parse([command, *NEEDED[command], spelling, *words]))
                assert changed == {**plain, parameter.name: value}, spelling
                assert type(changed[parameter.name]) is type(value)
                if len(words) == 1:
                    assert flat(parse([command, *NEEDED[command], f"{spelling}={words[0]}"])) == changed
        for preset, value in parameter.option.presets.items():
            changed = flat(parse([command, *NEEDED[command], preset]))
            assert changed == {**plain, parameter.name: value}
            assert flat(parse([command, *NEEDED[command], preset, parameter.flags[0], value])) == changed
        if parameter.optional:
            flag = parameter.flags[0]
            if parameter.type is not tuple and parameter.default is None:
                assert flat(parse([command, *NEEDED[command], flag, "None"])) == plain


ALIASES = {
    "learning_rate": "--lr",
    "r": "--lora-r --lora_r --rank --lora-rank",
    "epochs": "--num-epochs --num_train_epochs",
    "target_modules": "--lora-target-modules",
    "model": "--base-model --model-name-or-path",
    "data": "--data-path --dataset-name",
    "output": "--output-dir",
    "val_size": "--val-set-size",
    "cutoff_len": "--max-length --sequence-len",
    "packing": "--sample-packing",
    "remat": "--gradient-checkpointing",
    "optimizer": "--optim",
    "lr_scheduler": "--lr-scheduler-type",
    "prompt_template": "--prompt-template-name",
    "dtype": "--bf16 --fp16 --torch-dtype",
}


@pytest.mark.parametrize("name", ALIASES)
def test_finetune_has_the_flags_that_other_programs_have(name: str) -> None:
    parameter = parameters("finetune")[name]
    for alias in ALIASES[name].split():
        assert alias.replace("_", "-") in {*parameter.flags, *parameter.option.presets}


def test_a_line_of_alpaca_lora() -> None:
    line = (
        "--base_model=m --data_path=d --output_dir=o --batch_size=128 --micro_batch_size=4 --num_epochs=3 "
        "--learning_rate=1e-4 --cutoff_len=512 --val_set_size=2000 --lora_r=8 --lora_alpha=16 --lora_dropout=0.05 "
        "--lora_target_modules q_proj v_proj --train_on_inputs --prompt_template_name=alpaca"
    )
    found = flat(parse(["finetune", *line.split()]))
    wanted = {
        "model": "m",
        "data": ("d",),
        "output": Path("o"),
        "epochs": 3,
        "val_size": 2000,
        "r": 8,
        "lora_dropout": 0.05,
    }
    assert wanted.items() <= found.items() and found["target_modules"] == ("q_proj", "v_proj")


@pytest.mark.parametrize("words", ["one two --greedy", "--greedy one two", "one --greedy two", "--greedy -- one two"])
def test_prompts_are_before_and_behind_options(words: str) -> None:
    found = flat(parse(["generate", *words.split()]))
    assert found["prompts"] == ("one", "two") and found["greedy"]


def test_words_that_look_like_flags() -> None:
    assert flat(parse(["generate", "- one item", "--top-k", "-1"])) == flat(parse(["generate"])) | {
        "prompts": ("- one item",),
        "top_k": -1,
    }
    assert flat(parse(["generate", "--stop-token", "a", "--stop-token", "b"]))["stop_token"] == ("a", "b")


# ---------------------------------------------------------------- errors

FINETUNE = ["finetune", *NEEDED["finetune"]]
WRONG = {
    "a mistyped flag": (
        [*FINETUNE, "--max-stepps", "3"],
        "finetune has no option --max-stepps. Did you mean --max-steps? peft-jax finetune --help lists all options.",
    ),
    "a mistyped flag that must be given": (
        ["finetune", "--modle", "m", "--data", "d", "--output", "o"],
        "finetune has no option --modle. Did you mean --model? peft-jax finetune --help lists all options.",
    ),
    "a mistyped flag with its value": (
        [*FINETUNE, "--learning_rte=3"],
        "finetune has no option --learning-rte. Did you mean --learning-rate? peft-jax finetune --help lists all "
        "options.",
    ),
    "an abbreviation": (
        ["finetune", "--mod", "m"],
        "finetune has no option --mod. Did you mean --model? peft-jax finetune --help lists all options.",
    ),
    "a negated flag": (
        [*FINETUNE, "--no-resume"],
        "finetune has no option --no-resume. Did you mean --resume? peft-jax finetune --help lists all options.",
    ),
    "a flag of nothing near": (["demo", "-o", "x"], "demo has no option -o. peft-jax demo --help lists all options."),
    "a flag of another command": (
        ["generate", "--lr", "3"],
        "generate has no option --lr. peft-jax generate --help lists all options.",
    ),
    "a word of no option": (
        [*FINETUNE, "--resume", "yes"],
        "'yes' belongs to no option of finetune. peft-jax finetune --help lists all options.",
    ),
    "a second folder": (
        ["inspect", "a", "b"],
        "'b' belongs to no option of inspect. peft-jax inspect --help lists all options.",
    ),
    "no value at the end": (["finetune", "--model"], "--model has no value. Give MODEL behind it."),
    "no value before a flag": (["merge", "--adapter", "--output", "o"], "--adapter has no value. Give PATH behind it."),
    "no values": ([*FINETUNE, "--target-modules"], "--target-modules has no value. Give NAME behind it."),
    "a value for a flag": (
        ["generate", "--load-in-8bit=true"],
        "--load-in-8bit takes no value. Give the flag alone, or leave it out.",
    ),
    "a word for a whole number": ([*FINETUNE, "--r", "many"], "--r is 'many'. Give a whole number."),
    "a share for a whole number": ([*FINETUNE, "--lora-r=2.5"], "--r is '2.5'. Give a whole number."),
    "a word for a number": ([*FINETUNE, "--lr", "1,5"], "--learning-rate is '1,5'. Give a number."),
    "an unknown choice": (
        ["merge", *NEEDED["merge"], "--dtype", "int8"],
        "--dtype is 'int8'. Give one of float32, bfloat16, float16.",
    ),
    "two types": (
        [*FINETUNE, "--bf16", "--dtype", "float32"],
        "--bf16 and --dtype float32 contradict each other. Give one of them.",
    ),
    "both short types": (
        ["generate", "--bf16", "--fp16"],
        "--fp16 and --dtype bfloat16 contradict each other. Give one of them.",
    ),
    "what must be given": (
        ["finetune", "--model", "m"],
        "finetune needs --data DATA, --output PATH. peft-jax finetune --help says what that is.",
    ),
    "a folder that must be given": (["inspect"], "inspect needs PATH. peft-jax inspect --help says what that is."),
    "no command": ([], "no command is given. Give one of finetune, preview, generate, eval, merge, inspect, demo."),
    "a mistyped command": (
        ["fintune"],
        "there is no command 'fintune'. Did you mean finetune? Give one of finetune, preview, generate, eval, merge, "
        "inspect, demo.",
    ),
    "an unknown command": (
        ["serve"],
        "there is no command 'serve'. Give one of finetune, preview, generate, eval, merge, inspect, demo.",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_word_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = WRONG[case]
    assert main(words) == 2
    assert capsys.readouterr() == ("", f"peft-jax: error: {said}\n")

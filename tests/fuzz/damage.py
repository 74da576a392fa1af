"""Damage to folders, chosen by a seed: JSON values and texts, tensors, bytes, whole files."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

# Values that no field expects, and some that a few do.
HOSTILE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        2**31,
        10**9,
        2**63,
        -(2**63),
        10**30,
        10**400,
        0.5,
        -0.5,
        1e-300,
        1e300,
    ),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "a",
        "hot",
        "none",
        "auto",
        "../../x",
        "a\0b",
        "\x1b[31m",
        "ä" * 50,
    ),
    *("(a+)+$", "(a*)*b", "((a|aa)+)+$", "[", "(", ".*", "(?P<n>a)(?P=n)+", "x" * 100_000, "float32", "int8", "silu"),
    *([], {}, [[]], [{}], {"a": 1}, {"a": {"b": []}}, [1, "a"], [None], ["a"] * 2000, ["q_proj"], ["embed_tokens"]),
    *({"q_proj": 3}, {".*": -1}, {"": 1}, {"factor": 2.0}, {"rope_type": "yarn"}, [0], [-1], [10**9], [[0, 1], [1, 2]]),
    *(
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "dynamic", "factor": "x"},
        "full_attention",
        ["full_attention"],
    ),
]
# Values that many fields take, so that what is damaged may be accepted, and has to mean what it means to PEFT.
MILD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        2,
        3,
        4,
        0.5,
        2.0,
        "none",
        "all",
        "lora_only",
        "q_proj",
        ".*_proj",
        "all-linear",
        "",
        [],
    ),
    *(["q_proj"], ["k_proj", "v_proj"], ["lm_head"], ["embed_tokens"], ["norm"], [0], [1, 2], [-1], {}, {"q_proj": 1}),
    *(
        {"v_proj": 3},
        {"layers.0": 2},
        {"q_proj": 0},
        {"self_attn.q_proj": 2},
        {r"layers\.1\..*": 2},
        "layers",
        ["layers"],
    ),
    *(
        [[0, 1], [0, 2]],
        [[0, 3]],
        "CAUSAL_LM",
        "SEQ_CLS",
        "LORA",
        "IA3",
        "LOHA",
        "gaussian",
        "pissa",
        "model",
        "0.21.2",
    ),
]
# Names of fields that files of other kinds have: they are added where they do not belong.
FIELDS = (
    "r lora_alpha target_modules rank_pattern alpha_pattern layers_to_transform layers_pattern modules_to_save "
    "use_dora use_rslora bias fan_in_fan_out init_lora_weights peft_type task_type layer_replication "
    "target_parameters exclude_modules trainable_token_indices megatron_config loftq_config eva_config "
    "corda_config num_virtual_tokens hidden_size num_attention_heads num_key_value_heads head_dim hidden_act "
    "num_hidden_layers vocab_size max_position_embeddings rope_parameters rope_scaling rope_theta rms_norm_eps "
    "tie_word_embeddings torch_dtype dtype quantization_config architectures id2label label2id num_labels "
    "eos_token_id pad_token_id bos_token_id model_type initializer_range attention_bias sliding_window "
    "layer_types is_causal partial_rotary_factor intermediate_size"
).split()
TEXTS: list[Callable[[str, random.Random], str]] = [
    lambda text, dice: text[: dice.randrange(len(text) + 1)],
    lambda text, dice: "",
    lambda text, dice: dice.choice(["{}", "[]", "null", "3", '"a"', "[{}]", " ", "\0", "{", "[" * 100_000]),
    lambda text, dice: "[" + text + "]",
    lambda text, dice: text.replace("{", '{"r": 1, "r": 2, ', 1),
    lambda text, dice: text.replace(":", ": " + '{"a":' * 5000 + "1" + "}" * 5000 + ', "x":', 1),
    lambda text, dice: text.replace("{", '{"' + "k" * 1_000_000 + '": 1, ', 1),
    lambda text, dice: text.replace("{", '{"a": "\\ud800", ', 1),
    lambda text, dice: text.replace("{", '{"a": ' + "9" * dice.choice([400, 5000, 100_000]) + ", ", 1),
    lambda text, dice: text.replace("{", '{"a": 1e999, ', 1),
    lambda text, dice: _flipped(text.encode(), dice).decode("latin-1"),
    lambda text, dice: text + text,
]


def damage(folder: Path, dice: random.Random) -> str:
    """Damage one to three things in a folder, and say what in a line."""
    return "; ".join(_damage_one(folder, dice) for _ in range(dice.choice([1, 1, 1, 2, 3])))


def _damage_one(folder: Path, dice: random.Random) -> str:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    if not files:
        return "nothing is left"
    small = [file for file in files if file.suffix in (".json", ".jsonl", "")]
    file = dice.choice(small) if small and dice.random() < 0.8 else dice.choice(files)
    name = str(file.relative_to(folder))
    kind = dice.random()
    if kind < 0.03:
        file.unlink()
        return f"{name} is removed"
    if kind < 0.05:
        file.unlink()
        file.mkdir()
        return f"{name} is a folder"
    if kind < 0.07:
        file.unlink()
        file.symlink_to(file.name)
        return f"{name} is a link to itself"
    if kind < 0.15:
        data = _flipped(file.read_bytes(), dice)
        file.write_bytes(data)
        return f"{name} has other bytes"
    if file.suffix == ".safetensors":
        return f"{name}: {_damage_tensors(file, dice)}"
    if kind < 0.3:
        number = dice.randrange(len(TEXTS))
        text = file.read_text(encoding="utf-8", errors="replace")
        file.write_text(TEXTS[number](text, dice), encoding="utf-8", errors="replace")
        return f"{name}: text {number}"
    return f"{name}: {_damage_json(file, dice)}"


def _flipped(data: bytes, dice: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice([1, 1, 4, 64])):
        if changed:
            changed[dice.randrange(min(len(changed), dice.choice([16, 400, len(changed)])))] = dice.randrange(256)
    return bytes(changed[: dice.choice([len(changed)] * 3 + [dice.randrange(len(changed) + 1)])])


def _damage_json(file: Path, dice: random.Random) -> str:
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    number = dice.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[number])
    except (ValueError, IndexError, RecursionError):
        file.write_text("{}")
        return "{}"
    if not isinstance(value, dict | list):
        file.write_text("[]")
        return "[]"
    said = _damage_value(value, dice)
    lines[number] = json.dumps(value)
    file.write_text("\n".join(lines))
    return said


def _damage_value(value: Any, dice: random.Random) -> str:
    """Change an object or list somewhere in it."""
    while True:
        inner = [
            part for part in (value.values() if isinstance(value, dict) else value) if isinstance(part, dict | list)
        ]
        if not inner or dice.random() < 0.6:
            break
        value = dice.choice(inner)
    new = dice.choice(HOSTILE if dice.random() < 0.6 else MILD)
    if isinstance(value, list):
        if not value or dice.random() < 0.3:
            value.append(new)
            return f"appended {str(new)[:40]!r}"
        place: Any = dice.randrange(len(value))
    else:
        place = dice.choice([*value] or ["a"])
        if dice.random() < 0.35:
            place = dice.choice(FIELDS)
        elif dice.random() < 0.15:
            value.pop(place, None)
            return f"{place[:40]} removed"
    old = value[place] if isinstance(value, list) or place in value else None
    if isinstance(old, int | float) and not isinstance(old, bool) and dice.random() < 0.4:
        new = dice.choice(
            [old + 1, old - 1, -old, old * 2, str(old), [old], old + 0.5 if abs(old) < 1e9 else 0.5, old * 10**6]
        )
    value[place] = new
    return f"{str(place)[:40]} = {str(new)[:40]!r}"


def _damage_tensors(file: Path, dice: random.Random) -> str:
    try:
        tensors = load_file(file)
        key = dice.choice(sorted(tensors))
    except Exception:  # it is damaged already
        file.write_bytes(b"")
        return "emptied"
    tensor = tensors.pop(key)
    kind = dice.choice(
        ["removed", "renamed", "reshaped", "smaller", "int8", "float64", "float16", "nan", "inf", "twice", "odd"]
    )
    makers: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "removed": lambda: {},
        "renamed": lambda: {
            dice.choice([key + "x", "x." + key, "", "a" * 10_000, key.replace("0", "7"), "\x1b"]): tensor
        },
        "reshaped": lambda: {key: tensor.reshape(dice.choice([(-1,), (1, *tensor.shape), tensor.shape[::-1]]))},
        "smaller": lambda: {key: np.ascontiguousarray(tensor[: dice.randrange(len(tensor) or 1)])},
        "int8": lambda: {key: tensor.astype(np.int8)},
        "float64": lambda: {key: tensor.astype(np.float64)},
        "float16": lambda: {key: tensor.astype(np.float16)},
        "nan": lambda: {key: np.full_like(tensor, np.nan)},
        "inf": lambda: {key: np.full_like(tensor, np.inf)},
        "twice": lambda: {key: tensor, key.replace("lora_A", "lora_C"): tensor.copy(), "more": tensor.copy()},
        "odd": lambda: {key: tensor.astype(bool)},
    }
    save_file({**tensors, **makers[kind]()}, file)
    return f"{key[-40:]} {kind}"

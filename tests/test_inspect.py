"""`peft-jax inspect` on adapters that PEFT wrote, of methods that are supported here and of others."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from cases import tiny_configs
from peft.tuners.lora import LoraLayer
from peft_jax.interop.adapter import save_adapter
from peft_jax.interop.describe import read_adapter
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.cli.inspect.servers import PEFT_TYPES, VLLM_RANKS, verdicts
from peft_jax.cli.main import main
from peft_jax.core.partition import count_parameters

QV = ["q_proj", "v_proj"]
CONFIGS: dict[str, Any] = {
    "plain": peft.LoraConfig(r=8, lora_alpha=16, target_modules=QV),
    "rslora": peft.LoraConfig(r=9, lora_alpha=6, use_rslora=True, target_modules="all-linear"),
    "patterns": peft.LoraConfig(r=4, target_modules=QV, rank_pattern={"q_proj": 2}, alpha_pattern={"0.*v_proj": 3}),
    "layers": peft.LoraConfig(r=8, target_modules=QV, layers_to_transform=[1]),
    "whole": peft.LoraConfig(r=8, target_modules=QV, modules_to_save=["lm_head"]),
    "biases": peft.LoraConfig(r=8, target_modules=QV, bias="all"),
    "embedding": peft.LoraConfig(r=8, target_modules=["embed_tokens", "q_proj"]),
    "dora": peft.LoraConfig(r=8, target_modules=QV, use_dora=True),
    "lora_bias": peft.LoraConfig(r=8, target_modules=QV, lora_bias=True),
    "pissa": peft.LoraConfig(r=8, target_modules=QV, init_lora_weights="pissa"),
    "odd_rank": peft.LoraConfig(r=3, lora_alpha=6, target_modules=QV),
    "vera": peft.VeraConfig(r=8, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=5),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=5),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
}


@pytest.fixture(scope="session")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder with a model and an adapter of each kind, and how many parameters PEFT says it trains."""
    from transformers import AutoModelForCausalLM

    folder, counts = tmp_path_factory.mktemp("adapters"), {}
    shutil.copytree(tiny_llama, folder / "model")
    for name, config in CONFIGS.items():
        config.task_type = "CAUSAL_LM"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), config)
            counts[name] = model.get_nb_trainable_parameters()[0]
            model.peft_config["default"].base_model_name_or_path = "my-llama"
            model.save_pretrained(folder / name)
    return folder, counts


@pytest.fixture
def workplace(adapters: tuple[Path, dict[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the model and all adapters."""
    shutil.copytree(adapters[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs the command and returns what it prints."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(["inspect", *words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def change(folder: Path, **fields: Any) -> None:
    """Change fields of an adapter's config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_told_is_what_is_there(name: str, told: Callable[..., str], adapters: tuple[Path, Any]) -> None:
    found = json.loads(told(name, "--json", "--model", "model"))
    tensors = load_file(adapters[0] / name / "adapter_model.safetensors")
    assert {key: tuple(one["shape"]) for key, one in found["tensors"].items()} == {
        key: tensor.shape for key, tensor in tensors.items()
    }
    assert all(found["tensors"][key]["bytes"] == tensor.nbytes for key, tensor in tensors.items())
    assert {one["dtype"] for one in found["tensors"].values()} == {"F32"}
    assert found["trained_parameters"] == adapters[1][name]
    assert found["config"]["base_model_name_or_path"] == "my-llama" and found["problems"] == []
    assert found["fit"] == {
        "model": "model",
        "fits": True,
        "judged_by": dict.fromkeys(("prompt", "prefix"), "the shape of its prompt").get(
            name, "names and shapes" if isinstance(CONFIGS[name], peft.LoraConfig) else "names"
        ),
        "reasons": [],
    }


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if isinstance(config, peft.LoraConfig)])
def test_ranks_and_scales_are_those_of_peft(name: str, told: Callable[..., str], workplace: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = json.loads(told(name, "--json"))["modules"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("model"), name)
    layers = {path.removeprefix("base_model.model."): layer for path, layer in model.named_modules()}
    want = {path: layer for path, layer in layers.items() if isinstance(layer, LoraLayer)}
    assert {path: one["rank"] for path, one in found.items()} == {path: one.r["default"] for path, one in want.items()}
    for path, layer in want.items():
        assert found[path]["scaling"] == pytest.approx(layer.scaling["default"], rel=1e-6)


TAKEN: dict[str, dict[str, str | None]] = {  # None: taken; else a part of the reason why not
    "plain": {"peft_jax": None, "PEFT": None, "vLLM": None, "TGI": None},
    "rslora": {"peft_jax": None, "PEFT": None, "vLLM": None, "TGI": "pads rank 9 to 16"},
    "patterns": {"peft_jax": None, "PEFT": None, "vLLM": "one scale for all", "TGI": "one scale for all"},
    "layers": {"peft_jax": None, "PEFT": None, "vLLM": None, "TGI": "layers_to_transform"},
    "whole": {"peft_jax": None, "PEFT": None, "vLLM": "modules_to_save (lm_head)", "TGI": "modules_to_save"},
    "biases": {"peft_jax": None, "PEFT": None, "vLLM": "bias='all'", "TGI": "bias='all'"},
    "embedding": {"peft_jax": None, "PEFT": None, "vLLM": None, "TGI": "leaves embed_tokens out"},
    "dora": {"PEFT": None, "vLLM": "DoRA", "TGI": "DoRA"},
    "lora_bias": {"PEFT": None, "vLLM": "does not read lora_bias", "TGI": "does not read lora_bias"},
    "pissa": {"PEFT": None, "vLLM": "'pissa' needs a changed base", "TGI": "'pissa' needs a changed base"},
    "odd_rank": {"peft_jax": None, "PEFT": None, "vLLM": None, "TGI": "pads rank 3 to 8"},
    "vera": {"PEFT": None, "vLLM": "LoRA alone, not VERA", "TGI": "LoRA alone, not VERA"},
    "ia3": {"PEFT": None, "vLLM": "LoRA alone, not IA3", "TGI": "LoRA alone"},
    "prompt": {"PEFT": None, "vLLM": "LoRA alone, not PROMPT_TUNING", "TGI": "LoRA alone"},
    "oft": {"PEFT": None, "vLLM": "LoRA alone, not OFT", "TGI": "LoRA alone"},
}


@pytest.mark.parametrize("name", TAKEN)
def test_who_takes_it_and_why_not(name: str, told: Callable[..., str]) -> None:
    servers = json.loads(told(name, "--json"))["servers"]
    assert set(servers) == {"peft_jax", "PEFT", "vLLM", "TGI"}
    for server, reason in TAKEN[name].items():
        assert servers[server]["takes"] == (reason is None), servers[server]
        assert (reason or "") in servers[server]["note"]


def test_peft_jax_takes_what_it_loads(told: Callable[..., str], workplace: Path) -> None:
    base = pj.AutoModelForCausalLM.from_pretrained("model")
    for name in CONFIGS:
        takes = json.loads(told(name, "--json"))["servers"]["peft_jax"]["takes"]
        try:
            pj.PeftModel.from_pretrained(base, name)
        except ValueError:
            assert not takes, name
        else:
            assert takes, name


@pytest.mark.parametrize(
    ("rank", "flags"),
    [
        (8, "--enable-lora"),
        (16, "--enable-lora"),
        (17, "--max-lora-rank 32"),
        (300, "--max-lora-rank 320"),
        (600, None),
    ],
)
def test_vllms_limit_of_the_rank(rank: int, flags: str | None, told: Callable[..., str], workplace: Path) -> None:
    tensors = load_file("plain/adapter_model.safetensors")
    wide = {
        k: np.zeros((rank, t.shape[1]) if "lora_A" in k else (t.shape[0], rank), t.dtype) for k, t in tensors.items()
    }
    save_file(wide, "plain/adapter_model.safetensors")
    change(workplace / "plain", r=rank)
    vllm = json.loads(told("plain", "--json"))["servers"]["vLLM"]
    assert vllm["takes"] == (flags is not None)
    assert vllm["note"].endswith(flags if flags else f"its largest --max-lora-rank, {VLLM_RANKS[-1]}")


def test_the_types_are_those_of_peft() -> None:
    assert PEFT_TYPES == {one.value for one in peft.PeftType}


def _grow(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({**config, **fields}))


MISFITS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "wider": ("plain", {"hidden_size": 64, "head_dim": 8}, ["q_proj.lora_A.weight is for 32 features, not 64"]),
    "more heads": (
        "plain",
        {"num_attention_heads": 8, "head_dim": 8},
        ["q_proj.lora_B.weight is for 32 features, not 64"],
    ),
    "fewer layers": ("plain", {"num_hidden_layers": 1}, ["it has no matrix model.layers.1.self_attn.q_proj"]),
    "more layers": ("plain", {"num_hidden_layers": 3}, ["has nothing for model.layers.2.self_attn.q_proj, which"]),
    "more tokens": ("embedding", {"vocab_size": 300}, ["embed_tokens.lora_embedding_A is for 288 features, not 300"]),
    "another head": ("whole", {"vocab_size": 300}, ["lm_head.weight is 288 x 32, not 300 x 32"]),
    "wider for a prompt": ("prompt", {"hidden_size": 64}, ["its virtual tokens have 32 features, not 64"]),
    "more layers for a prefix": ("prefix", {"num_hidden_layers": 3}, ["keys and values of 3 layers with 16 features"]),
    "fewer layers for IA3": ("ia3", {"num_hidden_layers": 1}, ["it has no matrix model.layers.1.mlp.down_proj"]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_why_an_adapter_does_not_fit(case: str, told: Callable[..., str], workplace: Path) -> None:
    name, fields, reasons = MISFITS[case]
    _grow(workplace, **fields)
    fit = json.loads(told(name, "--json", "--model", "model"))["fit"]
    assert fit["fits"] is False
    for reason in reasons:
        assert any(reason in one for one in fit["reasons"]), fit["reasons"]
    shown = told(name, "--model", "model")
    assert "Fits        model: no, " in shown and max(map(len, shown.splitlines())) <= 80


def test_a_prompt_says_what_it_is(told: Callable[..., str], workplace: Path) -> None:
    assert "Prompt      5 virtual tokens, each an embedding of 32 features" in told("prompt")
    shown = told("prefix", "--model", "model")
    assert "Prompt      5 virtual tokens, each keys and values of 64 numbers in 2 layers" in shown
    assert "Fits        model: yes, by the shape of its prompt" in shown
    change(workplace / "prompt", num_virtual_tokens=4)
    assert "prompt_embeddings has 5 rows, but adapter_config.json says 4" in " ".join(told("prompt").split())


def test_a_head_fits_a_model_that_ties_it(told: Callable[..., str], workplace: Path) -> None:
    _grow(workplace, tie_word_embeddings=True)
    assert json.loads(told("whole", "--json", "--model", "model"))["fit"]["fits"] is True


def test_the_base_needs_no_weights(told: Callable[..., str], workplace: Path) -> None:
    (workplace / "model" / "model.safetensors").unlink()
    assert "yes, by names and shapes" in told("plain", "--model", "model")


def test_the_table_in_a_terminal(told: Callable[..., str]) -> None:
    assert (
        told("patterns").splitlines()
        == """\
Adapter     patterns
Method      LoRA for CAUSAL_LM, written by PEFT 0.21.2
Base        my-llama
Rank        2 in 2 modules, 4 in 2 modules
Scale       0.75 in 1 module, 2 in 1 module, 4 in 2 modules (alpha 8)
Targets     q_proj, v_proj (4 modules)
Trained     640 parameters
Tensors     8 in 2.6 kB

Tensor                                          Shape  Type  Count   Bytes
model.layers.*.self_attn.q_proj.lora_A.weight  2 x 32  F32       2   512 B
model.layers.*.self_attn.q_proj.lora_B.weight  32 x 2  F32       2   512 B
model.layers.*.self_attn.v_proj.lora_A.weight  4 x 32  F32       2  1.0 kB
model.layers.*.self_attn.v_proj.lora_B.weight  16 x 4  F32       2   512 B

Taken by
  peft_jax  yes
  PEFT      yes PeftModel.from_pretrained(base, folder)
  vLLM      no  it has one scale for all modules, and rank_pattern or
                alpha_pattern asks for several
  TGI       no  it has one scale for all modules, and rank_pattern or
                alpha_pattern asks for several""".splitlines()
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_lines_fit_a_terminal(name: str, told: Callable[..., str]) -> None:
    shown = told(name, "--model", "model")
    assert max(map(len, shown.splitlines())) <= 80, shown
    assert name in shown and "Taken by" in shown


def test_a_pickled_adapter_is_told_by_its_config(told: Callable[..., str], workplace: Path) -> None:
    (workplace / "plain" / "adapter_model.safetensors").rename("plain/adapter_model.bin")
    shown, found = told("plain"), json.loads(told("plain", "--json", "--model", "model"))
    assert "pickled" in shown and found["tensors"] is None and found["fit"]["fits"] is None
    assert [one["takes"] for one in found["servers"].values()] == [False, True, True, False]


def test_a_config_of_a_method_that_nobody_knows(told: Callable[..., str], workplace: Path) -> None:
    change(workplace / "ia3", peft_type="NEXT_YEARS")
    servers = json.loads(told("ia3", "--json"))["servers"]
    assert not any(one["takes"] for one in servers.values()) and "knows no NEXT_YEARS" in servers["PEFT"]["note"]


def test_ranks_that_are_not_the_configs(told: Callable[..., str], workplace: Path) -> None:
    change(workplace / "plain", r=4)
    found, shown = json.loads(told("plain", "--json", "--model", "model")), told("plain")
    assert "has rank 8 in the file, but adapter_config.json says 4" in found["problems"][0]
    assert not found["fit"]["fits"] and not any(one["takes"] for one in found["servers"].values())
    assert "Damaged     model.layers.0" in shown


def _half(folder: Path) -> None:
    tensors = load_file(folder / "plain" / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(tensors, folder / "plain" / "adapter_model.safetensors")


def test_half_a_lora(told: Callable[..., str], workplace: Path) -> None:
    _half(workplace)
    assert json.loads(told("plain", "--json"))["problems"] == [
        "model.layers.0.self_attn.q_proj has lora_A.weight alone"
    ]


def _cut(folder: Path) -> None:
    file = folder / "plain" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


WRONG: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "no folder": (lambda folder: None, ["none"], "No folder 'none'. Give the folder"),
    "no adapter given": (lambda folder: None, [], "PATH"),
    "a model": (lambda folder: None, ["model"], "It holds a whole model (config.json), not an adapter"),
    "a folder of adapters": (lambda folder: None, ["."], "but below it in biases, dora"),
    "no tensors": (
        lambda folder: (folder / "plain/adapter_model.safetensors").unlink(),
        ["plain"],
        "only its adapter_",
    ),
    "cut tensors": (_cut, ["plain"], "is damaged or cut off"),
    "config not JSON": (_write("plain/adapter_config.json", "{"), ["plain"], "is not JSON"),
    "config a list": (_write("plain/adapter_config.json", "[]"), ["plain"], "is not a JSON object"),
    "config of nothing": (_write("plain/adapter_config.json", "{}"), ["plain"], "names no peft_type"),
    "config of odd values": (lambda folder: change(folder / "plain", r="8"), ["plain"], "has r='8'. Save"),
    "no base": (lambda folder: None, ["plain", "--model", "./none"], "No folder './none'"),
    "another base": (lambda folder: _grow(folder, model_type="mamba"), ["plain", "--model", "model"], "'mamba'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_damaged_folder_is_one_line(case: str, workplace: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare, words, said = WRONG[case]
    prepare(workplace)
    capfd.readouterr()
    assert main(["inspect", *words]) == 2
    out, err = capfd.readouterr()
    assert not out and len(err.splitlines()) == 1 and err.startswith("peft-jax: error: ") and said in err, err


COUNTED = {
    **tiny_configs(),
    "LILY of two layers": pj.LilyConfig(r=2, stride_A=2, target_modules=["dense"]),
    "FROD of a model": pj.FrodConfig(sparse_rate=0.1, target_modules=["dense"]),
}


def test_peft_makes_the_basis_of_a_frod_anew(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    with pytest.warns(UserWarning, match="For PEFT train on from an adapter that PEFT saved"):
        params = pj.apply_adapter({"dense": {"kernel": matrix}}, COUNTED["FROD of a model"])
    save_adapter(params, tmp_path)
    (of_peft,) = [verdict for verdict in verdicts(read_adapter(tmp_path)) if verdict.program == "PEFT"]
    assert of_peft.takes and "only where PEFT itself started the adapter" in of_peft.note


def test_peft_makes_the_singular_vectors_of_a_psoft_anew(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    config = pj.PsoftConfig(r=2, target_modules=["dense"])
    save_adapter(pj.apply_adapter({"dense": {"kernel": matrix}}, config), tmp_path)
    (of_peft,) = [verdict for verdict in verdicts(read_adapter(tmp_path)) if verdict.program == "PEFT"]
    assert of_peft.takes and "where PyTorch's SVD has the same signs" in of_peft.note


def test_peft_has_qalora_for_gptq_alone(tmp_path: Path) -> None:
    config = pj.LoraConfig(r=2, target_modules=["dense"], use_qalora=True, qalora_group_size=4)
    save_adapter(pj.apply_adapter({"dense": {"kernel": np.ones((8, 12), np.float32)}}, config), tmp_path)
    (of_peft,) = [verdict for verdict in verdicts(read_adapter(tmp_path)) if verdict.program == "PEFT"]
    assert of_peft.takes and "on GPTQ's layers alone" in of_peft.note


@pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED)
def test_trained_parameters_of_each_method_are_those_that_are_trained(config: Any, tmp_path: Path) -> None:
    matrices = np.random.default_rng(0).normal(size=(3, 12, 8)).astype(np.float32)
    params = pj.apply_adapter({str(n): {"dense": {"kernel": matrix}} for n, matrix in enumerate(matrices)}, config)
    save_adapter(params, tmp_path)
    want = count_parameters(params)[0]
    assert read_adapter(tmp_path).trained == want > 0

"""Adapter files as people have them: each loads here to PEFT's value, or is refused by a line that says what to do."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close
from peft_jax.interop.patterns import in_file_order
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.cli.main import main

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights and saved embeddings
IDS = np.array([[5, 17, 2, 23, 9], [8, 8, 3, 21, 1]])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIZES = {"vocab_size": 24, "initializer_range": 0.5}
LLAMA = {
    **SIZES,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "attention_bias": True,
}
MODELS: dict[str, Callable[[], Any]] = {
    "own": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=24, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    ),
}
Q = {"own": "q_proj", "tied": "q_proj", "gpt2": "c_attn", "t5": "q"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        folders[name] = tmp_path_factory.mktemp(name)
        model = make()
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias"):
                    parameter.normal_()
        model.save_pretrained(folders[name])
    return folders


def torch_base(folder: Path) -> Any:
    kind = transformers.AutoModelForSeq2SeqLM if "t5" in folder.name else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def our_base(folder: Path) -> Any:
    return (pj.AutoModelForSeq2SeqLM if "t5" in folder.name else pj.AutoModelForCausalLM).from_pretrained(folder)


def inputs(folder: Path) -> dict[str, Any]:
    return {"input_ids": IDS, **({"decoder_input_ids": IDS} if "t5" in folder.name else {})}


def torch_logits(model: Any, folder: Path) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(**{name: torch.tensor(ids) for name, ids in inputs(folder).items()}).logits.numpy()


def write(base: Path, target: Path, config: Any, **options: Any) -> Any:
    """PEFT's adapter with random numbers, which it has written."""
    torch.manual_seed(2)
    model = peft.get_peft_model(torch_base(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(target, **options)
    return model


def change(folder: Path, **fields: Any) -> None:
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def rename(folder: Path, edit: Callable[[str], str]) -> None:
    tensors = {edit(key): tensor for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(base: Path, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        pj.PeftModel.from_pretrained(our_base(base), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "wanted", "multiple", "rows"),
    [("own", 27, None, 27), ("tied", 25, 8, 32), ("gpt2", 30, None, 30), ("t5", None, 16, 32)],
)
def test_resized_models_are_transformers_own(
    name: str, wanted: int | None, multiple: int | None, rows: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    theirs = torch_base(bases[name])
    theirs.resize_token_embeddings(wanted, pad_to_multiple_of=multiple)
    ours = our_base(bases[name]).resize_token_embeddings(wanted, pad_to_multiple_of=multiple)
    expected = torch_logits(theirs, bases[name])
    got = np.asarray(ours(**inputs(bases[name])).logits)
    assert got.shape[-1] == rows == ours.config.vocab_size
    kept = min(rows, 24)
    close(got[..., :kept], expected[..., :kept])
    np.testing.assert_allclose(got, expected, atol=5e-3)  # new rows are drawn about the mean of the old ones
    ours.save_pretrained(tmp_path)
    close(torch_logits(type(theirs).from_pretrained(tmp_path), bases[name]), got)


def test_new_rows_are_about_the_mean_or_random(bases: dict[str, Path]) -> None:
    base = our_base(bases["own"])
    table = np.asarray(base.params["model"]["embed_tokens"]["embedding"])
    mean = base.resize_token_embeddings(30).params["model"]["embed_tokens"]["embedding"][24:]
    np.testing.assert_allclose(mean, np.broadcast_to(table.mean(0), mean.shape), atol=1e-3)
    few = base.resize_token_embeddings(20)
    np.testing.assert_array_equal(few.params["model"]["embed_tokens"]["embedding"], table[:20])
    assert few.params["lm_head"]["kernel"].shape == (8, 20)
    drawn = base.resize_token_embeddings(30, mean_resizing=False).params["model"]["embed_tokens"]["embedding"][24:]
    assert 0.2 < float(jnp.std(drawn)) < 0.9  # initializer_range is 0.5
    adapted = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="'lm_head.kernel' is an Adapted leaf, .* Resize the model first"):
        adapted.resize_token_embeddings(30)


def test_commands_resize_to_the_adapters_tokens(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens([f"<{number}>" for number in range(290 - len(tokenizer))])
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(tokenizer))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained(tmp_path / "adapter")  # the vocabulary was resized, so PEFT writes both tables
    tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"write model.resize_token_embeddings\(290\) first"):
        pj.PeftModel.from_pretrained(pj.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "adapter")
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 290
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        close(merged(torch.tensor(IDS)).logits.numpy(), theirs(torch.tensor(IDS)).logits.numpy())
    close(
        pj.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(IDS).logits,
        merged(torch.tensor(IDS))[0].detach().numpy(),
    )
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter"), "--model", str(tiny_llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fit"]["fits"] is True and found["trained_parameters"] == 2 * 2 * (2 * 32 + 32 + 32) / 2
    assert not found["servers"]["vLLM"]["takes"] and "refuses a file with" in found["servers"]["vLLM"]["note"]


def test_a_file_of_one_adapter_beside_another_on_the_head(bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = peft.get_peft_model(torch_base(bases["own"]), peft.LoraConfig(r=2, target_modules=["q_proj"]), "a")
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["lm_head"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True, selected_adapters=["a"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "a" / WEIGHTS)
    again = peft.PeftModel.from_pretrained(torch_base(bases["own"]), tmp_path / "a")
    close(
        pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path / "a")(IDS).logits,
        torch_logits(again, bases["own"]),
    )
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"] *= 1.1
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    assert "PEFT does not read it: save the adapter again with save_embedding" in refusal(bases["own"], tmp_path / "a")


def test_an_adapter_of_rank_0_everywhere_changes_nothing(bases: dict[str, Path], tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj"], "init_r": 3, "target_r": 1, "total_step": 9, "tinit": 1, "tfinal": 1}
    write(bases["own"], tmp_path, peft.AdaLoraConfig(**options))
    tensors = load_file(tmp_path / WEIGHTS)
    empty = {key: one[:, :0] if key.endswith("lora_B") else one[:0] for key, one in tensors.items()}
    save_file(empty, tmp_path / WEIGHTS)
    modules = [f"model.layers.{layer}.self_attn.q_proj.lora_E" for layer in range(2)]
    change(tmp_path, rank_pattern=dict.fromkeys(modules, [False] * 3))
    model = pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_base(bases["own"]), tmp_path)
    close(model(IDS).logits, torch_logits(theirs, bases["own"]))


def test_empty_tensors_are_named(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(bases["own"], tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    save_file({key: one[:0].ravel() for key, one in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    assert "is empty, as DeepSpeed's ZeRO-3 writes" in refusal(bases["own"], tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not any(server["takes"] for server in found["servers"].values()) and "is empty" in found["problems"][0]


def test_what_a_finished_initialization_leaves_is_ignored(bases: dict[str, Path], tmp_path: Path) -> None:
    theirs = write(bases["own"], tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    left = peft.LoraConfig(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)).loftq_config
    off = {"qalora_group_size": 32, "megatron_core": None, "runtime_config": {"ephemeral_gpu_offload": False}}
    change(tmp_path, init_lora_weights=True, loftq_config=left, **off, one=[], two="", three={}, four=0)
    close(
        pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path)(IDS).logits, torch_logits(theirs, bases["own"])
    )
    change(tmp_path, use_qalora=True)  # PEFT ignores it on this base, and made whole factors
    assert "qalora_group_size=32" in refusal(bases["own"], tmp_path)
    change(tmp_path, qalora_group_size=2)
    said = refusal(bases["own"], tmp_path)
    assert "(PEFT ignores use_qalora outside GPTQ layers: load it with use_qalora=False)" in said
    assert "Load it on the base" not in said


def test_keys_with_an_adapters_name_or_a_wrapper(bases: dict[str, Path], tmp_path: Path) -> None:
    write(bases["own"], tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    plain = load_file(tmp_path / WEIGHTS)
    rename(
        tmp_path, lambda key: f"{key}.default.weight" if key.endswith("vector") else key.replace(".we", ".default.we")
    )
    theirs = peft.PeftModel.from_pretrained(torch_base(bases["own"]), tmp_path)
    named = pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path)
    close(named(IDS).logits, torch_logits(theirs, bases["own"]))
    assert np.abs(named(IDS).logits - our_base(bases["own"])(IDS).logits).max() > 0.01
    for wrapper, maker in (("_orig_mod.", "torch.compile"), ("_fsdp_wrapped_module.", "FSDP"), ("module.", "DataPar")):
        save_file(
            {key.replace("model.model.", f"model.{wrapper}model."): one for key, one in plain.items()},
            tmp_path / WEIGHTS,
        )
        said = refusal(bases["own"], tmp_path)
        assert maker in said and f"key.replace('{wrapper}', '')" in said
    save_file({key.removeprefix("base_model.model."): one for key, one in plain.items()}, tmp_path / WEIGHTS)
    assert "without PEFT's prefix" in refusal(bases["own"], tmp_path)
    moved = {key.replace("layers.0", "layers.7"): one for key, one in plain.items()}
    save_file(moved, tmp_path / WEIGHTS)
    said = refusal(bases["own"], tmp_path)
    assert "is missing" in said and "is left over" in said


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "*q_proj"},
        {"target_modules": ["q"], "exclude_modules": "*norm"},
        {"target_modules": ["q"], "modules_to_save": ["*head"]},
        {"target_modules": ["q"], "rank_pattern": {"*q_proj": 4}},
        {"target_modules": ["q"], "alpha_pattern": {"(q": 4}},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "*layers"},
    ],
)
def test_what_is_no_regular_expression_is_refused_by_the_config(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is no regular expression: ") as caught:
        pj.LoraConfig(**fields)
    assert "\n" not in str(caught.value)


def test_a_slow_regular_expression_takes_no_time() -> None:
    names = {f"{'a' * 40}{number}": {"kernel": jnp.ones((2, 2))} for number in range(3)}
    start = time.perf_counter()
    config = pj.LoraConfig(r=1, target_modules="(a+)+[12]", rank_pattern={"(a|aa)+1": 2})
    adapted = pj.apply_lora(names, config)
    assert time.perf_counter() - start < 20
    shapes = [
        leaf.params["lora_A"].shape[1]
        for leaf in adapted.values()
        for leaf in [leaf["kernel"]]
        if hasattr(leaf, "params")
    ]
    assert shapes == [2, 1]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_lora_bias_beside_trained_biases(bias: str, bases: dict[str, Path], tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], lora_bias=True, bias=bias, layers_to_transform=[1]
    )
    theirs = write(bases["own"], tmp_path, config)
    model = pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path)
    expected = torch_logits(theirs, bases["own"])
    close(model(IDS).logits, expected)
    close(model.merge_and_unload()(IDS).logits, torch_logits(theirs.merge_and_unload(), bases["own"]))
    model.save_pretrained(tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("name", "module", "kind"),
    [
        ("tied", "lm_head", "target"),
        ("tied", "lm_head", "saved"),
        ("tied", "embed_tokens", "regex"),
        ("gpt2", "wte", "target"),
        ("gpt2", "lm_head", "target"),
        ("gpt2", "wte", "saved"),
        ("t5", "shared", "target"),
        ("t5", "shared", "saved"),
    ],
)
def test_ensured_ties_are_pefts(name: str, module: str, kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": [Q[name], module]}
    if kind == "saved":
        fields = {"target_modules": [Q[name]], "modules_to_save": [module]}
    elif kind == "regex":
        fields = {"target_modules": f".*{Q[name]}|{module}"}
    config = peft.LoraConfig(r=2, ensure_weight_tying=True, **fields)
    theirs = write(bases[name], tmp_path, config, save_embedding_layers=False)
    model = pj.PeftModel.from_pretrained(our_base(bases[name]), tmp_path)
    close(model(**inputs(bases[name])).logits, torch_logits(theirs, bases[name]))
    made = pj.get_peft_model(our_base(bases[name]), pj.LoraConfig(r=2, ensure_weight_tying=True, **fields))
    keys = pj.get_peft_model_state_dict(made, save_embedding_layers=False).keys()
    assert keys >= load_file(tmp_path / WEIGHTS).keys()
    saved = peft.PeftConfig.from_pretrained(tmp_path)
    targets = made.peft_config["default"].target_modules
    assert (targets if isinstance(targets, str) else set(targets)) == saved.target_modules


def test_ties_that_peft_does_not_read_back_are_refused(bases: dict[str, Path]) -> None:
    fields = {"r": 2, "ensure_weight_tying": True}
    with pytest.raises(ValueError, match="PEFT ties 'lm_head' to 'shared', gives the others adapters of their own"):
        pj.get_peft_model(our_base(bases["t5"]), pj.LoraConfig(target_modules=["q", "embed_tokens"], **fields))
    with pytest.raises(ValueError, match="one magnitude for it and another for the head"):
        pj.get_peft_model(our_base(bases["tied"]), pj.LoraConfig(target_modules=["lm_head"], use_dora=True, **fields))


CONVOLUTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3 of outputs": ("IA3Config", {"feedforward_modules": []}),
    "ia3 of inputs": ("IA3Config", {"feedforward_modules": ["conv"]}),
    "lokr whole": ("LoKrConfig", {"r": 2}),
    "lokr in factors": ("LoKrConfig", {"r": 1, "decompose_both": True}),
    "loha": ("LoHaConfig", {"r": 2}),
    "boft": ("BOFTConfig", {"boft_block_size": 2}),
    "hira": ("HiraConfig", {"r": 2}),
    "hra": ("HRAConfig", {"r": 2}),
    "adalora": ("AdaLoraConfig", {"init_r": 2, "target_r": 1, "total_step": 9}),
}


def convolved(params: Any, x: jax.Array) -> jax.Array:
    numbers = ("NCHW", "HWIO", "NCHW")
    y = jax.lax.conv_general_dilated(x, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=numbers)
    return y + params["conv"]["bias"][None, :, None, None]


@pytest.mark.parametrize("row", CONVOLUTIONS)
def test_convolutions_of_other_methods(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    torch.manual_seed(0)
    module = torch.nn.Sequential()
    module.conv = torch.nn.Conv2d(4, 6, 3 if row in ("boft", "hra") else (3, 2))  # PEFT has these for squares alone
    kernel, bias = (getattr(module.conv, name).detach().numpy() for name in ("weight", "bias"))
    tree = {"conv": {"kernel": jnp.array(kernel.transpose(2, 3, 1, 0)), "bias": jnp.array(bias)}}
    name, options = CONVOLUTIONS[row]
    theirs = peft.get_peft_model(module, getattr(peft, name)(target_modules=["conv"], **options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 4, 7, 6)
    expected = theirs(x).detach().numpy()
    ours = interop.load_adapter(tree, tmp_path / "theirs", fn=convolved, args=(jnp.array(x),))
    close(pj.adapt(convolved)(ours, jnp.array(x)), expected)
    close(convolved(pj.merge(ours), jnp.array(x)), expected)
    assert np.abs(expected - convolved(tree, jnp.array(x))).max() > 1e-2
    interop.save_adapter(ours, tmp_path / "ours")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()


def test_none_initializes_as_in_peft_and_stays() -> None:
    config = pj.PeftConfig.from_dict({"peft_type": "LORA", "init_lora_weights": None, "target_modules": ["q"], "r": 2})
    assert config.to_dict()["init_lora_weights"] is None
    leaf = pj.apply_lora({"q": {"kernel": jnp.ones((4, 8))}}, config)["q"]["kernel"]
    assert jnp.abs(leaf.params["lora_B"]).min() > 0  # both factors are random, as with False


def test_patterns_keep_their_order_where_it_decides(bases: dict[str, Path], tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3, "layers.0.*": 1}}
    model = pj.get_peft_model(our_base(bases["own"]), pj.LoraConfig(init_lora_weights=False, **fields))
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]) == ["v_proj", "layers.0.*"]
    theirs = peft.PeftModel.from_pretrained(torch_base(bases["own"]), tmp_path)
    close(model(IDS).logits, torch_logits(theirs, bases["own"]))
    apart = pj.LoraConfig(**{**fields, "rank_pattern": {"v_proj": 3, "q_proj": 1}})
    keys = [f"base_model.model.layers.0.{name}.lora_A.weight" for name in ("q_proj", "v_proj")]
    assert list(in_file_order(apart.to_dict(), apart, keys)["rank_pattern"]) == ["q_proj", "v_proj"]


def test_a_files_order_of_alphas_is_warned_of(bases: dict[str, Path], tmp_path: Path) -> None:
    alphas = {"v_proj": 3, "layers.0.*": 1}
    write(bases["own"], tmp_path, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], alpha_pattern=alphas))
    with pytest.warns(
        UserWarning, match=r"'layers.0.\*', 'v_proj'\] of alpha_pattern all name .*v_proj', and the first"
    ):
        pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path)
    change(tmp_path, alpha_pattern=alphas)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pj.PeftModel.from_pretrained(our_base(bases["own"]), tmp_path)

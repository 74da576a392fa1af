"""Mixtures of experts: products by group, files in both layouts, LoRA on experts as PEFT has it, bad input."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES
from conformance import close, same_files, tolerance
from safetensors.numpy import load_file, save_file
from torch_mixtures import FIELDS, ROUTERS, ROWS, moved, torch_model

import peft_jax as pj
from peft_jax.core.paths import named_leaves
from peft_jax.core.weight import is_weight
from peft_jax.models.load_rounding import load_rounding
from peft_jax.models.modules.grouped_products import grouped_product, product_in_blocks
from peft_jax.models.registry import family_of, read_architecture

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = np.random.default_rng(0).integers(3, 50, (2, 9))
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # how configs call the number of experts
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj"]}


def lora_of(kind: str) -> dict[str, Any]:
    """LoRA on a module, all experts and the router."""
    return {**LORA, "target_parameters": [*EXPERTS, f"{ROUTERS.get(kind, 'gate')}.weight"], "task_type": "CAUSAL_LM"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One kind is compared, that with a dense layer among the others; with ``--grid`` all are.

    Of ``form`` there is one more, whose experts have biases and are stored as (in, out).
    """
    converted = "are_read_as" in metafunc.function.__name__  # names of its own in old files, or PEFT's table lacks it
    with_grid = metafunc.config.getoption("--grid")
    if "form" in metafunc.fixturenames:
        metafunc.parametrize("form", ROWS if with_grid else ["qwen3_moe", "gpt_oss"])
    if "kind" in metafunc.fixturenames and converted:
        further = ["olmoe", "deepseek_v2", "deepseek_v3"] if with_grid else []
        metafunc.parametrize("kind", ["mixtral", "qwen3_moe", *further])
    elif "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", ROWS if with_grid else ["qwen3_moe"])


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS).logits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch_model(kind).save_pretrained(made[kind])
        return made[kind]

    return get


@pytest.mark.parametrize("rows", [3, 40, 300])
def test_grouped_products_and_their_gradients(rows: int) -> None:
    """Some groups are empty, others have more rows than a block; all are multiplied by the matrix of their group."""
    random = np.random.default_rng(rows)
    groups = np.sort(random.choice([0, 1, 3, 3, 3, 6], rows))
    sizes = jnp.array(np.bincount(groups, minlength=7), jnp.int32)
    x, w, dy = (jnp.array(random.normal(size=shape), jnp.float32) for shape in ((rows, 5), (7, 5, 4), (rows, 4)))
    want = np.einsum("ri,rio->ro", x, np.asarray(w)[groups])
    dx = np.einsum("ro,rio->ri", dy, np.asarray(w)[groups])
    dw = np.zeros(w.shape)
    np.add.at(dw, groups, np.einsum("ri,ro->rio", x, dy))
    for product in (grouped_product, product_in_blocks):
        y, pull = jax.vjp(lambda x, w, product=product: product(x, w, sizes), x, w)
        for one, other in zip((y, *pull(dy)), (want, dx, dw), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max()))


def test_backward_keeps_no_matrix_of_an_expert() -> None:
    """Neither a slice of each block nor a copy: the frozen matrices themselves, and rows."""
    x, w, sizes = jnp.ones((256, 32)), jnp.ones((4, 32, 48)), jnp.full(4, 64)
    _, pull = jax.vjp(lambda x: product_in_blocks(x, w, sizes), x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > x.size]
    assert all(leaf.shape == w.shape for leaf in kept) and len(kept) <= 1, [leaf.shape for leaf in kept]


def test_fused_checkpoints_are_read_like_those_of_single_experts(kind: str, folders: Any, tmp_path: Any) -> None:
    model = torch_model(kind)
    model.save_pretrained(tmp_path, save_original_format=False)
    assert any(key.endswith("gate_up_proj") for key in load_file(tmp_path / "model.safetensors"))
    one, other = (pj.AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (tmp_path, folders(kind)))
    assert one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_condition_numbers_choose_pefts_targets(folders: Any) -> None:
    """Modules and fused experts in PEFT's order, in a tree too; what is too large is left out."""
    helpers = pytest.importorskip("peft.helpers")
    theirs, ours = torch_model("mixtral"), pj.AutoModelForCausalLM.from_pretrained(folders("mixtral"), dtype="float32")
    for share in (0.2, 1.0):
        want = helpers.find_kappa_target_modules(theirs, share, show_progress=False)
        assert pj.find_kappa_target_modules(ours, share) == want
    assert len(want["target_modules"]) > 4 and len(want["target_parameters"]) > 1
    assert want["target_modules"] != sorted(want["target_modules"])
    limit = ours.config.hidden_size
    want = helpers.find_kappa_target_modules(theirs, 1.0, limit, show_progress=False)
    assert pj.find_kappa_target_modules(ours, 1.0, limit) == want and "lm_head" not in want["target_modules"]
    with pytest.raises(ValueError, match="top_p is a fraction above 0 and at most 1, got 0"):
        pj.find_kappa_target_modules(ours, 0)


def test_lora_on_experts_both_ways(form: str, folders: Any, tmp_path: Any) -> None:
    """One adapter for each expert, of the router, and of a module: the same logits, merged too, and the same files."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = torch_model(form)
    plain = torch_logits(base)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**lora_of(form)))
    torch.manual_seed(1)
    moved(theirs, 0.2, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.eval().save_pretrained(tmp_path / "theirs")
    want = torch_logits(theirs)
    assert np.abs(want - plain).max() > 100 * tolerance(want), "the adapter is dead"
    ours = pj.AutoModelForCausalLM.from_pretrained(folders(form), dtype="float32")
    model = pj.PeftModel.from_pretrained(ours, tmp_path / "theirs")
    close(logits(model), want)
    close(logits(model.merge_and_unload()), want)
    model.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    fresh = pj.get_peft_model(ours, pj.LoraConfig(**lora_of(form)))
    close(logits(fresh), plain)
    small = pj.AutoModelForCausalLM.from_pretrained(folders(form), dtype="float32", load_in_8bit=True)
    rounded = logits(pj.PeftModel.from_pretrained(small, tmp_path / "theirs"))
    assert 0 < np.linalg.norm(rounded - want) / np.linalg.norm(want) < 0.1


def test_gradients_of_adapters_on_experts(kind: str, folders: Any, tmp_path: Any) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = peft.get_peft_model(torch_model(kind), peft.LoraConfig(**lora_of(kind)))
    torch.manual_seed(1)
    moved(theirs, 0.2, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.train().save_pretrained(tmp_path)
    theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
    want = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    base = pj.AutoModelForCausalLM.from_pretrained(folders(kind), dtype="float32")
    model = pj.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    trainable, frozen = pj.partition(model)
    grads = jax.grad(lambda own: pj.combine(own, frozen)(IDS, labels=IDS).loss)(trainable)
    found = pj.get_peft_model_state_dict(pj.combine(grads, frozen))
    assert found.keys() == want.keys()
    largest = max(np.abs(one).max() for one in want.values())
    for key in want:
        np.testing.assert_allclose(found[key], want[key], rtol=0, atol=1e-5 * max(1, largest), err_msg=key)


def test_experts_in_mxfp4_are_those_of_transformers(tmp_path: Any) -> None:
    """The published checkpoints have their experts so; transformers' own reader dequantizes them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = torch_model("gpt_oss", intermediate_size=64)
    generator = torch.Generator().manual_seed(3)
    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    for key in [key for key in tensors if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, n_in, out = tensors.pop(key).shape
        shape = (experts, out, n_in // 32, 16)
        tensors[f"{key}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        tensors[f"{key}_scales"] = torch.randint(122, 126, shape[:-1], dtype=torch.uint8, generator=generator)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    config = {**model.config.to_dict(), "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=settings, dtype=torch.float32
    )
    with pytest.warns(UserWarning, match="6 weights quantized by mxfp4"):
        ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    want = theirs.model.layers[2].mlp.experts.gate_up_proj.detach().numpy()
    np.testing.assert_array_equal(ours.params["model"]["layers"]["mlp"]["experts"]["gate_up_proj"][2], want)
    close(logits(ours), torch_logits(theirs.eval()))


def test_experts_in_fp8_are_those_of_transformers(folders: Any, tmp_path: Any) -> None:
    """As DeepSeek-V3 is published: expert by expert with scales of blocks, and a module that no model here has."""
    torch, writers = pytest.importorskip("torch"), pytest.importorskip("quantized_writers")
    file, block = "model.safetensors", [2, 2]
    stored, plain = {}, {}
    for key, values in load_file(folders("deepseek_v3") / file).items():
        module, _, name = key.rpartition(".")
        quantized = ".layers." in key and name == "weight" and values.ndim == 2 and not key.endswith(".mlp.gate.weight")
        parts, want = {key: torch.tensor(values)}, torch.tensor(values)
        if quantized:
            parts, want = writers.fp8(module, want, block=block)
        stored |= parts
        plain[key] = want.numpy()
        if key.startswith("model.layers.2.mlp.experts."):
            stored |= {name.replace("layers.2.", "layers.61."): part.clone() for name, part in parts.items()}
    config = json.loads((folders("deepseek_v3") / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3", "activation_scheme": "dynamic"}
    for name, tensors, fields in (("fp8", stored, {"quantization_config": quantization}), ("plain", plain, {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **fields}))
        if name == "plain":
            save_file(tensors, tmp_path / name / file, {"format": "pt"})
        else:
            pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / name / file, {"format": "pt"})
    want = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32").params
    with pytest.warns(UserWarning, match="weights quantized by fp8 in .* whose quantization of activations is not"):
        found = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype="float32").params
    jax.tree.map(np.testing.assert_array_equal, found, want)
    unlike = pj.AutoModelForCausalLM.from_pretrained(folders("deepseek_v3"), dtype="float32").params
    experts = [one["model"]["layers"]["sparse"]["mlp"]["experts"]["gate_up_proj"] for one in (want, unlike)]
    assert 1e-3 < np.abs(experts[0] - experts[1]).max() < 0.1, "quantization shows"
    lost = {key: part for key, part in stored.items() if key != "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"}
    pytest.importorskip("safetensors.torch").save_file(lost, tmp_path / "fp8" / file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor 'model.layers.1.mlp.experts.3.up_proj.weight_scale_inv'"):
        pj.AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", dtype="float32")


def test_biases_of_experts_are_refused_as_targets() -> None:
    sizes = {**ARCHITECTURES["gpt_oss"].sizes, "num_hidden_layers": 1}
    base = pj.AutoModelForCausalLM.from_config(read_architecture({"model_type": "gpt_oss", **sizes}))
    for options, said in (
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias='all' means .*down_proj_bias.* not supported"),
        ({"target_parameters": ["gate_up_proj_bias"]}, "gate_up_proj_bias' of shape .* is no weight of a product"),
        ({"target_modules": ["q_proj"], "fan_in_fan_out": True}, "fan_in_fan_out=True is for layers stored"),
        ({"target_modules": ["gate_up_proj"]}, "gate_up_proj.* Name it in target_parameters"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            pj.get_peft_model(base, pj.LoraConfig(**options, task_type="CAUSAL_LM"))
        assert "\n" not in str(caught.value)


def test_a_prefix_is_refused_where_layers_keep_latent_vectors() -> None:
    sizes = {**ARCHITECTURES["deepseek_v3"].sizes, "num_hidden_layers": 1}
    base = pj.AutoModelForCausalLM.from_config(read_architecture({"model_type": "deepseek_v3", **sizes}))
    with pytest.raises(ValueError, match="PREFIX_TUNING is not for deepseek_v3 models, whose layers keep one vector"):
        pj.get_peft_model(base, pj.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))


def test_layers_without_experts_stay_in_front() -> None:
    """Replicated layers are those of a config, which counts the dense ones in front."""
    config = read_architecture({"model_type": "deepseek_v3", **ARCHITECTURES["deepseek_v3"].sizes})
    assert config.with_layers([0, 0, 2, 1]).sparse_layers == (False, False, True, True)
    with pytest.raises(ValueError, match="a layer without experts after one with experts"):
        config.with_layers([0, 1, 0])


def test_bad_checkpoints_are_refused_in_one_line(folders: Any, tmp_path: Any) -> None:
    tensors = load_file(folders("olmoe") / "model.safetensors")
    config = json.loads((folders("olmoe") / "config.json").read_text())
    expert = "model.layers.1.mlp.experts.2.up_proj.weight"
    lacking = {key: tensor for key, tensor in tensors.items() if key != expert}
    narrow = {**tensors, expert: tensors[expert][:-1]}
    for bad, said, change in (
        (lacking, f"missing: {expert}", {}),
        (narrow, expert, {}),
        (tensors, "mlp.gate.weight", {"num_experts": 5}),
        (tensors, "missing", {"num_experts": 7}),
    ):
        save_file(bad, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match="do not fit its config.json") as caught:
            pj.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert said in str(caught.value) and "\n" not in str(caught.value), caught.value


def test_bad_adapters_are_refused_in_one_line(folders: Any, tmp_path: Any) -> None:
    pytest.importorskip("torch")
    base = pj.AutoModelForCausalLM.from_pretrained(folders("olmoe"), dtype="float32")
    pj.get_peft_model(base, pj.LoraConfig(**lora_of("olmoe"))).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    of_expert = next(key for key in tensors if key.endswith("experts.lora_A.weight"))
    save_file({**tensors, of_expert: tensors[of_expert][:-2]}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit this base: .*experts\.lora_A\.weight has shape") as caught:
        pj.PeftModel.from_pretrained(base, tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.gate' is no linear layer.*target_parameters"):
        pj.get_peft_model(base, pj.LoHaConfig(target_modules=["gate"], task_type="CAUSAL_LM"))


def single_experts(kind: str, folder: Any, targets: list[str]) -> dict[str, np.ndarray]:
    """An adapter on experts one by one and on routers, as PEFT wrote it before transformers 5."""
    row = ARCHITECTURES[ROWS[kind]]
    [n] = [row.sizes[name] for name in COUNTS if name in row.sizes]
    hidden, dense = row.sizes["hidden_size"], row.sizes.get("first_k_dense_replace", 0)
    inner = row.sizes.get("moe_intermediate_size", row.sizes["intermediate_size"])
    block = "block_sparse_moe" if kind == "mixtral" else "mlp"
    random, tensors = np.random.default_rng(3), {}
    for layer in range(row.sizes["num_hidden_layers"]):
        if layer < dense or layer in FIELDS.get(kind, {}).get("mlp_only_layers", ()):
            continue
        front = f"base_model.model.model.layers.{layer}.{block}"
        shapes = {}
        for target in targets:
            n_in, n_out = (inner, hidden) if target in ("w2", "down_proj") else (hidden, inner)
            shapes |= {f"{front}.experts.{expert}.{target}": (n_in, n_out) for expert in range(n)}
        shapes[f"{front}.gate"] = (hidden, n)
        for name, (n_in, n_out) in shapes.items():
            tensors[f"{name}.lora_A.weight"] = random.normal(0, 0.3, (2, n_in)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = random.normal(0, 0.3, (n_out, 2)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 3}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": [*targets, "gate"]}))
    return tensors


def test_adapters_on_single_experts_are_read_as_peft_reads_them(kind: str, folders: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    targets = ["w1", "w2", "w3"] if kind == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    single_experts(kind, tmp_path, targets)
    theirs = peft.PeftModel.from_pretrained(torch_model(kind), tmp_path).eval()
    ours = pj.AutoModelForCausalLM.from_pretrained(folders(kind), dtype="float32")
    model = pj.PeftModel.from_pretrained(ours, tmp_path)
    close(logits(model), torch_logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    for chosen in (["o_proj", *targets], "all-linear", rf".*\.({'|'.join(targets)})"):
        options = {"r": 2, "target_modules": chosen, "task_type": "CAUSAL_LM"}
        fresh = pj.get_peft_model(ours, pj.LoraConfig(**options))
        other = peft.get_peft_model(torch_model(kind), peft.LoraConfig(**options))
        shapes = {key: tuple(one.shape) for key, one in peft.get_peft_model_state_dict(other).items()}
        assert {key: one.shape for key, one in pj.get_peft_model_state_dict(fresh).items()} == shapes
    with pytest.raises(ValueError, match=f"names '{targets[0]}' without .* Name both, or neither"):
        pj.get_peft_model(ours, pj.LoraConfig(target_modules=[targets[0]], task_type="CAUSAL_LM"))


@pytest.mark.parametrize("mixture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_quantizing_a_model_and_reading_one_in_few_bits_take_the_same_leaves(mixture: str) -> None:
    """Fused experts, which are most of a mixture, and not its router."""
    row = ARCHITECTURES[ROWS[mixture]]
    config = read_architecture({"model_type": mixture, **row.sizes, **row.model_types[mixture], "num_hidden_layers": 2})
    small = jax.eval_shape(lambda: pj.quantize(pj.AutoModelForCausalLM.from_config(config)))
    quantized = {path for path, leaf in named_leaves(small.params, is_weight).items() if is_weight(leaf)}
    asked: dict[str, Any] = {"load_in_8bit": True, "load_in_4bit": False, "quantization_config": None}
    read = load_rounding(config, family_of(config).rows(config), **asked)
    assert read is not None and quantized == {path for path, _ in read.layouts}
    assert any(path.endswith("experts.down_proj") for path in quantized)
    assert not any(path.endswith(f"{ROUTERS.get(mixture, 'gate')}.kernel") for path in quantized)

"""LoRA's starts that look at data: PEFT's ranks, factors and bases, the function as it was, files to and from PEFT."""

import dataclasses
import importlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close

import peft_jax as pj
from peft_jax import interop

STARTS = {
    "eva": {"init_lora_weights": "eva"},
    "eva whitened, at fixed ranks": {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "whiten": True}}
    | {"target_modules": ["q_proj", "down_proj"]},  # of layers with the same inputs PEFT divides the same array twice
    "eva with patterns": {
        "init_lora_weights": "eva",
        "eva_config": {"rho": 1.5, "adjust_scaling_factors": False, "use_label_mask": False},
        "rank_pattern": {"v_proj": 4},
        "alpha_pattern": {"down_proj": 5},
    },
    "corda": {"init_lora_weights": "corda"},
    "corda kpm": {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}, "rank_pattern": {"v_proj": 3}},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": {}},
    "lora_ga in turns": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": {"direction": "ArBr", "scale": "gd_scale"},
        "use_rslora": True,
    },
    "lora_ga by the weight": {
        "init_lora_weights": "lora_ga",
        "lora_ga_config": {"direction": "A2rBr", "scale": "weight_svd"},
    },
    "lora_ga unit": {"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unit"}},
}
COMMON = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
CLASSES = {"eva_config": "EvaConfig", "corda_config": "CordaConfig", "lora_ga_config": "LoraGAConfig"}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # PEFT's, of options and of hooks that are not called
]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def config_of(library, row):
    options = {**COMMON, **STARTS[row]}
    classes = pj if library is pj else importlib.import_module("peft.tuners.lora.config")
    made = {name: getattr(classes, CLASSES[name])(**options[name]) for name in CLASSES if name in options}
    return library.LoraConfig(**{**options, **made})


def batches_of(length=12, rows=1):
    rng = np.random.default_rng(3)
    found = []
    for _ in range(3):
        ids = rng.integers(2, 280, (rows, length))
        labels = np.where(np.arange(length) < 3, -100, ids)
        found.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels})
    found[0]["attention_mask"][:, -1] = 0
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=20, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=288, num_hidden_layers=2, initializer_range=0.3, **sizes))
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def theirs_of(row, folder, batches):
    """PEFT's model with the adapter started from the batches."""
    import peft
    import torch

    # PEFT's CorDA takes its dataclass from attrs, of which it does not say that it needs it.
    with pytest.MonkeyPatch.context() as patch:
        if "attr" not in sys.modules:
            patch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga
    from transformers import AutoModelForCausalLM

    model, config = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), config_of(peft, row)
    tensors = [{name: torch.tensor(array) for name, array in batch.items()} for batch in batches]
    if row.startswith("corda"):
        preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in tensors])
    if row.startswith("lora_ga"):
        preprocess_loraga(model, config, lambda: [model(**batch).loss.backward() for batch in tensors])
    theirs = peft.get_peft_model(model, config)
    if row.startswith("eva"):
        peft.initialize_lora_eva_weights(theirs, tensors, show_progress_bar=False)
    return theirs.eval()


@pytest.mark.parametrize("row", STARTS)
def test_starts_are_pefts(row, folder, tmp_path, monkeypatch):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    def exact(x, q, niter):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        return u[:, :q], s[:q], vt[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", exact)  # PEFT's own starts at a random subspace
    torch.manual_seed(0)
    batches = batches_of()
    theirs = theirs_of(row, folder, batches)
    theirs.save_pretrained(tmp_path / "theirs")
    base = pj.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model = pj.PeftModel.of(pj.apply_lora_from_data(base, config_of(pj, row), batches))
    close(model(batches[0]["input_ids"]).logits, base(batches[0]["input_ids"]).logits)
    model.save_pretrained(tmp_path / "ours")
    ours, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for field in ours.keys() & other.keys() - {"target_modules", "alpha_pattern"}:
        assert ours[field] == other[field], field
    assert ours["alpha_pattern"].keys() == other["alpha_pattern"].keys()
    for name, alpha in other["alpha_pattern"].items():
        assert abs(ours["alpha_pattern"][name] - alpha) < 1e-6
    got = interop.get_peft_model_state_dict(model)
    want = {key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    assert got.keys() == want.keys()
    assert sum(np.abs(array).max() > 1e-3 for array in got.values()) >= len(got) // 2
    for key in (key for key in want if ".lora_A." in key):
        pair = key, key.replace("lora_A", "lora_B")
        signs = np.sign(np.sum(got[pair[0]] * want[pair[0]], axis=1))
        close_in_part(got[pair[0]] * signs[:, None], want[pair[0]])
        if row.startswith("lora_ga"):  # A and B take unlike directions, each with a sign of its own
            signs = np.sign(np.sum(got[pair[1]] * want[pair[1]], axis=0))
        close_in_part(got[pair[1]] * signs[None], want[pair[1]])
    if row.startswith("corda"):
        state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
        left = model.unload().params["model"]["layers"]
        for i, (part, name) in ((i, two) for i in (0, 1) for two in TWO):
            want_base = state[f"base_model.model.model.layers.{i}.{part}.{name}.base_layer.weight"].T
            close_in_part(left[part][name]["kernel"][i], want_base)
            assert np.abs(base.params["model"]["layers"][part][name]["kernel"][i] - want_base).max() > 1e-3


TWO = (("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj"))


def close_in_part(got, want):
    """EVA's decomposition is one of second moments in float32, whose small singular values have half the digits."""
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-3 * np.abs(want).max() + 1e-6)


def model_of(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def small():
    return {"up": {"kernel": normal(0, 6, 8)}, "down": {"kernel": normal(1, 8, 5)}}


def loss_of(params, batch):
    return jnp.mean((model_of(params, batch[0]) - batch[1]) ** 2)


def options(start, **more):
    config = {"lora_ga_config": pj.LoraGAConfig()} if start == "lora_ga" else {}
    return pj.LoraConfig(**{"r": 2, "target_modules": ["up", "down"], "init_lora_weights": start, **config, **more})


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_an_adapter_goes_on_the_base_as_it_was_once_its_start_is_taken_out(start, tmp_path):
    data = [(normal(i, 7, 6), normal(i + 9, 7, 5)) for i in range(2)]
    batches = data if start == "lora_ga" else [x for x, _ in data]
    fn = loss_of if start == "lora_ga" else model_of
    base = small()
    params = pj.apply_lora_from_data(base, options(start), batches, fn=fn)
    x = data[0][0]
    close(pj.adapt(model_of)(params, x), model_of(base, x))
    interop.save_adapter(params, tmp_path / "start")
    trainable, frozen = pj.partition(params)
    params = pj.combine(jax.tree.map(lambda array: array + 0.1, trainable), frozen)
    want = pj.adapt(model_of)(params, x)
    interop.save_adapter(params, tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start")
    again = interop.load_adapter(base, tmp_path / "lora")
    close(pj.adapt(model_of)(again, x), want)
    interop.save_adapter(params, tmp_path / "whole")  # goes on what the start left
    again = interop.load_adapter(pj.unload(params), tmp_path / "whole")
    close(pj.adapt(model_of)(again, x), want)
    assert np.abs(want - model_of(base, x)).max() > 1e-2


def test_the_first_step_of_lora_ga_is_along_the_gradient():
    """What the paper promises: of all steps of this rank the one nearest to full fine-tuning's."""
    base, batch = small(), (normal(3, 7, 6), normal(4, 7, 5))
    params = pj.apply_lora_from_data(base, options("lora_ga"), [batch], fn=loss_of)
    trainable, frozen = pj.partition(params)
    slopes = jax.grad(lambda t: pj.adapt(loss_of)(pj.combine(t, frozen), batch))(trainable)
    full = jax.grad(loss_of)(base, batch)["up"]["kernel"]
    after = pj.combine(jax.tree.map(lambda a, g: a - 1e-3 * g, trainable, slopes), frozen)
    step = (pj.merge(params)["up"]["kernel"] - pj.merge(after)["up"]["kernel"]).ravel()
    _, s, _ = np.linalg.svd(full)
    cosine = step @ full.ravel() / np.linalg.norm(step) / np.linalg.norm(full)
    assert cosine > np.linalg.norm(s[:2]) / np.linalg.norm(s) * 0.9


def test_eva_takes_the_principal_components_of_many_batches_and_moves_ranks_to_where_they_explain():
    scales = jnp.array([[8.0, 4.0, 1.0, 0.1, 0.1, 0.1]])
    batches = [normal(i, 64, 6) * scales for i in range(4)]
    params = pj.apply_lora_from_data(small(), options("eva", eva_config={"tau": 0.9999}), batches, fn=model_of)
    a = params["up"]["kernel"].params["lora_A"]
    x = np.concatenate(batches)
    _, _, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for i in range(2):
        assert abs(np.asarray(a[:, i]) @ vt[i]) > 0.999
    config = params["up"]["kernel"].tag.config
    assert sum(config.rank(name) for name in ("up", "down") if name in config.target_modules) == 4


def test_masked_tokens_count_for_nothing():
    x, wild = normal(0, 2, 20, 6), 100 * normal(1, 2, 20, 6)
    batches = [jnp.concatenate([x, wild], axis=1)]
    kept = jnp.concatenate([jnp.ones((2, 20)), jnp.zeros((2, 20))], axis=1)
    params = pj.apply_lora_from_data(small(), options("eva"), batches, fn=model_of, mask=lambda batch: kept)
    alone = pj.apply_lora_from_data(small(), options("eva"), [x], fn=model_of)
    close(params["up"]["kernel"].params["lora_A"], alone["up"]["kernel"].params["lora_A"])
    with pytest.raises(ValueError, match="the mask of their tokens has shape"):
        pj.apply_lora_from_data(small(), options("eva"), batches, fn=model_of, mask=lambda batch: kept[:1])


def test_an_int8_base_starts_with_eva_and_keeps_its_bits():
    base = pj.quantize(small())
    params = pj.apply_lora_from_data(base, options("eva", use_dora=True), [normal(2, 30, 6)], fn=model_of)
    np.testing.assert_array_equal(pj.unload(params)["up"]["kernel"].q, base["up"]["kernel"].q)
    close(pj.adapt(model_of)(params, normal(2, 3, 6)), pj.adapt(model_of)(base, normal(2, 3, 6)))


@pytest.mark.parametrize(
    ("start", "more", "batches", "message"),
    [
        ("eva", {}, [], "There are no batches"),
        ("eva", {"r": 4}, [normal(0, 9, 6)], "looks for r . rho = 8 components of the inputs of 'up', which are 6"),
        (
            "corda",
            {"corda_config": {"cache_file": "x"}},
            [normal(0, 9, 6)],
            "corda_config with .*cache_file.* not supp",
        ),
        (
            "lora_ga",
            {"r": 3},
            [(normal(0, 9, 6), normal(1, 9, 5))],
            "takes 2 . r = 6 directions of a weight that has 5",
        ),
        ("lora_ga", {"lora_ga_config": None}, [(normal(0, 9, 6), normal(1, 9, 5))], "lora_ga_config is not given"),
        (True, {}, [normal(0, 9, 6)], "does not look at data. Write pj.apply_lora"),
    ],
)
def test_starts_that_cannot_be_made_say_why(start, more, batches, message):
    fn = loss_of if start == "lora_ga" else model_of
    with pytest.raises(ValueError, match=message):
        pj.apply_lora_from_data(small(), options(start, **more), batches, fn=fn)


def test_without_data_they_are_refused_and_so_are_options_of_other_starts():
    with pytest.raises(ValueError, match="looks at data. Write pj.apply_lora_from_data"):
        pj.apply_lora(small(), options("corda"))
    with pytest.raises(ValueError, match="Give fn=, a function of the tree and a batch"):
        pj.apply_lora_from_data(small(), options("corda"), [normal(0, 9, 6)])
    with pytest.raises(ValueError, match="asks for a loss"):
        pj.apply_lora_from_data(small(), options("lora_ga"), [normal(0, 9, 6)], fn=model_of)
    with pytest.raises(ValueError, match="meets no inputs in a product"):
        pj.apply_lora_from_data(small(), options("corda"), [normal(0, 9, 6)], fn=lambda p, x: x @ p["up"]["kernel"])
    with pytest.raises(ValueError, match="is for float weights"):
        base = pj.quantize(small())
        pj.apply_lora_from_data(base, options("lora_ga"), [(normal(0, 9, 6), normal(1, 9, 5))], fn=loss_of)
    for wrong in ({"corda_config": {"corda_method": "x"}}, {"eva_config": {"rho": 0.5}}, {"eva_config": {"r": 1}}):
        with pytest.raises(ValueError, match="corda_method is|rho of at least 1|does not know"):
            options("eva" if "eva_config" in wrong else "corda", **wrong)
    with pytest.raises(ValueError, match="eva_config goes with init_lora_weights='eva'"):
        pj.LoraConfig(init_lora_weights="pissa", eva_config=pj.EvaConfig())

"""One LoRA made of several: PEFT's numbers in every way it has, and the right ones where it errs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax import interop
from peft_jax.adapters.combine.task_vectors import combine
from peft_jax.adapters.combine.weighted_lora import FACTORS, MATRICES, WAYS

NAMES, WEIGHTS = ["a", "b", "c"], [0.7, -0.4, 1.3]
PRUNED = {"density": 0.4}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def tree(bias=False):
    layers = {"up": {"kernel": normal(0, 2, 8, 12)}, "down": {"kernel": normal(1, 2, 12, 8)}}
    if bias:
        layers["up"]["bias"] = normal(2, 2, 12)
    return {"layers": layers, "embed": {"embedding": normal(3, 10, 8)}}


LAYOUT = {r".*kernel": pj.Layout((0,), (1,), (2,)), r".*bias": pj.Layout((0,), (), (1,))}


def with_adapters(base, configs):
    biased = "bias" in base["layers"]["up"]
    layout = {pattern: one for pattern, one in LAYOUT.items() if biased or "bias" not in pattern}
    for name, config in configs.items():
        config = {"r": 4, "init_lora_weights": False, "target_modules": ["up", "down", "embed"]} | config
        base = pj.apply_lora(
            base, pj.LoraConfig(**config), adapter_name=name, key=jax.random.key(len(name) + ord(name)), layout=layout
        )
    return base


def changes(params, base, name):
    """What an adapter adds to each leaf."""
    one, zero = pj.merge(pj.set_adapter(params, name)), pj.merge(base)
    return jax.tree.map(jnp.subtract, one, zero)


def combined(params, *args, **options):
    new = pj.add_weighted_adapter(params, NAMES, WEIGHTS, "new", *args, **options)
    for name in NAMES:
        jax.tree.map(np.testing.assert_array_equal, *(pj.merge(pj.set_adapter(one, name)) for one in (new, params)))
    return new


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"b": {"use_rslora": True, "lora_alpha": 3}},
        {"b": {"r": 2, "lora_alpha": 5}, "c": {"rank_pattern": {r"layers\.1\.up": 6}, "alpha_pattern": {"down": 3}}},
        {"a": {"target_modules": ["up"]}, "b": {"target_modules": r"layers\.0\..*"}},
        {name: {"lora_bias": True, "lora_alpha": 5, "target_modules": ["up"]} for name in "ac"},
    ],
    ids=["alike", "rslora", "ranks", "targets", "bias"],
)
@pytest.mark.parametrize("way", ["cat", "svd"])
def test_a_sum_of_adapters_is_exact_whatever_their_scales_ranks_and_targets(way, options):
    """PEFT is wrong by a square root of the rank after rslora, and drops the biases."""
    base = tree(bias="a" in options and "lora_bias" in options["a"])
    params = with_adapters(base, {name: options.get(name, {}) for name in NAMES})
    new = combined(params, way, **({"svd_rank": 18} if way == "svd" else {}))
    want = jax.tree.map(
        lambda *x: sum(w * one for w, one in zip(WEIGHTS, x, strict=True)),
        *(changes(params, base, name) for name in NAMES),
    )
    jax.tree.map(close, changes(new, base, "new"), want)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(want)) > 1


def test_a_combination_is_saved_and_loaded_as_what_it_is(tmp_path):
    base = tree()
    options = {"r": 2, "rank_pattern": {r"layers\.1\.up": 6}}
    params = with_adapters(base, {"a": options, "b": {**options, "layers_to_transform": None}})
    for way, ranks in {"linear": [2, 6], "cat": [12, 12]}.items():
        new = pj.add_weighted_adapter(params, ["a", "b"], [1.0, 0.5], way, way)
        interop.save_adapter(new, tmp_path, adapter_name=way)
        again = interop.load_adapter(base, tmp_path / way, layout={r".*kernel": LAYOUT[r".*kernel"]})
        jax.tree.map(close, pj.merge(again), pj.merge(pj.set_adapter(new, way)))
        assert again["layers"]["up"]["kernel"].state["rank"].tolist() == ranks


def peft_model(torch, peft, embedding=False):
    torch.manual_seed(0)
    layer = torch.nn.Embedding(12, 8) if embedding else torch.nn.Linear(12, 8)
    model = torch.nn.ModuleDict({"dense": layer})
    for i, name in enumerate(NAMES):
        config = peft.LoraConfig(r=4, lora_alpha=3 + i, init_lora_weights=False, target_modules=["dense"])
        model = peft.PeftModel(model, config, name) if i == 0 else model
        if i:
            model.add_adapter(name, config)
    return model


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("way", [way for way in WAYS if "dare" not in way])
def test_ways_without_chance_are_pefts(way, embedding):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = peft_model(torch, peft, embedding)
    options = {"density": 0.4, "majority_sign_method": "frequency"} if way not in ("svd", "linear", "cat") else {}
    options |= {"svd_rank": 5} if way in MATRICES else {}
    theirs.base_model.add_weighted_adapter(NAMES, WEIGHTS, "new", combination_type=way, **options)
    leaf = "embedding" if embedding else "kernel"
    base = {"dense": {leaf: jnp.zeros((12, 8))}}
    for name in NAMES:
        tensors = {
            key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs, adapter_name=name).items()
        }
        config = theirs.peft_config[name]
        config = pj.LoraConfig(r=4, lora_alpha=config.lora_alpha, target_modules=["dense"])
        base = interop.set_peft_model_state_dict(base, config, tensors, adapter_name=name)
    new = pj.add_weighted_adapter(base, NAMES, WEIGHTS, "new", way, **options)
    got = interop.get_peft_model_state_dict(new, "new")
    want = {key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs, adapter_name="new").items()}
    assert {key: tensor.shape for key, tensor in got.items()} == {key: tensor.shape for key, tensor in want.items()}
    got, want = (list(tensors.values()) for tensors in (got, want))
    signs = np.sign(np.sum(got[0] * want[0], axis=1)) if way in MATRICES else np.ones(len(got[0]))
    close(got[0] * signs[:, None], want[0], 1e-4)  # directions of near values turn with the last digits
    close(got[1] * signs[None], want[1], 1e-4)
    change = pj.merge(pj.set_adapter(new, "new"))["dense"][leaf]
    theirs.set_adapter("new")
    delta = theirs.base_model.model["dense"].get_delta_weight("new").detach().numpy()
    close(change, delta if embedding else delta.T)


def test_factors_are_cut_off_at_a_quantile():
    params = with_adapters(tree(), {"a": {}, "b": {}})
    free, cut = (
        pj.add_weighted_adapter(
            params, ["a", "b"], [1, 1], "new", svd_clamp=clamp, svd_full_matrices=full, svd_driver="gesvd"
        )
        for clamp, full in ((None, True), (0.8, False))
    )
    free, cut = (one["embed"]["embedding"].params for one in (free, cut))
    most = np.quantile(np.concatenate([free["lora_A"].ravel(), free["lora_B"].ravel()]), 0.8)
    for name in free:
        close(cut[name], np.clip(free[name], -most, most))
    assert np.abs(free["lora_B"]).max() > most


@pytest.mark.parametrize("way", ["linear", "ties", "magnitude_prune"])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_tensors_are_combined_as_peft_combines_them(way, sign):
    torch, merge_utils = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    tensors = [np.array(normal(i, 7, 9)) for i in range(3)]
    name = {"linear": "task_arithmetic"}.get(way, way)
    args = () if way == "linear" else (0.35,) if way == "magnitude_prune" else (0.35, sign)
    want = getattr(merge_utils, name)([torch.tensor(t) for t in tensors], torch.tensor(WEIGHTS), *args).numpy()
    close(combine(way, tensors, WEIGHTS, 0.35, sign, jax.random.key(0)), want)


@pytest.mark.parametrize("way", ["dare_linear", "dare_ties"])
def test_pruning_by_chance_keeps_the_density_and_the_mean(way):
    """Also of what PEFT draws: counts and means of many draws, within five standard errors."""
    torch, merge_utils = pytest.importorskip("torch"), pytest.importorskip("peft.utils.merge_utils")
    torch.manual_seed(0)
    tensors = [np.abs(np.array(normal(i, 100, 200))) + 0.1 for i in range(2)]
    weights, density = [0.6, 0.9], 0.3
    got = np.array(combine(way, tensors, weights, density, "total", jax.random.key(0)))
    theirs = getattr(merge_utils, way)([torch.tensor(t) for t in tensors], torch.tensor(weights), density).numpy()
    assert abs((got == 0).mean() - 0.7**2) < 5 * (0.49 * 0.51 / got.size) ** 0.5
    error = 5 * got.std() / got.size**0.5
    assert abs(got.mean() - theirs.mean()) < 2 * error
    if way == "dare_linear":
        assert abs(got.mean() - sum(w * t.mean() for w, t in zip(weights, tensors, strict=True))) < error


@pytest.mark.parametrize("way", WAYS)
def test_every_way_works_on_stacks_and_int8_bases(way):
    base = pj.quantize(tree(), target_modules=["up", "down"], layout={r".*kernel": LAYOUT[r".*kernel"]})
    params = base
    for name in NAMES:
        config = pj.LoraConfig(r=4, init_lora_weights=False, target_modules=["up", "embed"])
        params = pj.apply_lora(params, config, adapter_name=name, key=jax.random.key(ord(name)))
    new = combined(params, way, density=0.5)
    jax.tree.map(np.testing.assert_array_equal, pj.merge(new), pj.merge(params))  # it is not active yet
    rank = {"cat": 12}.get(way, 4)
    leaf = pj.set_adapter(new, "new")["layers"]["up"]["kernel"]
    assert leaf.params["lora_A"].shape == (2, 8, rank) and leaf.params["lora_B"].shape == (2, rank, 12)
    assert np.abs(changes(new, base, "new")["layers"]["up"]["kernel"]).max() > 0.1
    if way.startswith("dare"):
        other = pj.add_weighted_adapter(params, NAMES, WEIGHTS, "new", way, density=0.5, key=jax.random.key(1))
        assert (
            np.abs(
                changes(other, base, "new")["layers"]["up"]["kernel"]
                - changes(new, base, "new")["layers"]["up"]["kernel"]
            ).max()
            > 0.01
        )
    assert set(FACTORS) | set(MATRICES) | {"cat"} == set(WAYS)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((["a", "z"], [1, 1], "new"), {}, r"No adapters are named \['z'\]. Found: \['a', 'b'\]"),
        ((["a", "b"], [1], "new"), {}, "a weight for each"),
        ((["a", "a"], [1, 1], "new"), {}, "each once"),
        ((["a", "b"], [1, 1], "a"), {}, "'a' is taken"),
        ((["a", "b"], [1, 1], "new", "sum"), {}, "'sum' is not known. Write one of svd, "),
        ((["a", "b"], [1, 1], "new", "ties"), {}, r"'ties' needs a density in \(0, 1\], got None"),
        ((["a", "b"], [1, 1], "new", "dare_ties_svd"), {"density": 1.5}, "needs a density .*got 1.5"),
        (
            (["a", "b"], [1, 1], "new", "ties"),
            {"density": 0.5, "majority_sign_method": "most"},
            "or 'frequency', got 'most'",
        ),
        ((["a", "b"], [1, 1], "new"), {"svd_driver": "gesvda"}, "svd_driver is None, 'gesvd' or"),
        ((["a", "b"], [1, 1], "new", "linear"), {}, r"'linear' adds factors of one rank, .*'embed' have \[4, 2\]"),
    ],
)
def test_what_cannot_be_combined_is_named(args, options, message):
    params = with_adapters(tree(), {"a": {"target_modules": ["embed"]}, "b": {"r": 2, "target_modules": ["embed"]}})
    with pytest.raises(ValueError, match=message):
        pj.add_weighted_adapter(params, *args, **options)


@pytest.mark.parametrize(
    "config",
    [
        pj.LoraConfig(use_dora=True, target_modules=["embed"]),
        pj.LoraConfig(target_modules=["embed"], modules_to_save=["up"]),
        pj.LoraConfig(target_modules=["up"], init_lora_weights="pissa", r=4),
        pj.HiraConfig(target_modules=["embed"]),
    ],
    ids=["DoRA", "saved modules", "PiSSA", "HIRA"],
)
def test_adapters_that_are_no_sums_are_refused(config):
    params = with_adapters(tree(), {"a": {"target_modules": ["embed"]}}) if "embed" in config.target_modules else tree()
    layout = {r".*kernel": LAYOUT[r".*kernel"]}
    params = pj.apply_adapter(params, config, adapter_name="b", layout=layout)
    with pytest.raises(
        ValueError, match="is more than what is added to a weight|is for LoRA, or IA3 alone, and 'b' is HIRA"
    ):
        pj.add_weighted_adapter(params, ["b"], [1.0], "new")


@pytest.mark.filterwarnings("ignore")
def test_ia3_is_combined_as_in_peft(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)).save_pretrained(tmp_path / "base")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    targets = {"a": ["c_attn", "mlp.c_proj"], "b": ["c_attn", "attn.c_proj"]}
    for name, modules in targets.items():
        feedforward = [module for module in modules if module == "mlp.c_proj"]
        config = peft.IA3Config(target_modules=modules, feedforward_modules=feedforward, init_ia3_weights=False)
        theirs = theirs if isinstance(theirs, peft.PeftModel) else peft.get_peft_model(theirs, config, name)
        if name not in theirs.peft_config:
            theirs.add_adapter(name, config)
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new")
    theirs.save_pretrained(tmp_path)
    ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for name in targets:
        ours = pj.PeftModel.from_pretrained(ours, tmp_path / name, adapter_name=name)
    ours = pj.add_weighted_adapter(ours, ["a", "b"], [0.7, -0.4], "new")
    got = pj.get_peft_model_state_dict(ours, adapter_name="new")
    theirs.set_adapter("new")
    state = peft.get_peft_model_state_dict(theirs, adapter_name="new")
    assert got.keys() == state.keys() and len(got) == 6
    for key, tensor in state.items():
        np.testing.assert_allclose(got[key], tensor.detach().numpy(), rtol=1e-6, atol=1e-6)
    ids = np.arange(6)[None]
    with torch.no_grad():
        close(ours.set_adapter("new")(ids).logits, theirs(torch.tensor(ids)).logits.numpy())


@pytest.mark.parametrize(
    ("other", "options", "message"),
    [
        ({"feedforward_modules": ["up"]}, {}, "'layers.up.kernel' is scaled at its inputs by some of"),
        ({}, {"combination_type": "svd"}, "IA3's vectors are added up"),
        ({}, {"density": 0.5}, "IA3's vectors are added up"),
        ({"modules_to_save": ["down"]}, {}, r"Adapters \['b'\] have modules_to_save"),
        ({"target_modules": ".*up", "feedforward_modules": []}, {}, "target_modules is a regex in some"),
    ],
)
def test_ia3_that_cannot_be_combined_is_named(other, options, message):
    params = {"layers": {name: {"kernel": normal(n, 8, 8)} for n, name in enumerate(("up", "down"))}}
    plain = {"target_modules": ["up"], "feedforward_modules": []}
    for name, fields in (("a", plain), ("b", plain | other)):
        params = pj.apply_adapter(params, pj.IA3Config(**fields), adapter_name=name)
    with pytest.raises(ValueError, match=message):
        pj.add_weighted_adapter(params, ["a", "b"], [1.0, 1.0], "new", **options)

"""Where LoRA's factors start from the base: the same function as before, PEFT's factors, and adapters without it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.quant import NF4
from peft_jax.quant.nf4 import VALUES

STARTS = ["pissa", "pissa_niter_8", "olora", "orthogonal"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def config(init, **options):
    return pj.LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": init, "target_modules": ["dense"], **options})


def started(init, kernel, **options):
    layers = {"layers": {"dense": {"kernel": kernel}}}
    layout = {".*": pj.Layout((0,), (1,), (2,))} if kernel.ndim == 3 else None
    return pj.apply_lora(layers, config(init, **options), layout=layout)["layers"]["dense"]["kernel"]


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (3, 12, 8)])
def test_a_start_from_the_base_changes_nothing(init, shape):
    kernel = normal(0, *shape)
    leaf = started(init, kernel)
    close(leaf.dense(), kernel)
    assert all(np.abs(leaf.params[name]).max() > 0.01 for name in ("lora_A", "lora_B"))
    if init != "orthogonal":
        assert np.abs(leaf.base - kernel).max() > 0.1


def test_layers_of_a_stack_start_with_ranks_and_scales_of_their_own_or_not_at_all():
    kernel = normal(0, 3, 12, 8)
    options = {"rank_pattern": {r"layers\.0\.dense": 2}, "alpha_pattern": {r"layers\.0\.dense": 5}}
    leaf = started("pissa", kernel, target_modules=r"layers\.[02]\.dense", **options)
    np.testing.assert_array_equal(leaf.base[1], kernel[1])
    for i, (rank, alpha) in {0: (2, 5), 2: (4, 6)}.items():
        values = np.linalg.svd(leaf.base[i], compute_uv=False)
        np.testing.assert_allclose(values[: 8 - rank], np.linalg.svd(kernel[i], compute_uv=False)[rank:], rtol=1e-4)
        close(leaf.base[i] + alpha / rank * leaf.params["lora_A"][i] @ leaf.params["lora_B"][i], kernel[i])
        assert not leaf.params["lora_A"][i][:, rank:].any() and not leaf.params["lora_B"][i][rank:].any()


@pytest.mark.parametrize("init", STARTS)
def test_starts_are_pefts(init):
    """Where PEFT's factors are not random: their product, and both up to the signs of their directions."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    decaying = (0.3 ** np.arange(8))[None] * np.linalg.qr(np.random.default_rng(0).normal(size=(12, 8)))[0]
    weight = (decaying @ np.linalg.qr(np.random.default_rng(1).normal(size=(8, 8)))[0]).astype(np.float32)
    base = torch.nn.Linear(12, 8, bias=False)
    base.weight.data = torch.tensor(weight.T.copy())
    options = {"r": 4, "lora_alpha": 6, "init_lora_weights": init, "target_modules": ["dense"]}
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"dense": base}), peft.LoraConfig(**options)).base_model.model[
        "dense"
    ]
    a, b = (getattr(theirs, f"lora_{name}")["default"].weight.detach().numpy().T for name in "AB")
    leaf = started(init, jnp.array(weight))
    if init == "orthogonal":
        for ours, other in ((leaf.params["lora_A"], a), (leaf.params["lora_B"], b)):
            assert 0.5 < np.std(ours) / np.std(other) < 2
        np.testing.assert_array_equal(leaf.base, weight)
        return
    close(leaf.base, theirs.base_layer.weight.detach().numpy().T)
    for ours, other in ((leaf.params["lora_A"].T, a.T), (leaf.params["lora_B"], b)):
        signs = np.sign(np.sum(ours * other, axis=1))
        close(ours * signs[:, None], other, 1e-4)  # PEFT's fast SVD starts at another random subspace


def test_a_fast_start_is_near_the_exact_one():
    kernel = normal(0, 40, 24)
    exact, fast, rough = (started(init, kernel).base for init in ("pissa", "pissa_niter_32", "pissa_niter_0"))
    assert np.linalg.norm(fast - exact) < 0.01 * np.linalg.norm(exact) < np.linalg.norm(rough - exact)


def test_olora_on_an_int8_base_leaves_an_int8_base():
    tree = pj.quantize({"layers": {"dense": {"kernel": normal(0, 12, 8)}}})
    leaf = pj.apply_lora(tree, config("olora"))["layers"]["dense"]["kernel"]
    before = tree["layers"]["dense"]["kernel"].dense()
    assert leaf.base.q.dtype == jnp.int8
    assert np.abs(leaf.dense() - before).max() <= np.max(leaf.base.scale) / 2 + 1e-6
    assert np.abs(leaf.base.dense() - before).max() > 0.1


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (3, 12, 8)])
def test_mica_trains_a_alone_in_the_directions_that_the_weight_uses_least(shape):
    leaf = started("mica", normal(0, *shape))
    close(leaf.dense(), leaf.base)
    assert leaf.params.keys() == {"lora_A"} and not leaf.params["lora_A"].any()
    params = {"dense": leaf}
    trainable, frozen = pj.partition(params)
    slope = jax.grad(lambda t: jnp.sum(pj.merge(pj.combine(t, frozen))["dense"] ** 3))(trainable)
    assert all(np.abs(array).max() > 1e-3 for array in jax.tree.leaves(slope)) and len(jax.tree.leaves(slope)) == 1
    assert pj.summary(params).splitlines()[-1].split()[2] == str(4 * int(np.prod(shape[:-1])))
    for kernel, b in zip(
        leaf.base.reshape(-1, *shape[-2:]), leaf.state["lora_B"].reshape(-1, 4, shape[-1]), strict=True
    ):
        close(b @ b.T, np.eye(4))
        smallest = np.sort(np.linalg.svd(kernel, compute_uv=False))[:4][::-1]
        np.testing.assert_allclose(np.linalg.norm(kernel @ b.T, axis=0), smallest, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq_finds_grid_and_factors_as_pefts_algorithm(bits, rounds):
    torch, loftq_utils = pytest.importorskip("torch"), pytest.importorskip("peft.utils.loftq_utils")
    kernel = normal(0, 30, 24)
    options = pj.LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
    leaf = started("loftq", kernel, loftq_config=options)

    def grid(weight):  # (out, in), as bitsandbytes does it
        if bits == 8:
            scale = np.abs(weight).max(1, keepdims=True) / 127
            return np.round(weight / scale) * scale
        flat = np.pad(weight.ravel(), (0, -weight.size % 64)).reshape(-1, 64)
        largest = np.abs(flat).max(1, keepdims=True)
        nearest = np.abs(flat[..., None] / largest[..., None] - normal_float()).argmin(-1)
        return (normal_float()[nearest] * largest).ravel()[: weight.size].reshape(weight.shape)

    weight = left = np.array(kernel).T
    for _ in range(rounds):
        base = grid(left).astype(np.float32)
        found = loftq_utils._low_rank_decomposition(torch.tensor(weight - base), reduced_rank=4)
        left = weight - (found["L"] @ found["R"]).numpy()
    close(leaf.base, base.T)
    close(leaf.dense(), (base + (found["L"] @ found["R"]).numpy()).T)
    again = pj.quantize({"layers": {"dense": {"kernel": leaf}}})["layers"]["dense"]["kernel"]
    if bits == 8:
        close(again.dense(), leaf.dense())  # the base lies on our int8 grid
    assert np.linalg.norm(leaf.dense() - kernel) < 0.9 * np.linalg.norm(leaf.base - kernel)


def normal_float():
    """NF4 as its paper derives it: quantiles of a normal distribution, eight on one side of zero and seven beside."""
    stats = pytest.importorskip("scipy.stats")
    offset = 0.9677083
    positive = stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, [0.0], negative]))
    return values / values.max()


def round_to_nf4(array):
    """The array on NF4's grid, its blocks row by row."""
    return NF4.of(array, pj.Layout(inp=(1,), out=(0,))).dense()


def test_nf4_has_the_values_of_its_paper():
    np.testing.assert_allclose(VALUES, normal_float(), atol=1e-6)
    array = normal(0, 5, 30)
    rounded = round_to_nf4(array)
    np.testing.assert_array_equal(round_to_nf4(rounded), rounded)
    assert len(np.unique(rounded[0])) <= 16 and not round_to_nf4(jnp.zeros((2, 3))).any()


@pytest.mark.parametrize(
    ("init", "options", "base", "message"),
    [
        ("pissa", {}, "int8", "which is int8 already. Attach the adapter to the float model"),
        ("olora", {}, "adapted", "on which an adapter is trained already. Attach this one first"),
        ("pissa", {"r": 9}, "float", "which has 8, not 9. Choose a smaller r"),
        ("orthogonal", {"r": 3}, "float", "which is 3. Make r even"),
    ],
)
def test_bases_and_ranks_that_do_not_suit_are_named(init, options, base, message):
    tree = {"layers": {"dense": {"kernel": normal(0, 12, 8)}}}
    if base == "int8":
        tree = pj.quantize(tree)
    if base == "adapted":
        tree = pj.apply_lora(tree, config(True))
    with pytest.raises(ValueError, match=message):
        pj.apply_lora(tree, config(init, **options), adapter_name="second")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pisa"}, "'pisa' is not supported. Write True, False or one of gaussian"),
        ({"init_lora_weights": "loftq"}, "loftq_config is not given. Write loftq_config=LoftQConfig"),
        ({"init_lora_weights": "loftq", "loftq_config": {"bits": 4}}, r"does not know \['bits'\]"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config goes with init_lora_weights='loftq'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, "loftq_bits=4 or 8"),
    ],
)
def test_options_of_a_start_that_do_not_suit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pj.LoraConfig(**options)


def test_an_embedding_starts_as_always_but_not_with_loftq():
    tree = {"dense": {"embedding": normal(0, 12, 8)}}
    leaf = pj.apply_lora(tree, config("pissa"))["dense"]["embedding"]
    np.testing.assert_array_equal(leaf.base, tree["dense"]["embedding"])
    assert not leaf.params["lora_A"].any()
    with pytest.raises(ValueError, match="'loftq' is not for embeddings"):
        pj.apply_lora(tree, config("loftq", loftq_config=pj.LoftQConfig()))


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora", "use_rslora": True}]
)
def test_an_adapter_without_its_start_is_pefts_and_goes_on_the_base_as_it_was(options, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["dense"], **options}
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(12, 8)})
    weight = model["dense"].weight.detach().numpy().T.copy()
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options))
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "whole")  # on what the start left of the base
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    left = theirs.base_model.model["dense"].base_layer.weight.detach().numpy().T
    params = interop.load_adapter({"dense": {"kernel": jnp.array(left)}}, tmp_path / "whole")
    leaf = params["dense"]["kernel"]
    start = interop.load_adapter({"dense": {"kernel": jnp.array(left)}}, tmp_path / "start")
    interop.save_adapter(start, tmp_path / "our start")
    tagged = dataclasses.replace(leaf.tag, config=pj.LoraConfig(**options, inference_mode=True))
    params = {"dense": {"kernel": dataclasses.replace(leaf, tag=tagged)}}
    interop.save_adapter(params, tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "our start")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][key].tobytes() == files[1][key].tobytes() for key in files[0])
    ours, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    for field in ("r", "lora_alpha", "init_lora_weights", "use_rslora"):
        assert ours[field] == other[field], field
    again = interop.load_adapter({"dense": {"kernel": jnp.array(weight)}}, tmp_path / "ours")["dense"]["kernel"]
    close(again.dense(), leaf.dense())
    assert np.abs(again.dense() - weight).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "gaussian"}, "is for LoRA that starts in the base .*'gaussian'. Save it without"),
        ({"init_lora_weights": "pissa", "use_rslora": True, "alpha_pattern": {"dense": 2}}, "cannot be converted"),
        ({"init_lora_weights": "pissa", "r": 2}, "The initial adapter has no .*of shape"),
    ],
)
def test_adapters_that_cannot_be_converted_are_refused(options, message, tmp_path):
    tree = {"layers": {"dense": {"kernel": normal(0, 12, 8)}}}
    interop.save_adapter(pj.apply_lora(tree, config("pissa")), tmp_path / "start")
    params = pj.apply_lora(tree, config(**{"init": options.pop("init_lora_weights"), **options}))
    with pytest.raises(ValueError, match=message):
        interop.save_adapter(params, tmp_path / "out", path_initial_model_for_weight_conversion=tmp_path / "start")
    assert not (tmp_path / "out").exists()

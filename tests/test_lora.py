"""LoRA's own properties, with PEFT's layers as the reference for starts, ranks and scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj


def one(config, shape=(64, 48), leaf="kernel"):
    tree = {"dense": {leaf: jnp.zeros(shape)}}
    return pj.apply_lora(tree, config)["dense"][leaf]


def peft_start(init, embedding=False):
    """A and B as PEFT starts them, in our orientation."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    layer = torch.nn.Embedding(512, 256) if embedding else torch.nn.Linear(512, 256)
    config = LoraConfig(r=16, init_lora_weights=init, target_modules=["dense"])
    dense = get_peft_model(torch.nn.Sequential(torch.nn.ModuleDict({"dense": layer})), config).base_model.model[0].dense
    if embedding:
        return [
            dense.lora_embedding_A["default"].detach().numpy().T,
            dense.lora_embedding_B["default"].detach().numpy().T,
        ]
    return [dense.lora_A["default"].weight.detach().numpy().T, dense.lora_B["default"].weight.detach().numpy().T]


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_starts_are_drawn_as_peft_draws_them(init, embedding):
    config = pj.LoraConfig(r=16, init_lora_weights=init, target_modules=["dense"])
    leaf = one(config, (512, 256), "embedding" if embedding else "kernel")
    for ours, theirs in zip((leaf.params["lora_A"], leaf.params["lora_B"]), peft_start(init, embedding), strict=True):
        assert ours.shape == theirs.shape
        # Statistics of thousands of draws: 3 % is more than four standard errors.
        np.testing.assert_allclose(np.std(ours), np.std(theirs), rtol=0.03)
        np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.25)
        is_uniform = np.abs(theirs).max() < 2 * np.std(theirs) if np.std(theirs) else True
        assert not np.std(ours) or is_uniform == (np.abs(ours).max() < 2 * np.std(ours))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_and_scales_equal_pefts(use_rslora):
    import torch
    from peft import LoraConfig, get_peft_model

    options = dict(
        r=4,
        lora_alpha=6,
        use_rslora=use_rslora,
        rank_pattern={"q": 2, r"layers\.1\.v": 7},
        alpha_pattern={"layers.0.q": 3, r"layers\.1\.v": 9},
        target_modules=["q", "v"],
    )
    layers = torch.nn.ModuleList(
        [torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "v": torch.nn.Linear(8, 8)}) for _ in range(2)]
    )
    theirs = get_peft_model(torch.nn.ModuleDict({"layers": layers}), LoraConfig(**options)).base_model.model.layers
    ours = pj.LoraConfig(**options)
    for i in range(2):
        for name in "qv":
            layer = theirs[i][name]
            assert ours.rank(f"layers.{i}.{name}") == layer.r["default"]
            assert ours.scaling(f"layers.{i}.{name}") == pytest.approx(layer.scaling["default"], rel=1e-6)


def test_padding_is_zero_stays_zero_and_is_not_counted():
    config = pj.LoraConfig(
        r=4, rank_pattern={"layers.1.up": 2}, layers_to_transform=[0, 1], target_modules=["up"], init_lora_weights=False
    )
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    params = pj.apply_lora({"model": {"layers": {"up": {"kernel": jnp.ones((3, 8, 8))}}}}, config, layout=layout)
    # The first number after a list's name counts, so layers_to_transform needs the model's prefix, as in PEFT.
    leaf = params["model"]["layers"]["up"]["kernel"]
    assert leaf.state["rank"].tolist() == [4, 2, 0]
    params = pj.apply_lora(
        {"model": {"layers": {"up": {"kernel": jnp.ones((3, 8, 8))}}}},
        pj.LoraConfig(r=4, rank_pattern={r"layers\.1\.up": 2}, target_modules=["up"], init_lora_weights=False),
        layout=layout,
    )
    leaf = params["model"]["layers"]["up"]["kernel"]
    assert leaf.state["rank"].tolist() == [4, 2, 4]
    assert "trainable params: 160 ||" in pj.summary(params)  # (4 + 2 + 4) * (8 + 8)

    def loss(trainable, frozen):
        return jnp.sum(
            pj.adapt(lambda p, x: x @ p["model"]["layers"]["up"]["kernel"][1])(pj.combine(trainable, frozen), x) ** 2
        )

    x = jax.random.normal(jax.random.key(0), (5, 8))
    gradient = jax.grad(loss)(*pj.partition(params))["model"]["layers"]["up"]["kernel"].params
    for name, padded in {"lora_A": (1, slice(None), slice(2, 4)), "lora_B": (1, slice(2, 4))}.items():
        assert not leaf.params[name][padded].any() and not gradient[name][padded].any()
        assert leaf.params[name][1].any() and gradient[name][1].any()


def test_dropout_drops_the_inputs_of_the_low_rank_path_only():
    config = pj.LoraConfig(r=4, lora_dropout=0.25, target_modules=["dense"], init_lora_weights=False)
    leaf = one(config)
    x = jnp.ones((4000, 64))
    clean = leaf.apply(x)
    dropped = pj.with_dropout({"dense": {"kernel": leaf}}, jax.random.key(5))["dense"]["kernel"]
    noisy = dropped.apply(x)
    assert np.abs(noisy - clean).max() > 0.1
    # The mean over 4000 rows has a standard error of about 1 % of the values' spread.
    np.testing.assert_allclose(noisy.mean(0), clean.mean(0), atol=5 * float(noisy.std(0).max()) / 4000**0.5)
    again = pj.with_dropout({"dense": {"kernel": leaf}}, jax.random.key(5))["dense"]["kernel"]
    np.testing.assert_array_equal(again.apply(x), noisy)
    with pytest.raises(ValueError, match="dropout switched on.*Merge a tree without"):
        dropped.dense()


def test_dropout_that_would_have_to_be_merged_is_an_error_that_names_the_primitive():
    config = pj.LoraConfig(lora_dropout=0.5, target_modules=["dense"])
    params = pj.with_dropout(pj.apply_lora({"dense": {"kernel": jnp.ones((4, 4))}}, config), jax.random.key(0))
    with pytest.raises(ValueError, match="Primitive 'tanh' takes a weight that has to be merged"):
        pj.adapt(lambda p: jnp.tanh(p["dense"]["kernel"]))(params)


def test_adapters_stay_float32_on_a_bfloat16_base():
    kernel = jax.random.normal(jax.random.key(0), (16, 8), jnp.bfloat16)
    config = pj.LoraConfig(r=4, target_modules=["dense"], init_lora_weights=False)
    leaf = pj.apply_lora({"dense": {"kernel": kernel}}, config)["dense"]["kernel"]
    assert leaf.params["lora_A"].dtype == jnp.float32
    x = jax.random.normal(jax.random.key(1), (3, 16), jnp.bfloat16)
    low_rank = x.astype(jnp.float32) @ leaf.params["lora_A"] @ leaf.params["lora_B"] * 2
    want = ((x @ kernel).astype(jnp.float32) + low_rank).astype(jnp.bfloat16)
    assert leaf.apply(x).dtype == jnp.bfloat16 and leaf.dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(leaf.apply(x), want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "ranks of at least 1"),
        ({"rank_pattern": {"q": 0}}, "ranks of at least 1"),
        ({"lora_dropout": 1.0}, "probability"),
        ({"bias": "some"}, "bias is 'none', 'all' or 'lora_only'"),
        ({"target_modules": "q.*", "layers_to_transform": [1]}, "Put the layers into the regex"),
        ({"layers_pattern": "h"}, "Give layers_to_transform too"),
        ({"modules_to_save": "head"}, r"Write \['head'\]"),
        ({"trainable_token_indices": [1, 1]}, r"trainable_token_indices names \[1\] more than once"),
        ({"trainable_token_indices": {"embed": [-1]}}, "trainable_token_indices of 'embed' .*none below 0"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias=True goes with .*without DoRA"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias=True goes with init_lora_weights=True or"),
    ],
)
def test_wrong_fields_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pj.LoraConfig(**options)


def test_unknown_fields_of_a_file_are_named_unless_they_are_off():
    assert pj.PeftConfig.from_dict({"peft_type": "LORA", "new_switch": False}) == pj.LoraConfig()
    with pytest.raises(ValueError, match="new_switch"):
        pj.PeftConfig.from_dict({"peft_type": "LORA", "new_switch": True})
    with pytest.raises(ValueError, match="peft_type 'NO_SUCH' is not supported"):
        pj.PeftConfig.from_dict({"peft_type": "NO_SUCH"})


def test_fields_and_defaults_are_pefts():
    import dataclasses

    from peft import LoraConfig

    theirs = LoraConfig().to_dict()
    theirs.pop("runtime_config", None)  # PEFT does not save it
    ours = pj.LoraConfig().to_dict()
    assert ours.keys() == theirs.keys()
    assert {name: value for name, value in ours.items() if value != theirs[name]} == {"peft_version": None}
    assert dataclasses.fields(pj.LoraConfig)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_the_dropout_rate_is_part_of_the_structure_in_training_only(inference_mode):
    trees = [
        one(pj.LoraConfig(lora_dropout=rate, target_modules=["dense"], inference_mode=inference_mode))
        for rate in (0.0, 0.5)
    ]
    assert (jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])) == inference_mode

"""Each method's own property: what its paper promises of the adapted layer."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import METHODS, Adapter
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.core.adapted import changed_layers
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.partition import count_parameters
from peft_jax.core.targets import shortened_names
from peft_jax.methods import base, frod
from peft_jax.methods.joint_basis import joint_basis
from peft_jax.methods.lokr import factorization
from peft_jax.methods.oft import nearest_divisor
from peft_jax.methods.singular_clusters import k_means, low_rank_svd
from peft_jax.methods.waveft import daubechies
from peft_jax.models.defaults import method_defaults


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def perturbed(params, scale=0.3):
    """The tree with other numbers in every trained array."""
    trainable, frozen = pj.partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    leaves = [leaf + scale * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return pj.combine(jax.tree.unflatten(treedef, leaves), frozen)


def layer(params, x):
    return x @ params["dense"]["kernel"] + params["dense"]["bias"][None]


@pytest.fixture
def dense():
    return {"dense": {"kernel": normal(1, 6, 4), "bias": normal(2, 4)}}


@pytest.mark.parametrize("feedforward", [[], ["dense"]], ids=["outputs", "inputs"])
def test_ia3_scales_outputs_with_the_bias_or_inputs(feedforward, dense):
    config = pj.IA3Config(target_modules=["dense"], feedforward_modules=feedforward)
    params = perturbed(pj.apply_adapter(dense, config))
    ((role, vector),) = params["dense"]["kernel"].params.items()
    x = normal(3, 5, 6)
    want = layer(dense, x * vector[None]) if feedforward else layer(dense, x) * vector[None]
    close(pj.adapt(layer)(params, x), want)
    close(layer(pj.merge(params), x), want)
    assert len(jax.tree.leaves(pj.partition(params)[0])) == 1, "the vector is trained more than once"
    assert f"trainable params: {vector.size} ||" in pj.summary(params)


def test_ia3_adds_up_the_gradients_of_matrix_and_bias(dense):
    params = perturbed(pj.apply_adapter(dense, pj.IA3Config(target_modules=["dense"], feedforward_modules=[])))
    trainable, frozen = pj.partition(params)
    assert len(jax.tree.leaves((trainable, frozen))) == len({id(leaf) for leaf in jax.tree.leaves((trainable, frozen))})
    x = normal(3, 5, 6)

    def loss(trainable):
        return jnp.sum(jnp.sin(pj.adapt(layer)(pj.combine(trainable, frozen), x)))

    vector = params["dense"]["kernel"].params["ia3_out"]
    want = jax.grad(lambda vector: jnp.sum(jnp.sin(layer(dense, x) * vector[None])))(vector)
    gradient = jax.grad(loss)(trainable)
    close(gradient["dense"]["kernel"].params["ia3_out"], want)
    # A step that gives its old arrays away: the frozen twin must not hold one of them.
    step = jax.jit(lambda old, slope: jax.tree.map(jnp.subtract, old, slope), donate_argnums=0)
    params = pj.combine(step(trainable, gradient), frozen)
    close(pj.merge(params)["dense"]["bias"], dense["dense"]["bias"] * params["dense"]["kernel"].params["ia3_out"])


def test_ia3_spells_out_feedforward_modules_that_are_ends_of_targets(tmp_path):
    """PEFT reads no config whose feedforward_modules are not among its targets, and has whole paths as targets too."""
    targets = ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj", "q_proj"]
    config = pj.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
    assert config.feedforward_modules == ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj")
    with pytest.raises(ValueError, match=r"feedforward_modules has \['proj'\], not in target_modules"):
        pj.IA3Config(target_modules=targets, feedforward_modules=["proj"])
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = pj.AutoModelForCausalLM.from_config(pj.models.LlamaConfig(vocab_size=16, num_key_value_heads=1, **sizes))
    pj.get_peft_model(model, pj.IA3Config(target_modules="all-linear")).save_pretrained(tmp_path)
    again = pj.IA3Config.from_pretrained(tmp_path)
    assert again.feedforward_modules == ("down_proj",) and "down_proj" in again.target_modules


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_proj"]], ids=str)
def test_ia3_takes_a_default_of_which_a_target_is_the_end(targets, tmp_path):
    """GPT-2's is ``mlp.c_proj``; PEFT scales its inputs too, and cannot read the file that it writes of it."""
    config = pj.models.GPT2Config(
        16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=8
    )
    model = pj.get_peft_model(pj.AutoModelForCausalLM.from_config(config), pj.IA3Config(target_modules=targets))
    vectors = {path: set(leaf.params) for path, leaf in adapted_leaves(model) if path.endswith("c_proj.kernel")}
    assert sorted(vectors.values(), key=sorted) == [{"ia3_in"}, {"ia3_out"}]
    assert all(("mlp" in path) == (roles == {"ia3_in"}) for path, roles in vectors.items())
    model.save_pretrained(tmp_path)
    again = pj.IA3Config.from_pretrained(tmp_path)
    assert again.feedforward_modules == ("mlp.c_proj",) and "mlp.c_proj" in again.target_modules


def test_ia3_inputs_and_outputs_in_one_stack():
    """Layers of one leaf may be scaled at different sides; a layer that is no target is left alone."""
    tree = {"layers": {"up": {"kernel": normal(1, 3, 6, 4), "bias": normal(2, 3, 4)}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,)), ".*bias": pj.Layout((0,), (), (1,))}
    config = pj.IA3Config(target_modules=r"layers\.[02]\.up", feedforward_modules=r".*\.2\..*")
    params = perturbed(pj.apply_adapter(tree, config, layout=layout))
    kernel = params["layers"]["up"]["kernel"].params
    merged = pj.merge(params)["layers"]["up"]
    close(merged["kernel"][0], tree["layers"]["up"]["kernel"][0] * kernel["ia3_out"][0][None])
    close(merged["kernel"][2], tree["layers"]["up"]["kernel"][2] * kernel["ia3_in"][2][:, None])
    close(merged["bias"][0], tree["layers"]["up"]["bias"][0] * kernel["ia3_out"][0])
    for i in (1, 2):
        np.testing.assert_array_equal(merged["bias"][i], tree["layers"]["up"]["bias"][i])
    np.testing.assert_array_equal(merged["kernel"][1], tree["layers"]["up"]["kernel"][1])
    assert "trainable params: 10 ||" in pj.summary(params)  # 4 outputs and 6 inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["dense"]}, "needs feedforward_modules.*Write feedforward_modules=\\[\\]"),
        ({"target_modules": ["dense"], "feedforward_modules": ["x"]}, "has .*'x'.*, not in target_modules"),
    ],
)
def test_ia3_says_what_it_needs(options, message, dense):
    with pytest.raises(ValueError, match=message):
        pj.apply_adapter(dense, pj.IA3Config(**options))


@pytest.mark.parametrize("neumann", [False, True], ids=["Cayley", "Neumann"])
def test_oft_rotates(neumann, dense):
    """R'R = I: the merged matrix has the base's inner products. The series is off by its last term, as angles^terms."""
    config = pj.OFTConfig(
        oft_block_size=3, use_cayley_neumann=neumann, num_cayley_neumann_terms=12, target_modules=["dense"]
    )
    params = perturbed(pj.apply_adapter(dense, config), scale=0.1)
    before, after = dense["dense"]["kernel"], pj.merge(params)["dense"]["kernel"]
    close(after.T @ after, before.T @ before)
    assert np.abs(after - before).max() > 0.1
    close(pj.adapt(layer)(params, normal(3, 5, 6)), layer(pj.merge(params), normal(3, 5, 6)))


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("block_share", [False, True])
def test_oft_equals_pefts_rotation(terms, block_share):
    torch = pytest.importorskip("torch")
    from peft.tuners.oft.layer import OFTRotationModule

    theirs = OFTRotationModule(
        1 if block_share else 2, 6, 4, 8, block_share=block_share, num_cayley_neumann_terms=terms
    )
    angles = 0.3 * normal(0, 1 if block_share else 2, 6)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.array(angles)))
        want = theirs.get_weight().numpy()
    config = pj.OFTConfig(
        oft_block_size=4, block_share=block_share, num_cayley_neumann_terms=terms, target_modules=["dense"]
    )
    close(config.merge({"oft_R": angles}, {"hit": jnp.array(True)}, jnp.eye(8)), want)


def test_oft_takes_pefts_blocks_and_refuses_its_old_files():
    pytest.importorskip("peft")
    from peft.tuners.oft.layer import OFTLayer

    for size in (1, 7, 12, 40, 96):
        for wanted in (1, 2, 5, 8, 32):
            want = wanted if size % wanted == 0 else OFTLayer.adjust_oft_parameters(None, size, wanted)
            assert nearest_divisor(size, wanted) == want
    fields = pj.OFTConfig(target_modules=["q"]).to_dict()
    with pytest.raises(ValueError, match="from PEFT 0.17.1, whose Cayley-Neumann series was another"):
        pj.PeftConfig.from_dict({**fields, "peft_version": "0.17.1"})
    with pytest.raises(ValueError, match="r=2 and oft_block_size=32. Set one of them to 0"):
        pj.OFTConfig(r=2)


@pytest.mark.parametrize(("size", "factors"), [(2, 3), (4, 2), (8, 1)])
def test_boft_rotates_and_scales(size, factors):
    tree = {"dense": {"kernel": normal(0, 8, 5), "bias": normal(1, 5)}}
    config = pj.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["dense"])
    params = perturbed(pj.apply_adapter(tree, config), scale=0.5)
    before, after = tree["dense"]["kernel"], pj.merge(params)["dense"]["kernel"]
    scale = params["dense"]["kernel"].params["boft_s"]
    close(after.T @ after, (before.T @ before) * jnp.outer(scale, scale))
    close(pj.adapt(layer)(params, normal(3, 4, 8)), normal(3, 4, 8) @ after + tree["dense"]["bias"][None])
    eye = {"dense": {"kernel": jnp.eye(8), "bias": jnp.zeros(8)}}
    reach = pj.merge(perturbed(pj.apply_adapter(eye, config), scale=0.5))["dense"]["kernel"]
    assert (np.abs(reach) > 1e-6).sum() == 8 * size * 2 ** (factors - 1), "a factor doubles what an input reaches"


@pytest.mark.parametrize(("size", "factors"), [(2, 3), (4, 2), (6, 1)])
def test_boft_is_pefts_with_its_extension(size, factors, monkeypatch):
    """PEFT has several factors on machines with its CUDA extension, which this stands for."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.boft import layer as theirs_of

    monkeypatch.setattr(theirs_of, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(
        theirs_of.FastBlockDiag, "apply", lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    )
    options = {"boft_block_size": size, "boft_n_butterfly_factor": factors, "target_modules": ["dense"]}
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 5)})
    theirs = peft.get_peft_model(model, peft.BOFTConfig(init_weights=False, **options))
    tensors = {key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    dense = theirs.base_model.model["dense"]
    weight, bias = (x.detach().numpy() for x in (dense.base_layer.weight, dense.base_layer.bias))
    tree = {"dense": {"kernel": jnp.array(weight.T), "bias": jnp.array(bias)}}
    params = pj.set_peft_model_state_dict(tree, pj.BOFTConfig(**options), tensors)
    x = normal(0, 3, 24)
    want = dense(torch.tensor(np.array(x))).detach().numpy()
    close(pj.adapt(layer)(params, x), want)
    close(layer(pj.merge(params), x), want)
    assert np.abs(want - layer(tree, x)).max() > 0.1


@pytest.mark.parametrize(
    "config",
    [
        pj.BOFTConfig(boft_block_size=2, boft_dropout=0.5, init_weights=False, target_modules=["dense"]),
        pj.OFTConfig(oft_block_size=2, module_dropout=0.5, init_weights=False, target_modules=["dense"]),
    ],
    ids=["BOFT", "OFT"],
)
def test_dropout_stills_half_of_the_blocks(config):
    tree = {"dense": {"kernel": jnp.eye(8)}}
    params = pj.apply_adapter(tree, config)
    scale = params["dense"]["kernel"].params.get("boft_s", jnp.ones(8))
    stills = set()
    for seed in range(8):
        dropped = pj.with_dropout(params, jax.random.key(seed))["dense"]["kernel"]
        blocks = (dropped.apply(jnp.eye(8)) / scale[None]).reshape(4, 2, 4, 2)
        still = [bool(np.allclose(blocks[i, :, i], np.eye(2))) for i in range(4)]
        assert sum(still) == 2
        stills.add(tuple(still))
    assert len(stills) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boft_block_size": 5}, "boft_block_size=5.* needs a divisor of the 6 inputs of 'dense'"),
        ({"boft_block_size": 0, "boft_block_num": 4}, "boft_block_num=4.* needs a divisor of the 6 inputs"),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, "of blocks of even size whose number 2 divides"),
        ({"boft_block_num": 2}, "got boft_block_size=4 and boft_block_num=2. Set one of them to 0"),
        ({"boft_n_butterfly_factor": 0}, "boft_n_butterfly_factor is at least 1, got 0"),
    ],
)
def test_boft_says_which_blocks_fit(options, message, dense):
    with pytest.raises(ValueError, match=message):
        pj.apply_adapter(dense, pj.BOFTConfig(target_modules=["dense"], **options))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_hra_keeps_norms_and_reflects(orthogonal, dense):
    config = pj.HRAConfig(r=3, apply_GS=orthogonal, init_weights=False, target_modules=["dense"])
    params = perturbed(pj.apply_adapter(dense, config))
    before, after = dense["dense"]["kernel"], pj.merge(params)["dense"]["kernel"]
    close(after.T @ after, before.T @ before)
    chain = config.merge(*(getattr(params["dense"]["kernel"], name) for name in ("params", "state")), jnp.eye(6))
    close(np.linalg.det(chain), (-1.0) ** 3)  # an odd number of reflections
    assert np.abs(after - before).max() > 0.1


def test_hra_orthogonal_reflections_do_not_start_as_pairs(dense):
    with pytest.raises(ValueError, match="equal in pairs. Write init_weights=False"):
        pj.apply_adapter(dense, pj.HRAConfig(apply_GS=True, target_modules=["dense"]))


def test_loha_is_a_product_of_two_low_rank_matrices():
    """So its rank may be the square of theirs; LoRA's of four times as many numbers could not be above it."""
    config = pj.LoHaConfig(r=3, target_modules=["dense"], init_weights=False)
    params = pj.apply_adapter({"dense": {"kernel": jnp.zeros((16, 12))}}, config)
    assert np.linalg.matrix_rank(pj.merge(params)["dense"]["kernel"]) == 9
    assert "trainable params: 168 ||" in pj.summary(params)  # 2 * 3 * (16 + 12)


def test_hira_changes_weights_in_proportion(dense):
    params = perturbed(pj.apply_adapter(dense, pj.HiraConfig(r=2, target_modules=["dense"])))
    ratio = pj.merge(params)["dense"]["kernel"] / dense["dense"]["kernel"] - 1
    assert np.linalg.matrix_rank(ratio, rtol=1e-3) == 2
    kernel = {"kernel": dense["dense"]["kernel"].at[:, 0].set(0), "bias": dense["dense"]["bias"]}
    merged = pj.merge(perturbed(pj.apply_adapter({"dense": kernel}, pj.HiraConfig(target_modules=["dense"]))))
    assert not merged["dense"]["kernel"][:, 0].any(), "a weight of zero was changed"


def test_delora_has_directions_apart_from_a_strength(dense):
    """Over the norms of the weights, each of its r parts has norm λ / r, whatever the lengths of its vectors."""
    kernel = dense["dense"]["kernel"]
    norms = jnp.linalg.norm(kernel, axis=1)[:, None]
    config = pj.DeloraConfig(r=3, delora_lambda=6, init_weights=False, target_modules=["dense"])
    leaf = pj.apply_adapter(dense, config)["dense"]["kernel"]

    def change(**params):
        return (dataclasses.replace(leaf, params={**leaf.params, **params}).dense() - kernel) / norms

    a, b = leaf.params["delora_A"], leaf.params["delora_B"]
    for i in range(3):
        part = change(delora_A=jnp.where(jnp.arange(3)[None] == i, a, 0))
        close(jnp.linalg.norm(part), 6 / 3)
        close(part / 2, jnp.outer(a[:, i], b[i]) / jnp.linalg.norm(a[:, i]) / jnp.linalg.norm(b[i]))
    close(change(delora_A=7 * a, delora_B=0.3 * b), change())
    close(change(delora_lambda=leaf.params["delora_lambda"] / 4), change() / 4)
    assert 0.1 < jnp.linalg.norm(change()) < 6
    nested = pj.apply_adapter(pj.apply_adapter(dense, config), config, adapter_name="second")["dense"]["kernel"]
    close(nested.state["delora_w_norm"], norms[:, 0])  # of the base alone, as in PEFT


@pytest.mark.parametrize("seed", [None, 0, 7, 2**40 + 5])
def test_shira_trains_the_places_that_peft_draws(seed):
    torch, masks = pytest.importorskip("torch"), pytest.importorskip("peft.tuners.shira.mask_functions")
    for n_in, n_out, r in [(40, 24, 3), (4, 4, 2), (512, 256, 32)]:
        config = pj.ShiraConfig(r=r, random_seed=seed, init_weights=False, target_modules=["dense"])
        params = pj.apply_adapter({"dense": {"kernel": jnp.zeros((n_in, n_out))}}, config)
        changed = np.asarray(pj.merge(params)["dense"]["kernel"]).T != 0
        want = masks.random_mask(torch.nn.Linear(n_in, n_out), r, random_seed=seed).numpy()
        np.testing.assert_array_equal(changed, want)
        assert changed.sum() == r * (n_in + n_out)


def test_shira_of_places_that_a_user_chose_is_read_from_its_file(tmp_path):
    base = {"dense": {"kernel": jnp.zeros((8, 12))}}
    config = pj.ShiraConfig(r=2, init_weights=False, target_modules=["dense"])
    params = pj.apply_adapter(base, config)
    own, tensors = config.replace(mask_type="mine"), pj.get_peft_model_state_dict(params)
    with pytest.raises(ValueError, match="mask_type='mine' names a function"):
        pj.apply_adapter(base, own)
    with pytest.raises(ValueError, match=r"SHIRA with r=5 trains 100 elements of 'dense', which has 96. Lower r"):
        pj.apply_adapter(base, config.replace(r=5))
    assert tensors["base_model.model.dense.shira_indices"].dtype == np.int32
    loaded = pj.set_peft_model_state_dict(base, own, tensors)
    close(pj.merge(loaded)["dense"]["kernel"], pj.merge(params)["dense"]["kernel"])
    assert loaded["dense"]["kernel"].state["shira_indices"].dtype == jnp.int32


def test_fourierft_has_a_spectrum_at_few_frequencies(dense):
    config = pj.FourierFTConfig(n_frequency=7, scaling=3.0, random_loc_seed=2, target_modules=["dense"])
    params = pj.apply_adapter(dense, config)
    change = np.asarray(pj.merge(params)["dense"]["kernel"] - dense["dense"]["kernel"])
    # The real part keeps the half of a spectrum that is its own mirror image.
    spectrum = np.zeros((4, 6))
    torch = pytest.importorskip("torch")
    places = torch.randperm(24, generator=torch.Generator().manual_seed(2))[:7].numpy()
    spectrum.flat[places] = params["dense"]["kernel"].params["fourierft_spectrum"]
    mirror = np.roll(spectrum[::-1, ::-1], (1, 1), (0, 1))
    close(np.fft.fft2(change.T), 1.5 * (spectrum + mirror))


@pytest.mark.parametrize("method", [pj.FourierFTConfig, pj.WaveFTConfig])
def test_sparse_spectra_of_stacked_layers_have_sizes_of_their_own(method):
    config = method(n_frequency=5, n_frequency_pattern={r"1\.dense": 3}, target_modules=["dense"])
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    params = perturbed(pj.apply_adapter({"layers": {"dense": {"kernel": normal(0, 2, 6, 4)}}}, config, layout=layout))
    leaf = params["layers"]["dense"]["kernel"]

    def loss(arrays):
        return jnp.sum(jnp.sin(dataclasses.replace(leaf, params=arrays).dense()))

    (gradient,) = jax.grad(loss)(leaf.params).values()
    assert np.abs(gradient[0]).min() > 0 and np.abs(gradient[1, :3]).min() > 0
    assert not np.any(gradient[1, 3:]), "padding is trained"
    assert "trainable params: 8 ||" in pj.summary(params)


def test_c3a_is_circular_convolutions_of_blocks(dense):
    params = perturbed(pj.apply_adapter(dense, pj.C3AConfig(block_size=2, target_modules=["dense"])))
    kernel, x = params["dense"]["kernel"].params["c3a_kernel"], normal(3, 5, 6)
    transformed = np.einsum("xif,oif->xof", np.fft.ifft(np.reshape(x, (5, 3, 2))), np.fft.fft(kernel))
    close(pj.adapt(layer)(params, x) - layer(dense, x), np.fft.fft(transformed).real.reshape(5, 4) / 6)
    with pytest.raises(ValueError, match=r"block_size=4\) needs a divisor of the 6 inputs and 4 outputs of 'dense'"):
        pj.apply_adapter(dense, pj.C3AConfig(block_size=4, target_modules=["dense"]))


def test_c3a_has_pefts_gradient_of_its_kernel():
    """That of the inputs is right here and not in PEFT, so that whole models train otherwise there."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"block_size": 2, "target_modules": ["dense"]}
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"dense": torch.nn.Linear(6, 4)}), peft.C3AConfig(**options))
    dense = theirs.base_model.model["dense"]
    weight, kernel = dense.base_layer.weight, dense.c3a_kernel["default"]
    x = normal(3, 5, 6)
    given = torch.tensor(np.array(x), requires_grad=True)
    torch.sin(dense(given)).sum().backward()
    tree = {
        "dense": {"kernel": jnp.array(weight.detach().numpy().T), "bias": jnp.array(dense.base_layer.bias.detach())}
    }
    params = pj.apply_adapter(tree, pj.C3AConfig(**options))
    leaf = dataclasses.replace(params["dense"]["kernel"], params={"c3a_kernel": jnp.array(kernel.detach().numpy())})

    def loss(arrays, x):
        return jnp.sum(jnp.sin(dataclasses.replace(leaf, params=arrays).apply(x) + tree["dense"]["bias"][None]))

    of_kernel, of_x = jax.grad(loss, argnums=(0, 1))(leaf.params, x)
    close(of_kernel["c3a_kernel"], kernel.grad.numpy())
    y = x @ leaf.dense() + tree["dense"]["bias"][None]
    close(of_x, jnp.cos(y) @ leaf.dense().T)


def test_c3a_blocks_of_stacked_layers_have_sizes_of_their_own():
    kernel = normal(0, 2, 8, 4)
    options = {"target_modules": ["dense"], "block_size_pattern": {r"1\.dense": 2}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    params = pj.apply_adapter(
        {"layers": {"dense": {"kernel": kernel}}}, pj.C3AConfig(block_size=4, **options), layout=layout
    )
    change = pj.merge(params)["layers"]["dense"]["kernel"] - kernel
    for part, size in zip(np.asarray(change), (4, 2), strict=True):
        blocks = part.reshape(8 // size, size, 4 // size, size)
        for step in range(size):
            close(np.roll(blocks, (step, step), (1, 3)), blocks)
    assert f"trainable params: {32 // 4 + 32 // 2} ||" in pj.summary(params)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_turns_pairs_of_outputs_with_the_bias(variant, dense):
    config = pj.RoadConfig(variant=variant, group_size=4, target_modules=["dense"])
    params = perturbed(pj.apply_adapter(dense, config))
    x = normal(3, 5, 6)
    y, turned = np.asarray(layer(dense, x)), np.asarray(pj.adapt(layer)(params, x))
    close(layer(pj.merge(params), x), turned)
    if variant == "road_1":  # one angle and one scale for each pair: lengths are scaled
        scales = np.abs(params["dense"]["kernel"].params["road_alpha"])
        close(np.hypot(turned[:, :2], turned[:, 2:]), scales * np.hypot(y[:, :2], y[:, 2:]))
    with pytest.raises(ValueError, match="group_size=8.* needs a divisor of the 4 outputs of 'dense'"):
        pj.apply_adapter(dense, config.replace(group_size=8))


def test_gralora_has_a_grid_of_low_rank_blocks():
    kernel = normal(0, 12, 8)
    config = pj.GraloraConfig(r=4, gralora_k=4, init_weights=False, target_modules=["dense"])
    params = pj.apply_adapter({"dense": {"kernel": kernel}}, config)
    change = np.asarray(pj.merge(params)["dense"]["kernel"] - kernel)
    assert np.linalg.matrix_rank(change, tol=1e-4) > 4, "a LoRA of that many numbers has rank 4"
    blocks = change.reshape(4, 3, 4, 2).transpose(0, 2, 1, 3)
    assert (np.linalg.matrix_rank(blocks, tol=1e-4) == 1).all()
    assert "trainable params: 80 ||" in pj.summary(params)  # 4 (12 + 8)
    with pytest.raises(ValueError, match=r"gralora_k=4\) needs a divisor of the 12 inputs and 6 outputs of 'dense'"):
        pj.apply_adapter({"dense": {"kernel": kernel[:, :6]}}, config)


@pytest.mark.parametrize("moments", range(1, 11))
def test_waveft_filters_are_orthogonal_and_pefts(moments):
    wavelets = pytest.importorskip("peft.tuners.waveft.wavelet")
    low = daubechies(moments)
    np.testing.assert_allclose(low, wavelets.Wavelet(f"db{moments}").rec_lo, rtol=0, atol=1e-10)
    for shift in range(0, 2 * moments, 2):
        np.testing.assert_allclose(low[shift:] @ low[: len(low) - shift], shift == 0, atol=1e-10)


def test_waveft_of_haar_is_an_isometry(dense):
    config = pj.WaveFTConfig(n_frequency=24, scaling=1.0, init_weights=False, target_modules=["dense"])
    params = perturbed(pj.apply_adapter(dense, config))
    change = pj.merge(params)["dense"]["kernel"] - dense["dense"]["kernel"]
    close(jnp.linalg.norm(change), jnp.linalg.norm(params["dense"]["kernel"].params["waveft_spectrum"]))
    for options in ({"wavelet_family": "sym4"}, {"proportional_parameters": True}):
        with pytest.raises(ValueError, match=f"WaveFTConfig\\({next(iter(options))}=.* is not supported yet"):
            pj.WaveFTConfig(**options)


def with_transpose(params, x):
    return x @ params["dense"]["kernel"] @ params["dense"]["kernel"].T


def test_lily_is_not_for_a_tied_head(dense):
    params = pj.apply_adapter(dense, pj.LilyConfig(r=2, init_weights=False, target_modules=["dense"]))
    with pytest.raises(ValueError, match="is not linear in what it is multiplied with, as LILY"):
        pj.adapt(with_transpose)(params, normal(3, 6))


def test_pvera_draws_about_its_means_in_training_alone(dense):
    config = pj.PveraConfig(r=3, init_weights=False, target_modules=["dense"])
    params = pj.apply_adapter(dense, config)
    x = jnp.broadcast_to(normal(3, 6), (4000, 6))
    noisy_params = pj.with_dropout(params, jax.random.key(1))
    noisy, clean = pj.adapt(layer)(noisy_params, x), pj.adapt(layer)(params, x)
    leaf = params["dense"]["kernel"]
    variance = np.exp((x[0] @ leaf.state["pvera_A"] * leaf.params["pvera_lambda_d"])[3:])
    want = np.sqrt(variance @ np.square(leaf.state["pvera_B"] * leaf.params["pvera_lambda_b"][None]))
    np.testing.assert_allclose(np.std(noisy, axis=0), want, rtol=0.06)  # five standard errors of 4000 draws
    assert (np.abs(np.mean(noisy - clean, axis=0)) < 5 * want / 4000**0.5).all()
    with pytest.raises(ValueError, match="is not linear in what it is multiplied with"):
        pj.adapt(with_transpose)(noisy_params, x)
    for options in ({"sample_at_inference": True}, {"generator_seed": 3}):
        with pytest.raises(ValueError, match=f"PveraConfig\\({next(iter(options))}=.* is not supported yet"):
            pj.PveraConfig(**options)


def test_deft_of_a_basis_takes_its_directions_away_whole(dense):
    config = pj.DeftConfig(r=3, decomposition_method="qr", para=True, target_modules=["dense"])
    params = pj.apply_adapter(dense, config)
    basis, _ = np.linalg.qr(params["dense"]["kernel"].params["deft_P"])
    kernel, merged = dense["dense"]["kernel"], pj.merge(params)["dense"]["kernel"]
    close(merged, kernel - kernel @ basis @ basis.T)
    assert np.abs(merged @ basis).max() < 1e-5 < np.abs(kernel @ basis).max()


def test_peanut_without_an_activation_is_a_factor_of_the_weight(dense):
    config = pj.PeanutConfig(r=3, act_fn="linear", scaling=2.0, init_weights=False, target_modules=["dense"])
    params = pj.apply_adapter(dense, config)
    first, last = params["dense"]["kernel"].params.values()
    kernel = dense["dense"]["kernel"]
    close(pj.merge(params)["dense"]["kernel"], kernel + 2 * kernel @ first @ last)
    for options in ({"depth": 9}, {"act_fn": "prelu"}):
        (field,) = options
        with pytest.raises(ValueError, match=f"{field}=.* is not supported"):
            pj.PeanutConfig(**options)


LILY = {"r": 3, "stride_A": 2, "num_B": 3, "target_modules": ["up", "down"]}


def lily_trees(kind=None):
    """Five layers, each by itself and stacked, and the layout of the stack."""
    stack = {name: {"kernel": normal(seed, 5, 6, 6)} for seed, name in enumerate(("up", "down"))}
    apart = {str(i): jax.tree.map(lambda array, i=i: array[i], stack) for i in range(5)}
    if kind:
        apart = pj.quantize(apart, kind=kind)
    return {"layers": apart}, {"layers": stack}, {"layers.*": pj.Layout((0,), (1,), (2,))}


def first_equals(arrays):
    """For each array the place of the first one that is equal to it."""
    return [next(i for i, other in enumerate(arrays) if np.array_equal(one, other)) for one in arrays]


def lily_run(params, x):
    for i in range(5):
        layer = params["layers"][str(i)] if "0" in params["layers"] else None
        for name in ("up", "down"):
            x = x + jnp.tanh(x @ (layer[name]["kernel"] if layer else params["layers"][name]["kernel"][i]))
    return x


def test_lily_layers_share_factors_that_their_inputs_mix(tmp_path):
    """One first factor for two layers and one set of second ones for all, each trained once."""
    apart, stack, layout = lily_trees()
    fresh = pj.apply_adapter(apart, pj.LilyConfig(**LILY))
    x, run = normal(3, 4, 6), pj.adapt(lily_run)
    np.testing.assert_array_equal(run(fresh, x), lily_run(apart, x))
    params = perturbed(fresh)
    want = 2 * (3 * 6 * 3 + 3 * 3 * 6 + 5 * 3 * 3)  # three first factors, three second ones, five routers
    assert count_parameters(params)[0] == sum(leaf.size for leaf in jax.tree.leaves(pj.partition(params)[0])) == want
    file = pj.get_peft_model_state_dict(params)
    for name in ("up", "down"):
        first, second = ([file[f"base_model.model.layers.{i}.{name}.lily_{m}.weight"] for i in range(5)] for m in "AB")
        assert first_equals(first) == [0, 0, 2, 2, 4] and first_equals(second) == [0] * 5
    # By the paper: the change of one layer, whose weights are means over all rows.
    leaf, i = params["layers"]["3"]["down"]["kernel"], 3
    a, b, router = (file[f"base_model.model.layers.{i}.down.lily_{m}.weight"] for m in ("A", "B", "router"))
    inner = np.asarray(x) @ a.T
    weights = np.asarray(jax.nn.softmax(inner @ router.T, axis=-1)).mean(0)
    mixed = np.einsum("c,cro->ro", weights, b.reshape(3, 3, 6))
    close(leaf.apply(x), x @ leaf.base + inner @ mixed)
    assert np.abs(leaf.apply(x[:1]) - leaf.apply(x)[:1]).max() > 1e-4, "the other rows do not count"
    # A file goes onto the stack, whose numbers and gradients are the same; other copies are refused.
    config = pj.LilyConfig(**LILY)
    stacked = pj.set_peft_model_state_dict(stack, config, file, layout=layout)
    close(run(stacked, x), run(params, x))
    assert count_parameters(stacked)[0] == want
    again = pj.get_peft_model_state_dict(stacked)
    assert again.keys() == file.keys() and all(np.array_equal(again[key], file[key]) for key in file)

    def gradients(params):
        trainable, frozen = pj.partition(params)
        found = jax.jit(jax.grad(lambda trainable: jnp.sum(run(pj.combine(trainable, frozen), x) ** 2)))(trainable)
        return pj.get_peft_model_state_dict(pj.combine(found, frozen))

    one, other = gradients(params), gradients(stacked)
    for key in one:
        close(other[key], one[key], 1e-4)  # sums of five layers' gradients in another order
        assert np.abs(one[key]).max() > 1e-4, f"{key} has no gradient"
    file["base_model.model.layers.1.up.lily_A.weight"] = 1 + file["base_model.model.layers.1.up.lily_A.weight"]
    with pytest.raises(ValueError, match=r"layers.1.up.lily_A.weight is not equal to .*layers.0.up.lily_A.weight"):
        pj.set_peft_model_state_dict(stack, config, file, layout=layout)


def test_lily_of_a_regex_shares_among_all_of_one_size():
    apart, _, _ = lily_trees()
    params = pj.apply_adapter(apart, pj.LilyConfig(r=2, stride_A=4, target_modules=r".*\.(up|down)"))
    file = pj.get_peft_model_state_dict(perturbed(params))
    order = [f"base_model.model.layers.{i}.{name}.lily_{{}}.weight" for i in range(5) for name in ("down", "up")]
    assert first_equals([file[key.format("A")] for key in order]) == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert first_equals([file[key.format("B")] for key in order]) == [0] * 10


def test_lily_shares_by_the_ends_of_paths_where_peft_shortens_a_long_list():
    utils = pytest.importorskip("peft.tuners.tuners_utils")
    tree = {"layers": {str(i): {name: {"kernel": normal(i, 3, 3)} for name in ("up", "down", "on")} for i in range(10)}}
    names = [f"layers.{i}.{name}" for i in range(10) for name in ("up", "down")]
    for count, groups in ((20, 2), (19, 19)):
        params = pj.apply_adapter(tree, pj.LilyConfig(r=2, stride_A=10, target_modules=names[:count]))
        file = pj.get_peft_model_state_dict(perturbed(params))
        firsts = [file[key] for key in sorted(file) if "lily_A" in key]
        assert len(firsts) == count and len(set(first_equals(firsts))) == groups
    others = [f"layers.{i}.on" for i in range(10)] + ["layers.0.on.up"]
    want = utils._find_minimal_target_modules(names, [*others, "layers", *(f"layers.{i}" for i in range(10))])
    assert set(shortened_names(names, [*names, *others])) == want and len(want) == 11


@pytest.mark.parametrize("kind", ["int8", "nf4", "int4", "bfloat16"])
def test_lily_goes_on_other_bases_and_has_no_merged_form(kind):
    apart, _, _ = lily_trees(None if kind == "bfloat16" else kind)
    if kind == "bfloat16":
        apart = jax.tree.map(lambda array: array.astype(jnp.bfloat16), apart)
    params = perturbed(pj.apply_adapter(apart, pj.LilyConfig(**LILY)))
    leaf = params["layers"]["1"]["up"]["kernel"]
    x = normal(3, 4, 6).astype(jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
    config = pj.LilyConfig(**LILY | {"target_modules": ["up"]})
    bare = pj.apply_adapter({"up": {"kernel": jnp.zeros((6, 6), x.dtype)}}, config)
    bare = dataclasses.replace(bare["up"]["kernel"], params=dict(leaf.params) | dict(leaf.state["adapter"]))
    base = pj.unload(params)["layers"]["1"]["up"]["kernel"]
    plain = base.apply(x) if hasattr(base, "apply") else x @ base
    got, want = (np.asarray(y, np.float32) for y in (leaf.apply(x), plain + bare.apply(x).astype(x.dtype)))
    close(got, want, 2**-7 if kind == "bfloat16" else 1e-5)  # two sums are rounded to 8 digits
    assert np.abs(got - np.asarray(plain, np.float32)).max() > 0.05
    with pytest.raises(ValueError, match="mixes its factors by the inputs, so that it is no one matrix"):
        pj.merge(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride_A": 0}, "stride_A is a number of layers, at least 1, got 0"),
        ({"num_B": 1}, "num_B is at least 2, so that there is something to mix, got 1"),
        ({"r": 0}, "LILY needs ranks of at least 1"),
    ],
)
def test_lily_says_what_it_needs(options, message):
    with pytest.raises(ValueError, match=message):
        pj.LilyConfig(**options)


ADAMSS = {"r": 5, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["dense"]}


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (40, 40)])
def test_clusters_of_singular_vectors_are_those_of_pytorch_and_scikit_learn(shape):
    torch, cluster = pytest.importorskip("torch"), pytest.importorskip("sklearn.cluster")
    for seed in range(6):
        weight = np.asarray(normal(seed, *shape))
        q = 5
        left, right = low_rank_svd(weight, q, seed)
        torch.manual_seed(seed)
        u, _, v = (array.numpy() for array in torch.svd_lowrank(torch.tensor(weight), q=q, niter=2))
        signs = np.sign((u * left).sum(0))
        close(left * signs, u, 1e-4)  # vectors of near values of a product of eight float32 matrices
        close(right.T * signs, v, 1e-4)
        for clusters in (1, 3, 7):
            options = {"n_clusters": clusters, "init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
            want = cluster.KMeans(**options).fit_predict(u)
            np.testing.assert_array_equal(k_means(left, clusters), want)
    rows = np.repeat(np.asarray(normal(9, 4, 3)), 3, axis=0)  # of which some are chosen twice: clusters without rows
    options = {"n_clusters": 4, "init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}
    np.testing.assert_array_equal(k_means(rows, 4), cluster.KMeans(**options).fit_predict(rows))


def test_adamss_changes_each_cluster_at_low_rank_in_the_weights_directions():
    """Bias included, as the last input; the same in a stack; and a file is of its base alone."""
    kernel, bias = normal(1, 2, 8, 12), normal(2, 2, 12)
    apart = {"layers": [{"dense": {"kernel": kernel[i], "bias": bias[i]}} for i in range(2)]}
    stack = {"layers": {"dense": {"kernel": kernel, "bias": bias}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,)), ".*bias": pj.Layout((0,), (), (1,))}
    fresh = pj.apply_adapter(apart, pj.AdamssConfig(**ADAMSS))
    jax.tree.map(np.testing.assert_array_equal, pj.merge(fresh), apart)
    params = perturbed(fresh)
    merged = pj.merge(params)
    for i in range(2):
        node, dense = params["layers"][i]["dense"]["kernel"], merged["layers"][i]["dense"]
        change = np.concatenate([dense["kernel"] - kernel[i], dense["bias"][None] - bias[i][None]]).T
        assert np.abs(change[:, -1]).max() > 0.01, "the bias stays"
        whole = np.concatenate([kernel[i], bias[i][None]]).T
        right = low_rank_svd(whole, 5, 0)[1]
        close(change @ right.T @ right, change)
        labels = k_means(low_rank_svd(whole, 5, 0)[0], 3)
        assert [np.linalg.matrix_rank(change[labels == k], tol=1e-4) for k in range(3)] == np.minimum(
            np.bincount(labels), 2
        ).tolist()
        x = normal(5, 3, 8)
        close(node.apply(x), x @ dense["kernel"])
    file = pj.get_peft_model_state_dict(params)
    trained = sum(array.size for key, array in file.items() if "newB" not in key)
    assert count_parameters(params)[0] == trained
    stacked = pj.set_peft_model_state_dict(stack, pj.AdamssConfig(**ADAMSS), file, layout=layout)
    close(pj.merge(stacked)["layers"]["dense"]["bias"][1], merged["layers"][1]["dense"]["bias"])
    close(pj.merge(stacked)["layers"]["dense"]["kernel"][1], merged["layers"][1]["dense"]["kernel"])
    again = pj.get_peft_model_state_dict(stacked)
    assert again.keys() == file.keys() and all(np.array_equal(again[key], file[key]) for key in file)
    other = jax.tree.map(lambda array: array[::-1] ** 2, stack)
    with pytest.raises(ValueError, match="The clusters of .* outputs on this base, and .* in the file"):
        pj.set_peft_model_state_dict(other, pj.AdamssConfig(**ADAMSS), file, layout=layout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 8}, r"r=8\) has as many singular vectors as 'dense' has outputs, 4, .*Choose r below 4"),
        ({"init_weights": "zeros"}, "init_weights is 'orthogonal', None or False, got 'zeros'"),
        ({"num_subspaces": 0}, "num_subspaces is at least 1, got 0"),
        ({"use_asa": True, "mask_interval": 0}, "mask_interval is a number above 0 with use_asa, got 0"),
        ({"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "init_warmup=9 is to be below final_warmup=9"),
    ],
)
def test_adamss_says_what_it_needs(options, message, dense):
    with pytest.raises(ValueError, match=message):
        pj.apply_adapter(dense, pj.AdamssConfig(**ADAMSS | options))


@pytest.mark.filterwarnings("ignore:A FROD adapter")
def test_frod_turns_a_basis_that_layers_of_a_kind_share():
    """The base is U diag(l) V' with columns of U of length 1; a file has V once, and the places that PEFT draws."""
    torch = pytest.importorskip("torch")
    tree = {"layers": [{"up": {"kernel": normal(i, 6, 5)}, "out": {"kernel": normal(9 + i, 4, 3)}} for i in range(3)]}
    config = pj.FrodConfig(sparse_rate=0.2, projection_prng_key=3, target_modules=["up", "out"])
    params = pj.apply_adapter(tree, config)
    file = pj.get_peft_model_state_dict(params)
    assert sorted(key for key in file if "layers" not in key) == [
        f"base_model.{name}.{kind}" for name in ("frod_V", "frod_s_indices", "frod_s_size") for kind in ("out", "up")
    ]
    generator = torch.Generator().manual_seed(3)
    for kind, n_in in (("out", 4), ("up", 6)):
        places = np.array([(i, j) for i in range(n_in) for j in range(n_in) if i != j])
        drawn = torch.randperm(len(places), generator=generator)[: int(n_in * n_in * 0.2)].numpy()
        np.testing.assert_array_equal(file[f"base_model.frod_s_indices.{kind}"], places[drawn].T)
        basis = file[f"base_model.frod_V.{kind}"]
        for layer, adapted in zip(tree["layers"], params["layers"], strict=True):
            left = np.asarray(adapted[kind]["kernel"].state["frod_U"]).T
            close(np.linalg.norm(left, axis=0), np.ones(n_in))
            lengths = np.asarray(adapted[kind]["kernel"].params["frod_lambda_l"])
            close(left * lengths @ basis.T, layer[kind]["kernel"].T)
    moved = perturbed(params)
    node = moved["layers"][1]["up"]["kernel"]
    sparse = np.diag(np.asarray(node.params["frod_lambda_l"])).copy()
    sparse[tuple(file["base_model.frod_s_indices.up"])] += node.params["frod_lambda_s_values"]
    close(node.dense().T, np.asarray(node.state["frod_U"]).T @ sparse @ file["base_model.frod_V.up"].T)
    again = pj.set_peft_model_state_dict(tree, config, pj.get_peft_model_state_dict(moved))
    jax.tree.map(lambda got, want: close(got, want, 1e-6), pj.merge(again), pj.merge(moved))


def test_frod_makes_a_basis_once_for_all_leaves_of_a_kind(monkeypatch):
    made = []
    monkeypatch.setattr(frod, "joint_basis", lambda *given: made.append(given) or joint_basis(*given))
    tree = {"layers": [{"up": {"kernel": normal(i, 6, 5)}, "out": {"kernel": normal(9 + i, 4, 3)}} for i in range(3)]}
    with pytest.warns(UserWarning, match="has a basis of its own") as warned:
        pj.apply_adapter(tree, pj.FrodConfig(sparse_rate=0.2, target_modules=["up", "out"]))
    assert len(made) == 2 and [len(matrices) for matrices, _ in made] == [3, 3]
    assert [one.filename for one in warned if "of its own" in str(one.message)] == [__file__], "once, at the call"


@pytest.mark.filterwarnings("ignore:A FROD adapter")
def test_frod_adapters_on_one_weight_add_up():
    """As in PEFT each one adds what it changes of the base."""
    params = {"dense": {"kernel": normal(0, 6, 5)}}
    base, x, changes = params["dense"]["kernel"], normal(5, 3, 6), []
    for seed, name in enumerate(("default", "b")):
        config = pj.FrodConfig(sparse_rate=0.2, projection_prng_key=seed, target_modules=["dense"])
        params = pj.apply_adapter(params, config, adapter_name=name)
        alone = perturbed(pj.set_adapter(params, name), 0.3 + seed)
        changes.append(np.asarray(alone["dense"]["kernel"].dense() - base))
        params = alone
    assert all(np.abs(change).max() > 0.1 for change in changes)
    leaf = pj.set_adapter(params, ["default", "b"])["dense"]["kernel"]
    whole = np.asarray(base) + changes[0] + changes[1]
    close(leaf.dense(), whole)
    close(leaf.apply(x), np.asarray(x) @ whole)
    one = pj.set_adapter(params, "b")["dense"]["kernel"]
    close(one.apply(x), np.asarray(x) @ (np.asarray(base) + changes[1]))


def test_frod_says_what_peft_would_not_read(dense):
    config = pj.FrodConfig(sparse_rate=0.1, target_modules=["dense"])
    with pytest.warns(UserWarning, match="has a basis of its own.*train on from an adapter that PEFT saved"):
        params = pj.apply_adapter(dense, config)
    file = pj.get_peft_model_state_dict(params)
    file["base_model.frod_s_indices.dense"] = 6 + file["base_model.frod_s_indices.dense"]
    with pytest.raises(ValueError, match="frod_s_indices of 'dense.kernel' holds .* no whole number from 0 to 5"):
        pj.set_peft_model_state_dict(dense, config, file)
    with pytest.raises(ValueError, match=r"save_projection=False\) is not supported"):
        pj.FrodConfig(save_projection=False)
    with pytest.raises(ValueError, match="sparse_rate is a share, from 0 to 1, got 2"):
        pj.FrodConfig(sparse_rate=2)


@pytest.mark.filterwarnings("ignore:A FROD adapter")
def test_frod_has_one_basis_for_modules_of_equal_inputs():
    tree = {"layers": [{"up": {"kernel": normal(i, 4 + i, 5)}} for i in range(2)]}
    with pytest.raises(ValueError, match=r"modules of the kind 'up', and these have \[4, 5\] inputs"):
        pj.apply_adapter(tree, pj.FrodConfig(target_modules=["up"]))


@pytest.mark.parametrize("sizes", [(6, 9), (9, 6)])
def test_randlora_has_full_rank_and_its_matrices_are_frozen(sizes):
    tree = {"dense": {"kernel": normal(0, *sizes)}}
    config = pj.RandLoraConfig(r=2, init_weights=False, target_modules=["dense"])
    leaf = pj.apply_adapter(tree, config)["dense"]["kernel"]
    assert np.linalg.matrix_rank(leaf.dense() - tree["dense"]["kernel"], tol=1e-3) == config.r, "scales start alike"
    learned = {role: normal(seed, *array.shape) for seed, (role, array) in enumerate(leaf.params.items())}
    change = dataclasses.replace(leaf, params=learned).dense() - tree["dense"]["kernel"]
    assert np.linalg.matrix_rank(change, tol=1e-3) == min(sizes) > config.r
    assert set(leaf.params) == {"randlora_lambda", "randlora_gamma"}


def test_vblora_chooses_from_one_bank_that_all_layers_train(dense):
    tree = {"dense": dense["dense"], "other": {"kernel": normal(3, 4, 2)}}
    options = {"r": 3, "num_vectors": 5, "vector_length": 2, "topk": 1, "target_modules": ["dense", "other"]}
    params = pj.apply_adapter(tree, pj.VBLoRAConfig(init_vector_bank_bound=1.0, **options))
    trainable, frozen = pj.partition(params)
    first, second = trainable["dense"]["kernel"].params, trainable["other"]["kernel"].params
    assert list(first) == [*second, "vblora_vector_bank"]
    bank = np.asarray(first["vblora_vector_bank"])

    def changes(trainable):
        merged = pj.merge(pj.combine(trainable, frozen))
        return [merged[name]["kernel"] - tree[name]["kernel"] for name in ("dense", "other")]

    for change, logits in zip(changes(trainable), (first, second), strict=True):
        a, b = (bank[np.argmax(logits[f"vblora_logits_{factor}"], axis=-1)] for factor in "AB")  # a vector a part
        close(change, a.reshape(3, -1).T @ np.swapaxes(b, 0, 1).reshape(3, -1))
    every = jax.grad(lambda trainable: sum(jnp.sum(jnp.sin(change)) for change in changes(trainable)))(trainable)
    each = [jax.grad(lambda trainable, i=i: jnp.sum(jnp.sin(changes(trainable)[i])))(trainable) for i in range(2)]
    got, *parts = (one["dense"]["kernel"].params["vblora_vector_bank"] for one in (every, *each))
    close(got, parts[0] + parts[1])
    assert min(np.abs(part).max() for part in parts) > 1e-2
    file = pj.get_peft_model_state_dict(params)
    assert [key for key in file if "bank" in key] == ["base_model.vblora_vector_bank"]
    with pytest.raises(ValueError, match="vector_length=3 needs a divisor of the sizes of 'other', which are 4 and 2"):
        pj.apply_adapter(tree, pj.VBLoRAConfig(**options | {"vector_length": 3, "target_modules": ["other"]}))
    with pytest.raises(ValueError, match="topk is from 1 to num_vectors=5, got 6"):
        pj.VBLoRAConfig(**options | {"topk": 6})


@pytest.mark.parametrize("kinds", [("lora", "lora", "vector"), ("vector", "vector", "constant"), ("none",) * 3])
def test_glora_multiplies_and_adds_to_weight_and_bias(kinds):
    """Of several adapters each changes the weight and the bias as they were without the others, as in PEFT."""
    options = dict(zip(("config_A_B", "config_C", "config_D_E"), kinds, strict=True))
    config = pj.GloraConfig(r=2, target_modules=["dense"], init_weights=False, **options)
    tree = {"dense": {"kernel": normal(0, 6, 4), "bias": normal(1, 4)}}
    kernel, bias = tree["dense"]["kernel"], tree["dense"]["bias"]
    params, want, want_bias = tree, kernel, bias
    for number, name in enumerate(("one", "two")):
        params = pj.apply_adapter(params, config, adapter_name=name, key=jax.random.key(number))
        own = params["dense"]["kernel"].params
        if kinds[0] == "lora":
            want = want + kernel * (own["A.Xu"] @ own["A.Xd"]) + own["B.Xu"] @ own["B.Xd"]
            column = own["C.Xd"] @ own["C.Xu"]
        elif kinds[0] == "vector":
            want = want + kernel * own["A.X"][None] + own["B.X"][None]
            column = own["C.X"]
        if kinds[0] == "none":
            assert not own
        else:
            want_bias = want_bias + bias * jnp.broadcast_to(own["D.X"], 4) + jnp.broadcast_to(own["E.X"], 4)
            want_bias = want_bias + column @ kernel
    both = pj.set_adapter(params, ["one", "two"])
    merged = pj.merge(both)["dense"]
    close(merged["kernel"], want)
    close(merged["bias"], want_bias)
    x = normal(2, 3, 6)
    run = pj.adapt(lambda params, x: x @ params["dense"]["kernel"] + params["dense"]["bias"][None])
    close(run(both, x), x @ want + want_bias[None])


def test_glora_without_a_bias_has_zeros_in_its_file():
    tree = {"dense": {"kernel": normal(0, 6, 4)}}
    config = pj.GloraConfig(r=2, target_modules=["dense"])
    params = pj.apply_adapter(tree, config)
    assert set(params["dense"]["kernel"].params) == {"A.Xd", "A.Xu", "B.Xd", "B.Xu"}
    file = pj.get_peft_model_state_dict(params)
    key = "base_model.model.dense.glora_D.zeros"
    assert {name for name in file if name.endswith("zeros")} == {key.replace("D", part) for part in "CDE"}
    file[key][0] = 1
    with pytest.raises(ValueError, match="glora_D.zeros of 'dense.kernel' is not zero, but the config leaves D out"):
        pj.set_peft_model_state_dict(tree, config, file)
    with pytest.raises(ValueError, match="config_C is one of lora, vector, none, got 'constant'"):
        pj.GloraConfig(config_C="constant")


def test_tinylora_trains_a_few_numbers_between_singular_vectors(dense):
    """The change stays between the first singular vectors, and weight_tying says how many vectors there are."""
    tree = {name: {"kernel": normal(number, 6, 5)} for number, name in enumerate("abcde")}
    options = {"r": 2, "u": 3, "init_weights": "uniform", "init_v_bound": 5.0, "target_modules": list("abcde")}
    params = pj.apply_adapter(tree, pj.TinyLoraConfig(**options))
    assert count_parameters(params)[0] == 5 * 3
    merged = pj.merge(params)
    for name in "abcde":
        u, _, vt = np.linalg.svd(tree[name]["kernel"])
        change = np.asarray(merged[name]["kernel"] - tree[name]["kernel"])
        assert np.abs(change).max() > 0.1
        close(u[:, :2] @ (u[:, :2].T @ change @ vt[:2].T) @ vt[:2], change)
    assert sorted(key for key in pj.get_peft_model_state_dict(params) if "_v" in key) == [
        f"base_model.tinylora_v.{number}" for number in range(5)
    ]
    for tying, groups in ((0.4, [0, 1, 2, 2, 2]), (0.6, [0, 0, 1, 1, 1]), (1.0, [0] * 5)):
        params = pj.apply_adapter(tree, pj.TinyLoraConfig(**options, weight_tying=tying))
        assert [int(params[name]["kernel"].state["group"]) for name in "abcde"] == groups
        assert count_parameters(params)[0] == len(set(groups)) * 3
    with pytest.raises(ValueError, match="weight_tying is from 0 to 1, got 1.5"):
        pj.TinyLoraConfig(weight_tying=1.5)
    with pytest.raises(ValueError, match="init_weights is True, False or 'uniform', got 'zeros'"):
        pj.TinyLoraConfig(init_weights="zeros")


def test_unilora_projects_one_vector_and_keeps_its_length(dense):
    tree = {"dense": dense["dense"], "other": {"kernel": normal(3, 4, 2)}}
    options = {"r": 3, "theta_d_length": 7, "init_weights": False, "target_modules": ["dense", "other"]}
    params = pj.apply_adapter(tree, pj.UniLoraConfig(**options))
    first, second = params["dense"]["kernel"], params["other"]["kernel"]
    assert list(first.params) == ["unilora_theta_d"] and not second.params
    factors = [leaf.method.factors(leaf.params, leaf.state, *leaf.shape) for leaf in (first, second)]
    elements = np.concatenate([factor.ravel() for pair in factors for factor in pair])
    close(np.linalg.norm(elements), np.linalg.norm(first.params["unilora_theta_d"]))
    places = np.concatenate(
        [np.ravel(leaf.state[f"unilora_indices_{one}"]) for leaf in (first, second) for one in "AB"]
    )
    assert np.ptp(np.bincount(places)) <= 1, "each element is taken equally often, or once more"
    assert count_parameters(params)[0] == 7
    file = pj.get_peft_model_state_dict(params)
    assert set(file) == {"base_model.unilora_theta_d"}
    with pytest.raises(ValueError, match="theta_d_length is at least 1, got 0"):
        pj.UniLoraConfig(**options | {"theta_d_length": 0})
    whole = pj.apply_adapter(tree, pj.UniLoraConfig(**options, save_indices=True))
    file = pj.get_peft_model_state_dict(whole)
    file["base_model.model.other.unilora_indices_A"][0, 0] = 7
    with pytest.raises(
        ValueError, match="unilora_indices_A of 'other.kernel' holds 7, which is no whole number from 0"
    ):
        pj.set_peft_model_state_dict(tree, pj.UniLoraConfig(**options, save_indices=True), file)


@pytest.mark.parametrize("top", [True, False])
def test_supertuning_trains_the_largest_magnitudes_or_the_smallest(top, dense):
    options = {"sparsity": 0.75, "select_top": top, "init_weights": False, "target_modules": ["dense"]}
    params = pj.apply_adapter(dense, pj.SupertuningConfig(**options))
    kernel = np.asarray(dense["dense"]["kernel"])
    changed = np.asarray(pj.merge(params)["dense"]["kernel"]) != kernel
    assert changed.sum() == kernel.size // 4
    trained, left = np.abs(kernel[changed]), np.abs(kernel[~changed])
    assert trained.min() > left.max() if top else trained.max() < left.min()
    with pytest.raises(ValueError, match=r"sparsity=0.999 trains none of the \d+ elements of 'dense'. Lower sparsity"):
        pj.apply_adapter(dense, pj.SupertuningConfig(sparsity=0.999, target_modules=["dense"]))
    with pytest.raises(ValueError, match="lora_alpha=4 scales a LoRA, which r=None leaves out"):
        pj.SupertuningConfig(lora_alpha=4)


def test_osf_moves_its_vectors_beside_those_that_it_keeps(dense):
    """Steps along gradients stay orthogonal to the kept singular vectors, and the kept part of the weight stays."""
    config = pj.OSFConfig(effective_rank=2, target_modules=["dense"])
    leaf = pj.apply_adapter(dense, config)["dense"]["kernel"]
    x, kernel = normal(1, 5, 6), dense["dense"]["kernel"]

    def loss(params):
        return jnp.sum(jnp.sin(dataclasses.replace(leaf, params=params).apply(x)))

    gradient = jax.grad(loss)(leaf.params)
    stepped = {role: array - 0.1 * gradient[role] for role, array in leaf.params.items()}
    u, values, vt = np.linalg.svd(kernel, full_matrices=False)
    assert np.abs(stepped["V_low"].T @ u[:, :2]).max() < 1e-5 and np.abs(vt[:2] @ stepped["U_low"]).max() < 1e-5
    moved = dataclasses.replace(leaf, params=stepped).dense()
    assert np.abs(moved - kernel).max() > 1e-2
    close(u[:, :2].T @ moved @ vt[:2].T, np.diag(values[:2]))
    for rank, kept in ((4.0, 4), (1.0, 4)):
        with pytest.raises(
            ValueError, match=f"OSF keeps {kept} of the 4 singular values of 'dense'. Keep at least one"
        ):
            pj.apply_adapter(dense, config.replace(effective_rank=rank))
    with pytest.raises(ValueError, match="OSF keeps a number of singular values above 0, got {'effective_rank': -1}"):
        pj.OSFConfig(effective_rank=-1)


def test_osf_finds_patterns_of_ranks_anywhere(dense):
    config = pj.OSFConfig(effective_rank=1, rank_pattern={"(?i)EN[ST]": 3}, target_modules=["dense"])
    assert pj.apply_adapter(dense, config)["dense"]["kernel"].params["S_low"].shape == (1,)
    with pytest.raises(ValueError, match=r"a key of rank_pattern='\('"):
        pj.apply_adapter(dense, config.replace(rank_pattern={"(": 3}))


RANKS_OF_LAYERS = ["DeloraConfig", "LoHaConfig", "LoKrConfig", "LoraConfig", "OSFConfig"]


@pytest.mark.parametrize("largest", [6, 1])
@pytest.mark.parametrize("name", RANKS_OF_LAYERS)
def test_the_rank_of_a_layer_that_is_not_adapted_is_left_aside(name, largest):
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    model = pj.AutoModelForCausalLM.from_config(pj.models.LlamaConfig(num_hidden_layers=2, **sizes))
    ranks = {r"model\.layers\.0\..*": largest}
    targets = ["layers.1.self_attn.q_proj", "down_proj"]  # the second has a module that the pattern hits
    config = getattr(pj, name)(target_modules=targets, rank_pattern=ranks)
    adapted = pj.get_peft_model(model, config)
    q_proj = adapted.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (changed_layers(q_proj) == [False, True]).all()


def test_cayleys_map_of_half_precision_is_solved_in_float32(dense):
    config = pj.OFTConfig(oft_block_size=3, use_cayley_neumann=False, init_weights=False, target_modules=["dense"])
    leaf = pj.apply_adapter(dense, config)["dense"]["kernel"]
    half = dataclasses.replace(leaf, params=jax.tree.map(lambda array: array.astype(jnp.bfloat16), leaf.params))
    close(half.dense(), leaf.dense(), 2e-2)  # bfloat16 has 8 bits
    assert np.abs(leaf.dense() - dense["dense"]["kernel"]).max() > 0.1


PSOFTS = {
    "rotation": {},
    "series": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 30, "cayley_neumann_eps": 0.9},
    "with factors": {"psoft_mag_a": True, "psoft_mag_b": True},
    "any matrix": {"psoft_orth": False},
    "both alike": {"ab_svd_init": "pissa_init"},
}


@pytest.mark.parametrize("case", PSOFTS)
def test_psoft_rotates_the_largest_singular_directions(case, dense):
    """The rest of the weight stays, and a rotation keeps the lengths and angles of the columns in the subspace."""
    options = {"r": 3, "psoft_alpha": 7, "psoft_mag_a": False, "psoft_mag_b": False, "target_modules": ["dense"]}
    params = pj.apply_adapter(dense, pj.PsoftConfig(**options | PSOFTS[case]))
    kernel = np.asarray(dense["dense"]["kernel"])
    close(pj.merge(params)["dense"]["kernel"], kernel)
    u, values, vt = np.linalg.svd(kernel, full_matrices=False)  # inputs, and outputs, in their columns and rows
    moved = np.asarray(pj.merge(perturbed(params))["dense"]["kernel"])
    assert np.abs(moved - kernel).max() > 0.1
    close(moved @ vt[3:].T, kernel @ vt[3:].T)
    close(u[:, 3:].T @ moved, u[:, 3:].T @ kernel)
    before, after = (np.diag(1 / values[:3]) @ vt[:3] @ matrix.T @ u[:, :3] for matrix in (kernel, moved))
    close(before, np.eye(3))
    is_rotation = case in ("rotation", "series")
    assert (np.abs(after @ after.T - np.eye(3)).max() < 1e-5) == is_rotation


def test_psoft_trains_neither_of_its_factors(dense):
    """A step moves R alone; a file holds R alone, and what is read of it has the same A and B."""
    config = pj.PsoftConfig(r=3, init_weights=False, target_modules=["dense"])
    params = pj.apply_adapter(dense, config)
    trainable, frozen = pj.partition(params)
    x = normal(1, 5, 6)

    def loss(trainable):
        return jnp.sum(jnp.sin(pj.adapt(layer)(pj.combine(trainable, frozen), x)))

    gradient = jax.grad(loss)(trainable)
    assert len(jax.tree.leaves(gradient)) == 3 and all(np.abs(one).max() > 1e-3 for one in jax.tree.leaves(gradient))
    stepped = pj.combine(jax.tree.map(lambda array, slope: array - 0.1 * slope, trainable, gradient), frozen)
    tensors = pj.get_peft_model_state_dict(stepped)
    ends = {key.removeprefix("base_model.model.dense."): array.shape for key, array in tensors.items()}
    assert ends == {"psoft_R.weight": (3,), "psoft_R.vector_a": (3,), "psoft_R.vector_b": (3,)}
    again = pj.set_peft_model_state_dict(dense, config, tensors)
    for tree in (stepped, again):
        for role in ("psoft_A", "psoft_B"):
            old, new = (one["dense"]["kernel"].state[role] for one in (params, tree))
            np.testing.assert_array_equal(old, new)
    jax.tree.map(np.testing.assert_array_equal, pj.merge(again), pj.merge(stepped))
    assert count_parameters(params)[0] == 9


def test_the_scale_of_a_psoft_counts_when_it_is_changed_alone(dense):
    """B is divided by the scale."""
    changes = []
    for alpha in (1, 50):
        config = pj.PsoftConfig(r=3, psoft_alpha=alpha, init_weights=False, target_modules=["dense"])
        params = pj.apply_adapter(dense, config)
        changes.append(pj.merge(params)["dense"]["kernel"] - dense["dense"]["kernel"])
    close(changes[0], changes[1])
    doubled = pj.merge(pj.scale_adapter(params, 2.0))["dense"]["kernel"] - dense["dense"]["kernel"]
    close(doubled, 2 * changes[1])


def test_the_gradient_of_a_psoft_goes_through_the_ball_of_its_series(dense):
    """An angle that lengthens a Q on the ball's boundary alone changes nothing; at 0 the gradient is finite."""
    options = {"r": 2, "psoft_mag_a": False, "psoft_mag_b": False, "use_cayley_neumann": True}
    leaf = pj.apply_adapter(
        dense, pj.PsoftConfig(**options, cayley_neumann_eps=0.5, num_cayley_neumann_terms=9, target_modules=["dense"])
    )["dense"]["kernel"]

    def change(angle):
        return dataclasses.replace(leaf, params={"psoft_R": jnp.reshape(angle, (1,))}).dense()

    slopes = [np.abs(jax.jacobian(change)(jnp.float32(angle))).max() for angle in (0.0, 0.1, 3.0)]
    assert np.isfinite(slopes).all() and min(slopes[:2]) > 0.1 and slopes[2] < 1e-5


PSOFT_ERRORS = {
    "r=7 singular directions, and 'dense' of 6 inputs and 4 outputs has 4. Lower r": {"r": 7},
    "PSOFT needs ranks of at least 1": {"r": 0},
    "psoft_alpha is above 0, got 0": {"psoft_alpha": 0},
    "psoft_dropout is a probability": {"psoft_dropout": 1.0},
    "ab_svd_init is 'psoft_init' or 'pissa_init', got 'olora'": {"ab_svd_init": "olora"},
    "psoft_svd is 'full' or 'lowrank', got 'randomized'": {"psoft_svd": "randomized"},
    "psoft_svd_lowrank_niter is at least 0, got -1": {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": -1},
    "random_seed is from -9223372036854775808 to 18446744073709551615": {"random_seed": -(2**63) - 1},
    "num_cayley_neumann_terms is at least 1": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 0},
    "cayley_neumann_eps is between 0 and 1, or None, got 1": {"use_cayley_neumann": True, "cayley_neumann_eps": 1.0},
}


@pytest.mark.parametrize("words", PSOFT_ERRORS)
def test_psoft_refuses_wrong_fields(words, dense):
    with pytest.raises(ValueError, match=words):
        pj.apply_adapter(dense, pj.PsoftConfig(**{"r": 2, **PSOFT_ERRORS[words]}, target_modules=["dense"]))


@pytest.mark.parametrize("field", ["num_cayley_neumann_terms", "cayley_neumann_eps", "psoft_svd_lowrank_niter"])
def test_psoft_warns_of_fields_that_it_ignores(field):
    with pytest.warns(UserWarning, match=f"PSOFT uses {field} with .* alone. It is ignored."):
        pj.PsoftConfig(**{field: 0.5 if field == "cayley_neumann_eps" else 4})


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("init", ["psoft_init", "pissa_init"])
@pytest.mark.parametrize("svd", ["full", "lowrank"])
def test_psoft_has_the_singular_vectors_of_peft(svd, init, shape):
    """PEFT's frozen factors, signs included, in every bit but of roots; PyTorch's generator stays as it was."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"r": 5, "psoft_alpha": 3, "psoft_svd": svd, "ab_svd_init": init, "random_seed": 4}
    module = torch.nn.Sequential(torch.nn.Linear(*shape, bias=False))
    kernel = normal(8, *shape)
    module[0].weight.data = torch.tensor(np.asarray(kernel).T.copy())
    layer = peft.get_peft_model(module, peft.PsoftConfig(**options, target_modules=["0"])).base_model.model[0]
    before = torch.get_rng_state()
    params = pj.apply_adapter({"0": {"kernel": kernel}}, pj.PsoftConfig(**options, target_modules=["0"]))
    assert torch.equal(torch.get_rng_state(), before)
    state = params["0"]["kernel"].state
    for role, want in (("psoft_A", layer._psoft_A_cache), ("psoft_B", layer._psoft_B_cache)):
        close(state[role].T, want["default"].numpy(), 1e-6 if init == "pissa_init" else 0)


def test_psoft_without_pytorch(dense, monkeypatch):
    """The whole decomposition is NumPy's, of which a warning says what it means; the other one is an error."""
    config = pj.PsoftConfig(r=3, init_weights=False, target_modules=["dense"])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.warns(UserWarning, match="PSOFT without PyTorch takes NumPy's singular vectors.*pip install torch"):
        params = pj.apply_adapter(dense, config)
    u, _, _ = np.linalg.svd(dense["dense"]["kernel"].T, full_matrices=False)
    values = np.asarray(params["dense"]["kernel"].state["psoft_B"])
    close(values / np.linalg.norm(values, axis=1, keepdims=True), u[:, :3].T)
    tensors = pj.get_peft_model_state_dict(params)
    with pytest.warns(UserWarning, match="so that a file of PEFT's may mean something else here"):
        again = pj.set_peft_model_state_dict(dense, config, tensors)
    jax.tree.map(np.testing.assert_array_equal, pj.merge(again), pj.merge(params))
    with pytest.raises(ValueError, match="PyTorch is not installed. Install its CPU build .* psoft_svd='full'"):
        pj.apply_adapter(dense, config.replace(psoft_svd="lowrank"))


def test_a_psoft_is_attached_in_a_traced_program(dense):
    """Its shapes are known without the weights, which `peft-jax finetune` reads later; under jit the host computes."""
    config = pj.PsoftConfig(r=3, init_weights=False, target_modules=["dense"])

    def attached(params):
        return pj.apply_adapter(params, config, key=jax.random.key(1))

    want = attached(dense)
    assert jax.tree.map(jnp.shape, jax.eval_shape(attached, dense)) == jax.tree.map(jnp.shape, want)
    jax.tree.map(close, pj.merge(jax.jit(attached)(dense)), pj.merge(want))


def damaged(indices, number):
    wrong = indices.astype(np.float32)
    wrong[..., 0] = number
    return wrong


@pytest.mark.parametrize("number", [1000, -1, 0.5])
@pytest.mark.parametrize("name", ["SHIRA", "SUPERTUNING"])
def test_places_outside_of_a_matrix_are_refused(name, number, dense, tmp_path):
    options = {"SHIRA": {"r": 1}, "SUPERTUNING": {"sparsity": 0.75}}[name]
    config = {"SHIRA": pj.ShiraConfig, "SUPERTUNING": pj.SupertuningConfig}[name](**options, target_modules=["dense"])
    pj.interop.save_adapter(pj.apply_adapter(dense, config), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith("indices")]
    save_file({**tensors, key: damaged(tensors[key], number)}, file)
    with pytest.raises(ValueError, match=f"indices of 'dense.kernel' holds {number}.*, which is no whole number"):
        pj.interop.load_adapter(dense, tmp_path)


@pytest.mark.parametrize("split", ["in", "out"])
def test_delora_of_a_matrix_spread_over_devices(split):
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = {"in": P("tensor"), "out": P(None, "tensor")}[split]
    config = pj.DeloraConfig(r=3, init_weights=False, target_modules=["dense"])
    params = pj.apply_adapter({"dense": {"kernel": normal(1, 6, 4)}}, config)

    def product(params, x):
        def local(kernel, x):
            return jax.lax.psum(x @ kernel, "tensor") if split == "in" else x @ kernel

        x_spec, y_spec = (P(None, "tensor"), P()) if split == "in" else (P(), P(None, "tensor"))
        spread = jax.shard_map(local, mesh=mesh, in_specs=(spec, x_spec), out_specs=y_spec)
        return spread(params["dense"]["kernel"], x)

    x = normal(3, 5, 6)
    close(jax.jit(pj.adapt(product))(params, x), x @ pj.merge(params)["dense"]["kernel"])


INPUTS_DROPPED = {
    name: Adapter(method.config, method.drops_inputs).make(pj, init_weights=False, target_modules=["dense"])
    for name, method in METHODS.items()
    if method.drops_inputs is not None
}


@pytest.mark.parametrize("config", INPUTS_DROPPED.values(), ids=INPUTS_DROPPED)
def test_the_inputs_of_the_change_only_are_dropped(config, dense):
    params = pj.apply_adapter(dense, config)
    dropped = pj.with_dropout(params, jax.random.key(1))["dense"]["kernel"]
    x = jnp.ones((4000, 6))
    noisy, clean = dropped.apply(x), params["dense"]["kernel"].apply(x)
    base = x @ dense["dense"]["kernel"]
    spread = np.asarray((noisy - base).std(0))
    assert spread.min() > 0.01
    # The mean of 4000 rows is within five standard errors.
    assert (np.abs((noisy - clean).mean(0)) < 5 * spread / 4000**0.5).all()


OUTPUTS_DROPPED = {
    name: Adapter(method.config, options)
    for method in METHODS.values()
    for name, options in method.drops_outputs.items()
}


@pytest.mark.parametrize("name", OUTPUTS_DROPPED)
def test_dropped_outputs_are_pefts(name, monkeypatch):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config, options = OUTPUTS_DROPPED[name]
    options = {"rank_dropout": 0.5, "target_modules": ["dense"], "init_weights": False, **options}
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(6, 8)})
    theirs = peft.get_peft_model(model, getattr(peft, config)(**options)).train()
    dense = theirs.base_model.model["dense"]
    weight, bias = (x.detach().numpy() for x in (dense.base_layer.weight, dense.base_layer.bias))
    tree = {"dense": {"kernel": jnp.array(weight.T), "bias": jnp.array(bias)}}
    tensors = {key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    params = pj.set_peft_model_state_dict(tree, getattr(pj, config)(**options), tensors)
    dropped, x = pj.with_dropout(params, jax.random.key(3)), normal(0, 5, 6)
    got, base = np.asarray(pj.adapt(layer)(dropped, x)), np.asarray(layer(tree, x))
    kept = np.abs(got - base).max(0) > 0
    assert 1 < kept.sum() < 8
    # What PEFT draws is above 0.5 where we kept an output.
    monkeypatch.setattr(torch, "rand", lambda n: torch.ones(1) if n == 1 else torch.tensor(kept, dtype=torch.float32))
    close(got, dense(torch.tensor(np.array(x))).detach().numpy())
    full = np.asarray(pj.adapt(layer)(params, x))
    factor = 1 if name == "LOKR" else 8 / kept.sum()
    close(got, np.where(kept, base + factor * (full - base), base))


@pytest.mark.parametrize(("config", "options"), OUTPUTS_DROPPED.values(), ids=OUTPUTS_DROPPED)
def test_a_dropped_module_is_the_base_as_often_as_it_is_said(config, options, dense):
    options = {"target_modules": ["dense"], "init_weights": False, "module_dropout": 0.25, **options}
    params, x = pj.apply_adapter(dense, getattr(pj, config)(**options)), jnp.ones((1, 6))
    whole, base = (pj.adapt(layer)(tree, x) for tree in (params, dense))
    draw = jax.jit(lambda key: pj.adapt(layer)(pj.with_dropout(params, key), x))
    drawn = np.asarray(jax.lax.map(draw, jax.random.split(jax.random.key(0), 800)))
    is_base, is_whole = (np.abs(drawn - np.asarray(one)).max((1, 2)) < 1e-6 for one in (base, whole))
    assert (is_base ^ is_whole).all()
    assert abs(is_base.mean() - 0.25) < 5 * (0.25 * 0.75 / 800) ** 0.5  # five standard errors


@pytest.mark.parametrize("both", [False, True])
def test_lokr_is_a_kronecker_product(both):
    config = pj.LoKrConfig(r=1, alpha=3, decompose_both=both, target_modules=["dense"], init_weights=False)
    params = pj.apply_adapter({"dense": {"kernel": jnp.zeros((12, 8))}}, config)  # 12 = 3 * 4 and 8 = 2 * 4
    change = np.asarray(pj.merge(params)["dense"]["kernel"]).T.reshape(2, 4, 3, 4)
    blocks = change.transpose(0, 2, 1, 3).reshape(6, 16)  # all blocks are multiples of one
    assert np.linalg.matrix_rank(blocks, rtol=1e-4) == 1
    size = (5 if both else 6) + 8  # (2 + 3) or 2 * 3, and 4 + 4
    assert f"trainable params: {size} ||" in pj.summary(params)


def test_lokr_counts_and_trains_what_each_layer_of_a_stack_has():
    """The first layer has its second factor in two, the second whole, the third has none."""
    config = pj.LoKrConfig(
        r=1, rank_pattern={r"layers\.1\.up": 4}, target_modules=r"layers\.[01]\.up", init_weights=False
    )
    tree = {"layers": {"up": {"kernel": jnp.zeros((3, 12, 8))}}}
    params = pj.apply_adapter(tree, config, layout={".*": pj.Layout((0,), (1,), (2,))})
    assert f"trainable params: {6 + 8 + 6 + 16} ||" in pj.summary(params)
    trainable, frozen = pj.partition(params)

    def loss(trainable):
        return jnp.sum(jnp.sin(pj.merge(pj.combine(trainable, frozen))["layers"]["up"]["kernel"] + 1))

    gradient = jax.grad(loss)(trainable)["layers"]["up"]["kernel"].params
    there = {role: [bool(array[i].any()) for i in range(3)] for role, array in gradient.items()}
    assert there == {
        "lokr_w1": [True, True, False],
        "lokr_w2": [False, True, False],
        "lokr_w2_a": [True, False, False],
        "lokr_w2_b": [True, False, False],
    }


def test_lokr_factors_as_peft_does():
    pytest.importorskip("peft")
    from peft.tuners.lokr.layer import factorization as theirs

    for dimension in (1, 2, 7, 12, 36, 96, 128, 250):
        for factor in (-1, 1, 2, 3, 4, 5, 8, 16, 32):
            assert factorization(dimension, factor) == theirs(dimension, factor)


def test_beft_adds_a_bias_whether_there_is_one_or_not(dense):
    tree = {**dense, "bare": {"kernel": normal(5, 4, 3)}}
    params = perturbed(pj.apply_adapter(tree, pj.BeftConfig(target_modules=["dense", "bare"])))
    own = {name: params[name]["kernel"].params["beft_bias"] for name in ("dense", "bare")}
    assert len(jax.tree.leaves(pj.partition(params)[0])) == 2, "a bias is trained more than once"
    x = normal(3, 5, 6)

    def both(params, x):
        return layer(params, x) @ params["bare"]["kernel"]

    want = (layer(dense, x) + own["dense"][None]) @ tree["bare"]["kernel"] + own["bare"][None]
    close(pj.adapt(both)(params, x), want)
    close(jax.jit(pj.adapt(both))(params, x), want)
    with pytest.raises(ValueError, match="none to merge it into. Keep the adapter apart"):
        pj.merge(params)
    params = perturbed(pj.apply_adapter(pj.quantize(dense), pj.BeftConfig(target_modules=["dense"])))
    merged = pj.merge(params)
    close(merged["dense"]["bias"], dense["dense"]["bias"] + params["dense"]["kernel"].params["beft_bias"])
    close(layer(merged, x), pj.adapt(layer)(params, x))
    trainable, frozen = pj.partition(params)
    slope = jax.grad(lambda trainable: jnp.sum(pj.adapt(layer)(pj.combine(trainable, frozen), x)))(trainable)
    close(slope["dense"]["kernel"].params["beft_bias"], np.full(4, 5.0))


def test_beft_of_one_stack():
    """Of stacked layers without a bias those that are targets get one, in a scan too, and as groups."""
    kernel = normal(0, 3, 6, 6)
    config = pj.BeftConfig(target_modules=r"layers\.[02]\.up")
    layout = {".*": pj.Layout((0,), (1,), (2,))}
    params = perturbed(pj.apply_adapter({"layers": {"up": {"kernel": kernel}}}, config, layout=layout))
    own = params["layers"]["up"]["kernel"].params["beft_bias"].at[1].set(0)

    def chain(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["up"]["kernel"])[0]

    x = want = normal(1, 5, 6)
    for w, b in zip(kernel, own, strict=True):
        want = jnp.tanh(want @ w + b[None])
    close(pj.adapt(chain)(params, x), want)
    groups = jnp.array([2, 2, 1])
    got = pj.adapt(lambda params, x: jax.lax.ragged_dot(x, params["layers"]["up"]["kernel"], groups))(params, x)
    close(got, jax.lax.ragged_dot(x, kernel, groups) + jnp.repeat(own, groups, axis=0, total_repeat_length=5))
    assert "trainable params: 12 ||" in pj.summary(params)


def test_ln_tuning_trains_normalizations_whole():
    """Scale and bias, of stacked layers those that are targets; the file calls them as PyTorch does."""
    tree = {"layers": {"norm": {"scale": normal(0, 3, 4), "bias": normal(1, 3, 4)}}, "norm": {"scale": normal(2, 4)}}
    layout = {r"layers.*": pj.Layout((0,), (), (1,))}
    config = pj.LNTuningConfig(target_modules=r"layers\.[02]\.norm|norm")
    params = perturbed(pj.apply_adapter(tree, config, layout=layout))
    merged = pj.merge(params)
    for name in ("scale", "bias"):
        moved = np.abs(merged["layers"]["norm"][name] - tree["layers"]["norm"][name]).max(1)
        assert (moved > 0.01).tolist() == [True, False, True]
    tensors = pj.get_peft_model_state_dict(params)
    ends = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")
    keys = {f"base_model.model.layers.{i}.norm.{end}" for i in (0, 2) for end in ends}
    assert tensors.keys() == keys | {"base_model.model.norm.ln_tuning_layers.weight"}
    again = pj.set_peft_model_state_dict(tree, config, tensors, layout=layout)
    for one, other in zip(jax.tree.leaves(pj.merge(again)), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "trainable params: 20 ||" in pj.summary(params)
    with pytest.raises(ValueError, match="Target module 'layernorm' hits none"):
        pj.apply_adapter(tree, pj.LNTuningConfig(target_modules=["layernorm"]), layout=layout)


def test_vera_layers_share_their_random_matrices():
    tree = {"a": {"kernel": normal(0, 12, 5)}, "b": {"kernel": normal(1, 8, 9)}, "c": {"kernel": normal(2, 8, 9)}}
    params = pj.apply_adapter(tree, pj.VeraConfig(r=3, target_modules=["a", "b"]))
    states = [params[name]["kernel"].state for name in "ab"]
    np.testing.assert_array_equal(states[0]["vera_A"][:8], states[1]["vera_A"])
    np.testing.assert_array_equal(states[0]["vera_B"], states[1]["vera_B"][:, :5])
    tensors = pj.get_peft_model_state_dict(params)
    assert tensors["base_model.vera_A"].shape == (3, 12) and tensors["base_model.vera_B"].shape == (9, 3)
    np.testing.assert_array_equal(tensors["base_model.vera_A"].T, states[0]["vera_A"])
    np.testing.assert_array_equal(tensors["base_model.vera_B"].T, states[1]["vera_B"])
    assert f"trainable params: {3 + 5 + 3 + 9} ||" in pj.summary(params)
    trained = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(pj.partition(params)[0])}
    assert trained == {"vera_lambda_d", "vera_lambda_b"}
    other = pj.apply_adapter(tree, pj.VeraConfig(r=3, target_modules=["a", "b"], projection_prng_key=1))
    assert not np.allclose(other["a"]["kernel"].state["vera_A"], states[0]["vera_A"])


@pytest.mark.parametrize("seed", [0, 2**32 + 7])
def test_vera_draws_the_random_matrices_of_pytorch(seed):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    layers = torch.nn.ModuleDict({"a": torch.nn.Linear(37, 5), "b": torch.nn.Linear(3, 41)})
    options = dict(r=19, target_modules=["a", "b"], projection_prng_key=seed)
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(layers, peft.VeraConfig(**options)))
    tree = {"a": {"kernel": jnp.ones((37, 5))}, "b": {"kernel": jnp.ones((3, 41))}}
    ours = pj.get_peft_model_state_dict(pj.apply_adapter(tree, pj.VeraConfig(**options)))
    for key in ("base_model.vera_A", "base_model.vera_B"):
        np.testing.assert_array_equal(ours[key], theirs[key].numpy())


def test_vera_files_have_the_random_matrices_or_their_seed(dense):
    fields = pj.VeraConfig(r=3, target_modules=["dense"])
    tensors = pj.get_peft_model_state_dict(pj.apply_adapter(dense, fields))
    short = {key: tensor for key, tensor in tensors.items() if key != "base_model.vera_A"}
    with pytest.raises(ValueError, match="base_model.vera_A is missing"):
        pj.set_peft_model_state_dict(dense, fields, short)
    with pytest.raises(ValueError, match="base_model.vera_A is left over"):
        pj.set_peft_model_state_dict(dense, fields.replace(save_projection=False), tensors)


@pytest.mark.parametrize(("init", "size"), [(False, 4 * 8), ("mini", 4 * 2), ("bat", 2 * 4 * 4)])
def test_miss_repeats_one_block(init, size):
    """All blocks of rows change alike: by the block, or by the weight's block times (1 + M), plus M."""
    kernel = normal(0, 12, 8)
    config = pj.MissConfig(r=4, mini_r=2, init_weights=init, target_modules=["dense"])
    params = perturbed(pj.apply_adapter({"dense": {"kernel": kernel}}, config))
    (block,) = params["dense"]["kernel"].params.values()
    merged = pj.merge(params)["dense"]["kernel"]
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        if init == "bat":
            pieces = [kernel[rows, 4 * b : 4 * b + 4].T for b in range(2)]
            change = jnp.concatenate([piece @ block[b] + block[b] for b, piece in enumerate(pieces)]).T
        else:
            change = jnp.tile(block, (1, 8 // block.shape[1]))
        close(merged[rows], kernel[rows] + change)
    assert f"trainable params: {size} ||" in pj.summary(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 64}, "r=64.* is above the 6 inputs of 'dense'. Choose a smaller r"),
        ({"r": 4, "init_weights": "bat"}, "r that divides the 6 inputs and 4 outputs of 'dense'"),
        ({"r": 2, "init_weights": "mini", "mini_r": 3}, "mini_r=3.* needs a divisor of the 4 outputs of 'dense'"),
    ],
)
def test_miss_says_which_sizes_fit(options, message, dense):
    with pytest.raises(ValueError, match=message):
        pj.apply_adapter(dense, pj.MissConfig(target_modules=["dense"], **options))


STARTS = {
    name: Adapter(method.config, options) for method in METHODS.values() for name, options in method.starts.items()
}


@pytest.mark.filterwarnings("ignore:The symmetric initialization")
@pytest.mark.parametrize("name", STARTS)
def test_starts_are_drawn_as_peft_draws_them(name, monkeypatch):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)  # it would try to compile one
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(512, 256)})
    weight, bias = (parameter.detach().numpy() for parameter in model["dense"].parameters())
    tree = {"dense": {"kernel": jnp.array(weight.T), "bias": jnp.array(bias)}}
    theirs = peft.get_peft_model_state_dict(
        peft.get_peft_model(model, STARTS[name].make(peft, target_modules=["dense"]))
    )
    ours = pj.get_peft_model_state_dict(pj.apply_adapter(tree, STARTS[name].make(pj, target_modules=["dense"])))
    assert {key: array.shape for key, array in ours.items()} == {key: tuple(t.shape) for key, t in theirs.items()}
    for key, array in ours.items():
        want = theirs[key].numpy()
        deviation = 4 / (2 * array.size) ** 0.5  # four standard errors of a standard deviation, in proportion
        np.testing.assert_allclose(array.std(), want.std(), rtol=2 * deviation, atol=1e-9)
        np.testing.assert_allclose(array.mean(), want.mean(), atol=8 * float(want.std()) / array.size**0.5)
        is_uniform = np.abs(want).max() < 2 * want.std()
        assert is_uniform == bool(np.abs(array).max() < 2 * array.std()), key


FROM_TABLES = [name for name in base.names() if not base.by_name(name).on_model and not base.by_name(name).on_input]


@pytest.mark.parametrize("peft_type", FROM_TABLES)
def test_default_targets_are_those_of_pefts_tables(peft_type):
    pytest.importorskip("peft")
    from peft.utils import constants

    for model_type in ("llama", "mistral", "qwen2", "qwen3", "t5", "mt5"):
        for field, value in method_defaults(peft_type, model_type).items():
            name = peft_type.replace("_", "")
            table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_{field.upper()}_MAPPING")
            assert list(value) == table[model_type]


@pytest.mark.parametrize("leaf", ["embedding", "kernel"])
def test_trainable_tokens_change_their_own_rows_alone(leaf):
    """Those of an embedding, those of a head's outputs; in lookups, products and products with the transpose."""
    kernel = normal(0, 10, 10)
    config = pj.TrainableTokensConfig(token_indices=[7, 2], target_modules=["dense"])
    params = perturbed(pj.apply_adapter(pj.quantize({"dense": {leaf: kernel}}, target_modules=["dense"]), config))
    (vectors,) = params["dense"][leaf].params.values()
    want = params["dense"][leaf].base.dense()
    for place, vector in zip((7, 2), vectors, strict=True):
        want = want.at[place].set(vector) if leaf == "embedding" else want.at[:, place].set(vector)
    np.testing.assert_array_equal(pj.merge(params)["dense"][leaf], want)
    x, ids = normal(3, 5, 10), jnp.array([2, 9, 7, 12, -1])
    for use in (
        lambda w: x @ w,
        lambda w: x @ w.T,
        lambda w: jnp.take(w, ids, axis=0, mode="fill", fill_value=0),
        lambda w: jnp.take(w, ids, axis=0, mode="clip"),
    ):
        close(pj.adapt(lambda params, use=use: use(params["dense"][leaf]))(params), use(want))
    assert "trainable params: 20 ||" in pj.summary(params)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "at least one"),
        ([1, 3, 1], r"\[1\] more than once"),
        ([-1], "none below 0"),
        ([3, 6], r"\[6\].*ids 0 to 5"),
    ],
)
def test_trainable_tokens_are_ids_of_the_layer(tokens, message):
    with pytest.raises(ValueError, match=message):
        config = pj.TrainableTokensConfig(token_indices=tokens, target_modules=["embed"])
        pj.apply_adapter({"embed": {"embedding": jnp.ones((6, 3))}}, config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extension", [False, True], ids=["on a CPU", "with the extension"])
def test_boft_files_of_either_peft(extension, tmp_path, monkeypatch):
    """Without its CUDA extension PEFT makes one factor, and writes the number of the config all the same."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft_jax.interop.describe import read_adapter

    from peft_jax.cli.inspect.servers import verdicts

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: extension or None)
    options = {"boft_block_size": 2, "boft_n_butterfly_factor": 2, "target_modules": ["dense"]}
    model = torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 5)})
    weight, bias = (x.detach().numpy().copy() for x in (model["dense"].weight, model["dense"].bias))
    theirs = peft.get_peft_model(model, peft.BOFTConfig(init_weights=False, **options))
    theirs.save_pretrained(tmp_path)
    blocks = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.dense.boft_R"]
    assert blocks.shape == (2 if extension else 1, 12, 2, 2)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 2

    tree = {"dense": {"kernel": jnp.array(weight.T), "bias": jnp.array(bias)}}
    params = pj.interop.load_adapter(tree, tmp_path)
    ours, of_peft = verdicts(read_adapter(tmp_path))[:2]
    assert ours.takes and of_peft.takes
    if extension:
        assert "with BOFT's CUDA extension alone" in of_peft.note
        monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
        with pytest.raises(RuntimeError, match="size mismatch"):
            peft.PeftModel.from_pretrained(torch.nn.ModuleDict({"dense": torch.nn.Linear(24, 5)}), tmp_path)
        fields = json.loads((tmp_path / "adapter_config.json").read_text()) | {"boft_n_butterfly_factor": 3}
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
        message = "holds BOFT modules of 2 butterfly factors, and its config says boft_n_butterfly_factor=3"
        with pytest.raises(ValueError, match=message):
            pj.interop.load_adapter(tree, tmp_path)
        assert message in verdicts(read_adapter(tmp_path))[0].note
        return
    assert "without BOFT's CUDA extension alone" in of_peft.note
    x = normal(3, 3, 24)
    want = theirs.base_model.model["dense"](torch.tensor(np.array(x))).detach().numpy()
    close(pj.adapt(layer)(params, x), want)
    assert np.abs(want - layer(tree, x)).max() > 0.1
    pj.interop.save_adapter(params, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["boft_n_butterfly_factor"] == 1


def test_each_row_has_the_poly_of_its_task(dense, monkeypatch):
    """The rows' numbers are PEFT's, with its noise in training; of one task all rows share a matrix, which merges."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"r": 3, "n_tasks": 4, "n_skills": 3, "n_splits": 2, "init_weights": False, "target_modules": ["dense"]}
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"dense": torch.nn.Linear(6, 8)}), peft.PolyConfig(**options))
    module = theirs.base_model.model["dense"]
    module.poly_router["default"].module_logits.data.normal_()
    tree = {"dense": {"kernel": jnp.array(module.base_layer.weight.detach().numpy().T)}}
    module.base_layer.bias.data.zero_()
    tensors = {key: tensor.numpy() for key, tensor in peft.get_peft_model_state_dict(theirs).items()}
    params = pj.set_peft_model_state_dict(tree, pj.PolyConfig(**options), tensors)
    params = pj.set_requires_grad(params, "default")

    @pj.adapt
    def product(params, x):
        return x @ params["dense"]["kernel"]

    ids, x = [3, 0, 3, 2], normal(0, 4, 5, 6)
    of_rows, given = pj.with_task_ids(params, jnp.array(ids)), torch.tensor(np.array(x))
    want = module.eval()(given, task_ids=torch.tensor(ids)).detach().numpy()
    got = np.asarray(product(of_rows, x))
    close(got, want)
    for row, task in enumerate(ids):
        close(product(pj.merge(pj.with_task_ids(params, task)), x[row]), want[row])
    assert np.abs(want[0] - product(pj.merge(pj.with_task_ids(params, 0)), x[0])).max() > 1e-3
    close(product(pj.with_adapter_rows(params, ["default", "__base__"], [3, 0]), x[:2])[0], want[0])
    close(product(pj.with_adapter_rows(params, ["default", "__base__"], [3, 0]), x[:2])[1], product(tree, x[1]))

    noise = normal(5, 4, 2 * 3)
    drawn = torch.tensor(np.array(jax.nn.sigmoid(noise))).reshape(4, 2, 3)
    monkeypatch.setattr(torch, "rand", lambda shape, **options: drawn.reshape(shape))
    monkeypatch.setattr(jax.random, "logistic", lambda key, shape, dtype: noise.reshape(shape))
    noisy = product(pj.with_dropout(of_rows, jax.random.key(0)), x)
    close(noisy, module.train()(given, task_ids=torch.tensor(ids)).detach().numpy())
    assert np.abs(noisy - got).max() > 1e-2


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda params: pj.adapt(layer)(params, normal(0, 2, 6)),
            "of 3 tasks needs to know each row's. Give task",
        ),
        (lambda params: pj.merge(pj.with_task_ids(params, jnp.array([0, 1]))), "is no one matrix. Choose a task"),
        (
            lambda params: pj.with_task_ids(params, [3]),
            "task_ids are from 3 to 3, but the adapter has",
        ),
        (lambda params: pj.with_task_ids(params, jnp.ones(2)), r"whole numbers \(batch,\), got float32"),
        (lambda params: pj.with_task_ids(pj.unload(params), 0), "task_ids are for POLY, and no such adapter is active"),
        (
            lambda params: pj.adapt(layer)(pj.with_task_ids(params, jnp.array([0, 1])), normal(0, 3, 6)),
            "name the tasks of 2 rows",
        ),
    ],
    ids=["none", "merge", "outside", "floats", "no POLY", "other rows"],
)
def test_what_poly_needs_of_tasks_is_said(use, message, dense):
    params = pj.apply_adapter(dense, pj.PolyConfig(r=2, n_tasks=3, target_modules=["dense"]))
    with pytest.raises(ValueError, match=message):
        use(params)

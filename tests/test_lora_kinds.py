"""LoRA's variants with arrays, factors or noise of their own: what each promises, and PEFT's numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax as pj
from peft_jax import train
from peft_jax.core.weight import MergeError
from peft_jax.methods.lora import bdlora, monteclora, qalora
from peft_jax.train.hooks import RunHooks

TARGETS = ["one", "two"]


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def config(**options):
    return pj.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})


def moved(params, scale=0.3):
    """The tree with other numbers in every trained array."""
    trainable, frozen = pj.partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    leaves = [leaf + scale * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return pj.combine(jax.tree.unflatten(treedef, leaves), frozen)


def tree():
    return {"one": {"kernel": normal(0, 12, 8)}, "two": {"kernel": normal(1, 12, 8)}}


def model(params, x):
    return jnp.sin(x @ params["one"]["kernel"]) + x @ params["two"]["kernel"]


def test_kasa_takes_the_smallest_singular_values_out():
    base, x = tree(), normal(2, 5, 12)
    params = pj.apply_lora(base, config(kasa_config=pj.KasaConfig(), rank_pattern={"two": 2}))
    for name, rank in (("one", 4), ("two", 2)):
        before = jnp.linalg.svd(base[name]["kernel"], compute_uv=False)
        after = jnp.linalg.svd(params[name]["kernel"].base, compute_uv=False)
        close(after, jnp.where(jnp.arange(8) < 8 - rank, before, 0))
        close(params[name]["kernel"].dense(), params[name]["kernel"].base)  # B starts at zero
    assert "trainable params: 126 ||" in pj.summary(params)  # 4 * (12 + 8 + 1) + 2 * (12 + 8 + 1)
    params = moved(params)
    close(pj.adapt(model)(params, x), model(pj.merge(params), x))
    # A second one of no larger rank finds the base as it has to be; another kind does not.
    both = pj.apply_lora(params, config(r=2, kasa_config={}), adapter_name="second")
    np.testing.assert_array_equal(pj.unload(both)["one"]["kernel"], pj.unload(params)["one"]["kernel"])
    with pytest.raises(ValueError, match="kasa_config takes singular values out of the weight of 'one', which"):
        pj.apply_lora(pj.apply_lora(base, config()), config(kasa_config={}), adapter_name="second")
    with pytest.raises(ValueError, match="which is quantized, has another adapter or a KaSA of a"):
        pj.apply_lora(pj.quantize(base, kind="nf4", target_modules=TARGETS), config(kasa_config={}))
    with pytest.raises(ValueError, match="takes r=8 singular values out of 'one', which has 8. Choose a smaller r"):
        pj.apply_lora(base, config(r=8, kasa_config={}))


@pytest.mark.parametrize("kind", [{"bits": 8}, {"kind": "nf4"}], ids=["int8", "nf4"])
def test_a_kasa_is_quantized_after_it_is_attached(kind):
    params, x = moved(pj.apply_lora(tree(), config(kasa_config={}))), normal(2, 5, 12)
    quantized = pj.quantize(params, **kind, target_modules=TARGETS)
    base = pj.unload(quantized)["one"]["kernel"].dense()
    leaf = params["one"]["kernel"].params
    want = x @ base + 1.5 * ((x @ leaf["lora_A"]) * leaf["lora_diag"][None]) @ leaf["lora_B"]
    close(quantized["one"]["kernel"].apply(x), want)
    assert jnp.abs(base - params["one"]["kernel"].base).max() > 1e-3


def test_kasas_penalty_is_pefts():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"beta": 0.2, "gamma": 0.3}
    ours = config(kasa_config=options, rank_pattern={"two": 2})
    params = moved(pj.apply_lora(tree(), ours))
    base = torch.nn.ModuleDict({name: torch.nn.Linear(12, 8, bias=False) for name in TARGETS})
    asked = peft.LoraConfig(r=4, target_modules=TARGETS, kasa_config=options, rank_pattern={"two": 2})
    theirs = peft.get_peft_model(base, asked)
    from peft.utils.save_and_load import set_peft_model_state_dict

    tensors = {key: torch.tensor(array) for key, array in pj.get_peft_model_state_dict(params).items()}
    assert not set_peft_model_state_dict(theirs, tensors).unexpected_keys
    want = theirs.base_model._get_kasa_loss().item()
    penalized = jax.jit(lambda *given: RunHooks(given[0]).penalize(jnp.float32(1), given[1], given[2]))
    trainable, frozen = pj.partition(params)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    loss, slope = penalized(frozen, zeros, trainable)
    close(loss, np.float32(1 + want))
    close(slope["one"]["kernel"].params["lora_diag"], 0.4 * params["one"]["kernel"].params["lora_diag"])
    start, frozen = pj.partition(pj.apply_lora(tree(), ours))
    _, slope = penalized(frozen, zeros, start)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(slope))


@pytest.mark.parametrize("which", ["lora_A", "lora_B"])
def test_a_block_diagonal_factor_keeps_parts_apart(which):
    """Inputs, or outputs, of one block have to do with the ranks of that block alone."""
    field = "target_modules_bd_a" if which == "lora_A" else "target_modules_bd_b"
    params = moved(pj.apply_lora(tree(), config(use_bdlora={field: ["one", "two"], "nblocks": 2})))
    leaf = params["one"]["kernel"]
    a, b = bdlora.expanded(leaf.params["lora_A"], leaf.params["lora_B"], leaf.state["rank"], 12)
    factor = a if which == "lora_A" else b
    rows, columns = factor.shape[0] // 2, factor.shape[1] // 2
    assert not factor[:rows, columns:].any() and not factor[rows:, :columns].any()
    packed = leaf.params[which]
    parts = (packed[:, :2], packed[:, 2:]) if which == "lora_A" else (packed[:, :4], packed[:, 4:])
    close(factor[:rows, :columns], parts[0])
    close(factor[rows:, columns:], parts[1])
    x = normal(3, 5, 12)
    close(pj.adapt(model)(params, x), model(pj.merge(params), x))
    assert jnp.abs(pj.merge(params)["one"]["kernel"] - tree()["one"]["kernel"]).max() > 0.1


def test_blocks_are_those_that_a_config_can_make():
    for options, match in [
        ({"nblocks": 3, "target_modules_bd_a": ["one", "two"]}, "makes 3 blocks of lora_A of 'one', which is 12 x 4"),
        ({"target_modules_bd_a": ["one"], "nblocks": 2}, "nor target_modules_bd_b of use_bdlora has 'two'. Name it"),
        ({"target_modules_bd_a": ["o"], "target_modules_bd_b": ["one"]}, "both have 'one'. Remove it from one"),
    ]:
        with pytest.raises(ValueError, match=match):
            pj.apply_lora(tree(), config(use_bdlora=options))
    with pytest.raises(ValueError, match="makes other factors block-diagonal in some of the layers of 'layers.0.q'"):
        stacked = {"layers": {"q": {"kernel": normal(0, 2, 12, 8)}}}
        asked = config(target_modules=["q"], use_bdlora={"target_modules_bd_a": ["s.0"], "match_strict": False})
        pj.apply_lora(stacked, asked, layout={".*": pj.Layout((0,), (1,), (2,))})


def test_qalora_is_pefts_of_gptqs_layers():
    """Values and gradients; PEFT has it for GPTQ's layers, whose class takes any layer that multiplies."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from peft.tuners.lora.gptq import GPTQLoraLinear

    options = {"r": 4, "lora_alpha": 6, "use_qalora": True, "qalora_group_size": 3, "target_modules": ["one"]}
    base = torch.nn.Linear(12, 8, bias=False)
    base.qweight = base.weight
    theirs = GPTQLoraLinear(base, "default", peft.LoraConfig(**options), r=4, lora_alpha=6)
    torch.nn.init.normal_(theirs.lora_B["default"].weight)
    x = torch.randn(5, 12)
    want = theirs(x)
    torch.sin(want).sum().backward()
    arrays = {role: getattr(theirs, role)["default"].weight for role in ("lora_A", "lora_B")}
    params = {role: jnp.array(array.detach().numpy().T) for role, array in arrays.items()}
    params0 = pj.apply_lora({"one": {"kernel": jnp.array(base.weight.detach().numpy().T)}}, pj.LoraConfig(**options))
    leaf = params0["one"]["kernel"]
    assert {role: array.shape for role, array in leaf.params.items()} == {"lora_A": (4, 4), "lora_B": (4, 8)}
    assert jnp.abs(leaf.params["lora_A"]).max() <= 0.5 and jnp.abs(leaf.params["lora_A"]).max() > 0.3  # 1 / sqrt(4)

    def run(params):
        return dataclasses.replace(leaf, params=params).apply(jnp.array(x.numpy()))

    got, back = jax.vjp(run, params)
    close(got, want.detach().numpy())
    close(jnp.array(x.numpy()) @ dataclasses.replace(leaf, params=params).dense(), got)
    for role, slope in back(jnp.cos(got))[0].items():
        close(slope, arrays[role].grad.numpy().T)


def test_a_merged_qalora_moves_the_zero_points_alone():
    """Inputs of a group get the same change in each output: that is what a zero point is."""
    params = moved(pj.apply_lora(tree(), config(use_qalora=True, qalora_group_size=4)))
    change = (pj.merge(params)["one"]["kernel"] - tree()["one"]["kernel"]).reshape(3, 4, 8)
    close(change, jnp.broadcast_to(change[:, :1], change.shape))
    assert jnp.abs(change).max() > 0.1
    quantized = pj.quantize(params, kind="int4", group_size=4, target_modules=TARGETS)
    x = normal(3, 5, 12)
    close(pj.adapt(model)(quantized, x), model(pj.merge(quantized), x))
    with pytest.raises(ValueError, match="groups of qalora_group_size=5 inputs, and 'one' has 12. Choose a divisor"):
        pj.apply_lora(tree(), config(use_qalora=True, qalora_group_size=5))
    full = qalora.expanded(jnp.ones((3, 2)), 12)
    close(full, jnp.full((12, 2), 0.75))


@pytest.mark.parametrize("start", ["batch_average", "random"])
@pytest.mark.parametrize("groups", [4, 5])
def test_veloras_gradients_are_pefts(start, groups):
    """Forward is LoRA's, the inputs' gradient too; that of A is of the inputs that were compressed."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"num_groups": groups, "scale": 0.7, "init_type": start}
    base = torch.nn.ModuleDict({"one": torch.nn.Linear(12, 8, bias=False)})
    asked = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["one"], velora_config=options, init_lora_weights=False)
    theirs = peft.get_peft_model(base, asked).train()
    layer = theirs.base_model.model["one"]
    x = torch.randn(3, 5, 12, requires_grad=True)
    want = layer(x)
    torch.sin(want).sum().backward()
    tensors = {key: array.numpy() for key, array in peft.get_peft_model_state_dict(theirs).items()}
    kernel = jnp.array(layer.base_layer.weight.detach().numpy().T)
    ours = config(target_modules=["one"], velora_config=options)
    params = pj.set_peft_model_state_dict({"one": {"kernel": kernel}}, ours, tensors)
    np.testing.assert_array_equal(
        pj.get_peft_model_state_dict(params)["base_model.model.one.lora_velora_embed"],
        tensors["base_model.model.one.lora_velora_embed"],
    )

    def run(trained, x, key):
        leaf = dataclasses.replace(params["one"]["kernel"], params=trained)
        whole = {"one": {"kernel": leaf}}
        whole = whole if key is None else pj.with_dropout(whole, key)
        return whole["one"]["kernel"].apply(x)

    given = params["one"]["kernel"].params, jnp.array(x.detach().numpy())
    got, back = jax.vjp(lambda trained, x: run(trained, x, jax.random.key(0)), *given)
    slope, of_inputs = back(jnp.cos(got))
    close(got, want.detach().numpy())
    close(of_inputs, x.grad.numpy())
    close(slope["lora_B"], layer.lora_B["default"].weight.grad.numpy().T)
    close(slope["lora_A"], layer.lora_A["default"].weight.grad.numpy().T)
    exact = jax.vjp(lambda trained, x: run(trained, x, None), *given)[1](jnp.cos(got))[0]["lora_A"]
    assert jnp.abs(exact - slope["lora_A"]).max() > 0.1, "nothing was compressed"
    kept = jax.tree.leaves(jax.eval_shape(lambda trained, x: jax.vjp(run, trained, x, jax.random.key(0))[1], *given))
    assert sum(leaf.shape == (3, 5, 12) for leaf in kept) == 0, "backward has the inputs"


def test_velora_says_where_it_does_not_go():
    with pytest.raises(ValueError, match="init_type='batch_average_once' is not supported in training"):
        config(velora_config={"init_type": "batch_average_once"})
    assert config(velora_config={"init_type": "batch_average_once"}, inference_mode=True).velora_config
    params = pj.apply_lora(
        {"layers": {"one": {"kernel": normal(0, 3, 12, 8)}}},
        config(target_modules=["one"], velora_config={"num_groups": 2}),
        layout={".*": pj.Layout((0,), (1,), (2,))},
    )
    experts = pj.adapt(lambda params, x: jax.lax.ragged_dot(x, params["layers"]["one"]["kernel"], jnp.array([2, 1, 2])))
    x = normal(1, 5, 12)
    assert experts(params, x).shape == (5, 8)
    with pytest.raises(MergeError, match="VeLoRA compresses the rows of plain products alone"):
        experts(pj.with_dropout(params, jax.random.key(0)), x)


def montecloras(**options):
    return config(monteclora_config={"num_samples": 3, **options}, target_modules=["one"])


def test_monteclora_with_one_noise_is_pefts(monkeypatch):
    """Values, gradients and the penalty of a step in training, with the noise that PEFT drew."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"num_samples": 3, "sample_scaler": 0.5, "kl_loss_weight": 0.1, "use_entropy": True, "buffer_size": 1}
    base = torch.nn.ModuleDict({"one": torch.nn.Linear(12, 8, bias=False)})
    asked = {"r": 4, "lora_alpha": 6, "target_modules": ["one"], "init_lora_weights": False}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**asked, monteclora_config=options)).train()
    layer = theirs.base_model.model["one"]
    sampler = layer.lora_monteclora_sampler["default"]
    drawn = sampler.sampler.buffer[0]
    x = torch.randn(5, 12)
    want = layer(x)
    penalty = theirs.base_model._get_monteclora_loss()
    (torch.sin(want).sum() + penalty).backward()
    kernel = jnp.array(layer.base_layer.weight.detach().numpy().T)
    tensors = {key: array.numpy() for key, array in peft.get_peft_model_state_dict(theirs).items()}
    ours = pj.LoraConfig(**asked, monteclora_config=options)
    params = pj.set_peft_model_state_dict({"one": {"kernel": kernel}}, ours, tensors)
    noise = monteclora.Noise(
        jnp.array(drawn["z_mvn"]), jnp.array(drawn["z_wishart"].diag()), jnp.array(drawn["z_dirichlet"])
    )
    monkeypatch.setattr(monteclora, "drawn", lambda key, params, rank: noise)
    trainable, frozen = pj.partition(params)

    def run(trainable):
        whole = pj.with_dropout(pj.combine(trainable, frozen), jax.random.key(0))
        return whole["one"]["kernel"].apply(jnp.array(x.numpy()))

    got, back = jax.vjp(run, trainable)
    close(got, want.detach().numpy())
    loss, slopes = RunHooks(frozen, jax.random.key(0)).penalize(jnp.zeros(()), back(jnp.cos(got))[0], trainable)
    close(loss, penalty.item())
    slopes = slopes["one"]["kernel"].params
    close(slopes["lora_A"], layer.lora_A["default"].weight.grad.numpy().T)
    close(slopes["lora_B"], layer.lora_B["default"].weight.grad.numpy().T)
    close(slopes[monteclora.SPREAD], sampler.std_prior.grad.numpy())
    close(slopes[monteclora.CONCENTRATION], sampler.expert_weights_prior.grad.numpy())
    assert jnp.abs(got - params["one"]["kernel"].apply(jnp.array(x.numpy()))).max() > 0.1, "there is no noise"


def test_montecloras_noise_has_its_law():
    """A is its mean; variances of Wishart's samples, and the weights' means, are those of the distributions."""
    params = pj.apply_lora({"one": {"kernel": normal(0, 12, 8)}}, montecloras(sample_scaler=1.0))
    leaf = params["one"]["kernel"]
    count, spread = 2000, jnp.array([-1.0, 0.0, 0.5, 1.0])
    own = {**leaf.params, monteclora.SPREAD: spread, monteclora.CONCENTRATION: jnp.array([3.0, 3.0, 3.0])}
    keys = jax.random.split(jax.random.key(1), count)
    noise = jax.jit(jax.vmap(lambda key: monteclora.drawn(key, own, jnp.int32(4))))(keys)
    squares = np.asarray(noise.squares)
    # Means and variances of 2,000 samples are compared with the law: the bounds are about four standard errors.
    np.testing.assert_allclose(squares.mean(axis=0), 4, atol=0.25)  # chi-squared: as many degrees as the rank
    np.testing.assert_allclose(squares.var(axis=0), 8, atol=1.5)
    assert np.abs(np.corrcoef(squares.T) - np.eye(4)).max() < 0.08
    samples = jax.vmap(lambda one: monteclora.sampled(own, leaf.state, one))(noise)
    change = np.asarray(samples - leaf.params["lora_A"][None])
    np.testing.assert_allclose(change.mean(axis=0), 0, atol=0.25)
    weights = np.asarray(jax.vmap(lambda one: monteclora.weights(own, one))(noise))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.01)
    want = 4 * np.exp(2 * np.asarray(spread)) * np.square(weights).sum(axis=1).mean()
    np.testing.assert_allclose(change.var(axis=(0, 1)), want, rtol=0.1)


def test_monteclora_is_lora_outside_of_training_and_noisy_inside():
    params, x = moved(pj.apply_lora(tree(), montecloras(sample_scaler=0.5))), normal(2, 5, 12)
    run = pj.adapt(model)
    close(run(params, x), model(pj.merge(params), x))
    first, second = (run(pj.with_dropout(params, jax.random.key(seed)), x) for seed in (0, 1))
    assert jnp.abs(first - second).max() > 0.05
    close(run(pj.without_dropout(pj.with_dropout(params, jax.random.key(0))), x), run(params, x))
    assert "trainable params: 87 ||" in pj.summary(params)  # 4 * (12 + 8) + 4 + 3


@pytest.mark.parametrize(
    "options",
    [
        {"kasa_config": {}},
        {"use_bdlora": {"target_modules_bd_a": ["o"], "target_modules_bd_b": ["w2"]}},
        {"use_qalora": True},
        {"velora_config": {}},
        {"monteclora_config": {}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_variants_go_alone(options):
    (field,) = options
    wrong = [{"use_dora": True}, {"alora_invocation_tokens": [1]}, {"init_lora_weights": "pissa"}]
    wrong += [{"target_parameters": ["one.kernel"]}, {"init_lora_weights": "mica"}]
    for more in wrong:
        with pytest.raises(ValueError, match=f"{field} does not go with {{'{next(iter(more))}'"):
            config(**options, **more)
    with pytest.raises(ValueError, match=f"{field} is for linear layers, and 'one' is an embedding"):
        pj.apply_lora({"one": {"embedding": jnp.ones((32, 16))}}, config(**options, target_modules=["one"]))
    name = next((name for name in options if isinstance(options[name], dict)), None)
    if name is not None:
        with pytest.raises(ValueError, match=f"{name} does not know \\['rho'\\]"):
            config(**{name: {"rho": 1}})


def test_a_runs_options_are_not_saved_and_refused_by_name():
    assert config(runtime_config=pj.LoraRuntimeConfig()) == config(runtime_config={"ephemeral_gpu_offload": False})
    assert "runtime_config" not in config().to_dict()
    with pytest.raises(ValueError, match="ephemeral_gpu_offload=True.* is not supported: DoRA's norms are computed"):
        config(runtime_config={"ephemeral_gpu_offload": True})


def test_a_step_adds_the_penalty_and_needs_no_schedule():
    params = pj.apply_lora(tree(), config(kasa_config={"beta": 1.0, "gamma": 0.0}))
    squares = sum(float(jnp.sum(params[name]["kernel"].params["lora_diag"] ** 2)) for name in TARGETS)
    trainable, frozen = pj.partition(params)
    optimizer = optax.sgd(0.1)

    def logits(params, ids, mask):
        return pj.adapt(lambda params: jax.nn.one_hot(ids, 12) @ params["one"]["kernel"])(params)

    batch = {name: jnp.array([[1, 2, 3]]) for name in ("input_ids", "labels")} | {"attention_mask": jnp.ones((1, 3))}
    loss = train.make_evaluation_step(logits)(params, batch)
    step = train.make_training_step(logits, optimizer)
    _, _, metrics = step(trainable, optimizer.init(trainable), frozen, batch, jax.random.key(0))
    close(metrics.loss, float(loss[0]) / int(loss[1]) + squares)


def test_the_noise_of_monteclora_stays_in_a_layers_own_columns():
    """Of a stack whose layers have other ranks: what is beyond a rank is no part of the file."""
    stacked = {"layers": {"up": {"kernel": normal(0, 2, 6, 5)}}}
    layout = {r"layers\.up\.kernel": pj.Layout(stack=(0,), inp=(1,), out=(2,))}
    options = config(target_modules=["up"], rank_pattern={r"1\.up": 2}, monteclora_config={})
    params = pj.apply_lora(stacked, options, layout=layout)

    def loss(trainable, frozen, x):
        run = pj.with_dropout(pj.combine(trainable, frozen), jax.random.key(3))
        return jnp.sum(pj.adapt(lambda p, x: jnp.sin(x @ p["layers"]["up"]["kernel"][1]))(run, x) ** 2)

    trainable, frozen = pj.partition(params)
    second = jax.grad(loss)(trainable, frozen, normal(4, 3, 6))["layers"]["up"]["kernel"].params["lora_B"][1]
    assert np.abs(second[:2]).min() > 0 and not np.any(second[2:])


@pytest.mark.parametrize(
    "options",
    [
        {"kasa_config": {}},
        {"use_qalora": True, "qalora_group_size": 4},
        {"use_bdlora": {"target_modules_bd_a": ["up"], "nblocks": 4}},
    ],
)
def test_variants_are_on_the_mesh_of_their_base(options):
    """Arrays that the mesh does not divide are replicated."""
    mesh = jax.make_mesh((2, 4), ("tensor", "fsdp"))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    plain = {"up": {"kernel": normal(0, 12, 8)}}
    wanted = pj.apply_lora(plain, config(target_modules=["up"], **options), key=jax.random.key(1))
    base = jax.device_put(plain, place)
    found = pj.apply_lora(base, config(target_modules=["up"], **options), key=jax.random.key(1))
    leaf = found["up"]["kernel"]
    assert leaf.base.sharding == place
    assert all(array.sharding.mesh == mesh for array in jax.tree.leaves(leaf.params))
    jax.tree.map(close, leaf.params, wanted["up"]["kernel"].params)


def test_what_is_for_plain_factors_refuses_variants():
    params = pj.apply_lora(tree(), config(kasa_config={}))
    trainable, _ = pj.partition(params)
    optimizer = train.riemannian(optax.sgd(0.1))
    with pytest.raises(ValueError, match="for plain factors, and adapter 'default' has kasa_config"):
        optimizer.update(trainable, optimizer.init(trainable), trainable)

"""LoRA's variants: what each promises, and PEFT's layers as the reference of values and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import peft_jax as pj
from peft_jax.core.dropout import dropout


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


def adapted(config, kernel, **options):
    return perturbed(pj.apply_lora({"dense": {"kernel": kernel}}, config, **options))


def dora(**options):
    return pj.LoraConfig(**{"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["dense"], **options})


def test_dora_keeps_directions_and_sets_norms():
    kernel = normal(0, 12, 8)
    leaf = adapted(dora(), kernel)["dense"]["kernel"]
    merged = leaf.dense()
    np.testing.assert_allclose(jnp.linalg.norm(merged, axis=0), np.abs(leaf.params["lora_magnitude_vector"]), rtol=1e-5)
    direction = kernel + 5 / 3 * leaf.params["lora_A"] @ leaf.params["lora_B"]
    cosine = jnp.sum(merged * direction, axis=0) / jnp.linalg.norm(merged, axis=0) / jnp.linalg.norm(direction, axis=0)
    np.testing.assert_allclose(np.abs(cosine), 1, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_dora_has_pefts_values_and_gradients(kind):
    """No gradient goes through the norm: with it those of A and B would be others."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"r": 3, "lora_alpha": 5, "use_dora": True, "target_modules": ["dense"], "init_lora_weights": False}
    leaf_name, key = ("embedding", "lora_embedding") if kind == "embedding" else ("kernel", "lora")
    base = torch.nn.Embedding(12, 8) if kind == "embedding" else torch.nn.Linear(12, 8, bias=False)
    model = torch.nn.ModuleDict({"dense": base})
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options)).base_model.model["dense"]
    with torch.no_grad():
        theirs.lora_magnitude_vector["default"].weight.mul_(1.5)
    x = torch.tensor([3, 0, 3, 11]) if kind == "embedding" else torch.randn(5, 12)
    y = theirs(x)
    torch.sin(y).sum().backward()
    grads = {
        "lora_A": getattr(theirs, f"{key}_A")["default"],
        "lora_B": getattr(theirs, f"{key}_B")["default"],
        "lora_magnitude_vector": theirs.lora_magnitude_vector["default"].weight,
    }
    if kind == "linear":
        grads = {name: getattr(module, "weight", module) for name, module in grads.items()}
    weight = theirs.base_layer.weight.detach().numpy()
    tree = {"dense": {leaf_name: jnp.array(weight if kind == "embedding" else weight.T)}}
    leaf = pj.apply_lora(tree, pj.LoraConfig(**options))["dense"][leaf_name]
    params = {name: jnp.array(parameter.detach().numpy().T) for name, parameter in grads.items()}
    np.testing.assert_allclose(
        leaf.params["lora_magnitude_vector"],
        jnp.linalg.norm(leaf.base + 5 / 3 * leaf.params["lora_A"] @ leaf.params["lora_B"], axis=0),
        rtol=1e-6,
    )
    use = (lambda w: w[jnp.array(x.numpy())]) if kind == "embedding" else (lambda w: jnp.array(x.numpy()) @ w)
    run = pj.adapt(lambda params: use(params["dense"]))
    got, back = jax.vjp(lambda params: run({"dense": dataclasses.replace(leaf, params=params)}), params)
    close(got, y.detach().numpy())
    for name, gradient in back(jnp.cos(got))[0].items():
        close(gradient, grads[name].grad.numpy().T)
        assert np.abs(gradient).max() > 1e-3


def test_dora_drops_inputs_of_all_but_the_base():
    """PEFT's rule: what is added to the base's output has dropped inputs, the scaled base's product among it."""
    kernel = normal(0, 12, 8)
    params = pj.with_dropout(adapted(dora(lora_dropout=0.5), kernel), jax.random.key(1))
    leaf, x = params["dense"]["kernel"], normal(1, 5, 12)
    dropped = dropout(x, leaf.state)
    clean = dataclasses.replace(leaf, state={k: v for k, v in leaf.state.items() if k != "dropout"})
    assert np.abs(dropped - x).max() > 0.1
    close(leaf.apply(x), x @ kernel + dropped @ (clean.dense() - kernel))


def test_dora_of_several_shards_is_dora_of_the_whole():
    """Norms are over all inputs, also where each device has some of them only."""
    kernel, x = normal(0, 12, 8), normal(1, 4, 12)
    params = adapted(dora(), kernel)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def model(w, x):
        part = jax.shard_map(
            lambda w, x: jax.lax.psum(x @ w, "d"), mesh=mesh, in_specs=(P("d"), P(None, "d")), out_specs=P()
        )
        return part(w, x)

    got = jax.jit(pj.adapt(lambda params, x: model(params["dense"]["kernel"], x)))(params, x)
    close(got, x @ pj.merge(params)["dense"]["kernel"])


def test_dora_of_a_convolution():
    kernel = normal(0, 3, 3, 4, 6)

    def model(params, x):
        return jax.lax.conv_general_dilated(
            x, params["dense"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x = normal(1, 2, 5, 5, 4)
    params = adapted(dora(), kernel, fn=model, args=(x,))
    close(pj.adapt(model)(params, x), model(pj.merge(params), x))
    norms = jnp.sqrt(jnp.sum(jnp.square(pj.merge(params)["dense"]["kernel"]), axis=(0, 1, 2)))
    close(norms, np.abs(params["dense"]["kernel"].params["lora_magnitude_vector"]))


def test_dora_of_experts_has_norms_of_its_own_for_each():
    kernel, x, groups = normal(0, 3, 12, 8), normal(1, 7, 12), jnp.array([2, 1, 4], jnp.int32)

    def model(params, x):
        return jax.lax.ragged_dot(x, params["layers"]["dense"]["kernel"], groups)

    layout = {".*": pj.Layout((0,), (1,), (2,))}
    params = perturbed(pj.apply_lora({"layers": {"dense": {"kernel": kernel}}}, dora(), layout=layout))
    close(pj.adapt(model)(params, x), model(pj.merge(params), x))


def test_a_trained_bias_is_not_for_embeddings():
    config = pj.LoraConfig(lora_bias=True, target_modules=["dense"])
    with pytest.raises(ValueError, match="lora_bias is not for embeddings, as 'dense' is"):
        pj.apply_lora({"dense": {"embedding": jnp.ones((4, 3))}}, config)


@pytest.mark.parametrize("bias", [True, False])
def test_a_trained_bias_counts_as_often_as_the_scale(bias):
    tree = {"dense": {"kernel": normal(0, 12, 8)} | ({"bias": normal(1, 8)} if bias else {})}
    config = pj.LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=["dense"])
    params = perturbed(pj.apply_lora(tree, config))
    leaf, x = params["dense"]["kernel"], normal(2, 5, 12)

    def model(params, x):
        return x @ params["dense"]["kernel"] + params["dense"].get("bias", jnp.zeros(8))[None]

    want = model(tree, x) + 3 * (x @ leaf.params["lora_A"] @ leaf.params["lora_B"] + leaf.params["lora_bias"][None])
    close(pj.adapt(model)(params, x), want)
    assert "trainable params: 48 ||" in pj.summary(params)  # 2 * (12 + 8) + 8
    gradient = jax.grad(lambda t, f: jnp.sum(jnp.sin(pj.adapt(model)(pj.combine(t, f), x))))(*pj.partition(params))
    close(gradient["dense"]["kernel"].params["lora_bias"], 3 * jnp.sum(jnp.cos(want), axis=0))
    if bias:
        close(model(pj.merge(params), x), want)
    else:
        with pytest.raises(ValueError, match="has none to merge it into. Keep the adapter apart"):
            pj.merge(params)


def test_alora_counts_from_its_last_invocation_on():
    """Prompts that have it twice, once, at the end, in part and not at all; and the tokens that are generated after."""
    ids = jnp.array(
        [[1, 5, 6, 5, 6, 2], [5, 6, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 6, 5], [6, 1, 2, 3, 4, 5]]
    )
    config = pj.LoraConfig(r=2, alora_invocation_tokens=[5, 6], lora_bias=True, target_modules=["dense"])
    tree = {"dense": {"kernel": normal(0, 12, 8), "bias": normal(1, 8)}}
    params = perturbed(pj.apply_lora(tree, config))
    invoked, x = pj.with_invocations(params, ids), normal(2, 5, 6, 12)

    def model(params, x):
        return x @ params["dense"]["kernel"] + jnp.expand_dims(params["dense"]["bias"], range(x.ndim - 1))

    run, leaf, base = pj.adapt(model), params["dense"]["kernel"], model(tree, x)
    added = 4 * (x @ leaf.params["lora_A"] @ leaf.params["lora_B"] + leaf.params["lora_bias"][None, None])
    for row, start in enumerate([3, 0, 4, 6, 6]):
        close(run(invoked, x)[row], base[row] + jnp.where(jnp.arange(6)[:, None] < start, 0, added[row]))
    last = run(invoked, x[:, -1:])  # one token after the prompt
    close(last, (base + added)[:, -1:].at[3:].set(base[3:, -1:]))
    close(run(invoked, x[:, -1]), last[:, 0])
    with pytest.raises(ValueError, match=r"Tell it: pj.with_invocations\(params, input_ids\)"):
        run(params, x)
    with pytest.raises(ValueError, match=r"gives \(3, 6, 8\).*5 rows.*has to be the batch"):
        run(invoked, x[:3])
    with pytest.raises(ValueError, match="adds to some tokens of a sequence only"):
        pj.merge(invoked)


def test_alora_generates_as_peft_does(tiny_llama, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=8, lora_alpha=64, alora_invocation_tokens=[7, 8], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
    model = pj.PeftModel.from_pretrained(ours, tmp_path)
    for prompt in ([5, 7, 8, 9], [5, 8, 7, 9]):
        ids = np.array([prompt])
        with torch.no_grad():
            options = {"attention_mask": torch.ones(1, 4, dtype=torch.int64), "max_new_tokens": 12, "do_sample": False}
            want = theirs.generate(input_ids=torch.tensor(ids), **options).numpy()
        np.testing.assert_array_equal(model.generate(ids, max_new_tokens=want.shape[1] - 4), want)
        plain = ours.generate(ids, max_new_tokens=want.shape[1] - 4)
        assert np.array_equal(plain, want) == (prompt[1] == 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alora_invocation_tokens": []}, "at least one"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "do not go with use_dora=True"),
    ],
)
def test_invocations_that_do_not_suit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pj.LoraConfig(**options)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor")  # PEFT takes the bias for a cut matrix
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}])
def test_layers_stored_inputs_first_are_pefts(options, tmp_path):
    """GPT-2's Conv1D, told by fan_in_fan_out: the same values, files and merged weights."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from safetensors.numpy import load_file
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 5, "fan_in_fan_out": True, "target_modules": ["dense"], **options}
    model = torch.nn.ModuleDict({"dense": Conv1D(8, 12)})
    model["dense"].weight.data.copy_(torch.randn(12, 8))
    weight, bias = (jnp.array(getattr(model["dense"], name).detach().numpy()) for name in ("weight", "bias"))
    theirs = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) * parameter.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(5, 12)
    want = theirs.base_model.model["dense"](x).detach().numpy()
    params = pj.interop.load_adapter({"dense": {"weight": weight, "bias": bias}}, tmp_path / "theirs")

    def layer(params, x):
        return x @ params["dense"]["weight"] + params["dense"]["bias"][None]

    close(pj.adapt(layer)(params, x.numpy()), want)
    close(layer(pj.merge(params), x.numpy()), want)
    assert np.abs(want - layer({"dense": {"weight": weight, "bias": bias}}, x.numpy())).max() > 0.1
    pj.interop.save_adapter(params, tmp_path / "ours")
    ours, file = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {key: array.tobytes() for key, array in ours.items()} == {
        key: array.tobytes() for key, array in file.items()
    }


TINY = {"vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = np.array([[5, 17, 2, 40, 9], [8, 8, 50, 3, 21]])


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """A folder of a model, and folders of random LoRAs on it, in PEFT's files; the last one has another rank."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("arrow")
    LlamaForCausalLM(LlamaConfig(**TINY, initializer_range=0.2, eos_token_id=None)).save_pretrained(folder / "base")
    for number, rank in enumerate([3, 3, 3, 3, 3, 2]):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        targets = ["q_proj", "down_proj"]
        config = peft.LoraConfig(r=rank, lora_alpha=2 + number, target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder / str(number))
    return folder


@pytest.mark.parametrize("use_gks", [False, True], ids=["plain", "GenKnowSub"])
def test_arrow_routes_as_in_peft(use_gks, loras):
    import torch
    from peft import ArrowConfig, create_arrow_model
    from transformers import LlamaForCausalLM

    tasks, general = [str(loras / n) for n in "012"], [str(loras / n) for n in "34"] if use_gks else None
    options = {"top_k": 2, "router_temperature": 0.5, "use_gks": use_gks, "rng_seed": 5}
    theirs = LlamaForCausalLM.from_pretrained(loras / "base").eval()
    theirs = create_arrow_model(theirs, tasks, ArrowConfig(**options), general).eval()
    base = pj.AutoModelForCausalLM.from_pretrained(loras / "base", dtype="float32")
    model = pj.create_arrow_model(base, tasks, pj.ArrowConfig(**options), general)
    with torch.no_grad():
        want = theirs(torch.tensor(TOKENS)).logits.numpy()
        tokens = theirs.generate(torch.tensor(TOKENS), max_new_tokens=6, do_sample=False, pad_token_id=0).numpy()
    close(model(TOKENS).logits, want)
    np.testing.assert_array_equal(model.generate(TOKENS, max_new_tokens=6), tokens)
    assert sorted(model.peft_config) == sorted(theirs.peft_config) and model.active_adapters == ["arrow_router"]
    for name in ("task_0", "task_2"):
        assert np.abs(model.set_adapter(name)(TOKENS).logits - want).max() > 1e-2
    assert not jax.tree.leaves(pj.partition(model)[0])
    if use_gks:
        return
    for kind in ("int8", "nf4"):
        narrow = pj.quantize(base, kind=kind)
        routed = [pj.create_arrow_model(one, tasks, pj.ArrowConfig(**options)) for one in (narrow, pj.merge(narrow))]
        close(routed[0](TOKENS).logits, routed[1](TOKENS).logits)


def test_arrow_gives_each_token_the_lora_of_its_direction(loras):
    """With top_k=1 a row of a product is that of one LoRA: of the one whose first singular vector is nearest."""
    base = pj.AutoModelForCausalLM.from_pretrained(loras / "base", dtype="float32")
    model = pj.create_arrow_model(base, [loras / n for n in "012"], pj.ArrowConfig(top_k=1, rng_seed=1))
    leaf = model.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    leaf = leaf.mapped(0, lambda array, axis: jnp.take(array, 1, axis), drop=True)
    experts = {}
    while hasattr(leaf, "tag"):
        experts[leaf.tag.name], leaf = leaf, leaf.base
    router = experts.pop("arrow_router")
    x = normal(0, 40, 24)
    want, places = [], []
    for number in range(3):
        expert = dataclasses.replace(experts[f"task_{number}"], base=leaf, active=True)
        vectors = np.linalg.svd(expert.dense() - leaf)[0]
        places.append(np.abs(x @ vectors[:, 0]))
        want.append(expert.apply(x))
    best = np.argmax(places, axis=0)
    clear = np.diff(np.sort(places, axis=0), axis=0)[-1] > 0.1  # the vectors are found but for some digits
    assert len(set(best)) == 3 and clear.sum() > 20
    close(router.apply(x)[clear], np.stack(want)[best, np.arange(40)][clear])


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ("", {}, "names at least one LoRA, got none"),
        ("01", {}, "top_k=3 is above the 2 LoRAs"),
        ("01", {"top_k": 1, "use_gks": True}, "use_gks=True takes the mean of general LoRAs out"),
        ("05", {"top_k": 1}, "'task_1' on 'model.layers.*' has another rank than 'task_0'|'task_0' .* than 'task_1'"),
    ],
    ids=["none", "top_k", "general", "rank"],
)
def test_what_arrow_needs_is_said(paths, options, message, loras):
    base = pj.AutoModelForCausalLM.from_pretrained(loras / "base", dtype="float32")
    with pytest.raises(ValueError, match=message):
        pj.create_arrow_model(base, [loras / n for n in paths], pj.ArrowConfig(**options))


def test_an_arrow_model_is_not_merged_and_its_router_has_no_file(loras, tmp_path):
    base = pj.AutoModelForCausalLM.from_pretrained(loras / "base", dtype="float32")
    model = pj.create_arrow_model(base, [loras / n for n in "01"], pj.ArrowConfig(top_k=1))
    with pytest.raises(ValueError, match="chooses LoRAs for each token, which no merged weight does"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="An Arrow router has no file"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, selected_adapters=["task_0", "task_1"])
    again = pj.create_arrow_model(base, [tmp_path / "task_0", tmp_path / "task_1"], pj.ArrowConfig(top_k=1))
    np.testing.assert_array_equal(again(TOKENS).logits, model(TOKENS).logits)
    without = pj.delete_adapter(model, "arrow_router").set_adapter("task_1")
    lora = pj.PeftModel.from_pretrained(base, loras / "1")
    close(without(TOKENS).logits, lora(TOKENS).logits)

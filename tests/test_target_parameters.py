"""target_parameters: LoRA on fused experts gives PEFT's outputs, files and merged weights, in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close, same_files, tolerance
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop

EXPERTS = ("gate_up_proj", "down_proj")
NAMES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYOUTS = {
    r".*experts\..*": pj.Layout(stack=(0,), inp=(2,), out=(1,)),
    r".*gate\.weight": pj.Layout(inp=(1,), out=(0,)),
}
STACKED = {
    r".*experts\..*": pj.Layout(stack=(0, 1), inp=(3,), out=(2,), index_after=("layers", None)),
    r".*gate\.weight": pj.Layout(stack=(0,), inp=(2,), out=(1,)),
}
CONFIG = {
    "r": 2,
    "lora_alpha": 3,
    "target_modules": [],
    "target_parameters": [*NAMES, "gate.weight"],
    "rank_pattern": {r"layers\.1\.mlp\.experts\.down_proj": 3},
    "alpha_pattern": {"gate.weight": 5},
    "use_rslora": True,
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def block(mlp, x):
    """Mixtral's sparse block: the two best of all experts for each token."""
    logits = x @ mlp["gate"]["weight"].T
    best, index = jax.lax.top_k(jax.nn.softmax(logits), 2)
    best = best / best.sum(-1, keepdims=True)
    parts = jnp.einsum("td,efd->tef", x, mlp["experts"]["gate_up_proj"])
    gate, up = jnp.split(parts, 2, axis=-1)
    each = jnp.einsum("tef,edf->ted", jax.nn.silu(gate) * up, mlp["experts"]["down_proj"])
    return jnp.einsum("tk,tkd->td", best, jnp.take_along_axis(each, index[..., None], axis=1))


def unrolled(params, xs):
    return jnp.stack([block(layer["mlp"], x) for layer, x in zip(params["model"]["layers"], xs, strict=True)])


def scanned(params, xs):
    _, ys = jax.lax.scan(lambda _, both: (None, block(both[0]["mlp"], both[1])), None, (params["model"]["layers"], xs))
    return ys


def shaped(seed=0):
    """The blocks of two layers, not of any checkpoint."""
    names = {"gate_up_proj": (3, 20, 12), "down_proj": (3, 12, 10)}
    layer = {"experts": {name: normal(i + seed, *shape) for i, (name, shape) in enumerate(names.items())}}
    return {"mlp": layer | {"gate": {"weight": normal(seed + 2, 3, 12)}}}


def tree(layers, stacked=False):
    return {"model": {"layers": jax.tree.map(lambda *one: jnp.stack(one), *layers) if stacked else layers}}


def perturbed(params):
    """The tree with random numbers in every trained array, as its file has them: padding stays zero."""
    trainable, frozen = pj.partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    leaves = [leaf + 0.3 * normal(i, *leaf.shape) for i, leaf in enumerate(leaves)]
    return pj.combine(jax.tree.unflatten(treedef, leaves), frozen)


@pytest.fixture(scope="module")
def mixtral():
    torch = pytest.importorskip("torch")
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=12, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    config = MixtralConfig(vocab_size=40, num_key_value_heads=2, num_local_experts=3, initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def blocks_of(model):
    """Our trees of a model's sparse blocks, without any adapter."""
    state = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    found = []
    for i in range(2):
        at = next(name for name in state if name.endswith(f"layers.{i}.mlp.experts.down_proj"))
        prefix = at.removesuffix("experts.down_proj")
        arrays = {name: jnp.array(state[prefix + name].numpy()) for name in ("gate.weight", *NAMES_INSIDE)}
        found.append(
            {
                "mlp": {
                    "gate": {"weight": arrays["gate.weight"]},
                    "experts": {n: arrays[f"experts.{n}"] for n in EXPERTS},
                }
            }
        )
    return found


NAMES_INSIDE = tuple(f"experts.{name}" for name in EXPERTS)


def watched(model, run):
    """Inputs and outputs of the sparse blocks."""
    import torch

    seen = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for layer in model.get_base_model().model.layers
    ]
    with torch.no_grad():
        run(model)
    for hook in hooks:
        hook.remove()
    return (np.stack([one[k].reshape(-1, 12).numpy() for one in seen]) for k in (0, 1))


@pytest.mark.filterwarnings("ignore")  # PEFT says that it ignores the patterns, which it does not
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_of_a_mixtral_in_both_directions(stacked, mixtral, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import copy

    torch.manual_seed(1)
    theirs = peft.get_peft_model(copy.deepcopy(mixtral), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIG)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(10).reshape(1, 10)
    xs, want = watched(theirs, lambda model: model(ids))
    fn, layouts = (scanned, STACKED) if stacked else (unrolled, LAYOUTS)
    base = tree(blocks_of(theirs), stacked)
    params = interop.load_adapter(base, tmp_path / "theirs", layout=layouts)
    close(pj.adapt(fn)(params, xs), want)
    close(fn(pj.merge(params), xs), want)
    interop.save_adapter(params, tmp_path / "ours")
    tensors = same_files(tmp_path / "ours", tmp_path / "theirs")
    own = interop.get_peft_model_state_dict(params)
    assert {name.rpartition(".lora_")[0] for name in tensors if "experts" in name} == {
        f"base_model.model.model.layers.{i}.mlp.experts{more}" for i in (0, 1) for more in ("", ".base_layer")
    }
    for key in own:
        without = {name: array * 0 if name == key else array for name, array in own.items()}
        config = pj.PeftConfig.from_pretrained(tmp_path / "theirs")
        dead = interop.set_peft_model_state_dict(base, config, without, layout=layouts)
        assert np.abs(pj.adapt(fn)(dead, xs) - want).max() > 100 * tolerance(want), key
    merged = blocks_of(theirs.merge_and_unload())
    for ours, other in zip(jax.tree.leaves(pj.merge(params)), jax.tree.leaves(tree(merged, stacked)), strict=True):
        close(ours, other)

    made = perturbed(pj.apply_lora(base, pj.LoraConfig(task_type="CAUSAL_LM", **CONFIG), layout=layouts))
    interop.save_adapter(made, tmp_path / "back")
    again = peft.get_peft_model(copy.deepcopy(mixtral), peft.PeftConfig.from_pretrained(tmp_path / "back"))
    saved = peft.utils.save_and_load.load_peft_weights(str(tmp_path / "back"))
    assert peft.set_peft_model_state_dict(again, dict(saved)).unexpected_keys == []
    assert peft.get_peft_model_state_dict(again).keys() == saved.keys()
    xs, want = watched(again.eval(), lambda model: model(ids))
    close(pj.adapt(fn)(interop.load_adapter(base, tmp_path / "back", layout=layouts), xs), want)


@pytest.mark.parametrize("kind", ["llama4", "is_transposed"])
def test_experts_stored_as_in_out(kind, tmp_path):
    """Llama 4's experts do not say that they are, so that PEFT takes the last axis for the inputs; others do."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts

    torch.manual_seed(0)
    experts = Llama4TextExperts(Llama4TextConfig(hidden_size=12, intermediate_size=5, num_local_experts=3))
    for parameter in experts.parameters():
        parameter.data.normal_()
    if kind == "is_transposed":
        experts.is_transposed = True
    base = {"block": {"experts": {name: jnp.array(getattr(experts, name).detach().numpy()) for name in EXPERTS}}}
    config = {"r": 2, "target_modules": [], "target_parameters": [f"experts.{name}" for name in EXPERTS]}

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.ModuleDict({"experts": experts})

        def forward(self, x):
            return self.block["experts"](x)

    model = peft.get_peft_model(Model(), peft.LoraConfig(init_lora_weights=False, **config)).eval()
    model.save_pretrained(tmp_path / "theirs")
    x = torch.randn(6, 12)
    with torch.no_grad():
        want = model(x).numpy()

    def run(params, x):
        own = params["block"]["experts"]
        gate, up = jnp.split(jnp.einsum("etd,edf->etf", x.reshape(3, 2, 12), own["gate_up_proj"]), 2, axis=-1)
        return jnp.einsum("etf,efd->etd", up * jax.nn.silu(gate), own["down_proj"]).reshape(6, 12)

    x = jnp.array(x.numpy())
    as_peft = pj.Layout((0,), (2,), (1,), index_after=(None,))
    as_it_is = pj.Layout((0,), (1,), (2,), index_after=(None,))
    right, wrong = (as_peft, as_it_is) if kind == "llama4" else (as_it_is, as_peft)
    params = interop.load_adapter(base, tmp_path / "theirs", layout={".*": right})
    close(pj.adapt(run)(params, x), want)
    close(run(pj.merge(params), x), want)
    assert np.abs(run(base, x) - want).max() > 100 * tolerance(want)
    interop.save_adapter(params, tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    with pytest.raises(ValueError, match="lora_A.weight has shape .* listed in the order .* declares them"):
        interop.load_adapter(base, tmp_path / "theirs", layout={".*": wrong})


def test_parameters_that_a_file_cannot_tell_apart_are_named():
    tree = {"block": {"first": jnp.ones((2, 4, 4)), "second": jnp.ones((2, 4, 4))}}
    layout = {".*": pj.Layout((0,), (1,), (2,), index_after=(None,))}
    config = pj.LoraConfig(r=2, target_modules=[], target_parameters=["second", "first"])
    params = pj.apply_lora(tree, config, layout=layout)
    with pytest.raises(ValueError, match="'block.first' and 'block.second', two of one shape in one module"):
        interop.get_peft_model_state_dict(params)
    told = config.replace(rank_pattern={"first": 3})
    tensors = interop.get_peft_model_state_dict(pj.apply_lora(tree, told, layout=layout))
    assert len(tensors) == 4
    with pytest.raises(ValueError, match="two of one shape in one module"):
        interop.set_peft_model_state_dict(tree, config, tensors, layout=layout)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_start_apart_and_train_on_the_side_path(stacked):
    layers = [shaped(), shaped(10)]
    fn, base = (scanned if stacked else unrolled), tree(layers, stacked)
    xs = normal(5, 2, 7, 12)
    config = pj.LoraConfig(**CONFIG)
    params = pj.apply_lora(base, config, fn=fn, args=(xs,))
    close(pj.adapt(fn)(params, xs), fn(base, xs))
    for array in (leaf for leaf in jax.tree.leaves(pj.partition(params)[0]) if leaf.ndim > 2 and leaf.any()):
        each = np.reshape(array, (-1, *array.shape[-2:]))
        for i in range(len(each)):
            assert all(np.abs(each[i] - each[j]).max() > 0.1 for j in range(i))
    told = str(pj.explain(fn, params, xs))
    assert "merged somewhere" in told and "0 merged somewhere" in told, told
    trainable, frozen = pj.partition(perturbed(params))
    got = jax.grad(lambda t: jnp.sum(pj.adapt(fn)(pj.combine(t, frozen), xs) ** 2))(trainable)
    want = jax.grad(lambda t: jnp.sum(fn(pj.merge(pj.combine(t, frozen)), xs) ** 2))(trainable)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close(one, other)
    (count,) = {pj.summary(params).splitlines()[-1].split()[2]}
    ranks = [2, 2, 2, 2, 2, 3]  # gate, up and gate, down, of each layer
    sizes = [15, 3 * 32, 3 * 22, 15, 3 * 32, 3 * 22]
    assert int(count) == sum(rank * size for rank, size in zip(ranks, sizes, strict=True))


def test_random_factors_have_pefts_spread():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    experts = torch.nn.Module()
    experts.weight = torch.nn.Parameter(torch.zeros(16, 24, 40))
    config = {"r": 8, "target_modules": [], "target_parameters": ["experts.weight"], "init_lora_weights": False}
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"experts": experts}), peft.LoraConfig(**config))
    layout = {".*": pj.Layout((0,), (2,), (1,), index_after=(None,))}
    ours = pj.apply_lora({"experts": {"weight": jnp.zeros((16, 24, 40))}}, pj.LoraConfig(**config), layout=layout)
    want, got = peft.get_peft_model_state_dict(theirs), interop.get_peft_model_state_dict(ours)
    assert want.keys() == got.keys()
    for key in want:
        np.testing.assert_allclose(np.abs(got[key]).max(), want[key].abs().max(), rtol=0.02)
        np.testing.assert_allclose(got[key].std(), want[key].std(), rtol=0.05)


def test_a_quantized_expert_weight_is_adapted_like_a_float_one():
    base = tree([shaped()])
    int8 = pj.quantize(base, layout=LAYOUTS)
    params = pj.apply_lora(int8, pj.LoraConfig(r=2, target_modules=[], target_parameters=NAMES), layout=LAYOUTS)
    params = perturbed(params)
    xs = normal(5, 1, 7, 12)
    close(pj.adapt(unrolled)(params, xs), unrolled(pj.merge(params), xs))
    assert params["model"]["layers"][0]["mlp"]["experts"]["down_proj"].base.q.dtype == jnp.int8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, r"do not go with \{'lora_dropout': 0.1\}"),
        ({"use_dora": True}, "do not go with .*use_dora"),
        ({"lora_bias": True}, "do not go with .*lora_bias"),
        ({"fan_in_fan_out": True}, "do not go with .*fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "do not go with .*pissa"),
        ({"target_parameters": "experts.down_proj"}, "Give it a value of: Sequence"),
    ],
)
def test_options_that_are_for_modules_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pj.LoraConfig(**{"target_parameters": NAMES, **options})


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"target_parameters": ["experts.down"]}, LAYOUTS, "Target parameter 'experts.down' hits none .* Nearest: "),
        (
            {"target_parameters": ["gate.bias"]},
            LAYOUTS,
            r"'.*gate.bias' of shape \(3,\), which is no weight of a product",
        ),
        ({"target_modules": ["gate"], "target_parameters": ["gate.weight"]}, LAYOUTS, "Name it in one of them"),
        (
            {"target_parameters": ["gate.weight"], "modules_to_save": ["gate"]},
            LAYOUTS,
            "trained whole by modules_to_save",
        ),
        ({"target_parameters": NAMES}, None, "is a target, and its input and output axes are ambiguous"),
        ({"target_modules": ["down_proj"]}, None, "is a target, and its input and output axes are ambiguous"),
        (
            {"target_modules": ["down_proj"]},
            LAYOUTS,
            "stacks experts without names of their own. Name it in target_par",
        ),
        ({"target_modules": ["inner"], "target_parameters": ["mlp.own"]}, LAYOUTS, "which no file of PEFT's can hold"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_named(options, layout, message):
    layer = shaped()
    layer["mlp"]["gate"]["bias"] = jnp.zeros(3)
    layer["mlp"] |= {"own": jnp.ones((4, 4)), "inner": {"weight": jnp.ones((4, 4))}}
    unnamed = {pattern: pj.Layout(one.stack, one.inp, one.out, index_after=(None,)) for pattern, one in LAYOUTS.items()}
    with pytest.raises(ValueError, match=message):
        pj.apply_lora(tree([layer]), pj.LoraConfig(**{"target_modules": [], **options}), layout=layout and unnamed)


def test_experts_that_are_one_matrix_already_are_named():
    base = {"experts": {"weight": normal(0, 3, 8, 4)}}
    args = (normal(1, 5, 4),)

    def fn(params, x):
        return jnp.einsum("ti,eoi->teo", x, params["experts"]["weight"])

    config = pj.LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    assert pj.apply_lora(base, config, fn=fn, args=args)["experts"]["weight"].layout.stack == (0,)
    with pytest.raises(ValueError, match="is quantized or adapted as one matrix of all its experts"):
        pj.apply_lora(pj.quantize(base, fn=fn, args=args), config)
    with pytest.raises(ValueError, match=r"whose axes are stack=\(\), inp=\(2,\), out=\(0, 1\)"):
        pj.apply_lora(base, config, layout={".*": pj.Layout((), (2,), (0, 1))})


def test_adapters_of_parameters_are_not_combined_but_kept_apart():
    params = tree([shaped()])
    for name in ("a", "b"):
        config = pj.LoraConfig(r=2, target_modules=[], target_parameters=NAMES)
        params = pj.apply_lora(params, config, layout=LAYOUTS, adapter_name=name)
    assert (
        interop.get_peft_model_state_dict(params, "a").keys() == interop.get_peft_model_state_dict(params, "b").keys()
    )
    with pytest.raises(ValueError, match="target_parameters.* cannot be combined"):
        pj.add_weighted_adapter(params, ["a", "b"], [1.0, 1.0], "c")


def test_all_linear_leaves_the_named_parameters_to_their_own_adapter():
    xs = normal(5, 1, 7, 12)
    base = tree([shaped()])
    config = pj.LoraConfig(r=2, target_modules="all-linear", target_parameters=NAMES)
    params = pj.apply_lora(base, config, fn=unrolled, args=(xs,))
    assert {key.split("mlp.")[1] for key in interop.get_peft_model_state_dict(params)} == {
        f"{module}.lora_{end}.weight" for module in ("gate", "experts", "experts.base_layer") for end in "AB"
    }


def test_a_file_that_lacks_an_expert_weight_is_refused(tmp_path):
    config = pj.LoraConfig(r=2, target_modules=[], target_parameters=NAMES)
    params = pj.apply_lora(tree([shaped()]), config, layout=LAYOUTS)
    interop.save_adapter(params, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.mlp.experts.lora_A.weight")
    with pytest.raises(ValueError, match="experts.lora_A.weight is missing"):
        interop.set_peft_model_state_dict(tree([shaped()]), config, tensors, layout=LAYOUTS)

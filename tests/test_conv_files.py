"""LoRA on convolutions: PEFT's files, with an axis for each position in the kernel, and its outputs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close, same_files, tolerance
from peft_jax.interop.describe import read_adapter

import peft_jax as pj
from peft_jax import interop
from peft_jax.core.weight import MergeError

OPTIONS = {
    "plain": {"target_modules": ["one", "two"], "rank_pattern": {"two": 3}},
    "DoRA": {"target_modules": ["one", "two"], "use_dora": True},
    "lora_bias": {"target_modules": ["one"], "lora_bias": True},
    "a saved one": {"target_modules": ["one"], "modules_to_save": ["two"]},
    "groups": {"target_modules": ["one", "two"], "r": 6, "rank_pattern": {"two": 2}, "lora_bias": True},
    "groups with DoRA": {"target_modules": ["one", "two"], "r": 6, "rank_pattern": {"two": 2}, "use_dora": True},
}
GROUPS = dict.fromkeys(("groups", "groups with DoRA"), {"one": 3, "two": 2})  # of the layers of a row
SPELL = {1: "NWC", 2: "NHWC", 3: "NDHWC"}


def model_of(dims, groups):
    """Two convolutions, kernels as Flax has them: positions, inputs, outputs."""
    space = SPELL[dims][1:-1]
    numbers = (SPELL[dims], f"{space}IO", SPELL[dims])

    def run(params, x):
        for name, stride in (("one", 2), ("two", 1)):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            convolution = partial(jax.lax.conv_general_dilated, feature_group_count=groups.get(name, 1))
            x = convolution(x, kernel, (stride,) * dims, "VALID", dimension_numbers=numbers)
            x = jnp.tanh(x + jnp.expand_dims(bias, tuple(range(x.ndim - 1))))
        return x

    return run


def torch_model(dims, groups):
    torch = pytest.importorskip("torch")
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
    sizes = ((3, 2, 4)[:dims], (2, 3, 1)[:dims])
    torch.manual_seed(dims)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = kind(6, 12, sizes[0], stride=2, groups=groups.get("one", 1))
            self.two = kind(12, 4, sizes[1], groups=groups.get("two", 1))

        def forward(self, x):
            return torch.tanh(self.two(torch.tanh(self.one(x))))

    return Model()


def tree_of(model):
    def moved(weight):
        return jnp.array(np.moveaxis(weight.detach().numpy(), (0, 1), (-1, -2)))

    return {
        name: {
            "kernel": moved(getattr(model, name).weight),
            "bias": jnp.array(getattr(model, name).bias.detach().numpy()),
        }
        for name in ("one", "two")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("dims", "row"), [(2, row) for row in OPTIONS] + [(1, "groups"), (3, "plain")])
def test_convolutions_in_both_directions(dims, row, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    groups = GROUPS.get(row, {})
    base, run = tree_of(torch_model(dims, groups)), model_of(dims, groups)
    options = {"r": 2, "lora_alpha": 3, **OPTIONS[row]}
    theirs = peft.get_peft_model(torch_model(dims, groups), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 6, *(11, 10, 9)[:dims])
    with torch.no_grad():
        want = np.moveaxis(theirs(x).numpy(), 1, -1)
    x = jnp.array(np.moveaxis(x.numpy(), 1, -1))
    inputs = tuple(range(dims + 1))
    layout = {
        f"{name}.kernel": pj.Layout(inp=inputs, out=(dims + 1,), taps=inputs[:-1], groups=groups.get(name, 1))
        for name in ("one", "two")
    }
    params = interop.load_adapter(base, tmp_path / "theirs", layout=layout)
    close(pj.adapt(run)(params, x), want)
    if groups:
        with pytest.raises(MergeError, match="LoRA of a convolution with groups has outputs of one group see"):
            pj.merge(params)
    else:
        close(run(pj.merge(params), x), want)
    assert np.abs(run(base, x) - want).max() > 100 * tolerance(want)
    interop.save_adapter(params, tmp_path / "ours")
    tensors = same_files(tmp_path / "ours", tmp_path / "theirs")
    assert tensors["base_model.model.one.lora_A.weight"].ndim == dims + 2

    made = pj.apply_lora(base, pj.LoraConfig(**options), fn=run, args=(x,))  # which axes are positions is read off
    trainable, frozen = pj.partition(made)
    made = pj.combine(
        jax.tree.map(lambda a: a + 0.2 * jax.random.normal(jax.random.key(0), a.shape), trainable), frozen
    )
    interop.save_adapter(made, tmp_path / "back")
    again = peft.PeftModel.from_pretrained(torch_model(dims, groups), tmp_path / "back").eval()
    saved = interop.get_peft_model_state_dict(made)
    assert f"trainable params: {sum(array.size for array in saved.values()):,} " in str(pj.summary(made))
    assert read_adapter(tmp_path / "back").problems() == []
    assert peft.get_peft_model_state_dict(again).keys() == saved.keys()
    with torch.no_grad():
        close(pj.adapt(run)(made, x), np.moveaxis(again(torch.tensor(np.moveaxis(x, -1, 1))).numpy(), 1, -1))


def test_oft_of_a_convolution_is_what_peft_merges(tmp_path):
    """PEFT's forward pass sums overlapping patches, so that a fresh OFT changes outputs; its merged kernel is OFT's."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    theirs = torch.nn.ModuleDict({"one": torch.nn.Conv2d(6, 8, 3, bias=False)})
    kernel = np.moveaxis(theirs["one"].weight.detach().numpy(), (0, 1), (-1, -2)).copy()
    theirs = peft.get_peft_model(theirs, peft.OFTConfig(oft_block_size=6, target_modules=["one"]))
    with torch.no_grad():
        theirs.base_model.model["one"].oft_R["default"].weight.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path)
    layout = {"one.kernel": pj.Layout(inp=(0, 1, 2), out=(3,), taps=(0, 1))}
    ours = pj.merge(interop.load_adapter({"one": {"kernel": jnp.array(kernel)}}, tmp_path, layout=layout))
    want = theirs.merge_and_unload()["one"].weight.detach().numpy()
    close(ours["one"]["kernel"], np.moveaxis(want, (0, 1), (-1, -2)))
    assert np.abs(np.moveaxis(want, (0, 1), (-1, -2)) - kernel).max() > 0.05


def test_a_kernel_of_one_position_has_axes_for_it():
    def fn(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["one"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)

    params = {"one": {"kernel": jnp.ones((1, 1, 3, 4))}}
    params = pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["one"]), fn=fn, args=(jnp.ones((1, 5, 5, 3)),))
    shapes = [array.shape for array in interop.get_peft_model_state_dict(params).values()]
    assert shapes == [(2, 3, 1, 1), (4, 2, 1, 1)]


def test_a_matrix_of_several_axes_that_is_no_kernel_has_a_flat_file():
    params = {"out": {"kernel": jnp.ones((2, 3, 4))}}
    config = pj.LoraConfig(r=2, target_modules=["out"])
    fn = lambda params, x: jnp.einsum("thd,hdo->to", x, params["out"]["kernel"])  # noqa: E731
    params = pj.apply_lora(params, config, fn=fn, args=(jnp.ones((1, 2, 3)),))
    assert interop.get_peft_model_state_dict(params)["base_model.model.out.lora_A.weight"].shape == (2, 6)


def test_positions_have_to_be_inputs():
    with pytest.raises(ValueError, match="taps of leaf 'one.kernel' that are no input axes"):
        layout = {".*": pj.Layout(inp=(0, 1), out=(2,), taps=(2,))}
        pj.apply_lora({"one": {"kernel": jnp.ones((2, 3, 4))}}, pj.LoraConfig(target_modules=["one"]), layout=layout)


def of_groups(groups, *configs, taps=None):
    """A convolution with adapters; its groups are read off the program, unless a layout names its taps alone."""

    def fn(params, x):
        kernel = params["one"]["kernel"]
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    params, x = {"one": {"kernel": jnp.ones((3, 2, 6))}}, jax.random.normal(jax.random.key(1), (2, 5, 2 * groups))
    told = {"fn": fn, "args": (x,)} if taps is None else {"layout": {".*": pj.Layout((), (0, 1), (2,), taps=taps)}}
    for number, config in enumerate(configs):
        params = pj.apply_lora(params, config, adapter_name=f"a{number}", key=jax.random.key(number), **told)
    return params, lambda params: pj.adapt(fn)(params, x)


NOT_FOR_GROUPS = {
    "a rank that is no multiple": (
        {"r": 3},
        "convolution of 2 groups, which share the rank, and it is 3. Choose",
    ),
    "BD-LoRA": ({"use_bdlora": {}}, "use_bdlora is for linear layers, and 'one' is a convolution"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "does not go with {'init_lora_weights': 'pissa'}"),
    "an invocation": ({"alora_invocation_tokens": [1]}, "does not go with {'alora_invocation_tokens'"),
}


@pytest.mark.parametrize("row", NOT_FOR_GROUPS)
def test_what_a_convolution_with_groups_refuses(row):
    options, match = NOT_FOR_GROUPS[row]
    with pytest.raises(ValueError, match=match):
        of_groups(2, pj.LoraConfig(**{"r": 4, "target_modules": ["one"], **options}))


def test_groups_have_to_be_told_with_taps():
    params, run = of_groups(2, pj.LoraConfig(r=4, target_modules=["one"]), taps=(0,))
    with pytest.raises(ValueError, match="of a convolution of 2 groups, and its layout says 1. Write groups=2 in its"):
        run(params)
    with pytest.raises(ValueError, match="groups=4 of leaf 'one.kernel' of shape .* are not those of a convolution"):
        pj.Layout((), (0, 1), (2,), taps=(0,), groups=4).check((3, 2, 6), "one.kernel")


def test_random_factors_and_sums_of_adapters_with_groups():
    config = pj.LoraConfig(r=4, target_modules=["one"], init_lora_weights=False)
    params, run = of_groups(2, config, config)
    a, b = (params["one"]["kernel"].params[name] for name in ("lora_A", "lora_B"))
    for factor, n_in in ((a, 3 * 4), (b, 4 // 2)):  # as PyTorch's convolutions, by what an output sees
        assert 0.7 < jnp.abs(factor).max() * n_in**0.5 <= 1
    with pytest.raises(ValueError, match="'cat' multiplies or joins factors, which those of 'one.kernel', a conv"):
        pj.add_weighted_adapter(params, ["a0", "a1"], [1, 1], "both", "cat")
    half = pj.set_adapter(pj.add_weighted_adapter(params, ["a1"], [0.5], "half"), "half")
    base = run(pj.unload(params))
    moved = run(pj.set_adapter(params, "a1")) - base
    close(run(half) - base, 0.5 * moved)
    assert jnp.abs(moved).max() > 0.1

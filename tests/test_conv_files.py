"""LoRA on convolutions: PEFT's files, with an axis for each position in the kernel, and its outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close, same_files, tolerance

import peft_jax as pj
from peft_jax import interop

OPTIONS = {
    "plain": {"target_modules": ["one", "two"], "rank_pattern": {"two": 3}},
    "DoRA": {"target_modules": ["one", "two"], "use_dora": True},
    "lora_bias": {"target_modules": ["one"], "lora_bias": True},
    "a saved one": {"target_modules": ["one"], "modules_to_save": ["two"]},
}
SPELL = {1: "NWC", 2: "NHWC", 3: "NDHWC"}


def model_of(dims):
    """Two convolutions, kernels as Flax has them: positions, inputs, outputs."""
    space = SPELL[dims][1:-1]
    numbers = (SPELL[dims], f"{space}IO", SPELL[dims])

    def run(params, x):
        for name, stride in (("one", 2), ("two", 1)):
            kernel, bias = params[name]["kernel"], params[name]["bias"]
            x = jax.lax.conv_general_dilated(x, kernel, (stride,) * dims, "VALID", dimension_numbers=numbers)
            x = jnp.tanh(x + jnp.expand_dims(bias, tuple(range(x.ndim - 1))))
        return x

    return run


def torch_model(dims):
    torch = pytest.importorskip("torch")
    kind = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dims]
    sizes = ((3, 2, 4)[:dims], (2, 3, 1)[:dims])
    torch.manual_seed(dims)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = kind(3, 5, sizes[0], stride=2), kind(5, 4, sizes[1])

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
@pytest.mark.parametrize(("dims", "row"), [(2, row) for row in OPTIONS] + [(1, "plain"), (3, "plain")])
def test_convolutions_in_both_directions(dims, row, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base, run = tree_of(torch_model(dims)), model_of(dims)
    options = {"r": 2, "lora_alpha": 3, **OPTIONS[row]}
    theirs = peft.get_peft_model(torch_model(dims), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 3, *(11, 10, 9)[:dims])
    with torch.no_grad():
        want = np.moveaxis(theirs(x).numpy(), 1, -1)
    x = jnp.array(np.moveaxis(x.numpy(), 1, -1))
    inputs = tuple(range(dims + 1))
    layout = {".*kernel": pj.Layout(inp=inputs, out=(dims + 1,), taps=inputs[:-1])}
    params = interop.load_adapter(base, tmp_path / "theirs", layout=layout)
    close(pj.adapt(run)(params, x), want)
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
    again = peft.PeftModel.from_pretrained(torch_model(dims), tmp_path / "back").eval()
    saved = interop.get_peft_model_state_dict(made)
    assert peft.get_peft_model_state_dict(again).keys() == saved.keys()
    with torch.no_grad():
        close(pj.adapt(run)(made, x), np.moveaxis(again(torch.tensor(np.moveaxis(x, -1, 1))).numpy(), 1, -1))


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

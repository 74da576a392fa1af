"""Layers of two shapes: a stack for each shape, scanned by the pattern that repeats; adapters, names and files."""

import dataclasses
import json
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peft_jax.interop.checkpoint import load_params, open_tensors, save_checkpoint
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.adapt import adapt
from peft_jax.core.paths import named_leaves
from peft_jax.models.config import CAUSAL_LM, ModelConfig
from peft_jax.models.family import Family, Sharding, stacked_layouts
from peft_jax.models.modules.decoder import Decoder, DecoderBackbone
from peft_jax.models.modules.heads import DecoderHead
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_scan import Segment, segments
from peft_jax.models.modules.layer_views import View
from peft_jax.models.modules.layers import RMSNorm, linear_maker

IDS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])
ORDER = ("narrow", "narrow", "wide", "narrow", "narrow", "wide", "narrow")


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    stems = MappingProxyType({"toy": "Toy"})
    tasks = MappingProxyType({CAUSAL_LM: "ForCausalLM"})

    vocab_size: int = 12
    hidden_size: int = 8
    num_hidden_layers: int = len(ORDER)
    num_attention_heads: int = 1
    max_position_embeddings: int = 16
    model_type: str = "toy"
    task_type: str = CAUSAL_LM
    order: tuple[str, ...] = ORDER

    @property
    def stacks(self) -> tuple[str, ...]:
        return self.order


class ToyLayer(nnx.Module):
    """Mixes the positions that its view shows, in a width that is its kind's; counts its calls."""

    def __init__(self, config: ToyConfig, dtype: Any, width: int, rngs: nnx.Rngs) -> None:
        linear = linear_maker(config, dtype, rngs)
        self.up, self.down = linear(config.hidden_size, width), linear(width, config.hidden_size)

    def __call__(self, x: jax.Array, call: Any, handed: Any) -> Any:
        seen = call.view.mask.astype(x.dtype) @ x
        return x + 0.3 * self.down(jnp.tanh(self.up(seen))) * (call.layer + 1).astype(x.dtype), handed


class ToyModel(DecoderBackbone):
    embedding_name = "embed"

    def make_layer(self, dtype: Any) -> Any:
        widths = {"narrow": 4, "wide": 16}
        return {name: partial(ToyLayer, self.config, dtype, width) for name, width in widths.items()}

    def make_norm(self, dtype: Any) -> nnx.Module:
        return RMSNorm(self.config.hidden_size, 1e-6, dtype)

    def views(self, x: jax.Array, places: Any, inputs: ForwardInputs) -> dict[str, View]:
        return {kind: View(places.mask) for kind in self.config.kinds}


class Toy(Decoder):
    backbone_class, head = ToyModel, DecoderHead({CAUSAL_LM: "lm_head"})


TOY = Family(
    config=ToyConfig,
    module=Toy,
    layouts=stacked_layouts("layers"),
    backbone="model",
    embedding="embed",
    heads=Toy.head.names,
    peft_defaults={"toy": {}},
    sharding=Sharding(columns="up", rows="down", tables="embed"),
)
CONFIG = ToyConfig(initializer_range=0.4)
LAYOUT = TOY.layouts_of(CONFIG)


@pytest.fixture(scope="module")
def params() -> Any:
    return TOY.init_params(CONFIG, jax.random.key(0))


@jax.jit
def one_by_one(params: Any, ids: jax.Array) -> jax.Array:
    """The same model without a scan."""
    inner = params["model"]
    x = inner["embed"]["embedding"][ids]
    mask = np.tril(np.ones((ids.shape[1], ids.shape[1]), np.float32))[None]
    places = {"narrow": 0, "wide": 0}
    for number, name in enumerate(ORDER):
        layer = jax.tree.map(lambda leaf, at=places[name]: leaf[at], inner["layers"][name])
        places[name] += 1
        h = jnp.tanh(mask @ x @ layer["up"]["kernel"] + layer["up"]["bias"][None, None])
        x = x + 0.3 * (h @ layer["down"]["kernel"] + layer["down"]["bias"][None, None]) * jnp.float32(number + 1)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * inner["norm"]["scale"][None, None]
    return x @ params["lm_head"]["kernel"]


def logits(params: Any, ids: jax.Array, **options: Any) -> jax.Array:
    output: jax.Array = TOY.apply(CONFIG, params, ForwardInputs(input_ids=ids, **options)).logits
    return output


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, float(np.abs(want).max())))


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("a" * 9, [(0, 1, 9)]),
        ("aab" * 3, [(0, 3, 3)]),
        ("aab" * 3 + "aa", [(0, 3, 3), (9, 1, 2)]),
        ("aaab" * 3 + "AAAB" * 4, [(0, 4, 3), (12, 4, 4)]),
        ("abbbb", [(0, 1, 1), (1, 1, 4)]),
    ],
)
def test_the_shortest_patterns_are_found(kinds: str, want: list[tuple[int, int, int]]) -> None:
    assert segments(list(kinds)) == [Segment(*one) for one in want]


def test_layers_run_in_their_order(params: Any) -> None:
    want = one_by_one(params, IDS)
    for options in ({}, {"remat": True}, {"output_hidden_states": True}):
        close(jax.jit(partial(logits, **options))(params, IDS), want)
    inputs = ForwardInputs(input_ids=IDS, output_hidden_states=True)
    states = jax.jit(partial(TOY.apply, CONFIG))(params, inputs).hidden_states
    assert states.shape == (8, 2, 4, 8)
    close(states[0], params["model"]["embed"]["embedding"][IDS])
    of_ours, of_theirs = (
        jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, IDS) ** 2)))(params) for f in (logits, one_by_one)
    )
    jax.tree.map(close, of_ours, of_theirs)


def test_compiled_layers_do_not_grow_with_depth() -> None:
    sizes = []
    for repeats in (2, 6):
        order = ORDER[:3] * repeats
        config = dataclasses.replace(CONFIG, order=order, num_hidden_layers=len(order))
        shapes = jax.eval_shape(partial(TOY.init_params, config), jax.random.key(0))
        program = jax.make_jaxpr(partial(TOY.apply, config))(shapes, ForwardInputs(input_ids=IDS))
        sizes.append(str(program).count("dot_general"))
    assert sizes[0] == sizes[1]


def test_names_are_those_of_the_layers(params: Any) -> None:
    wide = LAYOUT["model\\.layers\\.wide\\.up\\.kernel"]
    assert wide.numbers == (2, 5)
    keys = {row.path: row.keys for row in TOY.rows(CONFIG)}
    assert keys["model.layers.wide.up.kernel"] == ["model.layers.2.up.weight", "model.layers.5.up.weight"]
    assert keys["model.layers.narrow.down.bias"][2] == "model.layers.3.down.bias"


def test_adapters_are_applied_saved_and_loaded_by_layer(params: Any) -> None:
    config = pj.LoraConfig(
        r=4,
        target_modules=r"model\.layers\.\d\.(up|down)",
        rank_pattern={r"layers\.5\.up": 2},
        alpha_pattern={r"layers\.0\.down": 32},
        init_lora_weights=False,
    )
    adapted = pj.apply_lora(params, config, key=jax.random.key(1), layout=LAYOUT)
    tensors = interop.get_peft_model_state_dict(adapted)
    found = {key.removeprefix("base_model.model.") for key in tensors}
    modules = [f"model.layers.{number}.{name}" for number in range(7) for name in ("up", "down")]
    assert found == {f"{module}.lora_{end}.weight" for module in modules for end in "AB"}
    assert tensors["base_model.model.model.layers.5.up.lora_A.weight"].shape == (2, 8)
    assert tensors["base_model.model.model.layers.2.up.lora_A.weight"].shape == (4, 8)
    assert tensors["base_model.model.model.layers.2.up.lora_B.weight"].shape == (16, 4)
    dense = jax.tree.map(np.asarray, params)
    for key, a in tensors.items():
        if "lora_A" not in key:
            continue
        b = tensors[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        scale = (32 if module == "model.layers.0.down" else 8) / a.shape[0]
        change = scale * (b @ a).T
        number, name = module.split(".")[2:]
        stack = ORDER[int(number)]
        place = ORDER[: int(number)].count(stack)
        kernel = np.array(dense["model"]["layers"][stack][name]["kernel"])
        kernel[place] += change
        dense["model"]["layers"][stack][name]["kernel"] = kernel
    want = one_by_one(dense, IDS)
    assert np.abs(want - one_by_one(params, IDS)).max() > 0.01
    run = jax.jit(adapt(logits))
    close(run(adapted, IDS), want)
    jax.tree.map(close, pj.merge(adapted), dense)
    again = interop.set_peft_model_state_dict(params, config, tensors, layout=LAYOUT)
    close(run(again, IDS), want)
    trainable, frozen = pj.partition(adapted)
    grads = jax.jit(jax.grad(lambda own: jnp.sum(adapt(logits)(pj.combine(own, frozen), IDS) ** 2)))(trainable)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_adapters_of_int8_layers(params: Any) -> None:
    small = pj.quantize(params, target_modules=["up", "down"], layout=LAYOUT)
    paths = [path for path in named_leaves(small) if path.endswith(".q")]
    assert len(paths) == 4
    config = pj.LoraConfig(r=2, target_modules=["up"])
    adapted = pj.apply_lora(small, config, layout=LAYOUT)
    run = jax.jit(adapt(logits))
    close(run(adapted, IDS), run(small, IDS))
    assert "base_model.model.model.layers.5.up.lora_A.weight" in interop.get_peft_model_state_dict(adapted)


def test_checkpoints_have_a_tensor_a_layer(params: Any, tmp_path: Any) -> None:
    rows = TOY.rows(CONFIG)
    save_checkpoint(tmp_path, params, rows, {"model_type": "toy"})
    file = load_file(tmp_path / "model.safetensors")
    assert {key for key in file if "layers.2." in key} == {
        f"model.layers.2.{name}.{end}" for name in ("up", "down") for end in ("weight", "bias")
    }
    np.testing.assert_array_equal(
        file["model.layers.5.up.weight"], params["model"]["layers"]["wide"]["up"]["kernel"][1].T
    )
    again = load_params(open_tensors(tmp_path), rows, lambda path, array: array)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert json.loads((tmp_path / "config.json").read_text()) == {"model_type": "toy"}


def test_numbers_of_layers_fit_the_stack() -> None:
    layout = pj.Layout(stack=(0,), inp=(1,), out=(2,), numbers=(1, 2))
    with pytest.raises(ValueError, match="gives leaf 'up' of shape .* 2 numbers of layers. Give one for each"):
        layout.check((3, 8, 8), "up")

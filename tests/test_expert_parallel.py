"""Mixtures on meshes of eight devices: the numbers of one device, with experts computed where they are."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES
from torch_mixtures import ROUTERS, ROWS

import peft_jax as pj
from peft_jax.core.paths import named_leaves
from peft_jax.core.product import Grouped
from peft_jax.core.weight import is_weight
from peft_jax.models.registry import read_architecture
from peft_jax.train.mesh import in_use, make_mesh, parse_mesh, place, place_batch, spec

EXPERTS = 8
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # how configs call the number of experts
WEIGHTS = ("fsdp", "expert")  # what splits an axis of the weights that are no experts'
MATRICES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = np.random.default_rng(0).integers(3, 50, (8, 12))
MASK = np.where(np.arange(12) < 9 - np.arange(8)[:, None] % 3, 0, 1)[:, ::-1]
LABELS = np.where((MASK == 1) & (IDS % 3 > 0), IDS, -100)


class Case(NamedTuple):
    """A mixture on a mesh."""

    kind: str
    mesh: str
    on_experts: bool = True
    int8: bool = False
    prompt: bool = False
    generates: bool = True


ALWAYS = "qwen3_moe-int8"
CASES = {
    ALWAYS: Case("qwen3_moe", "data=2,tensor=2,expert=2", int8=True, generates=False),
    "qwen3_moe-attention": Case("qwen3_moe", "fsdp=2,expert=4", on_experts=False),
    "qwen3_moe-rows": Case("qwen3_moe", "data=4,fsdp=2"),
    "qwen2_moe-prompt": Case("qwen2_moe", "data=2,expert=4", prompt=True),
    "mixtral": Case("mixtral", "tensor=8"),
    "gpt_oss": Case("gpt_oss", "fsdp=2,expert=4"),
    "gpt_oss-int8": Case("gpt_oss", "expert=8", on_experts=False, int8=True),
    "deepseek_v3": Case("deepseek_v3", "data=2,fsdp=2,expert=2", int8=True),
}


def model_of(case: Case) -> Any:
    """A tiny mixture with an adapter, whose routers' loss is a part of the loss where they have one."""
    row = ARCHITECTURES[ROWS[case.kind]]
    count = next(name for name in COUNTS if name in row.sizes)
    fields = {**row.sizes, **row.model_types[case.kind], count: EXPERTS, "num_hidden_layers": 2}
    routed = {} if case.kind.startswith("deepseek") else {"output_router_logits": True, "router_aux_loss_coef": 0.7}
    config = read_architecture({"model_type": case.kind, **fields, **routed, "initializer_range": 0.2})
    model = pj.AutoModelForCausalLM.from_config(config)
    model = pj.quantize(model) if case.int8 else model
    if case.prompt:
        prompt = pj.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
        return pj.get_peft_model(model, prompt)
    options: dict[str, Any] = {}
    if case.on_experts:
        options["target_parameters"] = [*MATRICES, f"mlp.{ROUTERS.get(case.kind, 'gate')}.weight"]
    lora = pj.LoraConfig(r=2, lora_alpha=3, target_modules=["o_proj"], init_lora_weights=False, **options)
    model = pj.get_peft_model(model, lora.replace(task_type="CAUSAL_LM"))
    return dataclasses.replace(model, remat=True)


@jax.jit
def step(model: Any, ids: jax.Array, mask: jax.Array, labels: jax.Array) -> Any:
    """The loss of a batch, and its gradient."""
    trainable, frozen = pj.partition(model)
    return jax.value_and_grad(lambda own: pj.combine(own, frozen)(ids, mask, labels=labels).loss)(trainable)


def gathered(program: str) -> set[str]:
    """The arrays of all experts that a compiled program gathers: matrices from or to the 32 hidden features."""
    return set(re.findall(rf"= (\w+\[{EXPERTS},(?:32,\d+|\d+,32)\])\S* all-gather", program))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == ALWAYS else pytest.mark.slow) for name in CASES]
)
def test_eight_devices_give_the_numbers_of_one(name: str) -> None:
    """Loss with the routers' own, gradients, and tokens; three rows of tokens cannot be split over the devices."""
    case = CASES[name]
    model, mesh = model_of(case), make_mesh(parse_mesh(case.mesh))
    batch = {"ids": IDS, "mask": MASK, "labels": LABELS}
    want, slopes = step(model, **batch)
    tokens = model.generate(IDS[:3], max_new_tokens=4) if case.generates else None
    on_mesh = place(model, mesh)
    devices = mesh.shape["tensor"] * mesh.shape["expert"]
    for path, leaf in named_leaves(on_mesh.params, is_weight).items():
        if path.endswith(("experts.gate_up_proj", "experts.down_proj")):
            array = leaf.array if is_weight(leaf) else leaf
            assert array.sharding.shard_shape(array.shape)[1] * devices == EXPERTS, path
            assert array.dtype == (jnp.int8 if case.int8 else jnp.float32), path
        elif path.endswith(("o_proj.kernel", "embed_tokens.embedding")):
            array = leaf.array if is_weight(leaf) else leaf
            parts_of_weight = array.size // np.prod(array.sharding.shard_shape(array.shape))
            assert parts_of_weight == devices * mesh.shape["fsdp"], path
    with in_use(mesh):
        placed = place_batch(batch, mesh)
        compiled = step.lower(on_mesh, **placed).compile()
        found, parts = compiled(on_mesh, **placed)
        others = on_mesh.generate(IDS[:3], max_new_tokens=4) if case.generates else None
    assert mesh.shape["fsdp"] > 1 or not gathered(compiled.as_text()), "weights of experts are gathered"
    np.testing.assert_allclose(found, want, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slopes))
    assert largest > 1e-3
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, largest))
    if case.generates:
        np.testing.assert_array_equal(others, tokens)


@pytest.mark.slow
def test_without_the_mesh_in_use_the_numbers_are_the_same_and_weights_are_gathered() -> None:
    case = CASES["qwen3_moe-attention"]
    model, mesh = model_of(case), make_mesh({"expert": 8})
    want, _ = step(model, IDS, MASK, LABELS)
    on_mesh, batch = place(model, mesh), place_batch({"ids": IDS, "mask": MASK, "labels": LABELS}, mesh)
    np.testing.assert_allclose(step(on_mesh, **batch)[0], want, rtol=1e-5)
    assert gathered(step.lower(on_mesh, **batch).compile().as_text()), "the measure sees nothing"


def test_how_experts_are_split() -> None:
    mesh = make_mesh({"expert": 2, "tensor": 4})
    path = "model.layers.mlp.experts.gate_up_proj"
    assert tuple(spec(path, (2, 8, 16, 24), mesh)) == (None, ("expert", "tensor"), "fsdp", None)
    assert tuple(spec(path, (2, 6, 16, 24), mesh)) == (None, "expert", "fsdp", None)
    assert tuple(spec(f"{path}_bias", (2, 8, 24), mesh)) == (None, ("expert", "tensor"), None)
    assert tuple(spec("model.layers.self_attn.q_proj.kernel", (2, 16, 24), mesh)) == (None, WEIGHTS, "tensor")
    assert tuple(spec("model.layers.self_attn.o_proj.kernel", (2, 16, 24), mesh)) == (None, "tensor", WEIGHTS)
    assert tuple(spec("model.embed_tokens.embedding", (24, 16), mesh)) == (("tensor", *WEIGHTS), None)
    assert tuple(spec("model.embed_tokens.embedding", (20, 16), mesh)) == (("tensor", "fsdp"), None)
    assert tuple(spec("model.embed_tokens.embedding", (21, 16), mesh)) == (None, None)
    with pytest.raises(ValueError, match=r"expert=2, which does not divide the 7 experts of .*\. Give a divisor of 7"):
        spec(path, (2, 7, 16, 24), mesh)


def test_integers_as_they_are_in_a_grouped_product() -> None:
    """The form for TPUs alone, which the CPU can run too, and its gradient, are those of converted integers."""
    x = jax.random.normal(jax.random.key(0), (6, 8), jnp.bfloat16)
    matrices = jax.random.randint(jax.random.key(1), (3, 8, 4), -127, 127, jnp.int8)
    product = Grouped(preferred_element_type=jnp.dtype("bfloat16"), group_sizes=jnp.array([1, 3, 2], jnp.int32))
    for one, other in zip(
        jax.vjp(lambda x: product.full(x, matrices), x),
        jax.vjp(lambda x: product.full_of_integers(x, matrices), x),
        strict=True,
    ):
        if callable(one):
            one, other = one(jnp.ones((6, 4), jnp.bfloat16)), other(jnp.ones((6, 4), jnp.bfloat16))
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_on_a_tpu_the_rank_is_no_last_axis_in_memory(kind: str) -> None:
    """Of first factors and of their gradient: the TPU fills a last axis up to 128 numbers."""
    x, factors = jnp.ones((6, 8), jnp.bfloat16), jnp.ones((3, 8, 2), kind)
    product = Grouped(group_sizes=jnp.array([1, 3, 2], jnp.int32))
    gradient = jax.jit(jax.grad(lambda factors: (product.down(x, factors) ** 2).sum()))
    text = gradient.trace(factors).lower(lowering_platforms=("tpu",)).as_text()
    layouts = re.findall(r"@LayoutConstraint\(.*result_layouts = \[dense<(.*?)>", text)
    assert layouts == ["[1, 2, 0]"] * 2  # from the innermost axis outwards
    np.testing.assert_array_equal(gradient(factors)[:, 0, 0], [16, 48, 32])


def test_rows_as_they_are_in_a_grouped_product_with_wider_factors() -> None:
    """As above, of bfloat16 rows and float32 factors, with the gradients of both."""
    x = jax.random.normal(jax.random.key(0), (6, 8), jnp.bfloat16)
    factors = jax.random.normal(jax.random.key(1), (3, 8, 2))
    product = Grouped(group_sizes=jnp.array([1, 3, 2], jnp.int32))
    (found, back), (want, want_back) = (jax.vjp(form, x, factors) for form in (product.down_of_two_types, product.down))
    assert found.dtype == want.dtype == jnp.float32
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    slope = jnp.arange(12.0).reshape(6, 2)
    (own, of_factors), (wanted, of_wanted) = back(slope), want_back(slope)
    assert own.dtype == wanted.dtype == jnp.bfloat16
    np.testing.assert_allclose(of_factors, of_wanted, rtol=0, atol=1e-4)  # sums of up to 33
    np.testing.assert_allclose(own, wanted, rtol=2**-7, atol=1e-5)  # rounded to bfloat16

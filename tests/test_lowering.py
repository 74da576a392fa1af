"""What the benchmark of programs for accelerators that are not here reads off programs."""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import peft_jax as pj
from peft_jax.train.mesh import make_mesh

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from lowering_checks import dequantized, frozen_gradients, multiplications  # noqa: E402
from lowering_table import FOREIGN_CASES, foreign_name, table  # noqa: E402

MATRIX = (8, 24)
X = jax.ShapeDtypeStruct((5, 8), jnp.float32)


def test_operations_are_those_of_all_products_as_often_as_they_run() -> None:
    def layers(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, w)[0].sum()

    w = jax.ShapeDtypeStruct((3, 8, 8), jnp.float32)
    assert multiplications(jax.make_jaxpr(layers)(X, w)) == 3 * 2 * 5 * 8 * 8
    assert multiplications(jax.make_jaxpr(jax.grad(layers))(X, w)) == 3 * 3 * 2 * 5 * 8 * 8  # and again, and backward


def test_the_gradient_of_a_frozen_weight_is_seen_and_that_of_an_adapter_is_not() -> None:
    params = {"up": {"kernel": jnp.ones(MATRIX)}}
    fn = pj.adapt(lambda params, x: jnp.sum((x @ params["up"]["kernel"]) ** 2))
    trainable, frozen = pj.partition(pj.apply_lora(params, pj.LoraConfig(r=2, target_modules=["up"])))
    ours = jax.make_jaxpr(jax.grad(lambda trainable, x: fn(pj.combine(trainable, frozen), x)))(trainable, X)
    assert not frozen_gradients(ours, {MATRIX})
    whole = jax.make_jaxpr(jax.grad(fn))(params, X)
    assert frozen_gradients(whole, {MATRIX}) & {MATRIX, MATRIX[::-1]}


@pytest.mark.usefixtures("optimizing_compiler")
@pytest.mark.parametrize("keeps", [True, False])
def test_a_dequantized_weight_is_seen(keeps: bool) -> None:
    params = pj.quantize({"up": {"kernel": jax.random.normal(jax.random.key(0), MATRIX)}})

    def run(params: Any, x: jax.Array) -> Any:
        dense = pj.merge(params)["up"]["kernel"]
        return (x @ dense, dense) if keeps else x * dense.sum()

    text = jax.jit(run).lower(params, X).compile().as_text()
    assert dequantized(text, {MATRIX}, make_mesh({})) == ({"f32[8,24]"} if keeps else set())


@pytest.mark.parametrize(
    ("buffer", "is_weight"),
    {
        "bf16[2,2,2,24]": True,  # two blocks of two halves of two inputs
        "bf16[2,2,24]": True,  # one half of each
        "bf16[24,8]": True,
        "f32[2,3,24]": False,
        "f32[2,2,24]": False,  # given to the program
        "u8[2,2,2,24]": False,
    }.items(),
)
def test_a_weight_in_blocks_is_seen(buffer: str, is_weight: bool) -> None:
    text = f"ENTRY %main {{\n  %one = {buffer} fusion(%two), kind=kLoop\n}}"
    own = {(2, 2, 24)} if buffer.startswith("f32") else set()
    assert dequantized(text, {MATRIX}, make_mesh({}), own) == ({buffer} if is_weight else set())


@pytest.mark.parametrize(
    ("buffer", "is_weight"),
    {
        "bf16[3,8,24]": True,  # all experts
        "bf16[3,24,8]": True,
        "bf16[8,24]": True,
        "f32[3,4,8]": False,  # first factors of rank 4, as many numbers as a matrix that is split
        "f32[2,4,24]": False,
        "bf16[8,3]": False,  # a router, given to the program
    }.items(),
)
def test_experts_are_seen_and_their_adapters_are_not(buffer: str, is_weight: bool) -> None:
    text = f"ENTRY %main {{\n  %one = {buffer} fusion(%two), kind=kLoop\n}}"
    found = dequantized(text, {(3, 8, 24), MATRIX, (8, 3)}, make_mesh({}), {(8, 3)}, in_blocks=False)
    assert found == ({buffer} if is_weight else set())


def test_the_table_says_what_is_met() -> None:
    record = {
        "size": "70b",
        "work": "train",
        "chip": "v5e:4x4",
        "mesh": "fsdp=16",
        "rows": 16,
        "length": 9,
        "micro": 16,
    }
    record |= {"argument": 2**30, "temp": 2**30, "operations": 103, "operations_without_adapters": 100}
    record |= {"compile_seconds": 1.0, "date": "2026-01-31"}
    text = table([record | {"base": "int8", "per_chip": 17 * 2**30}, record | {"base": "bfloat16", "per_chip": 2**35}])
    assert "fits 16 chips of 16 GiB (70b, int8, v5e:4x4): **not met**, 17.000." in text
    assert "under 0.6 of bf16's (70b, int8, v5e:4x4): **met**, 0.53" in text
    assert "without adapters (70b, int8, v5e:4x4): **met**, 1.030" in text
    assert "## Where" not in text
    text = table([record | {"base": "nf4+head", "per_chip": 2**34, "dequantized": ["bf16[2,9]"]}])
    assert "70B with nf4 LoRA fits 8 chips of 16 GiB (70b, nf4+head, v5e:4x4): **met**, 16.000." in text
    assert "- 70b, nf4+head, train, v5e:4x4: `bf16[2,9]`." in text
    refused = {**record, "base": "int8", "refused": "Error: no memory"}
    line = "- 70b, int8, train, v5e:4x4, fsdp=16, 16 x 9 / 16: `Error: no memory`\n"
    assert table([refused]).endswith(line)
    assert table([refused], ["8b nf4"]).endswith(f"{line}\nNot compiled yet: 8b nf4.\n")
    hand, ours = ({"temporaries": n * 2**20, "traffic": float(2**30), "copies": n} for n in (5, 6))
    beside = {"features": 512, "model": "einsum", "remat": True, "layers": 4, "base": "int8"}
    beside |= {"chip": "h100", "date": "2026-01-31"}
    pairs = [{**beside, "by_hand": hand, "adapt": ours}, {**beside, "by_hand": ours, "adapt": hand}]
    row = "| 512 | einsum, remat | 4 | int8 | h100 | {}, {} | 1.000, 1.000 | {}, {} | {} | 2026-01-31 |\n"
    want = row.format("5.0", "6.0", 5, 6, "**not met**") + row.format("6.0", "5.0", 6, 5, "met")
    assert table([refused], [], pairs).endswith(want)
    missing = [foreign_name(*case) for case in FOREIGN_CASES][:2]
    text = table([refused], [], pairs, missing)
    assert text.endswith("Not compiled yet: 512 einsum bfloat16 v5e:1x1; 512 einsum int8 v5e:1x1.\n")


def test_a_row_of_a_grouped_product_counts_with_one_matrix() -> None:
    w, sizes = jax.ShapeDtypeStruct((3, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3,), jnp.int32)
    program = jax.make_jaxpr(jax.grad(lambda x, w, sizes: jax.lax.ragged_dot(x, w, sizes).sum(), (0, 1)))(X, w, sizes)
    assert multiplications(program) == 3 * 2 * 5 * 8 * 4
    assert frozen_gradients(program, {(3, 8, 4)}) == {(3, 8, 4)}

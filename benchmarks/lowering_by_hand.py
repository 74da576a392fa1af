"""Decoders that are not this package's, with LoRA written by hand and with LoRA by `peft_jax.adapt`, compiled.

    .venv-aot/bin/python benchmarks/lowering_by_hand.py --only "scanned remat"

One decoder has einsum kernels with the axes that such models give them, ``(in, heads, head_dim)`` and ``(heads,
head_dim, out)``, and layers outside a scan; tunix's Llama has such leaves. The other is a linen module whose layers are
scanned. Both also run with their layers computed again in the backward pass. `make lowering` runs this program too, and
has its environment. Recorded in docs/lowering_by_hand.json and docs/lowering.md are temporaries, bytes that the
compiler says are read and written, and copies between fusions; floating-point operations agree.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from flax import linen as nn
from foreign_decoders import SIZES, ScannedDecoder, Sizes, decoder, decoder_weights
from lowering import BY_HAND, described, on, without_a_tpu, write_page
from lowering_table import FOREIGN_CASES, foreign_name

import peft_jax as pj

RANK, SCALING = 16, 2.0
Program = tuple[Any, Any, Callable[..., jax.Array]]  # trained arrays, frozen ones, and the loss of both and the tokens


@dataclasses.dataclass(frozen=True)
class Case:
    """A decoder to compile twice.

    Attributes:
        features: Between its layers; the other sizes go with them.
        model: "einsum" or "scanned".
        remat: Whether backward keeps each layer's input alone.
        base: Element type of the frozen kernels: bfloat16 or int8.
        chip: A topology as the compiler's package names it.
    """

    features: int
    model: str
    remat: bool
    base: str
    chip: str

    @property
    def name(self) -> str:
        """What the case is called in the records."""
        return foreign_name(self.features, self.model, self.remat, self.base, self.chip)

    @property
    def layers(self) -> int:
        """Layers of the decoder; those of a scan are compiled once."""
        return 4 if self.model == "einsum" else 8

    @property
    def sizes(self) -> Sizes:
        """All of its sizes."""
        return SIZES[self.features]


CASES = [Case(*case) for case in FOREIGN_CASES]


class ByHand(NamedTuple):
    """A kernel with LoRA: the frozen array, its scales if it is int8, and both factors."""

    kernel: jax.Array
    scale: jax.Array | None
    first: jax.Array
    second: jax.Array


def multiply_by_hand(axes: str, x: jax.Array, weight: Any) -> jax.Array:
    """An einsum whose kernel may have LoRA, with the factors' products in float32."""
    if not isinstance(weight, ByHand):
        return jnp.einsum(axes, x, weight)
    operands, result = axes.split("->")
    of_x, of_kernel = operands.split(",")
    inputs = "".join(axis for axis in of_kernel if axis in of_x)
    outputs = "".join(axis for axis in of_kernel if axis not in of_x)
    inner = "".join(axis for axis in of_x if axis not in inputs) + "r"

    @jax.checkpoint  # or the float copy of integers is kept for backward
    def dequantized(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.einsum(axes, x, kernel.astype(x.dtype)) * scale.astype(x.dtype)

    if weight.scale is None:
        y = jnp.einsum(axes, x, weight.kernel)
    else:
        y = dequantized(x, weight.kernel, weight.scale)
    low = jnp.einsum(f"{of_x},{inputs}r->{inner}", x.astype(jnp.float32), weight.first)
    update = jnp.einsum(f"{inner},r{outputs}->{result}", low, weight.second) * SCALING
    return (y + update).astype(x.dtype)


def einsum_by_hand(case: Case) -> Program:
    """The decoder of einsum kernels, with LoRA by hand."""
    frozen, trained, scales = decoder_weights(case.sizes, case.layers), {}, {}
    for number in range(case.layers):
        for name, (axes, shape) in case.sizes.kernels.items():
            inputs = 2 if axes.startswith("btnh") else 1
            key = f"layer_{number}", name
            trained[key] = jnp.zeros((*shape[:inputs], RANK)), jnp.zeros((RANK, *shape[inputs:]))
            if case.base == "int8":
                frozen[key[0]][name] = {"kernel": jnp.zeros(shape, jnp.int8)}
                scales[key] = jnp.zeros(shape[inputs:])

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        arrays, scales = frozen
        params = jax.tree.map(lambda array: array, arrays)
        for (layer, name), factors in trained.items():
            params[layer][name]["kernel"] = ByHand(arrays[layer][name]["kernel"], scales.get((layer, name)), *factors)
        return decoder(case.sizes, params, ids, multiply_by_hand, remat=case.remat)

    return trained, (frozen, scales), loss


class LoraDense(nn.Module):
    """A dense layer with LoRA by hand, whose factors are the collection "lora".

    Attributes:
        features: Outputs.
        int8: Whether the kernel is of integers with a scale for each output.
    """

    features: int
    int8: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``(..., in)``."""
        zeros, shape = nn.initializers.zeros, (x.shape[-1], self.features)
        kernel = self.param("kernel", zeros, shape, jnp.int8 if self.int8 else jnp.bfloat16)
        scale = self.param("scale", zeros, shape[1:], jnp.float32) if self.int8 else None
        first = self.variable("lora", "first", jnp.zeros, (shape[0], RANK))
        second = self.variable("lora", "second", jnp.zeros, (RANK, shape[1]))
        return multiply_by_hand("btd,df->btf", x, ByHand(kernel, scale, first.value, second.value))


def scanned_by_hand(case: Case) -> Program:
    """The linen decoder, with LoRA by hand."""
    model = ScannedDecoder(case.sizes, case.layers, case.remat, partial(LoraDense, int8=case.base == "int8"))
    variables = jax.eval_shape(model.init, jax.random.key(0), case.sizes.ids)

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        found: jax.Array = model.apply({"params": frozen, "lora": trained}, ids)
        return found

    return variables["lora"], variables["params"], loss


def einsum_plain(case: Case) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """The loss of the decoder of einsum kernels, and what makes its tree."""
    return partial(decoder, case.sizes, remat=case.remat), partial(decoder_weights, case.sizes, case.layers)


def scanned_plain(case: Case) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """The loss of the linen decoder, and what makes its tree."""
    dense = partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = ScannedDecoder(case.sizes, case.layers, case.remat, dense)

    def loss(params: Any, ids: jax.Array) -> Any:
        return model.apply({"params": params}, ids)

    return loss, lambda: model.init(jax.random.key(0), _zeros(case.sizes))["params"]


def _zeros(sizes: Sizes) -> jax.Array:
    return jnp.zeros(sizes.ids.shape, sizes.ids.dtype)


def by_adapt(case: Case) -> Program:
    """Either decoder with LoRA by `peft_jax.adapt`."""
    fn, make = (einsum_plain if case.model == "einsum" else scanned_plain)(case)
    targets = list(case.sizes.kernels)

    def adapted() -> Any:
        params, args = make(), (_zeros(case.sizes),)
        if case.base == "int8":
            params = pj.quantize(params, target_modules=targets, fn=fn, args=args)
        config = pj.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=targets)
        return pj.apply_lora(params, config, fn=fn, args=args)

    trained, frozen = pj.partition(jax.eval_shape(adapted))
    run = pj.adapt(fn)
    return trained, frozen, lambda trained, frozen, ids: run(pj.combine(trained, frozen), ids)


def compiled(program: Program, ids: jax.ShapeDtypeStruct, device: Any) -> dict[str, float]:
    """What a compiler says of the loss of the tokens ``ids`` and the gradients of the factors."""
    trained, frozen, loss = program
    where = jax.sharding.NamedSharding(jax.sharding.Mesh([device], "x"), jax.sharding.PartitionSpec())
    step = jax.jit(jax.value_and_grad(loss)).lower(on(where, trained), on(where, frozen), on(where, ids)).compile()
    return {
        "temporaries": step.memory_analysis().temp_size_in_bytes,
        "traffic": (step.cost_analysis() or {}).get("bytes accessed", 0.0),  # of a described GPU there is none
        "copies": len(re.findall(r"= \w+\[[\d,]+\]\S* copy\(", step.as_text())),  # of arrays, not of numbers
    }


@dataclasses.dataclass(frozen=True)
class Options:
    """Which cases."""

    only: str = ""
    """A part of their names, such as "scanned remat" or h100; all by default."""


def main(options: Options) -> None:
    """Compile the cases, and write the records after each."""
    is_any = False
    for case in CASES:
        if options.only not in case.name:
            continue
        is_any = True
        device = described(case.chip)[0]
        by_hand = (einsum_by_hand if case.model == "einsum" else scanned_by_hand)(case)
        record = {
            **dataclasses.asdict(case),
            "layers": case.layers,
            "by_hand": compiled(by_hand, case.sizes.ids, device),
            "adapt": compiled(by_adapt(case), case.sizes.ids, device),
            "jax": jax.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        found = json.loads(BY_HAND.read_text()) if BY_HAND.exists() else {}
        found[case.name] = record
        records = {known.name: found[known.name] for known in CASES if known.name in found}
        BY_HAND.write_text(json.dumps(records, indent=1) + "\n")
        write_page()
        print(case.name, record["by_hand"], record["adapt"], flush=True)
    if not is_any:
        print(f"no case of other people's models has {options.only!r} in its name")


if __name__ == "__main__":
    without_a_tpu()
    main(tyro.cli(Options))

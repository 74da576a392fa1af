"""A decoder of einsum kernels, with LoRA written by hand and with LoRA by `peft_jax.adapt`, compiled for accelerators.

    .venv-aot/bin/python benchmarks/lowering_by_hand.py --chips v5e:1x1 h100

The kernels have the axes that such models give them, ``(in, heads, head_dim)`` and ``(heads, head_dim, out)``, and the
layers are not in a scan. The environment is that of `make lowering`. Printed for each chip and base: temporaries, bytes
that the compiler says are read and written, and copies between fusions, of both; floating-point operations agree.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from lowering import described, on, without_a_tpu

import peft_jax as pj

HIDDEN, HEADS, HEAD, WIDE, VOCABULARY = 512, 8, 64, 2048, 2048
ROWS, LENGTH, RANK, SCALING = 4, 256, 16, 2.0
IDS = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
KERNELS = {  # axes of the product, and of the kernel
    "q": ("btd,dnh->btnh", (HIDDEN, HEADS, HEAD)),
    "k": ("btd,dnh->btnh", (HIDDEN, HEADS, HEAD)),
    "v": ("btd,dnh->btnh", (HIDDEN, HEADS, HEAD)),
    "o": ("btnh,nhd->btd", (HEADS, HEAD, HIDDEN)),
    "gate": ("btd,df->btf", (HIDDEN, WIDE)),
    "up": ("btd,df->btf", (HIDDEN, WIDE)),
    "down": ("btf,fd->btd", (WIDE, HIDDEN)),
}
Multiply = Callable[[str, jax.Array, Any], jax.Array]


class ByHand(NamedTuple):
    """A kernel with LoRA: the frozen array, its scales if it is int8, and both factors."""

    kernel: jax.Array
    scale: jax.Array | None
    first: jax.Array
    second: jax.Array


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
        chips: Topologies as `make lowering` names them.
        layers: Of the decoder.
    """

    chips: tuple[str, ...] = ("v5e:1x1", "v6e:1x1", "h100")
    layers: int = 8


def decoder_weights(layers: int) -> dict[str, Any]:
    """The tree, in bfloat16."""
    tree: dict[str, Any] = {"embedding": jnp.zeros((VOCABULARY, HIDDEN), jnp.bfloat16)}
    for number in range(layers):
        layer = {name: {"kernel": jnp.zeros(shape, jnp.bfloat16)} for name, (_, shape) in KERNELS.items()}
        tree[f"layer_{number}"] = layer
    return tree


def normalized(x: jax.Array) -> jax.Array:
    """Root-mean-square normalization, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotated(x: jax.Array) -> jax.Array:
    """Rotary positions of ``(rows, length, heads, head_dim)``."""
    half = HEAD // 2
    angles = jnp.arange(LENGTH)[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    left, right = jnp.split(x, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def decoder(params: dict[str, Any], ids: jax.Array, multiply: Multiply = jnp.einsum) -> jax.Array:
    """The loss of predicting each next token; the head is the embedding's transpose."""
    x = params["embedding"][ids]
    visible = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for number in range(len(params) - 1):
        layer = params[f"layer_{number}"]

        def product(name: str, x: jax.Array, layer: Any = layer) -> jax.Array:
            return multiply(KERNELS[name][0], x, layer[name]["kernel"])

        h = normalized(x)
        queries, keys, values = rotated(product("q", h)), rotated(product("k", h)), product("v", h)
        scores = jnp.einsum("btnh,bsnh->bnts", queries, keys).astype(jnp.float32) / HEAD**0.5
        weights = jax.nn.softmax(jnp.where(visible, scores, -1e30), -1).astype(x.dtype)
        x = x + product("o", jnp.einsum("bnts,bsnh->btnh", weights, values))
        h = normalized(x)
        x = x + product("down", jax.nn.silu(product("gate", h)) * product("up", h))
    logits = jnp.einsum("btd,vd->btv", x, params["embedding"])[:, :-1].astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


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


def by_hand(layers: int, *, int8: bool) -> tuple[Any, Any, Callable[..., jax.Array]]:
    """Trained factors, the frozen tree, and the loss of both."""
    frozen, trained, scales = decoder_weights(layers), {}, {}
    for number in range(layers):
        for name, (axes, shape) in KERNELS.items():
            inputs = 2 if axes.startswith("btnh") else 1
            key = f"layer_{number}", name
            trained[key] = jnp.zeros((*shape[:inputs], RANK)), jnp.zeros((RANK, *shape[inputs:]))
            if int8:
                frozen[key[0]][name] = {"kernel": jnp.zeros(shape, jnp.int8)}
                scales[key] = jnp.zeros(shape[inputs:])

    def loss(trained: Any, frozen: Any, ids: jax.Array) -> jax.Array:
        arrays, scales = frozen
        params = jax.tree.map(lambda array: array, arrays)
        for (layer, name), factors in trained.items():
            params[layer][name]["kernel"] = ByHand(arrays[layer][name]["kernel"], scales.get((layer, name)), *factors)
        return decoder(params, ids, multiply_by_hand)

    return trained, (frozen, scales), loss


def by_adapt(layers: int, *, int8: bool) -> tuple[Any, Any, Callable[..., jax.Array]]:
    """The same by `peft_jax.adapt`."""
    params, args = decoder_weights(layers), (jnp.zeros(IDS.shape, IDS.dtype),)
    targets = list(KERNELS)
    if int8:
        params = pj.quantize(params, target_modules=targets, fn=decoder, args=args)
    config = pj.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=targets)
    trained, frozen = pj.partition(pj.apply_lora(params, config, fn=decoder, args=args))
    adapted = pj.adapt(decoder)
    return trained, frozen, lambda trained, frozen, ids: adapted(pj.combine(trained, frozen), ids)


class Compiled(NamedTuple):
    """What a compiler says of a step: temporaries in bytes, bytes read and written (0 if unknown), and copies."""

    temporaries: int
    traffic: float
    copies: int


def compiled(case: tuple[Any, Any, Callable[..., jax.Array]], device: Any) -> Compiled:
    """The loss and the gradients of the factors, compiled for a device."""
    trained, frozen, loss = case
    where = jax.sharding.NamedSharding(jax.sharding.Mesh([device], "x"), jax.sharding.PartitionSpec())
    program = jax.jit(jax.value_and_grad(loss)).lower(on(where, trained), on(where, frozen), on(where, IDS)).compile()
    copied = re.findall(r"= \w+\[[\d,]+\]\S* copy\(", program.as_text())  # of arrays, not of numbers
    traffic = (program.cost_analysis() or {}).get("bytes accessed", 0.0)
    return Compiled(program.memory_analysis().temp_size_in_bytes, traffic, len(copied))


def main(options: Options) -> None:
    """Print a table."""
    print(
        "| chip | base | temporaries, MiB: by hand | by adapt | traffic, GiB: by hand | by adapt | copies | by adapt |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for chip in options.chips:
        device = described(chip)[0]
        for base in ("bfloat16", "int8"):
            cells = [chip, base]
            hand = compiled(by_hand(options.layers, int8=base == "int8"), device)
            ours = compiled(by_adapt(options.layers, int8=base == "int8"), device)
            cells += [f"{one.temporaries / 2**20:.1f}" for one in (hand, ours)]
            cells += [f"{one.traffic / 2**30:.3f}" if one.traffic else "-" for one in (hand, ours)]
            cells += [str(one.copies) for one in (hand, ours)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    without_a_tpu()
    main(tyro.cli(Options))

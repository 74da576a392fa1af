"""What an int8 base costs in the backward pass, by the compiler's word: no timing, no accelerator needed.

    python benchmarks/int8_residuals.py                  # this machine's CPU
    python benchmarks/int8_residuals.py --target tpu     # TPU v5e, ahead of time

For the TPU it needs Python 3.12 and ``pip install ".[tpu-compiler]"``.

Compiles the gradient of LoRA factors on a scanned stack of two matmuls a layer and prints the compiler's temporary
memory for three ways to use the int8 weights: plain dequantization under autodiff, which keeps a dense copy of the
whole stack for backward; a custom_vjp that keeps the integers; and `peft_jax`'s product. The ratio is to the last.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding

from peft_jax.core.layout import Layout
from peft_jax.quant import Int8

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Options:
    """Shapes of the stack, and the machine to compile for."""

    target: Literal["cpu", "tpu"] = "cpu"
    layers: int = 16
    dim: int = 2048
    hidden: int = 8192
    tokens: int = 4096
    rank: int = 16


def plain(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """Dequantize and multiply, left to autodiff."""
    return ((x @ q.astype(x.dtype)) * scale).astype(x.dtype)


@jax.custom_vjp
def keeps_integers(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """The same with a backward pass of its own, for the gradient of x alone."""
    return plain(x, q, scale)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[Any, None, None]:
    q, scale = saved
    return (g * scale).astype(g.dtype) @ q.astype(g.dtype).T, None, None


keeps_integers.defvjp(lambda x, q, scale: (plain(x, q, scale), (q, scale)), _backward)


def ours(x: jax.Array, q: jax.Array, scale: jax.Array) -> jax.Array:
    """The product of a quantized leaf."""
    return Int8(q, scale, Layout(), jnp.dtype(x.dtype)).apply(x)


def gradient(product: Product, remat: bool) -> Callable[..., Any]:
    """The gradient of the LoRA factors of the stack."""

    def layer(h: jax.Array, p: Any) -> tuple[jax.Array, None]:
        q1, s1, q2, s2, a1, b1, a2, b2 = p
        inner = jax.nn.silu(product(h, q1, s1) + (h @ a1) @ b1)
        return h + product(inner, q2, s2) + (inner @ a2) @ b2, None

    body = jax.checkpoint(layer) if remat else layer
    return jax.grad(lambda ab, base, x: jax.lax.scan(body, x, (*base, *ab))[0].astype(jnp.float32).sum())


def device(target: str) -> Any:
    """The device to compile for; a TPU is only described."""
    if target == "cpu":
        return jax.devices("cpu")[0]
    from jax.experimental import topologies  # loads libtpu

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]


def main(options: Options) -> None:
    """Print one line per product."""
    where = SingleDeviceSharding(device(options.target))

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    n, dim, hidden, rank = options.layers, options.dim, options.hidden, options.rank
    base = (
        array(n, dim, hidden, dtype=jnp.int8),
        array(n, hidden, dtype=jnp.float32),
        array(n, hidden, dim, dtype=jnp.int8),
        array(n, dim, dtype=jnp.float32),
    )
    factors = (array(n, dim, rank), array(n, rank, hidden), array(n, hidden, rank), array(n, rank, dim))
    x = array(options.tokens, dim)
    print(f"{options.target}: {n} layers of {dim} x {hidden} x 2 in int8, {2 * n * dim * hidden / 2**20:.0f} MiB")
    for remat in (False, True):
        temporaries = {}
        for product in (plain, keeps_integers, ours):
            program = jax.jit(gradient(product, remat)).lower(factors, base, x).compile()
            temporaries[product.__name__] = program.memory_analysis().temp_size_in_bytes
        for name, size in temporaries.items():
            ratio = size / temporaries["ours"]
            print(f"  remat={remat!s:5}  {name:14}  temporaries {size / 2**20:6.0f} MiB  {ratio:.2f} of ours")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # What libtpu asks for on a machine without a TPU.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    main(tyro.cli(Options))

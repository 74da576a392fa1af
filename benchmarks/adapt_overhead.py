"""What `peft_jax.adapt` costs beside the unwrapped function, LoRA written by hand, and merging inside the loss.

    python benchmarks/adapt_overhead.py --layers 24 --dim 128 --batch 4

A decoder of several layers (attention and gated MLP, LoRA on all seven matmuls), with its layers unrolled, in a scan,
and in a scan of twice the depth. All ways are timed in turn, in one run; times are medians, those of tracing and of
attaching on the clock of the process. The gradient is that of the factors, for the unwrapped function that of the
matmul weights. What attaching by ``fn=`` takes is below each table, beside the trace of the unwrapped function.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

import peft_jax as pj

SHAPES = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "gate": (1, 3), "up": (1, 3), "down": (3, 1)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The decoder.

    Attributes:
        layers: Its depth.
        dim: Features; heads have 32, the MLP three times as many.
        batch: Sequences.
        length: Tokens of a sequence.
        rank: Rank of the adapters.
        repeats: Runs of which the median is printed.
    """

    layers: int = 24
    dim: int = 128
    batch: int = 4
    length: int = 64
    rank: int = 8
    repeats: int = 7


@dataclasses.dataclass(frozen=True)
class Way:
    """One way of computing the same: a loss of what is trained, what is not, and the input."""

    name: str
    loss: Callable[[Any, Any, jax.Array], jax.Array]
    trained: Any
    rest: Any


def layer(weights: Any, x: jax.Array, linear: Callable[[jax.Array, Any], jax.Array]) -> jax.Array:
    """One layer of the decoder; ``linear(x, weight)`` is its matmul."""
    h = norm(x)
    q, k, v = (linear(h, weights[name]).reshape(*x.shape[:2], -1, 32) for name in "qkv")
    x = x + linear(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape), weights["o"])
    h = norm(x)
    return x + linear(jax.nn.silu(linear(h, weights["gate"])) * linear(h, weights["up"]), weights["down"])


def norm(x: jax.Array) -> jax.Array:
    """Root mean square normalisation."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def decoder(weights: Any, x: jax.Array, linear: Callable[[jax.Array, Any], jax.Array] = jnp.matmul) -> jax.Array:
    """All layers: those of a list one after the other, those of a dictionary of stacks in a scan."""
    if isinstance(weights, dict):
        return jax.lax.scan(lambda x, weights: (layer(weights, x, linear), None), x, weights)[0]
    for one in weights:
        x = layer(one, x, linear)
    return x


def by_hand(x: jax.Array, weight: tuple[jax.Array, ...]) -> jax.Array:
    """A matmul with LoRA, written out."""
    w, a, b, scaling = weight
    return x @ w + (x @ a) * scaling @ b


def ways(settings: Settings, scanned: bool) -> tuple[list[Way], jax.Array]:
    """The unwrapped function, LoRA by hand, `adapt` and merging, on the same numbers; and their input."""
    x = jax.random.normal(jax.random.key(0), (settings.batch, settings.length, settings.dim))
    keys = iter(jax.random.split(jax.random.key(1), len(SHAPES)))
    stacks = {
        name: jax.random.normal(next(keys), (settings.layers, m * settings.dim, n * settings.dim)) * settings.dim**-0.5
        for name, (m, n) in SHAPES.items()
    }
    base = stacks if scanned else [jax.tree.map(lambda w, i=i: w[i], stacks) for i in range(settings.layers)]
    config = pj.LoraConfig(r=settings.rank, target_modules="all-linear", init_lora_weights=False)
    params = pj.apply_lora(base, config, fn=decoder, args=(x,))
    trainable, frozen = pj.partition(params)
    leaves, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: hasattr(leaf, "params"))
    pairs = [(leaf.params["lora_A"], leaf.params["lora_B"]) for leaf in leaves]
    bases = [(leaf.base, leaf.state["scaling"]) for leaf in leaves]

    def hand(pairs: Any, bases: Any, x: jax.Array) -> jax.Array:
        joined = [(w, a, b, scaling) for (a, b), (w, scaling) in zip(pairs, bases, strict=True)]
        return total(decoder(jax.tree.unflatten(treedef, joined), x, by_hand))

    adapted = pj.adapt(decoder)
    return [
        Way("unwrapped", lambda base, _, x: total(decoder(base, x)), base, None),
        Way("by hand", hand, pairs, bases),
        Way("adapt", lambda t, f, x: total(adapted(pj.combine(t, f), x)), trainable, frozen),
        Way("merging", lambda t, f, x: total(decoder(pj.merge(pj.combine(t, f)), x)), trainable, frozen),
    ], x


def total(y: jax.Array) -> jax.Array:
    """The loss."""
    return jnp.sum(jnp.sin(y))


def programs(found: list[Way], x: jax.Array) -> dict[str, Any]:
    """The compiled loss and gradient of each way, by its name."""
    return {way.name: jax.jit(jax.value_and_grad(way.loss)).lower(way.trained, way.rest, x).compile() for way in found}


def medians(
    found: list[Way], run: Callable[[Way], Any], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Milliseconds that ``run`` takes for each way, taken in turn; the first round warms up and is left out.

    Python's garbage collector is off meanwhile, as in ``timeit``: its long runs would fall to one of them by chance.
    """
    times: list[list[float]] = [[] for _ in found]
    for _ in range(repeats + 1):
        for way, row in zip(found, times, strict=True):
            gc.collect()
            gc.disable()
            start = clock()
            jax.block_until_ready(run(way))
            row.append(1e3 * (clock() - start))
            gc.enable()
    return [statistics.median(row[1:]) for row in times]


def measure(settings: Settings, scanned: bool) -> dict[str, list[float]]:
    """What each way costs, by what is counted."""
    found, x = ways(settings, scanned)
    compiled = programs(found, x)

    def jitted(way: Way, derive: Callable[..., Any] = lambda loss: loss) -> Any:
        return jax.jit(lambda *args: derive(way.loss)(*args))  # a new function each time, which JAX has not traced yet

    def traced(derive: Callable[..., Any]) -> list[float]:
        def run(way: Way) -> None:
            jitted(way, derive).trace(way.trained, way.rest, x)

        return medians(found, run, settings.repeats, time.process_time)

    def compile_again(way: Way) -> None:
        jitted(way, jax.value_and_grad).lower(way.trained, way.rest, x).compile()

    lowered = {way.name: jitted(way, jax.value_and_grad).lower(way.trained, way.rest, x) for way in found}
    return {
        "trace forward (ms)": traced(lambda loss: loss),
        "trace gradient (ms)": traced(jax.value_and_grad),
        "the same, compiled (ms)": medians(found, compile_again, 1),
        "StableHLO lines": [lowered[way.name].as_text().count("\n") for way in found],
        "MFLOP": [compiled[way.name].cost_analysis()["flops"] / 1e6 for way in found],
        "temporaries (MiB)": [compiled[way.name].memory_analysis().temp_size_in_bytes / 2**20 for way in found],
        "step (ms)": medians(found, lambda way: compiled[way.name](way.trained, way.rest, x), settings.repeats),
    }


def attaching(settings: Settings, scanned: bool) -> tuple[float, float]:
    """Milliseconds of a trace of the unwrapped function, and of attaching adapters to its weights by it."""
    found, x = ways(settings, scanned)
    base = found[0].trained
    config = pj.LoraConfig(r=settings.rank, target_modules="all-linear")

    def trace(*_: Any) -> None:
        jax.jit(lambda base, x: decoder(base, x)).trace(base, x)

    def attach(*_: Any) -> Any:
        return pj.apply_lora(base, config, fn=decoder, args=(x,))

    actions = [Way("trace", trace, None, None), Way("attach", attach, None, None)]
    traced, attached = medians(actions, lambda way: way.loss(None, None, x), settings.repeats, time.process_time)
    return traced, attached


def main(settings: Settings) -> None:
    """Print a table for each program."""
    deeper = dataclasses.replace(settings, layers=2 * settings.layers)
    cases = [("unrolled", settings, False), ("in a scan", settings, True), ("in a scan", deeper, True)]
    for kind, one, scanned in cases:
        print(f"\n{one.layers} layers {kind}, JAX {jax.__version__} on {jax.devices()[0].device_kind}")
        names = ["unwrapped", "by hand", "adapt", "merging", "adapt/unwrapped", "adapt/by hand"]
        print(f"{'':24}" + "".join(f"{name:>16}" for name in names))
        for what, (plain, hand, ours, merging) in measure(one, scanned).items():
            row = "".join(f"{value:16,.1f}" for value in (plain, hand, ours, merging))
            print(f"{what:24}{row}{ours / plain:16.3f}{ours / hand:16.3f}")
        traced, attached = attaching(one, scanned)
        print(
            f"attaching (ms)          {attached:16,.1f}  for a trace of {traced:,.1f}, {attached / traced:.2f} times it"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))

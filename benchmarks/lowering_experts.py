"""One layer of Qwen3-30B-A3B's experts on several chips: memory by the mesh's axis for experts, and by sharding rules.

    .venv-aot/bin/python benchmarks/lowering_experts.py --chips v5e:4x4

The experts are int8. The program is their sum for 4608 tokens, 8 experts for each, and with ``--backward`` the gradient
of the tokens too. The environment is that of `make lowering`. Printed are the temporaries of a chip, and the bytes that
the compiler says are read and written: with tokens gathered by `jax.shard_map`, as the mesh in use makes it, and by
sharding rules alone.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import MIXTURES, described, on, without_a_tpu

import peft_jax as pj
from peft_jax.models.modules.mixture import Choice, Experts
from peft_jax.models.registry import read_architecture
from peft_jax.train.mesh import in_use, make_mesh

CONFIG: Any = read_architecture(MIXTURES["Qwen3-30B-A3B"])
LAYOUTS = {".*_proj": pj.Layout(stack=(0,), inp=(1,), out=(2,), index_after=(None,))}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled.

    Attributes:
        chips: A topology as `make lowering` names it.
        tokens: On all chips.
        backward: Whether the gradient is computed too.
    """

    chips: str = "v5e:4x4"
    tokens: int = 4608
    backward: bool = True


def make_experts() -> Experts:
    """The module, in bfloat16."""
    return Experts(CONFIG, jnp.bfloat16, nnx.Rngs(0), inner=CONFIG.moe_intermediate_size)


def quantized_weights() -> Any:
    """The module's tensors by name, in int8."""
    tensors = {name: getattr(make_experts(), name)[...] for name in Experts.tensor_names}
    return pj.quantize(tensors, layout=LAYOUTS)


def loss(params: Any, x: jax.Array, weights: jax.Array, experts: jax.Array) -> jax.Array:
    """The sum of the outputs, for the module with these tensors."""
    module = nnx.eval_shape(make_experts)
    for name, tensor in params.items():
        setattr(module, name, nnx.Param(tensor))
    out: jax.Array = module(x, Choice(x, weights, experts)).astype(jnp.float32).sum()
    return out


def main(options: Options) -> None:
    """Print a line for each way."""
    devices = described(options.chips)
    mesh = make_mesh({"expert": len(devices)}, devices)
    where = NamedSharding(mesh, P("expert"))
    top_k = CONFIG.num_experts_per_tok
    args = on(
        where,
        (
            jax.eval_shape(quantized_weights),
            jax.ShapeDtypeStruct((options.tokens, CONFIG.hidden_size), jnp.bfloat16),
            jax.ShapeDtypeStruct((options.tokens, top_k), jnp.bfloat16),
            jax.ShapeDtypeStruct((options.tokens, top_k), jnp.int32),
        ),
    )
    fn = pj.adapt(loss)
    step = jax.value_and_grad(fn, argnums=1) if options.backward else fn
    for name, used in (("gathered tokens", mesh), ("sharding rules", None)):
        jax.clear_caches()
        with in_use(used):
            compiled = jax.jit(step).lower(*args).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
        traffic = (compiled.cost_analysis() or {}).get("bytes accessed", 0.0) / 1e9
        print(f"{name}: {temporaries:.2f} GiB of temporaries, {traffic:.2f} GB read and written", flush=True)


if __name__ == "__main__":
    without_a_tpu()
    main(tyro.cli(Options))

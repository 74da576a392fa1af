"""The decoders of tunix, as its trainers call them: Flax NNX modules."""

import jax
import jax.numpy as jnp
from flax import nnx
from nets import Net, normal
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

IDS = jnp.array([[3, 0, 7, 2], [1, 3, 2, 10]])
SIZES = {"num_layers": 2, "vocab_size": 11, "embed_dim": 8, "hidden_dim": 16, "num_heads": 2, "head_dim": 4}
SIZES |= {"num_kv_heads": 1, "rope_theta": 10_000}
INPUTS = (IDS, jnp.tile(jnp.arange(4), (2, 1)), jnp.tril(jnp.ones((2, 4, 4), bool)))


def of_nnx(model, *inputs, call=lambda model, *inputs: model(*inputs)):
    """A module's state, and a function that puts it back."""
    graph, state = nnx.split(model)
    return Net(lambda state, *inputs: call(nnx.merge(graph, state), *inputs), state, inputs)


def lively(model):
    """The module with small random numbers in place of its weights of zeros, which would hide those behind them."""

    def filled(path, leaf):
        numbers = normal(len(jax.tree_util.keystr(path)), *leaf.shape).astype(leaf.dtype) / 4
        return leaf if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.floating) else numbers

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(filled, state))


def logits(model, ids, positions, mask):
    return model(ids, positions, None, mask)[0]


def llama(**fields):
    config = llama3.ModelConfig(**SIZES, norm_eps=1e-5, **fields)
    return of_nnx(lively(llama3.Llama3(config, rngs=nnx.Rngs(0))), *INPUTS, call=logits)


def qwen(make, config, **fields):
    config = config(**SIZES, norm_eps=1e-6, **fields)
    return of_nnx(lively(make(config, rngs=nnx.Rngs(0))), *INPUTS, call=logits)


def gemma():
    config = gemma3.ModelConfig(
        num_layers=2,
        num_embed=11,
        embed_dim=8,
        hidden_dim=16,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        sliding_window_size=2,
        param_dtype=jnp.float32,
    )
    return of_nnx(lively(gemma3.Gemma3(config, rngs=nnx.Rngs(0))), *INPUTS, call=logits)


NETS = {
    "tunix Llama 3": llama,
    "tunix Llama 3, tied and rematerialized": lambda: llama(weight_tying=True, remat_config=llama3.RematConfig.DECODER),
    "tunix Qwen 2": lambda: qwen(qwen2.Qwen2, qwen2.ModelConfig),
    "tunix Qwen 3": lambda: qwen(qwen3.Qwen3, qwen3.ModelConfig),
    "tunix Qwen 3, mixture": lambda: qwen(qwen3.Qwen3, qwen3.ModelConfig, num_experts=3, num_experts_per_tok=2),
    "tunix Gemma 3": gemma,
}

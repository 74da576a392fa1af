"""Nets of penzai: named axes, layers that share parameters by variables."""

import jax
import jax.numpy as jnp
from nets import Net
from penzai import pz
from penzai.models import simple_mlp
from penzai.models.transformer.variants import gpt_neox, llamalike_common

IDS = jnp.array([[3, 0, 7, 2], [1, 3, 2, 10]])


def of_penzai(model, call, *inputs):
    """The values of a model's parameters, and a function that binds them again."""
    unbound, variables = pz.unbind_params(model, freeze=True)

    def fn(values, *inputs):
        frozen = []
        for variable in variables:
            frozen.append(
                pz.ParameterValue(label=variable.label, value=values[variable.label], metadata=variable.metadata)
            )
        return call(pz.bind_variables(unbound, frozen), *inputs)

    return Net(fn, {variable.label: variable.value for variable in variables}, inputs)


def tokens(model, ids):
    return model(pz.nx.wrap(ids).tag("batch", "seq"), token_positions=pz.nx.arange("seq", 4)).unwrap(
        "batch", "seq", "vocabulary"
    )


def llama(tied=False, **fields):
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2,
        vocab_size=11,
        mlp_variant="swiglu",
        tie_embedder_and_logits=tied,
        **fields,
    )
    model = llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))
    return of_penzai(model, tokens, IDS)


def neox():
    config = gpt_neox.GPTNeoXTransformerConfig(
        num_attention_heads=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2,
        vocab_size=11,
        rope_subset_size=2,
        rope_wavelength=10_000,
        layernorm_epsilon=1e-5,
        activation_fn="gelu_exact",
        parameter_dtype=jnp.float32,
        activation_dtype=jnp.float32,
    )
    return of_penzai(gpt_neox.build_gpt_neox_transformer(config, jax.random.key(0)), tokens, IDS)


def mlp():
    model = simple_mlp.MLP.from_config(jax.random.key(0), [8, 12, 5])
    call = lambda model, x: model(pz.nx.wrap(x).tag("batch", "features")).unwrap("batch", "features")  # noqa: E731
    return of_penzai(model, call, jax.random.normal(jax.random.key(1), (3, 8)))


NETS = {
    "penzai MLP": mlp,
    "penzai Llama": llama,
    "penzai Llama, tied": lambda: llama(tied=True),
    "penzai Llama in a LayerStack": lambda: llama(use_layer_stack=True),
    "penzai GPT-NeoX": neox,
}

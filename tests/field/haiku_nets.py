"""Nets of dm-haiku: parameters in a dictionary of dictionaries, and a function that takes them first."""

import haiku as hk
import jax
import jax.numpy as jnp
from nets import Net, normal

X, IMAGE, IDS = normal(1, 2, 5, 8), normal(2, 2, 8, 8, 4), jnp.array([[3, 0, 7], [1, 3, 2]])


def of_haiku(net, *inputs):
    """A transformed function's parameters, and the function without its random numbers."""
    run = hk.without_apply_rng(hk.transform(net))
    return Net(run.apply, run.init(jax.random.key(0), *inputs), inputs)


def with_state(make, x, **fields):
    """The same of a net with batch statistics, in evaluation."""
    run = hk.without_apply_rng(hk.transform_with_state(lambda x, is_training: make()(x, is_training)))
    params, state = run.init(jax.random.key(0), x, True)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # the last scale of a block starts at zero
    return Net(lambda params, x: run.apply(params, state, x, False)[0], params, (x,), **fields)


def resnet():
    wide = (True, True, True, True)
    return hk.nets.ResNet((1, 1, 1, 1), 5, channels_per_group=(8, 8, 8, 8), use_projection=wide)


def mobile_net():
    return hk.nets.MobileNetV1(strides=(1, 2), channels=(8, 8), num_classes=5)


def transformer(ids, width=8, layers=2):
    """A decoder, as haiku's example has it."""
    h = hk.Embed(11, width)(ids)
    mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
    for _ in range(layers):
        a = hk.LayerNorm(-1, True, True)(h)
        attend = hk.MultiHeadAttention(2, width // 2, w_init=hk.initializers.VarianceScaling(2.0), model_size=width)
        h = h + attend(a, a, a, mask=mask)
        a = hk.LayerNorm(-1, True, True)(h)
        h = h + hk.Linear(width)(jax.nn.gelu(hk.Linear(2 * width)(a)))
    return hk.Linear(11)(h)


def decoder(**fields):
    """Its function, parameters and input in a size where products count."""
    ids = jax.random.randint(jax.random.key(1), (4, 32), 0, 11)
    run = hk.without_apply_rng(hk.transform(lambda ids: transformer(ids, **fields)))
    return run.apply, run.init(jax.random.key(0), ids), ids


def with_lora(fn, factors, scaling):
    """The function with LoRA written by hand into its linear layers; ``factors`` by the layers' names."""

    def linear(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if not isinstance(context.module, hk.Linear) or context.method_name != "__call__":
            return y
        a, b = factors[context.module.module_name]
        return y + (args[0] @ a) * scaling @ b

    def run(params, *inputs):
        with hk.intercept_methods(linear):
            return fn(params, *inputs)

    return run


def layer_stack(x):
    """Layers that ``hk.layer_stack`` scans over."""
    return hk.layer_stack(3)(lambda h: jnp.tanh(hk.Linear(8)(h)))(x)


def recurrent(x):
    return hk.dynamic_unroll(hk.LSTM(6), x, hk.LSTM(6).initial_state(x.shape[1]))[0]


NETS = {
    "haiku MLP": lambda: of_haiku(lambda x: hk.nets.MLP([12, 6])(x), X),
    "haiku transformer": lambda: of_haiku(transformer, IDS),
    "haiku layer_stack": lambda: of_haiku(layer_stack, X),
    "haiku ResNet": lambda: with_state(resnet, IMAGE),
    "haiku MobileNetV1": lambda: with_state(mobile_net, IMAGE, left_out=r"groups do not divide"),
    "haiku LSTM": lambda: of_haiku(recurrent, X),
    "haiku GRU": lambda: of_haiku(lambda x: hk.dynamic_unroll(hk.GRU(6), x, jnp.zeros((x.shape[1], 6)))[0], X),
}

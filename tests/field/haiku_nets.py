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


def with_state(make, x):
    """The same of a net with batch statistics, in evaluation."""
    run = hk.without_apply_rng(hk.transform_with_state(lambda x, is_training: make()(x, is_training)))
    params, state = run.init(jax.random.key(0), x, True)
    return Net(lambda params, x: run.apply(params, state, x, False)[0], params, (x,))


def resnet():
    wide = (True, True, True, True)
    return hk.nets.ResNet((1, 1, 1, 1), 5, channels_per_group=(4, 8, 8, 8), use_projection=wide)


def mobile_net():
    return hk.nets.MobileNetV1(strides=(1, 2), channels=(8, 8), num_classes=5)


def transformer(ids):
    """A decoder of two layers, as haiku's example has it."""
    h = hk.Embed(11, 8)(ids)
    for _ in range(2):
        norm = hk.LayerNorm(-1, True, True)
        attend = hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling(2.0), model_size=8)
        a = norm(h)
        mask = jnp.tril(jnp.ones((1, 1, ids.shape[1], ids.shape[1])))
        h = h + attend(a, a, a, mask=mask)
        h = h + hk.Linear(8)(jax.nn.gelu(hk.Linear(16)(hk.LayerNorm(-1, True, True)(h))))
    return hk.Linear(11)(h)


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
    "haiku MobileNetV1": lambda: with_state(mobile_net, IMAGE),
    "haiku LSTM": lambda: of_haiku(recurrent, X),
    "haiku GRU": lambda: of_haiku(lambda x: hk.dynamic_unroll(hk.GRU(6), x, jnp.zeros((x.shape[1], 6)))[0], X),
}

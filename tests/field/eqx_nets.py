"""Nets of Equinox and of what is built on it: diffrax, flowjax and haliax. A model is its own pytree of parameters."""

import diffrax
import equinox as eqx
import flowjax.bijections
import flowjax.distributions
import flowjax.flows
import haliax
import haliax.nn
import jax
import jax.numpy as jnp
from nets import Net, normal

X, IMAGE, ROWS = normal(1, 8), normal(2, 3, 8, 8), normal(3, 4, 3)
KEY = jax.random.key(0)


def of_equinox(model, *inputs, call=lambda model, *inputs: model(*inputs), **fields):
    """A model's arrays, and a function that puts them back into it."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Net(lambda params, *inputs: call(eqx.combine(params, static), *inputs), params, inputs, **fields)


class Neural(eqx.Module):
    """A neural differential equation, as diffrax's first example has it."""

    field: eqx.nn.MLP
    adjoint: diffrax.AbstractAdjoint = eqx.field(static=True)

    def __call__(self, times, start):
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: self.field(y)),
            diffrax.Tsit5(),
            t0=times[0],
            t1=times[-1],
            dt0=0.25,
            y0=start,
            saveat=diffrax.SaveAt(ts=times),
            stepsize_controller=diffrax.ConstantStepSize(),
            max_steps=16,
            adjoint=self.adjoint,
        )
        return solved.ys


class Controlled(eqx.Module):
    """A neural controlled differential equation: the vector field is a matrix for each state."""

    field: eqx.nn.MLP
    initial: eqx.nn.MLP
    readout: eqx.nn.Linear

    def __call__(self, times, points):
        path = diffrax.CubicInterpolation(times, diffrax.backward_hermite_coefficients(times, points))
        term = diffrax.ControlTerm(lambda t, y, _: self.field(y).reshape(6, 3), path).to_ode()
        start = self.initial(points[0])
        solved = diffrax.diffeqsolve(term, diffrax.Heun(), times[0], times[-1], 0.5, start, max_steps=16)
        return self.readout(solved.ys[-1])


def neural(adjoint, **fields):
    model = Neural(eqx.nn.MLP(3, 3, 8, 2, activation=jnp.tanh, key=KEY), adjoint)
    return of_equinox(model, jnp.linspace(0, 1, 3), ROWS[0], **fields)


def controlled():
    one, two, three = jax.random.split(KEY, 3)
    model = Controlled(
        eqx.nn.MLP(6, 18, 8, 1, final_activation=jnp.tanh, key=one),
        eqx.nn.MLP(3, 6, 8, 1, key=two),
        eqx.nn.Linear(6, 1, key=three),
    )
    return of_equinox(model, jnp.linspace(0, 1, 4), ROWS, left_out=r"2 in all.*custom_vjp_call")


def flow(make, **fields):
    """A normalizing flow's log probabilities."""
    base = flowjax.distributions.Normal(jnp.zeros(4))
    model = make(KEY, base_dist=base, **fields)
    return of_equinox(model, normal(3, 5, 4), call=lambda model, x: model.log_prob(x))


class Cnn(eqx.Module):
    """The net of Equinox's example on MNIST."""

    layers: list

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(3, 4, 3, key=one),
            eqx.nn.MaxPool2d(2, 2),
            jax.nn.relu,
            jnp.ravel,
            eqx.nn.Linear(36, 8, key=two),
            jax.nn.sigmoid,
            eqx.nn.Linear(8, 5, key=three),
            jax.nn.log_softmax,
        ]

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Rnn(eqx.Module):
    """The net of Equinox's example on spirals: a cell in a scan."""

    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __call__(self, xs):
        state, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(8), xs)
        return self.head(state)


def rnn():
    return of_equinox(Rnn(eqx.nn.GRUCell(3, 8, key=KEY), eqx.nn.Linear(8, 2, key=jax.random.key(1))), ROWS)


def attention():
    model = eqx.nn.MultiheadAttention(2, 8, use_query_bias=True, use_output_bias=True, key=KEY)
    return of_equinox(model, normal(4, 5, 8), call=lambda model, x: model(x, x, x))


def ensemble():
    """Members made and called by ``vmap``."""
    members = eqx.filter_vmap(lambda key: eqx.nn.MLP(8, 3, 6, 1, key=key))(jax.random.split(KEY, 4))
    evaluate = eqx.filter_vmap(lambda member, x: member(x), in_axes=(eqx.if_array(0), None))
    return of_equinox(members, X, call=evaluate)


Batch, Position, Embed, Heads, HeadSize, Mlp, Layers, Vocab = haliax.make_axes(
    Batch=2, Position=4, Embed=8, Heads=2, HeadSize=4, Mlp=12, Layers=3, Vocab=11
)


class HaliaxBlock(eqx.Module):
    """A block after levanter's GPT-2: named axes, a fused projection, a gated MLP."""

    qkv: haliax.nn.Linear
    out: haliax.nn.Linear
    mlp: haliax.nn.MLP

    @staticmethod
    def init(*, key):
        one, two, three = jax.random.split(key, 3)
        Three = haliax.Axis("qkv", 3)
        return HaliaxBlock(
            haliax.nn.Linear.init(In=Embed, Out=(Three, Heads, HeadSize), key=one),
            haliax.nn.Linear.init(In=(Heads, HeadSize), Out=Embed, key=two),
            haliax.nn.MLP.init(Embed, Embed, 12, 2, key=three),
        )

    def __call__(self, x):
        q, k, v = self.qkv(x).unbind("qkv")
        Key = Position.alias("key")
        k, v = k.rename({"position": "key"}), v.rename({"position": "key"})
        y = haliax.nn.attention.dot_product_attention(Key, HeadSize, q, k, v)
        x = x + self.out(y)
        return x + self.mlp(x)


class HaliaxTransformer(eqx.Module):
    """Blocks that haliax stacks and scans over."""

    embed: haliax.nn.Embedding
    blocks: haliax.nn.Stacked

    def __call__(self, ids):
        x = self.embed(haliax.named(ids, (Batch.alias("batch"), Position.alias("position"))))
        return self.embed.unembed(self.blocks.fold(x)).array


def haliax_transformer():
    embed = haliax.nn.Embedding.init(Vocab, Embed, key=KEY)
    blocks = haliax.nn.Stacked.init(Layers, HaliaxBlock)(key=jax.random.split(KEY, 3))
    return of_equinox(HaliaxTransformer(embed, blocks), jnp.array([[3, 0, 7, 2], [1, 3, 2, 10]]))


NETS = {
    "equinox MLP": lambda: of_equinox(eqx.nn.MLP(8, 3, 6, 2, key=KEY), X),
    "equinox CNN": lambda: of_equinox(Cnn(KEY), IMAGE),
    "equinox GRU in a scan": rnn,
    "equinox attention": attention,
    "equinox ensemble": ensemble,
    "diffrax neural ODE": lambda: neural(diffrax.DirectAdjoint()),
    "diffrax neural ODE, checkpoints": lambda: neural(  # a derivative of diffrax's own
        diffrax.RecursiveCheckpointAdjoint(), targets=r"field\.layers\.\d", is_merged=True
    ),
    "diffrax neural CDE": controlled,
    "flowjax coupling": lambda: flow(flowjax.flows.coupling_flow, flow_layers=2, nn_width=8),
    "haliax transformer": haliax_transformer,
}

"""Layers written anew after public repositories that are no packages: bonsai, big_vision, jax-llm-examples, openpi."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen, nnx
from nets import Net, normal

IDS = jnp.array([[3, 0, 7, 2], [1, 3, 2, 10]])
IMAGE = normal(2, 2, 8, 8, 3)


# ---- big_vision: a vision transformer in linen, its blocks in a scan, and a head with a learned query


class MlpBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        width = x.shape[-1]
        return linen.Dense(width)(linen.gelu(linen.Dense(2 * width)(x)))


class Encoder1DBlock(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic=True):
        y = linen.LayerNorm()(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, deterministic=deterministic)(y, y)
        return x + MlpBlock()(linen.LayerNorm()(x)), None


class MAPHead(linen.Module):
    @linen.compact
    def __call__(self, x):
        probe = self.param("probe", linen.initializers.xavier_uniform(), (1, 1, x.shape[-1]))
        x = linen.MultiHeadDotProductAttention(num_heads=2)(jnp.tile(probe, [len(x), 1, 1]), x)
        return (x + MlpBlock(name="mlp")(linen.LayerNorm()(x)))[:, 0]


class VisionTransformer(linen.Module):
    scan: bool = False

    @linen.compact
    def __call__(self, image):
        x = linen.Conv(8, (4, 4), strides=(4, 4), padding="VALID", name="embedding")(image)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = x + self.param("pos_embedding", linen.initializers.normal(0.3), (1, *x.shape[1:]))
        if self.scan:
            block = linen.remat(Encoder1DBlock, prevent_cse=False, static_argnums=(2,))
            layers = linen.scan(
                block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=linen.broadcast, length=2
            )
            x, _ = layers(name="encoderblock")(x, True)
        else:
            for i in range(2):
                x, _ = Encoder1DBlock(name=f"encoderblock_{i}")(x)
        return linen.Dense(5, name="head")(MAPHead()(linen.LayerNorm(name="encoder_norm")(x)))


def vision_transformer(**fields):
    module = VisionTransformer(**fields)
    return Net(module.apply, module.init(jax.random.key(0), IMAGE), (IMAGE,))


# ---- jax-llm-examples: dataclasses of arrays, einsums, a mixture of experts by ragged_dot


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["q", "k", "v", "o", "gate", "up", "down"], meta_fields=[]
)
@dataclasses.dataclass
class LlmLayer:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    o: jax.Array
    gate: jax.Array
    up: jax.Array
    down: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["layers", "embedding", "router", "lm_head"], meta_fields=[]
)
@dataclasses.dataclass
class LlmWeights:
    layers: list
    embedding: jax.Array
    router: jax.Array
    lm_head: jax.Array


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def attention(layer, x):
    q = jnp.einsum("btd,dnh->bnth", x, layer.q)
    k, v = jnp.einsum("btd,dnh->bnth", x, layer.k), jnp.einsum("btd,dnh->bnth", x, layer.v)
    q = q.reshape(len(x), 2, 2, *q.shape[2:])
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k) / 2
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    y = jnp.einsum("bkgts,bksh->bkgth", jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1), v)
    return jnp.einsum("bnth,nhd->btd", y.reshape(len(x), 4, *y.shape[3:]), layer.o)


def dense_mlp(layer, x):
    gate, up = jnp.einsum("btd,df->btf", x, layer.gate), jnp.einsum("btd,df->btf", x, layer.up)
    return jnp.einsum("btf,fd->btd", jax.nn.silu(gate) * up, layer.down)


def experts_mlp(layer, x, router):
    """Each token in two of three experts, the tokens sorted by expert."""
    flat = x.reshape(-1, x.shape[-1])
    weights, chosen = jax.lax.top_k(jax.nn.softmax(flat @ router, axis=-1), 2)
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=3)
    rows = jnp.take(flat, order // 2, axis=0)
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, layer.gate, sizes)) * jax.lax.ragged_dot(rows, layer.up, sizes)
    out = jax.lax.ragged_dot(hidden, layer.down, sizes)[jnp.argsort(order)].reshape(-1, 2, x.shape[-1])
    return jnp.einsum("tkd,tk->td", out, weights).reshape(x.shape)


def llm(experts):
    shapes = {"q": (8, 4, 4), "k": (8, 2, 4), "v": (8, 2, 4), "o": (4, 4, 8)}
    lead = (3,) if experts else ()
    shapes |= {"gate": (*lead, 8, 12), "up": (*lead, 8, 12), "down": (*lead, 12, 8)}
    layers = []
    for i in range(2):
        layers.append(
            LlmLayer(**{name: normal(8 * i + j, *shape) / 3 for j, (name, shape) in enumerate(shapes.items())})
        )
    weights = LlmWeights(layers, normal(20, 11, 8), normal(21, 8, 3), normal(22, 8, 11) / 3)

    def forward(weights, ids):
        x = weights.embedding[ids]
        for layer in weights.layers:
            x = x + attention(layer, rms_norm(x))
            h = rms_norm(x)
            x = x + (experts_mlp(layer, h, weights.router) if experts else dense_mlp(layer, h))
        return rms_norm(x) @ weights.lm_head

    return Net(forward, weights, (IDS,))


# ---- bonsai: NNX modules; openpi: Gemma's layers in a scan, of einsums over several experts


class Bottleneck(nnx.Module):
    def __init__(self, rngs):
        self.down = nnx.Conv(8, 4, (1, 1), use_bias=False, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.up = nnx.Conv(4, 8, (1, 1), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(x + self.norm(self.up(jax.nn.relu(self.conv(jax.nn.relu(self.down(x)))))))


class ResNet(nnx.Module):
    """After bonsai's ResNet: a stem, stages in an ``nnx.Sequential``, a pooled head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs)
        self.stages = nnx.Sequential(Bottleneck(rngs), Bottleneck(rngs))
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.stages(self.stem(x)).mean((1, 2)))


def resnet():
    graph, state = nnx.split(ResNet(nnx.Rngs(0)))
    return Net(lambda state, x: nnx.merge(graph, state)(x), state, (IMAGE,))


def gemma_layer(x, layer):
    h = rms_norm(x)
    q = jnp.einsum("btd,ndh->btnh", h, layer["q_einsum"]["w"])
    k, v = jnp.einsum("bsd,ckdh->cbskh", h, layer["kv_einsum"]["w"])
    scores = jnp.einsum("btnh,bsh->bnts", q, k[:, :, 0]) / 2
    y = jnp.einsum("bnts,bsh->btnh", jax.nn.softmax(scores, axis=-1), v[:, :, 0])
    x = x + jnp.einsum("btnh,nhd->btd", y, layer["attn_vec_einsum"]["w"])
    gates, h = layer["mlp"]["gating_einsum"], rms_norm(x)
    hidden = jax.nn.gelu(jnp.dot(h, gates[0])) * jnp.dot(h, gates[1])
    return x + jnp.dot(hidden, layer["mlp"]["linear"]), None


def gemma():
    layers = {
        "q_einsum": {"w": normal(0, 2, 2, 8, 4) / 3},
        "kv_einsum": {"w": normal(1, 2, 2, 1, 8, 4) / 3},
        "attn_vec_einsum": {"w": normal(2, 2, 2, 4, 8) / 3},
        "mlp": {"gating_einsum": normal(3, 2, 2, 8, 12) / 3, "linear": normal(4, 2, 12, 8) / 3},
    }
    params = {"layers": layers, "embedder": {"input_embedding": normal(5, 11, 8) / 3}}

    def forward(params, ids):
        x = params["embedder"]["input_embedding"][ids] * 8**0.5
        x, _ = jax.lax.scan(jax.checkpoint(gemma_layer), x, params["layers"])
        return x @ params["embedder"]["input_embedding"].T

    return Net(forward, params, (IDS,))


NETS = {
    "big_vision ViT": vision_transformer,
    "big_vision ViT in a scan": lambda: vision_transformer(scan=True),
    "jax-llm-examples Llama": lambda: llm(experts=False),
    "jax-llm-examples mixture": lambda: llm(experts=True),
    "bonsai ResNet": resnet,
    "openpi Gemma in a scan": gemma,
}

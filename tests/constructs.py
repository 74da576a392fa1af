"""The constructs that a JAX program may use a weight in: one row each, with its formula in NumPy."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import peft_jax as pj

STACK = pj.Layout((0,), (1,), (2,))
CHOSEN = np.array([[0, 2], [1, 0], [2, 1], [1, 1], [0, 1]])  # layers for five rows
IDS = np.array([[3, 0], [7, 7]])
GROUPS = np.array([1, 3, 1])
MESH = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@dataclasses.dataclass(frozen=True)
class Row:
    """A construct: the function of weight and input, its formula, and what is expected of it."""

    fn: Callable[..., Any]
    formula: Callable[..., Any]
    shape: tuple[int, ...] = (8, 8)
    layout: Any = None
    side_path: bool = True
    x: tuple[int, ...] = (5, 8)
    name: str = "kernel"
    tolerance: float = 1e-5


def sharded(spec, x):
    return jax.lax.with_sharding_constraint(x, NamedSharding(MESH, spec))


def scanned(w, x, **options):
    return jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), h.sum()), x, w, **options)


def scanned_np(w, x, order=1):
    sums = []
    for layer in w[::order]:
        sums.append(x.sum())
        x = np.tanh(x @ layer)
    return x, np.array(sums[::order])


def scanned_with_checkpoint(w, x):
    body = jax.checkpoint(lambda h, layer: (jnp.tanh(h @ layer), None), policy=jax.checkpoint_policies.dots_saveable)
    return jax.lax.scan(body, x, w)[0]


def repeated_np(w, x):
    for _ in range(3):
        x = np.tanh(x @ w)
    return x


def counted(w, x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ w)), (0, x))[1]


@jax.custom_jvp
def doubled(x):
    return x * 2


doubled.defjvp(lambda primals, tangents: (doubled(*primals), tangents[0] * 2))


@jax.custom_vjp
def tripled(x):
    return x * 3


tripled.defvjp(lambda x: (x * 3, None), lambda _, g: (g * 3,))


@jax.custom_vjp
def clipped_gradient(w):
    """A weight whose gradient is not that of a copy."""
    return w


clipped_gradient.defvjp(lambda w: (w, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


@jax.custom_jvp
def halved_tangent(w):
    return w


halved_tangent.defjvp(lambda primals, tangents: (halved_tangent(*primals), tangents[0] / 2))


@jax.custom_vjp
def scaled_and_moved(w, factor):
    """A weight that is passed on beside another result."""
    return factor * w.T, jnp.cos(factor)


def scaled_and_moved_back(res, g):
    w, factor = res
    return jax.vjp(lambda w, factor: (factor * w.T, jnp.cos(factor)), w, factor)[1](g)


scaled_and_moved.defvjp(lambda w, factor: (scaled_and_moved(w, factor), (w, factor)), scaled_and_moved_back)


def passed_on_beside(w, x):
    w, number = scaled_and_moved(w, jnp.sum(x))
    return x @ w + number


@jax.custom_vjp
def own_matmul(x, w):
    return x @ w


own_matmul.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


def pallas_double(x):
    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] * 2

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def conv(w, x, *, strides=None, numbers=None, groups=1, dilation=None, padding="SAME"):
    n = w.ndim - 2
    numbers = numbers or {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}[n]
    return jax.lax.conv_general_dilated(
        x,
        w,
        strides or (1,) * n,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        feature_group_count=groups,
    )


def conv_np(w, x, *, strides=None, groups=1, dilation=None):
    """A convolution (channels last, kernel (taps, in, out), padding SAME) tap by tap."""
    taps, (n_in, n_out) = w.shape[:-2], w.shape[-2:]
    strides, dilation = strides or (1,) * len(taps), dilation or (1,) * len(taps)
    size = [-(-n // s) for n, s in zip(x.shape[1:-1], strides, strict=True)]
    need = [
        max((o - 1) * s + (t - 1) * d + 1 - n, 0)
        for o, s, t, d, n in zip(size, strides, taps, dilation, x.shape[1:-1], strict=True)
    ]
    x = np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in need), (0, 0)])
    y = np.zeros((len(x), *size, n_out))
    for tap in np.ndindex(*taps):
        window = tuple(
            slice(t * d, t * d + (o - 1) * s + 1, s) for t, d, o, s in zip(tap, dilation, size, strides, strict=True)
        )
        part = x[(slice(None), *window)]
        for g in range(groups):
            out = slice(g * n_out // groups, (g + 1) * n_out // groups)
            y[..., out] += part[..., g * n_in : (g + 1) * n_in] @ w[tap][:, out]
    return y


def attention(w, x):
    q, k, v = jnp.split((x @ w).reshape(1, 5, 6, 4), 3, axis=2)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def attention_np(w, x):
    q, k, v = np.split((x @ w).reshape(5, 6, 4), 3, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) / 2
    scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)[None]


def rows_of(w, ids):
    return jax.vmap(lambda w, i: w[i])(w, ids)


def shard_mapped(w, x, *, w_spec=(), x_spec=("data",), out_spec=("data",), reduce=None, turned=False):
    def local(w, x):
        y = x @ (w.T if turned else w)
        return y if reduce is None else jax.lax.psum(y, reduce)

    return jax.shard_map(local, mesh=MESH, in_specs=(P(*w_spec), P(*x_spec)), out_specs=P(*out_spec))(w, x)


def printed(w, x):
    jax.debug.print("{}", x[0, 0])
    return x @ w


def grad_np(w, x):
    return np.cos(x @ w) @ w.T


def expanded(w):
    return jnp.broadcast_to(w, (5, *w.shape))


def chosen_in_a_scan(w, x):
    """Layers that are taken from a stack by a traced index."""

    def step(h, i):
        return jnp.tanh(h @ jax.lax.dynamic_index_in_dim(w, i, keepdims=False)), None

    return jax.lax.scan(step, x, jnp.array([2, 0, 1, 2]))[0]


def chosen_in_a_scan_np(w, x):
    return scanned_np(w[[2, 0, 1, 2]], x)[0]


def experts(w, x):
    """Each row has a matrix of its own."""
    return jnp.einsum("bi,bio->bo", x, w[jnp.argmax(x, axis=1) % 3])


def experts_np(w, x):
    return np.einsum("bi,bio->bo", x, w[np.argmax(x, axis=1) % 3])


def scan_of_groups(w, x):
    """A stack of four layers in two groups."""
    groups = w.reshape(2, 2, 8, 8)
    return jax.lax.scan(lambda h, group: (scanned(group, h)[0], None), x, groups)[0]


def every_second(w, x):
    groups = w.reshape(2, 2, 8, 8)
    return scanned(groups[:, 1], x)[0]


def layers_by_hand(w, x):
    """Layers that are taken apart and stacked again for a scan."""
    return scanned(jnp.stack([w[1] * 0.5, w[0] * 0.3]), x)[0]


def fused(w, x):
    """Heads of three projections in one matrix."""
    q, k, v = jnp.split(w, 3, axis=1)
    return x @ q + jnp.tanh(x @ k) * (x @ v)


def fused_np(w, x):
    q, k, v = np.split(w, 3, axis=1)
    return x @ q + np.tanh(x @ k) * (x @ v)


def fused_heads(w, x):
    q, k = (w.reshape(8, 2, 3, 4)[:, i].reshape(8, 12) for i in range(2))
    return (x @ q) * (x @ k)


def fused_heads_np(w, x):
    q, k = (w.reshape(8, 2, 3, 4)[:, i].reshape(8, 12) for i in range(2))
    return (x @ q) * (x @ k)


def transposed_conv(w, x):
    """A kernel backwards, as in a transposed convolution."""
    return conv(w[::-1, ::-1], x)


def mixed(w, x):
    return jax.lax.dot_general(x.astype(jnp.bfloat16), w, (((1,), (0,)), ((), ())))


def gathered(w, x):
    """Each device has a part of the weight and gathers the whole one, as in FSDP."""

    def local(w, x):
        return x @ jax.lax.all_gather(w, "data", axis=0, tiled=True)

    return jax.shard_map(local, mesh=MESH, in_specs=(P("data"), P()), out_specs=P(), check_vma=False)(w, x)


def gathered_untiled(w, x, *, spec=("data",), at=0, order=(0, 1, 2), check=False):
    def local(w, x):
        parts = jax.lax.all_gather(w, "data", axis=at, tiled=False)
        y = x @ parts.transpose(order).reshape(8, 8)
        return jax.lax.pmean(y, "data") if check else y

    return jax.shard_map(local, mesh=MESH, in_specs=(P(*spec), P()), out_specs=P(), check_vma=check)(w, x)


def passed_around(w, x):
    """Parts of a weight go from device to device, and each meets its part of the input."""

    def local(w, x):
        device, y = jax.lax.axis_index("data"), jnp.zeros((5, 8))
        for turn in range(4):
            rows = jax.lax.dynamic_slice_in_dim(x, 2 * ((device + turn) % 4), 2, axis=1)
            y = y + rows @ w
            w = jax.lax.ppermute(w, "data", [(i, (i - 1) % 4) for i in range(4)])
        return y

    return jax.shard_map(local, mesh=MESH, in_specs=(P("data"), P()), out_specs=P(), check_vma=False)(w, x)


def layers_gathered_in_a_scan(w, x):
    def local(w, x):
        def step(h, layer):
            return jnp.tanh(h @ jax.lax.all_gather(layer, "data", axis=1, tiled=True)), None

        return jax.lax.scan(step, x, w)[0]

    return jax.shard_map(local, mesh=MESH, in_specs=(P(None, None, "data"), P()), out_specs=P(), check_vma=False)(w, x)


def index_pairs(x):
    return jnp.argmax(x, axis=1) % 2, jnp.argmin(x, axis=1) % 3


def expert_of_layer(w, x):
    layers, experts = index_pairs(x)
    return jnp.einsum("bi,bio->bo", x, w[layers, experts]) + jnp.einsum("bi,bio->bo", x, w[1, experts])


def expert_of_layer_np(w, x):
    layers, experts = np.argmax(x, axis=1) % 2, np.argmin(x, axis=1) % 3
    return np.einsum("bi,bio->bo", x, w[layers, experts] + w[1, experts])


DOT, TWO = (lambda w, x: x @ w), (lambda w, x: 2 * (x @ w))
TURNED = pj.Layout((), (1,), (0,))
TAPS = {n: pj.Layout((), tuple(range(n + 1)), (n + 1,)) for n in (1, 2, 3)}

FOLLOWED = {
    "times a number": Row(lambda w, x: x @ (w * 2), lambda w, x: 2 * (x @ w)),
    "divided by a number": Row(lambda w, x: x @ (w / 2), lambda w, x: x @ w / 2),
    "times a computed number": Row(lambda w, x: x @ (jnp.sin(x[0, 0]) * w), lambda w, x: np.sin(x[0, 0]) * (x @ w)),
    "negative": Row(lambda w, x: x @ -w.T, lambda w, x: -(x @ w.T)),
    "scaled and converted": Row(
        lambda w, x: x @ (0.3 * w).astype(jnp.bfloat16).astype(jnp.float32), lambda w, x: 0.3 * (x @ w), tolerance=0.05
    ),  # bfloat16 rounds to 8 bits of mantissa
    "scaled layers in a scan": Row(
        lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ (w * 0.5)), None), x, w * 3.0)[0],
        lambda w, x: scanned_np(w * 1.5, x)[0],
        (3, 8, 8),
        STACK,
    ),
    "scaled lookup": Row(lambda w, x: (2.0 * w)[IDS], lambda w, x: 2.0 * w[IDS]),
    "scaled ragged_dot": Row(
        lambda w, x: jax.lax.ragged_dot(x, w * 2, jnp.asarray(GROUPS)),
        lambda w, x: 2 * np.stack([row @ w[g] for row, g in zip(x, np.repeat(np.arange(3), GROUPS), strict=True)]),
        (3, 8, 6),
        STACK,
    ),
    "device_put": Row(lambda w, x: x @ jax.device_put(w), lambda w, x: x @ w),
    "part of a kernel": Row(lambda w, x: x @ w[:, :4], lambda w, x: x @ w[:, :4]),
    "every third output": Row(lambda w, x: x @ w[:, 1::3], lambda w, x: x @ w[:, 1::3]),
    "one output": Row(lambda w, x: x @ w[:, 3], lambda w, x: x @ w[:, 3]),
    "part of the inputs": Row(lambda w, x: x[:, :3] @ w[2:5], lambda w, x: x[:, :3] @ w[2:5]),
    "part of both, transposed": Row(lambda w, x: x[:, :3] @ w[1:7, 4:7].T, lambda w, x: x[:, :3] @ w[1:7, 4:7].T),
    "split": Row(fused, fused_np, (8, 24)),
    "split by heads": Row(fused_heads, fused_heads_np, (8, 24)),
    "looked up, part of the features": Row(lambda w, x: w[:, 2:6][IDS], lambda w, x: w[:, 2:6][IDS]),
    "reversed": Row(lambda w, x: x @ w[::-1], lambda w, x: x @ w[::-1]),
    "reversed outputs": Row(lambda w, x: x @ w[:, ::-1], lambda w, x: x @ w[:, ::-1]),
    "padded outputs": Row(lambda w, x: x @ jnp.pad(w, ((0, 0), (1, 2))), lambda w, x: np.pad(x @ w, ((0, 0), (1, 2)))),
    "padded inputs": Row(lambda w, x: x @ jnp.pad(w[:5], ((1, 2), (0, 0))), lambda w, x: x[:, 1:6] @ w[:5]),
    "padded, cut and turned": Row(
        lambda w, x: x[:, :5] @ jnp.pad(w, ((0, 0), (2, 0)))[::-1, :5].T,
        lambda w, x: x[:, :5] @ np.pad(w, ((0, 0), (2, 0)))[::-1, :5].T,
    ),
    "conv, kernel backwards": Row(
        transposed_conv, lambda w, x: conv_np(w[::-1, ::-1], x), (3, 3, 4, 6), TAPS[2], x=(2, 5, 5, 4)
    ),
    "fused kernels": Row(lambda w, x: x @ jnp.concatenate([w, w], axis=1), lambda w, x: x @ np.hstack([w, w])),
    "fused kernels, inputs": Row(
        lambda w, x: jnp.hstack([x, 2 * x]) @ jnp.concatenate([w, -w.T]),
        lambda w, x: x @ w - 2 * x @ w.T,
    ),
    "fused kernels, moved": Row(
        lambda w, x: x @ jnp.concatenate([w, 2 * w], axis=1).reshape(8, 2, 8).transpose(0, 2, 1).reshape(8, 16),
        lambda w, x: x @ np.hstack([w, 2 * w]).reshape(8, 2, 8).transpose(0, 2, 1).reshape(8, 16),
        side_path=False,
    ),
    "fused kernels, heads": Row(
        lambda w, x: jnp.einsum("bi,iho->bho", x, jnp.concatenate([w, 2 * w], axis=1).reshape(8, 4, 4)),
        lambda w, x: (x @ np.hstack([w, 2 * w])).reshape(5, 4, 4),
    ),
    "stacked": Row(
        lambda w, x: jnp.einsum("bi,sio->sbo", x, jnp.stack([w, 2 * w])), lambda w, x: np.stack([x @ w, 2 * x @ w])
    ),
    "stacked, one for each input": Row(
        lambda w, x: jnp.einsum("sbi,sio->sbo", jnp.stack([x, 2 * x]), jnp.stack([w, w])),
        lambda w, x: np.stack([x @ w, 2 * x @ w]),
    ),
    "stacked for a scan": Row(
        layers_by_hand, lambda w, x: scanned_np(np.stack([w[1] * 0.5, w[0] * 0.3]), x)[0], (2, 8, 8), STACK
    ),
    "stacked, then one": Row(lambda w, x: x @ jnp.stack([w, w.T])[1], lambda w, x: x @ w.T),
    "experts by index": Row(experts, experts_np, (3, 8, 6), STACK),
    "one of a stack by take": Row(
        lambda w, x: x @ jnp.take(w, jnp.argmax(x[0]) % 3, axis=0),
        lambda w, x: x @ w[np.argmax(x[0]) % 3],
        (3, 8, 6),
        STACK,
    ),
    "a stack in another order": Row(
        lambda w, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w[jnp.array([2, 0, 1, 2])])[0],
        chosen_in_a_scan_np,
        (3, 8, 8),
        STACK,
    ),
    "layers by index in a scan": Row(chosen_in_a_scan, chosen_in_a_scan_np, (3, 8, 8), STACK),
    "layers by index in a loop": Row(
        lambda w, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w[i]), x),
        lambda w, x: scanned_np(w, x)[0],
        (3, 8, 8),
        STACK,
    ),
    "scan backwards": Row(
        lambda w, x: scanned(w[::-1], x)[0], lambda w, x: scanned_np(w[::-1], x)[0], (3, 8, 8), STACK
    ),
    "scan of groups": Row(scan_of_groups, lambda w, x: scanned_np(w, x)[0], (4, 8, 8), STACK),
    "every second layer": Row(every_second, lambda w, x: scanned_np(w[1::2], x)[0], (4, 8, 8), STACK),
    "mixed element types": Row(mixed, lambda w, x: x @ w, tolerance=0.05),  # bfloat16 has 8 bits of mantissa
    "shard_map, gathered": Row(gathered, lambda w, x: x @ w),
    "shard_map, gathered untiled": Row(gathered_untiled, DOT),
    "shard_map, gathered untiled, checked": Row(partial(gathered_untiled, check=True), DOT),
    "shard_map, columns gathered untiled": Row(
        partial(gathered_untiled, spec=(None, "data"), at=1, order=(0, 1, 2)),
        DOT,
    ),
    "shard_map, columns gathered in front": Row(
        partial(gathered_untiled, spec=(None, "data"), order=(1, 0, 2)),
        DOT,
    ),
    "shard_map, passed around": Row(passed_around, DOT),
    "shard_map, layers gathered in a scan": Row(
        layers_gathered_in_a_scan, lambda w, x: scanned_np(w, x)[0], (3, 8, 8), STACK
    ),
    "experts by row and place": Row(
        lambda w, x: jnp.einsum("bi,bkio->bko", x, w[CHOSEN]),
        lambda w, x: np.einsum("bi,bkio->bko", x, w[CHOSEN]),
        (3, 8, 8),
        STACK,
    ),
    "vmap over an index": Row(
        lambda w, x: jax.vmap(lambda row, i: row @ w[i])(x, jnp.asarray(CHOSEN[:, 0])),
        lambda w, x: np.einsum("bi,bio->bo", x, w[CHOSEN[:, 0]]),
        (3, 8, 8),
        STACK,
    ),
    "w[i, j]": Row(
        expert_of_layer, expert_of_layer_np, (2, 3, 8, 6), pj.Layout((0, 1), (2,), (3,), index_after=("layers", ""))
    ),
    "w[i, j], one of each": Row(
        lambda w, x: x @ w[index_pairs(x)[0][0], index_pairs(x)[1][0]],
        lambda w, x: x @ w[np.argmax(x[0]) % 2, np.argmin(x[0]) % 3],
        (2, 3, 8, 6),
        pj.Layout((0, 1), (2,), (3,), index_after=("layers", "")),
    ),
    "custom_jvp that passes it on": Row(lambda w, x: x @ doubled(w), lambda w, x: 2 * (x @ w)),
    "custom_vjp that passes it on": Row(
        lambda w, x: x @ tripled(w[::-1]).T, lambda w, x: 3 * (x @ w[::-1].T), layout=TURNED
    ),
    "custom_vjp that passes it on and more": Row(
        passed_on_beside, lambda w, x: x.sum() * (x @ w.T) + np.cos(x.sum()), layout=TURNED
    ),
    "custom_vjp that changes its gradient": Row(
        lambda w, x: x @ clipped_gradient(w), lambda w, x: x @ w, side_path=False
    ),
    "custom_jvp that changes its gradient": Row(
        lambda w, x: x @ halved_tangent(w), lambda w, x: x @ w, side_path=False
    ),
}

ROWS = {
    "x @ w": Row(DOT, DOT),
    "w @ x": Row(lambda w, x: w @ x.T, lambda w, x: w @ x.T),
    "w.T": Row(lambda w, x: x @ w.T, lambda w, x: x @ w.T),
    "transpose": Row(lambda w, x: jnp.transpose(w, (1, 0)) @ x.T, lambda w, x: w.T @ x.T),
    "weight is (out, in)": Row(lambda w, x: x @ w.T, lambda w, x: x @ w.T, (6, 8), name="weight"),
    "einsum, input first": Row(lambda w, x: jnp.einsum("bi,io->bo", x, w), DOT),
    "einsum, weight first": Row(lambda w, x: jnp.einsum("io,bi->ob", w, x), lambda w, x: (x @ w).T),
    "heads": Row(
        lambda w, x: jnp.einsum("bi,iho->bho", x, w),
        lambda w, x: np.einsum("bi,iho->bho", x, w),
        (8, 2, 6),
        pj.Layout((), (0,), (1, 2)),
    ),
    "heads in the middle": Row(
        lambda w, x: jnp.einsum("bi,hio->bho", x, w),
        lambda w, x: np.einsum("bi,hio->bho", x, w),
        (2, 8, 6),
        pj.Layout((), (1,), (0, 2)),
    ),
    "heads, contracted": Row(
        lambda w, x: jnp.einsum("bho,hoi->bi", x.reshape(5, 2, 4), w),
        lambda w, x: np.einsum("bho,hoi->bi", x.reshape(5, 2, 4), w),
        (2, 4, 6),
        pj.Layout((), (0, 1), (2,)),
    ),
    "split into heads": Row(
        lambda w, x: jnp.einsum("bi,iho->bho", x, w.reshape(8, 3, 4)),
        lambda w, x: (x @ w).reshape(5, 3, 4),
        (8, 12),
    ),
    "split, moved and joined": Row(
        lambda w, x: x @ w.reshape(8, 3, 4).transpose(0, 2, 1).reshape(8, 12),
        lambda w, x: x @ w.reshape(8, 3, 4).transpose(0, 2, 1).reshape(8, 12),
        (8, 12),
    ),
    "joined heads": Row(
        lambda w, x: x @ w.reshape(-1, 6),
        lambda w, x: x @ w.reshape(-1, 6),
        (8, 2, 3),
        pj.Layout((), (0,), (1, 2)),
    ),
    "expand and squeeze": Row(
        lambda w, x: jnp.einsum("abi,aio->bo", x[None], jnp.expand_dims(w, 0)),
        DOT,
    ),
    "broadcast": Row(
        lambda w, x: jnp.einsum("bi,bio->bo", x, expanded(w), optimize=False),
        DOT,
    ),
    "astype": Row(
        lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16),
        DOT,
        tolerance=0.05,  # bfloat16 rounds to 8 bits of mantissa, in every product and before merging
    ),
    "copy and stop_gradient": Row(lambda w, x: x @ jax.lax.stop_gradient(jnp.array(w, copy=True)), DOT),
    "w[1] of a stack": Row(lambda w, x: x @ w[1], lambda w, x: x @ w[1], (3, 8, 6), STACK),
    "w[i] of a stack, i computed": Row(
        lambda w, x: x @ w[jnp.argmax(x[0]) % 3], lambda w, x: x @ w[np.argmax(x[0]) % 3], (3, 8, 6), STACK
    ),
    "two layers of a stack": Row(
        lambda w, x: jnp.einsum("bi,lio->lbo", x, w[1:]), lambda w, x: x @ w[1:], (3, 8, 6), STACK
    ),
    "unrolled loop over a stack": Row(
        lambda w, x: jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]),
        lambda w, x: np.tanh(np.tanh(x @ w[0]) @ w[1]),
        (2, 8, 8),
        STACK,
    ),
    "batched stack": Row(lambda w, x: jnp.einsum("bi,lio->lbo", x, w), lambda w, x: x @ w, (3, 8, 6), STACK),
    "stack in the middle": Row(
        lambda w, x: jax.lax.scan(lambda h, w: (h @ w, None), x, jnp.moveaxis(w, 1, 0))[0],
        lambda w, x: x @ w[:, 0] @ w[:, 1],
        (8, 2, 8),
        pj.Layout((1,), (0,), (2,)),
    ),
    "lookup": Row(lambda w, x: jnp.take(w, IDS, axis=0), lambda w, x: w[IDS]),
    "indexing": Row(lambda w, x: w[IDS], lambda w, x: w[IDS]),
    "vmap of indexing": Row(lambda w, x: jax.vmap(lambda i: w[i])(jnp.asarray(IDS[0])), lambda w, x: w[IDS[0]]),
    "one row": Row(lambda w, x: w[jnp.argmax(x[0])], lambda w, x: w[np.argmax(x[0])]),
    "tied": Row(lambda w, x: jnp.take(w, IDS, axis=0) @ w.T, lambda w, x: w[IDS] @ w.T),
    "vmap of lookups in a stack": Row(
        lambda w, x: rows_of(w, IDS), lambda w, x: np.stack([w[i][IDS[i]] for i in range(2)]), (2, 8, 6), STACK
    ),
    "vmap of a lookup in a stack": Row(
        lambda w, x: jax.vmap(lambda w: jnp.take(w, IDS[0], axis=0))(w), lambda w, x: w[:, IDS[0]], (3, 8, 6), STACK
    ),
    "conv 1-D": Row(conv, conv_np, (3, 4, 6), TAPS[1], x=(2, 7, 4)),
    "conv 2-D": Row(conv, conv_np, (3, 3, 4, 6), TAPS[2], x=(2, 5, 5, 4)),
    "conv 3-D": Row(conv, conv_np, (2, 3, 2, 4, 6), TAPS[3], x=(1, 3, 4, 3, 4)),
    "conv, strides": Row(
        partial(conv, strides=(2, 1)), partial(conv_np, strides=(2, 1)), (3, 3, 4, 6), TAPS[2], x=(2, 5, 5, 4)
    ),
    "conv, dilation": Row(
        partial(conv, dilation=(1, 2)), partial(conv_np, dilation=(1, 2)), (3, 3, 4, 6), TAPS[2], x=(2, 6, 6, 4)
    ),
    "conv, groups": Row(partial(conv, groups=2), partial(conv_np, groups=2), (3, 3, 2, 6), TAPS[2], x=(2, 5, 5, 4)),
    "conv, channels first": Row(
        partial(conv, numbers=("NCHW", "OIHW", "NCHW")),
        lambda w, x: np.moveaxis(conv_np(w.transpose(2, 3, 1, 0), np.moveaxis(x, 1, -1)), -1, 1),
        (6, 4, 3, 3),
        pj.Layout((), (1, 2, 3), (0,)),
        x=(2, 4, 5, 5),
    ),
    "ragged_dot": Row(
        lambda w, x: jax.lax.ragged_dot(x, w, jnp.asarray(GROUPS)),
        lambda w, x: np.stack([row @ w[g] for row, g in zip(x, np.repeat(np.arange(3), GROUPS), strict=True)]),
        (3, 8, 6),
        STACK,
    ),
    "ragged_dot of a layer by number": Row(
        lambda w, x: jax.lax.ragged_dot(x, w[jnp.argmax(x[0]) // 8 + 1], jnp.asarray(GROUPS)),
        lambda w, x: np.stack([row @ w[1, g] for row, g in zip(x, np.repeat(np.arange(3), GROUPS), strict=True)]),
        (2, 3, 8, 6),
        pj.Layout((0, 1), (2,), (3,), index_after=("layers", "layers")),
    ),
    "dot_product_attention": Row(attention, attention_np, (8, 24)),
    "with_sharding_constraint on the weight": Row(lambda w, x: x @ sharded(P(None, "tensor"), w), DOT),
    "with_sharding_constraint on activations": Row(lambda w, x: sharded(P(None, "tensor"), x @ w), DOT),
    "optimization_barrier": Row(lambda w, x: jnp.matmul(*jax.lax.optimization_barrier((x, w))), DOT),
    "inner jit": Row(lambda w, x: jax.jit(lambda w: jnp.tanh(x @ w))(w), lambda w, x: np.tanh(x @ w)),
    "inner jit, donated": Row(lambda w, x: jax.jit(lambda w, y: y @ w, donate_argnums=1)(w, x * 1), DOT),
    "inner jit, out_shardings": Row(
        lambda w, x: jax.jit(lambda w: x @ w, out_shardings=NamedSharding(MESH, P(None, "tensor")))(w), DOT
    ),
    "checkpoint": Row(lambda w, x: jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x), lambda w, x: np.tanh(x @ w)),
    "scan over layers": Row(scanned, scanned_np, (3, 8, 8), STACK),
    "scan of one layer": Row(scanned, scanned_np, (1, 8, 8), STACK),
    "scan, reversed": Row(partial(scanned, reverse=True), partial(scanned_np, order=-1), (3, 8, 8), STACK),
    "scan, unrolled": Row(partial(scanned, unroll=2), scanned_np, (3, 8, 8), STACK),
    "scan, checkpoint with policy": Row(scanned_with_checkpoint, lambda w, x: scanned_np(w, x)[0], (3, 8, 8), STACK),
    "scan, closed over": Row(
        lambda w, x: jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=3)[0], repeated_np
    ),
    "scan of scans": Row(
        lambda w, x: jax.lax.scan(lambda h, w: (scanned(w, h)[0], None), x, w)[0],
        lambda w, x: scanned_np(w.reshape(4, 8, 8), x)[0],
        (2, 2, 8, 8),
        pj.Layout((0, 1), (2,), (3,), index_after=("layers", "layers")),
    ),
    "while_loop": Row(counted, repeated_np),
    "fori_loop": Row(lambda w, x: jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ w), x), repeated_np),
    "cond": Row(
        lambda w, x: jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: x @ w * 2, w),
        lambda w, x: x @ w * (1 if x.sum() > 0 else 2),
    ),
    "switch": Row(lambda w, x: jax.lax.switch(1, [lambda w: x, lambda w: x @ w * 2, lambda w: x @ w], w), TWO),
    "vmap over inputs": Row(lambda w, x: jax.vmap(lambda row: row @ w)(x), DOT),
    "vmap over a stack": Row(lambda w, x: jax.vmap(lambda w: x @ w)(w), lambda w, x: x @ w, (3, 8, 6), STACK),
    "vmap over both": Row(
        lambda w, x: jax.vmap(lambda w, row: row @ w)(w, x),
        lambda w, x: np.einsum("bi,bio->bo", x, w),
        (5, 8, 6),
        STACK,
    ),
    "custom_jvp on activations": Row(lambda w, x: jax.nn.relu(doubled(x @ w)), lambda w, x: np.maximum(2 * (x @ w), 0)),
    "custom_vjp on activations": Row(lambda w, x: tripled(x @ w), lambda w, x: 3 * (x @ w)),
    "custom_vjp on the weight": Row(lambda w, x: own_matmul(x, w), DOT, side_path=False),
    "shard_map": Row(shard_mapped, DOT, x=(24, 8)),
    "shard_map, weight split by columns": Row(
        partial(shard_mapped, w_spec=(None, "tensor"), out_spec=("data", "tensor")), DOT, x=(24, 8)
    ),
    "shard_map, weight split by rows": Row(
        partial(shard_mapped, w_spec=("tensor",), x_spec=("data", "tensor"), reduce="tensor"), DOT, x=(24, 8)
    ),
    "shard_map, transposed": Row(partial(shard_mapped, turned=True), lambda w, x: x @ w.T, (6, 8), x=(24, 8)),
    "shard_map, transposed, split": Row(
        partial(shard_mapped, turned=True, w_spec=(None, "tensor"), x_spec=("data", "tensor"), reduce="tensor"),
        lambda w, x: x @ w.T,
        (6, 8),
        x=(24, 8),
    ),
    "lookup, filled": Row(
        lambda w, x: jnp.take(w, np.array([3, 9]), axis=0, mode="fill", fill_value=1.0),
        lambda w, x: np.stack([w[3], np.ones(8)]),
        side_path=False,
    ),
    # By 16 bits, as JAX 0.10.0's compiler without fusion emitters takes this way by itself.
    "cast to 8 bits": Row(
        lambda w, x: x @ w.astype(jnp.float16).astype(jnp.float8_e4m3fn).astype(jnp.float32),
        lambda w, x: x @ w.astype(np.float16).astype(jnp.float8_e4m3fn).astype(np.float64),
        side_path=False,
    ),
    "grad inside": Row(lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x), grad_np),
    "jvp inside": Row(
        lambda w, x: jax.jvp(lambda x: jnp.sin(x @ w), (x,), (x,))[1], lambda w, x: np.cos(x @ w) * (x @ w)
    ),
    "hessian inside": Row(
        lambda w, x: jax.hessian(lambda row: jnp.sum(jnp.sin(row @ w)))(x[0]),
        lambda w, x: -w @ np.diag(np.sin(x[0] @ w)) @ w.T,
        (8, 6),
    ),
    "Pallas call on activations": Row(lambda w, x: pallas_double(x @ w), TWO),
    "debug.print": Row(printed, DOT),
    "two uses": Row(lambda w, x: x @ w @ w, lambda w, x: x @ w @ w),
    "elementwise": Row(lambda w, x: x @ jnp.tanh(w), lambda w, x: x @ np.tanh(w), side_path=False),
    **FOLLOWED,
    "weight times weight": Row(lambda w, x: x @ (w @ w), lambda w, x: x @ (w @ w), side_path=False),
    "part of the input axes": Row(
        lambda w, x: jnp.einsum("bi,iho->bho", x, w),
        lambda w, x: np.einsum("bi,iho->bho", x, w),
        (8, 2, 6),
        pj.Layout((), (0, 1), (2,)),
        side_path=False,
    ),
    "norm of the weight": Row(lambda w, x: x / jnp.linalg.norm(w), lambda w, x: x / np.linalg.norm(w), side_path=False),
    "returned": Row(lambda w, x: (w, x), lambda w, x: (w, x), side_path=False),
}

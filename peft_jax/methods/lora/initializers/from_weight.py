"""How LoRA's factors start from the base weight itself, a part of which they may take over.

PiSSA: Meng et al., 2024, https://arxiv.org/abs/2404.02948, equations 2 to 5, and its fast form by Halko et al., 2011,
algorithm 5.1; OLoRA: Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775; LoftQ: Li et al., 2023,
https://arxiv.org/abs/2310.08659, algorithm 1; orthogonal: https://datta0.github.io/posts/rethink-lora-init; MiCA:
https://arxiv.org/abs/2604.01694. Numbers
follow PEFT 0.21.2, but that LoftQ's factors stand for the same matrix whatever their scale.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import Layout
from peft_jax.core.paths import keys_from_names
from peft_jax.core.weight import Dense, Weight
from peft_jax.quant.int8 import Int8, quantize_array
from peft_jax.quant.nf4 import round_to_nf4


class Start(NamedTuple):
    """What a layer starts with: A ``(in, rank)``, B ``(rank, out)``, and its matrix, None for the one it had."""

    a: jax.Array
    b: jax.Array
    matrix: jax.Array | None = None


Starter = Callable[[jax.Array, int, float, jax.Array], Start]  # of a layer's matrix, rank, scale and key


def starter(config: Any) -> Starter | None:
    """How the factors of a config start; None if the base does not matter."""
    init = config.init_lora_weights
    if not isinstance(init, str):
        return None
    if match := re.fullmatch(r"pissa(_niter_(\d+))?", init):
        passes = None if match[2] is None else int(match[2])
        return lambda matrix, rank, scale, key: _pissa(matrix, rank, scale, key, passes)
    if init == "loftq":
        bits, rounds = config.loftq_config["loftq_bits"], config.loftq_config["loftq_iter"]
        return lambda matrix, rank, scale, key: _loftq(matrix, rank, scale, bits, rounds)
    return {"olora": _olora, "orthogonal": _orthogonal, "mica": _mica}.get(init)


def changes_base(init: bool | str) -> bool:
    """Whether a start changes the base in a way that an adapter's file does not tell."""
    return isinstance(init, str) and init.startswith(("pissa", "olora", "loftq", "corda", "lora_ga"))


def begin(
    config: Any,
    base: Weight,
    names: np.ndarray,
    hit: np.ndarray,
    key: jax.Array,
    starters: Sequence[Starter] | None = None,
) -> tuple[dict[str, jax.Array], Weight]:
    """Factors of each stacked layer, padded with zeros to the largest rank, and the base that they go on.

    ``starters`` are those of the layers, where they do not start alike.

    Raises:
        ValueError: if the base is not one that the start takes, or a rank does not suit it.
    """
    layout, dense = base.layout, _dense(config, base, str(names.flat[0]))
    starts: Sequence[Starter | None] = starters or [starter(config)] * names.size
    stack, (n_in, n_out) = names.shape, layout.sizes(base.shape)
    matrices = jnp.reshape(layout.matrix(dense), (-1, n_in, n_out))
    keys = jnp.reshape(keys_from_names(key, names), (-1,))
    width = max(config.rank(name) for name in names[hit])
    none = Start(jnp.zeros((n_in, width)), jnp.zeros((width, n_out)))
    layers = []
    for i, (name, on) in enumerate(zip(names.flat, hit.flat, strict=True)):
        if not on:
            layers.append(none)
            continue
        rank = config.rank(name)
        if rank > min(n_in, n_out) and config.init_lora_weights != "orthogonal":
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} starts at r directions of '{name}', which has "
                f"{min(n_in, n_out)}, not {rank}. Choose a smaller r."
            )
        start = starts[i]
        assert start is not None
        made = start(matrices[i].astype(jnp.float32), rank, config.scaling(name), keys[i])
        a, b = jnp.pad(made.a, ((0, 0), (0, width - rank))), jnp.pad(made.b, ((0, width - rank), (0, 0)))
        layers.append(Start(a, b, made.matrix))
    params = {
        "lora_A": jnp.reshape(jnp.stack([layer.a for layer in layers]), (*stack, n_in, width)),
        "lora_B": jnp.reshape(jnp.stack([layer.b for layer in layers]), (*stack, width, n_out)),
    }
    if all(layer.matrix is None for layer in layers):
        return params, base
    left = [
        old if one.matrix is None else one.matrix.astype(dense.dtype) for old, one in zip(matrices, layers, strict=True)
    ]
    rest = layout.unmatrix(jnp.reshape(jnp.stack(left), (*stack, n_in, n_out)), base.shape)
    return params, quantize_array(rest, layout) if isinstance(base, Int8) else Dense(rest, layout)


def _dense(config: Any, base: Weight, name: str) -> jax.Array:
    """The base's array, if the start may change it."""
    init = config.init_lora_weights
    if isinstance(base, Dense) or init == "orthogonal" or (isinstance(base, Int8) and init == "olora"):
        return base.dense()
    if isinstance(base, Int8):
        raise ValueError(
            f"init_lora_weights={init!r} starts from the float weight of '{name}', which is int8 already. Attach the "
            "adapter to the float model, and quantize it then."
        )
    raise ValueError(
        f"init_lora_weights={init!r} takes a part out of the weight of '{name}', on which an adapter is trained "
        "already. Attach this one first."
    )


def _pissa(matrix: jax.Array, rank: int, scale: float, key: jax.Array, passes: int | None) -> Start:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False) if passes is None else fast_svd(matrix, rank, passes, key)
    root = jnp.sqrt(s[:rank] / scale)
    a, b = u[:, :rank] * root[None], root[:, None] * vt[:rank]
    return Start(a, b, matrix - scale * a @ b)


def fast_svd(matrix: jax.Array, rank: int, passes: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest singular values and vectors, from a random subspace of ``rank`` that the matrix was applied to."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vt = fast_svd(matrix.T, rank, passes, key)
        return vt.T, s, u.T
    basis, _ = jnp.linalg.qr(matrix @ jax.random.normal(key, (matrix.shape[1], rank)))
    for _ in range(passes):
        basis, _ = jnp.linalg.qr(matrix.T @ basis)
        basis, _ = jnp.linalg.qr(matrix @ basis)
    u, s, vt = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vt


def _olora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Start:
    q, r = jnp.linalg.qr(matrix.T)
    a, b = r[:rank].T, q[:, :rank].T
    return Start(a, b, matrix - scale * a @ b)


def _orthogonal(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Start:
    """Random factors whose rows are orthogonal, so that their product is zero."""
    (n_in, n_out), half = matrix.shape, rank // 2
    if rank % 2:
        raise ValueError(f"init_lora_weights='orthogonal' has A and B share their rank, which is {rank}. Make r even.")
    of_q, of_a, of_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(of_q, (rank, rank)))
    a = jax.random.normal(of_a, (n_in, half)) @ q[0::2] / 10
    return Start(a, q[1::2].T @ jax.random.normal(of_b, (half, n_out)) / 10)


def _mica(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Start:
    """B at the outputs' directions with the smallest singular values, A at zero."""
    _, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return Start(jnp.zeros((len(matrix), rank)), vt[len(vt) - rank :])


def _loftq(matrix: jax.Array, rank: int, scale: float, bits: int, rounds: int) -> Start:
    """A grid's nearest matrix to what the factors leave, and the factors nearest to what the grid leaves, in turns."""
    left = matrix
    for _ in range(rounds):
        grid = round_to_nf4(left.T).T if bits == 4 else quantize_array(left, Layout()).dense()
        u, s, vt = jnp.linalg.svd(matrix - grid, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a, b = u[:, :rank] * root[None], root[:, None] * vt[:rank]
        left = matrix - a @ b
    return Start(a / scale**0.5, b / scale**0.5, grid)

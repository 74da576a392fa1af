"""LoRA's initializers that look at the base weight, and may take a part out of it.

PiSSA: Meng et al., 2024, https://arxiv.org/abs/2404.02948, equations 2 to 5, and its fast form by Halko et al., 2011,
algorithm 5.1; OLoRA: Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775; LoftQ: Li et al., 2023,
https://arxiv.org/abs/2310.08659, algorithm 1; orthogonal: https://datta0.github.io/posts/rethink-lora-init; MiCA:
https://arxiv.org/abs/2604.01694. Numbers follow PEFT 0.21.2, except that LoftQ's factors give the same matrix whatever
their scale.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from peft_jax.core.layout import Layout
from peft_jax.methods.lora.initializers.base import Factors, Initialize
from peft_jax.quant.kinds import Quantizer


def pissa(config: Any) -> Initialize:
    """PiSSA, by the exact decomposition, or with ``"pissa_niter_N"`` by N passes of the fast one."""
    _, _, passes = config.init_lora_weights.partition("_niter_")
    return partial(_pissa, passes=int(passes) if passes else None)


def loftq(config: Any) -> Initialize:
    """LoftQ with the config's options."""
    options = config.loftq_config
    return partial(_loftq, bits=options["loftq_bits"], rounds=options["loftq_iter"])


def _pissa(matrix: jax.Array, rank: int, scale: float, key: jax.Array, passes: int | None) -> Factors:
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False) if passes is None else fast_svd(matrix, rank, passes, key)
    root = jnp.sqrt(s[:rank] / scale)
    a, b = u[:, :rank] * root[None], root[:, None] * vt[:rank]
    return Factors(a, b, matrix - scale * a @ b)


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


def olora(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """OLoRA: columns of the weight's QR decomposition."""
    q, r = jnp.linalg.qr(matrix.T)
    a, b = r[:rank].T, q[:, :rank].T
    return Factors(a, b, matrix - scale * a @ b)


def orthogonal(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """Random factors whose rows are orthogonal, so that their product is zero."""
    (n_in, n_out), half = matrix.shape, rank // 2
    if rank % 2:
        raise ValueError(f"init_lora_weights='orthogonal' has A and B share their rank, which is {rank}. Make r even.")
    of_q, of_a, of_b = jax.random.split(key, 3)
    q, _ = jnp.linalg.qr(jax.random.normal(of_q, (rank, rank)))
    a = jax.random.normal(of_a, (n_in, half)) @ q[0::2] / 10
    return Factors(a, q[1::2].T @ jax.random.normal(of_b, (half, n_out)) / 10)


def mica(matrix: jax.Array, rank: int, scale: float, key: jax.Array) -> Factors:
    """B at the outputs' directions with the smallest singular values, A at zero."""
    _, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return Factors(jnp.zeros((len(matrix), rank)), vt[len(vt) - rank :])


def _loftq(matrix: jax.Array, rank: int, scale: float, key: jax.Array, bits: int, rounds: int) -> Factors:
    """A grid's nearest matrix to what the factors leave, and the factors nearest to what the grid leaves, in turns."""
    left, quantizer = matrix, Quantizer("nf4" if bits == 4 else "int8")
    for _ in range(rounds):
        grid = quantizer(left, Layout()).dense()
        a, b = of_difference(matrix - grid, rank, 1.0)
        left = matrix - a @ b
    return Factors(a / scale**0.5, b / scale**0.5, grid)


def of_difference(lost: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The factors whose product, times the adapter's scale, is nearest to a matrix; LoftQ's of what rounding lost."""
    u, s, vt = jnp.linalg.svd(lost, full_matrices=False)
    root = jnp.sqrt(s[:rank])
    a, b = u[:, :rank] * root[None], root[:, None] * vt[:rank]
    return a / scale**0.5, b / scale**0.5

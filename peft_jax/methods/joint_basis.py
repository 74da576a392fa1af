"""The basis that layers of one kind share in FRoD, and the places of its sparse matrix, which PyTorch draws."""

import functools

import numpy as np
from jaxtyping import Float, Int

from peft_jax.methods.torch_draws import seeded


def category_of(module: str) -> str:
    """The kind of a module, by PEFT's rule on its path.

    Example:
        >>> category_of("model.layers.3.self_attn.q_proj"), category_of("encoder.layer.0.attention.output.dense")
        ('self_attn_q_proj', 'attention_output')
    """
    *parents, last = module.split(".")
    if not parents or parents[-1].isdigit():
        return last
    kind = f"{parents[-1]}_{last}"
    return "attention_output" if kind == "output_dense" and parents[-2:-1] == ["attention"] else kind


def layer_of(module: str, otherwise: int) -> int:
    """The number of a module's layer: the one behind ``layers``, or the first one in its path.

    Example:
        >>> layer_of("model.layers.3.experts.5.up", 0), layer_of("h.2.c_fc", 0), layer_of("classifier.dense", 7)
        (3, 2, 7)
    """
    parts = module.split(".")
    behind = parts[parts.index("layers") + 1 :] if "layers" in parts else []
    for part in [*behind[:1], *parts]:
        if part.isdigit():
            return int(part)
    return otherwise


def joint_basis(matrices: list[Float[np.ndarray, "out in"]], alpha: float) -> Float[np.ndarray, "in in"]:
    """The basis V of a hierarchical joint decomposition, in which each matrix is ``U diag(l) V'``.

    With the stacked matrices ``Q R`` it is ``R' E``, where E are the eigenvectors of the mean inverse of
    ``Q_i' Q_i + alpha``. Fewer rows than columns have the right singular vectors.
    """
    stacked = np.concatenate(matrices).astype(np.float64)
    rows, columns = stacked.shape
    if rows < columns:
        return np.linalg.svd(stacked, full_matrices=True)[2].T.astype(np.float32)
    q, r = np.linalg.qr(stacked)
    mean = np.zeros((columns, columns))
    start = 0
    for matrix in matrices:
        own = q[start : start + len(matrix)]
        start += len(matrix)
        mean += np.linalg.inv(own.T @ own + alpha * np.eye(columns)) / len(matrices)
    return (r.T @ np.linalg.eigh(mean)[1]).astype(np.float32)


def count_of_places(n_in: int, share: float) -> int:
    """The number of elements beside the diagonal that are trained, at least one if the share is above zero."""
    others = n_in * n_in - n_in
    count = min(int(n_in * n_in * share), others)
    return max(1, count) if share > 0 and others else count


@functools.lru_cache(maxsize=8)
def places(seed: int, sizes: tuple[int, ...], share: float) -> tuple[Int[np.ndarray, "2 places"], ...]:
    """Row and column of these elements for each category, in the order in which PEFT draws them: that of their names.

    Args:
        seed: Of PyTorch's generator.
        sizes: Inputs of each category.
        share: The share of elements that are trained.
    """
    generator = seeded(seed)
    found = []
    for n_in in sizes:
        count, others = count_of_places(n_in, share), n_in * n_in - n_in
        bits = (
            generator.randint(0, 2**32, size=max(others - 1, 0), dtype=np.uint32) if count else np.zeros(0, np.uint32)
        )
        chosen = _first_of_permutation(bits, others, count)
        row, column = np.divmod(chosen, max(n_in - 1, 1))
        found.append(np.stack([row, column + (column >= row)]).astype(np.int32))
    return tuple(found)


def _first_of_permutation(bits: np.ndarray, size: int, count: int) -> np.ndarray:
    """The first numbers of a shuffle by exchanges from the front."""
    moved: dict[int, int] = {}
    drawn = []
    for step in range(count):
        other = step + int(bits[step]) % (size - step) if step < size - 1 else step
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(step, step)
    return np.array(drawn, np.int64)


def left_factor(
    weight: Float[np.ndarray, "out in"], basis: Float[np.ndarray, "in in"]
) -> tuple[Float[np.ndarray, "out in"], Float[np.ndarray, " in"]]:
    """``U`` with columns of length 1, and ``l``, such that the weight is ``U diag(l) V'``."""
    wide, v = weight.astype(np.float64), basis.astype(np.float64)
    try:
        scaled = np.linalg.solve(v, wide.T).T
    except np.linalg.LinAlgError:
        scaled = wide @ np.linalg.pinv(v, rcond=1e-6).T
    lengths = np.linalg.norm(scaled, axis=0)
    is_there = lengths > 1e-12
    return np.where(is_there, scaled / np.where(is_there, lengths, 1), 0).astype(np.float32), lengths.astype(np.float32)

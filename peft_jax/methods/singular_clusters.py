"""Clusters of a matrix's outputs by its left singular vectors, as PyTorch and scikit-learn find them for AdaMSS."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from peft_jax.methods.on_host import on_host
from peft_jax.methods.torch_draws import normal, seeded

SEED, ITERATIONS, TOLERANCE = 123456789, 10, 1e-4  # PEFT's for k-means, and scikit-learn's default
POWERS = 2  # of torch.svd_lowrank


class Clusters(NamedTuple):
    """The clusters of layers, stacked axes first; outputs are sorted by their clusters.

    Attributes:
        right: The right singular vectors, padded.
        first: Of each cluster the directions of its largest singular values among these, padded.
        ranks: Number of them.
        lengths: Number of outputs in each cluster.
        cluster: The cluster of each sorted output.
        place: Where each output is among the sorted ones.
    """

    right: Float[Array, "*stack width columns"]
    first: Float[Array, "*stack subspaces rank width"]
    ranks: Int[Array, "*stack subspaces"]
    lengths: Int[Array, "*stack subspaces"]
    cluster: Int[Array, "*stack out"]
    place: Int[Array, "*stack out"]

    @property
    def second_shape(self) -> tuple[int, ...]:
        """Shape of an array with a row for each output and a column for each rank."""
        return (*self.cluster.shape, self.first.shape[-2])


def first_of(size: int, counts: Int[Array, "*groups"]) -> Bool[Array, "*groups size"]:
    """True at the first places of ``size``, as many as the counts say.

    Example:
        >>> first_of(3, jnp.array([1, 2])).tolist()
        [[True, False, False], [True, True, False]]
    """
    return jax.lax.broadcasted_iota(jnp.int32, (*counts.shape, size), counts.ndim) < counts[..., None]


def clusters_of(
    matrix: Float[Array, "*stack in out"],
    bias: Float[Array, "*stack out"] | None,
    adapted: np.ndarray,
    r: int,
    sizes: tuple[int, int, int],
    threshold: float | None,
    seed: int,
) -> Clusters:
    """The clusters of each layer, computed on the host; zeros where it is not adapted.

    Args:
        matrix: The matrices.
        bias: Their biases, if they have some.
        adapted: Which layers are asked for.
        r: Number of singular vectors that is asked for.
        sizes: That with which they are padded, the number of clusters, and the largest rank of one.
        threshold: Share of a cluster's largest singular value, squared, above which others count for its rank.
        seed: That of the random matrix.
    """
    *stack, n_in, n_out = matrix.shape
    width, subspaces, rank = sizes
    floats = ((width, n_in + 1), (subspaces, rank, width))
    integers = ((subspaces,), (subspaces,), (n_out,), (n_out,))
    declared: list[Any] = [jax.ShapeDtypeStruct((*stack, *shape), jnp.float32) for shape in floats]
    declared += [jax.ShapeDtypeStruct((*stack, *shape), jnp.int32) for shape in integers]
    shapes = Clusters(*declared)

    def found_in(matrix: np.ndarray, *biases: np.ndarray) -> Clusters:
        found: list[Any] = [np.zeros(one.shape, one.dtype) for one in shapes]
        for index in zip(*np.nonzero(adapted), strict=True) if adapted.ndim else [()]:
            whole = matrix[index].T
            if biases:
                whole = np.concatenate([whole, biases[0][index][:, None]], axis=1)
            for array, own in zip(found, _of_layer(whole, r, subspaces, rank, threshold, seed), strict=True):
                array[index][tuple(map(slice, own.shape))] = own
        return Clusters(*found)

    arrays = (matrix,) if bias is None else (matrix, bias.astype(jnp.float32))
    found: Clusters = on_host(found_in, shapes, *arrays)
    return found


def _of_layer(
    weight: Float[np.ndarray, "out in"], r: int, subspaces: int, rank: int, threshold: float | None, seed: int
) -> tuple[np.ndarray, ...]:
    """The arrays of one layer, not padded."""
    left, right = low_rank_svd(weight, min(r, *weight.shape), seed)
    labels = k_means(left, subspaces)
    order = np.argsort(labels, kind="stable")
    first = np.zeros((subspaces, rank, len(right)), np.float32)
    lengths = np.bincount(labels, minlength=subspaces)
    ranks = np.minimum(lengths, rank)
    for number in range(subspaces):
        _, values, directions = np.linalg.svd(left[labels == number].astype(np.float64), full_matrices=False)
        if threshold is not None:  # PEFT's values are those of the Gram matrix, the squares of these
            ranks[number] = max(1, min(ranks[number], int((values**2 > threshold * values[0] ** 2).sum())))
        own = directions[: ranks[number]]
        first[number, : len(own)] = own
    return right, first, ranks, lengths, labels[order], np.argsort(order)


def low_rank_svd(
    weight: Float[np.ndarray, "out in"], q: int, seed: int
) -> tuple[Float[np.ndarray, "out rank"], Float[np.ndarray, "rank in"]]:
    """The singular vectors of ``torch.svd_lowrank``, but for their signs: of the weight in a random subspace.

    They are computed in float64, and so are clusters, so that those are the same wherever an adapter is read.

    Halko et al., 2009, https://arxiv.org/abs/0909.4061, algorithms 4.4 and 5.1.
    """
    wide = weight.astype(np.float64)
    is_flat = wide.shape[0] < wide.shape[1]
    tall = wide.T if is_flat else wide
    random = normal(seeded(seed), tall.shape[1] * q).reshape(tall.shape[1], q)
    basis, _ = np.linalg.qr(tall @ random)
    for _ in range(POWERS):
        basis, _ = np.linalg.qr(tall.T @ basis)
        basis, _ = np.linalg.qr(tall @ basis)
    inner, _, right = np.linalg.svd(basis.T @ tall, full_matrices=False)
    left = basis @ inner
    if is_flat:
        left, right = right.T, left.T
    return left, right.astype(np.float32)


def k_means(rows: Float[np.ndarray, "rows features"], clusters: int) -> Int[np.ndarray, " rows"]:
    """The labels of scikit-learn's k-means from PEFT's seed: Lloyd's iterations from random rows.

    Example:
        >>> k_means(np.array([[0.0], [5.0], [0.1], [5.1]], np.float32), 2).tolist()
        [0, 1, 0, 1]
    """
    rows = rows.astype(np.float64)
    tolerance = np.mean(np.var(rows, axis=0)) * TOLERANCE
    rows = rows - rows.mean(axis=0)
    weights = np.ones(len(rows), np.float32)
    chosen = np.random.RandomState(SEED).choice(len(rows), clusters, replace=False, p=weights / weights.sum())
    centers, before = rows[chosen], np.full(len(rows), -1)
    for _ in range(ITERATIONS):
        labels = _nearest(rows, centers)
        moved = _means(rows, centers, labels)
        shift = float((np.linalg.norm(moved - centers, axis=1) ** 2).sum())
        centers = moved
        if np.array_equal(labels, before):
            return labels
        if shift <= tolerance:
            break
        before = labels
    return _nearest(rows, centers)


def _nearest(rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The number of the center that is nearest to each row."""
    return np.argmin((centers**2).sum(axis=1) - 2 * rows @ centers.T, axis=1)


def _means(rows: np.ndarray, centers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The means of clusters; an empty one gets the row that is farthest from its center, which its cluster loses."""
    counts = np.bincount(labels, minlength=len(centers))
    sums = np.zeros_like(centers)
    np.add.at(sums, labels, rows)
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        distances = ((rows - centers[labels]) ** 2).sum(axis=1)
        farthest = np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]
        for cluster, row in zip(empty, farthest, strict=True):
            sums[labels[row]] -= rows[row]
            sums[cluster] = rows[row]
            counts[cluster] = 1
            counts[labels[row]] -= 1
    return sums / np.maximum(counts, 1)[:, None]

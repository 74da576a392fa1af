"""AdaMSS: W' = W + P [B_1 A_1 V'; ...; B_K A_K V'], of clusters of outputs that each have a low-rank change.

AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning, NeurIPS 2025: the rows of the left
singular vectors of [W | b] are clustered, V are its right ones, B_i and A_i are trained for cluster i, and P puts the
outputs into their places. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.float_types import added
from peft_jax.core.paths import normal_by_names
from peft_jax.core.weight import Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_rank
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.packed_tensors import PackedTensors
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.singular_clusters import Clusters, clusters_of, first_of
from peft_jax.methods.starts_from_weight import Neighbours, StartsAmongWeights
from peft_jax.methods.subspace_schedule import SubspaceSchedule
from peft_jax.methods.target_fields import LayerFields, TargetFields

A, B, RIGHT = "adamss_A", "adamss_B", "adamss_newB"
RANKS, LENGTHS = "adamss_ranks", "adamss_lengths"  # of the clusters, as the shapes of a file's tensors say them
PLACE, CLUSTER, OWN_LENGTHS = "place", "cluster", "lengths_of_base"
CHANGE = "change"


@register("ADAMSS")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamssConfig(
    TargetFields,
    LayerFields,
    StartsAmongWeights,
    BiasRule,
    SubspaceSchedule,
    PackedTensors,
    FrozenArrays,
    FactoredChange,
):
    """Trains a change of low rank for each cluster of outputs, and of their bias; fields and defaults are PEFT's.

    The clusters are those that scikit-learn's k-means gives PEFT. They are not in a file: they are made again of the
    base, so that a file belongs to its base's numbers. An output that is nearly as far from two clusters may be in
    the other one for PEFT, which computes them in float32: a file whose clusters have other sizes than here is an
    error. They are settled by ``r`` singular vectors, fewer than outputs; with as many all outputs are equally far
    from each other, and rounding would decide, so that this is an error here.

    With ``use_asa`` training freezes the subspaces that matter least, as `peft_jax.train` does it after each step.
    Steps count from 0, as those of PEFT's callback.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        r: Number of singular vectors, at least 1.
        num_subspaces: Number of clusters, at least 1.
        subspace_rank: Rank of a cluster's change, at least 1; that of a smaller cluster is its size.
        init_weights: ``"orthogonal"`` starts at no change; None, or False, at a small random one.
        use_asa: Whether training freezes subspaces.
        asa_target_subspaces: Number of subspaces of all layers that are trained in the end; as in PEFT, one
            subspace fewer than this stays trained.
        init_warmup: First step that counts.
        final_warmup: Step at which the number is reached.
        mask_interval: Number of steps from one choice to the next.
        asa_importance_beta: Decay of the mean importance.
        asa_uncertainty_beta: Decay of its mean deviation.
        asa_schedule_exponent: Power of the share of steps that are left.
        use_dynamic_rank: Whether a cluster's rank is the number of its large singular values, if that is smaller.
        svd_threshold: Share of the largest one above which a value is large.
        random_seed: Seed of the random matrix with which the singular vectors are found.

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.arange(48.0).reshape(8, 6) % 7}}
        >>> config = AdamssConfig(r=4, num_subspaces=2, subspace_rank=2, target_modules=["q"])
        >>> params = pj.apply_adapter(params, config)
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'adamss_A': (2, 2, 4), 'adamss_B': (6, 2)}
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        A: ("subspaces", "rank", "width"),
        B: ("rows", "rank"),
        RIGHT: ("width", "columns"),
        RANKS: ("subspaces",),
        LENGTHS: ("subspaces",),
    }

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    init_weights: str | bool | None = "orthogonal"
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is False:  # as PEFT stores it
            object.__setattr__(self, "init_weights", None)
        check_rank(self)
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"init_weights is 'orthogonal', None or False, got {self.init_weights!r}.")
        for field in ("num_subspaces", "subspace_rank"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field} is at least 1, got {value}.")
        self.check_schedule()

    @property
    def frozen(self) -> tuple[str, ...]:
        """The singular vectors and the sizes of the clusters are frozen, and a file has them."""
        return (RIGHT, RANKS, LENGTHS)

    def changes_bias(self, module: str) -> bool:
        """Every bias changes with its matrix: the last input of a cluster is that of the bias."""
        return True

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The shapes are those of a module with a bias; arrays of one without have zeros at their ends."""
        if lookup:
            raise ValueError(f"ADAMSS is not for embeddings, as '{module}' is. Target other modules.")
        width = min(self.r, n_out, n_in + 1)
        if width >= n_out:
            raise ValueError(
                f"AdamssConfig(r={self.r}) has as many singular vectors as '{module}' has outputs, {n_out}, which are "
                f"all equally far from each other then. Choose r below {n_out}."
            )
        subspaces = min(self.num_subspaces, n_out)
        return {
            A: (subspaces, self.subspace_rank, width),
            B: (n_out, self.subspace_rank),
            RIGHT: (width, n_in + 1),
            RANKS: (subspaces,),
            LENGTHS: (subspaces,),
        }

    def init_among(
        self, base: Weight, among: Neighbours, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """The arrays are made of the singular vectors of the base without other adapters."""
        found, state = self._clusters(base, among.bias, names, adapted), self.state(names, adapted)
        second = jnp.zeros(found.second_shape)
        if self.init_weights is None:
            is_trained = first_of(self.subspace_rank, jnp.take_along_axis(found.ranks, found.cluster, -1))
            second = jnp.where(is_trained, 0.01 * normal_by_names(key, names, found.second_shape), 0)
        state |= {RIGHT: found.right, RANKS: found.ranks, LENGTHS: found.lengths}
        return {A: found.first, B: second}, state | _of_base(found), base

    def state_among(self, base: Weight, among: Neighbours, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The clusters are made again of the base."""
        return _of_base(self._clusters(base, among.bias, names, adapted))

    def _clusters(self, base: Weight, bias: jax.Array | None, names: np.ndarray, adapted: np.ndarray) -> Clusters:
        matrix = base.layout.matrix(base.unadapted.dense()).astype(jnp.float32)
        *_, n_in, n_out = matrix.shape
        for name in names[adapted].flat:
            self.shapes(str(name), n_in, n_out, lookup=base.layout.lookup)
        threshold = self.svd_threshold if self.use_dynamic_rank else None
        sizes = (min(self.r, n_out, n_in + 1), min(self.num_subspaces, n_out), self.subspace_rank)
        return clusters_of(matrix, bias, adapted, self.r, sizes, threshold, self.random_seed)

    def check_frozen(self, arrays: Mapping[str, Any], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if the clusters of a file are not those of the base."""
        if not np.array_equal(arrays[LENGTHS], arrays[OWN_LENGTHS]):
            raise ValueError(
                f"The clusters of '{path}' have {np.asarray(arrays[OWN_LENGTHS]).tolist()} outputs on this base, and "
                f"{arrays[LENGTHS].tolist()} in the file. Load the adapter on the base that it was made for."
            )

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """Count the elements of both factors of all clusters of each stacked layer."""
        ranks, width = np.asarray(state[RANKS]), np.asarray(state[RIGHT]).any(-1).sum(-1)
        return np.asarray(state["hit"]) * (ranks.sum(-1) * width + (ranks * np.asarray(state[LENGTHS])).sum(-1))

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """Give ``V A'`` of all clusters, and ``B'`` in the places of the outputs."""
        first = params[A]
        *groups, subspaces, rank, width = first.shape
        right = state[RIGHT].astype(first.dtype)[..., :n_in]
        down = jnp.einsum("...wi,...kw->...ik", right, first.reshape(*groups, subspaces * rank, width))
        second = _in_places(params[B], state, subspaces)
        return down, jnp.where(state["hit"][..., None, None], jnp.swapaxes(second, -1, -2), 0)

    def for_bias(self, params: Arrays, state: Mapping[str, Any], base: Weight) -> dict[str, jax.Array]:
        """Give the change of the bias."""
        first = params[A]
        *groups, subspaces, rank, _ = first.shape
        inner = jnp.einsum("...krw,...w->...kr", first, state[RIGHT].astype(first.dtype)[..., -1])
        second = _in_places(params[B], state, subspaces)
        return {CHANGE: jnp.einsum("...ok,...k->...o", second, inner.reshape(*groups, subspaces * rank))}

    def bias_roles(self, params: Arrays) -> set[str]:
        """Give the name of the change of the bias."""
        return {CHANGE}

    def merge_bias(self, params: Arrays, state: Arrays, bias: Float[Array, " out"]) -> Float[Array, " out"]:
        """Add the change to the bias."""
        return added(bias, jnp.where(state["hit"], params[CHANGE], 0))

    def misfits(self, tensors: Mapping[str, np.ndarray], n_in: int, n_out: int) -> list[str]:
        """Tensors of clusters that are missing, or are no matrices that go together."""
        shapes, right = self.shapes("", n_in, n_out, lookup=False), tensors.get(RIGHT)
        if right is None:
            return [f"{RIGHT} is missing"]
        widest = shapes[RIGHT][0]
        if right.ndim != 2 or len(right) > widest or right.shape[1] not in (n_in, n_in + 1):
            return [f"{RIGHT} has shape {right.shape}, not {(widest, n_in)}"]
        found, outputs = [], 0
        (subspaces,) = shapes[RANKS]
        for number in range(subspaces):
            first, second = tensors.get(f"{A}.{number}"), tensors.get(f"{B}.{number}")
            if first is None:
                found.append(f"{A}.{number} is missing")
            elif first.shape[1:] != (len(right),) or len(first) > self.subspace_rank:
                wanted = min(len(first), self.subspace_rank), len(right)
                found.append(f"{A}.{number} has shape {first.shape}, not {wanted}")
            if second is None:
                found.append(f"{B}.{number} is missing")
                continue
            outputs += len(second)
            if first is not None and second.shape[1:] != first.shape[:1]:
                found.append(f"{B}.{number} has shape {second.shape}, not {(len(second), len(first))}")
        if not found and outputs != n_out:
            found.append(f"{B} has {outputs} rows in all clusters, not {n_out}")
        return found

    def packed(self, tensors: Mapping[str, np.ndarray], n_in: int, n_out: int) -> dict[str, np.ndarray]:
        """Join the tensors of the clusters of a module to one tensor for each array."""
        rest, shapes = dict(tensors), self.shapes("", n_in, n_out, lookup=False)
        ours = {role: np.zeros(shapes[role], np.float32) for role in (A, B, RIGHT)}
        right = rest.pop(RIGHT)
        ours[RIGHT][: right.shape[0], : right.shape[1]] = right
        ranks, lengths, row = [], [], 0
        (subspaces,) = shapes[RANKS]
        for number in range(subspaces):
            first, second = rest.pop(f"{A}.{number}"), rest.pop(f"{B}.{number}")
            ours[A][number, : first.shape[0], : first.shape[1]] = first
            ours[B][row : row + len(second), : second.shape[1]] = second
            row += len(second)
            ranks.append(len(first))
            lengths.append(len(second))
        return {**ours, RANKS: np.array(ranks, np.int32), LENGTHS: np.array(lengths, np.int32), **rest}

    def unpacked(self, tensors: Mapping[str, np.ndarray], *, biased: bool) -> dict[str, np.ndarray]:
        """Split the tensors of a module into those of each cluster, as PEFT has them."""
        n_in = tensors[RIGHT].shape[1] - (0 if biased else 1)
        width = min(self.r, len(tensors[B]), n_in)
        found, row = {RIGHT: tensors[RIGHT][:width, :n_in]}, 0
        for number, (rank, length) in enumerate(zip(tensors[RANKS], tensors[LENGTHS], strict=True)):
            found[f"{A}.{number}"] = tensors[A][number, :rank, :width]
            found[f"{B}.{number}"] = tensors[B][row : row + length, :rank]
            row += length
        return {suffix: np.ascontiguousarray(tensor) for suffix, tensor in found.items()}


def _of_base(found: Clusters) -> dict[str, jax.Array]:
    """The arrays of the clusters that no file has."""
    return {PLACE: found.place, CLUSTER: found.cluster, OWN_LENGTHS: found.lengths}


def _in_places(
    second: Float[Array, "*groups out rank"], state: Mapping[str, Any], subspaces: int
) -> Float[Array, "*groups out columns"]:
    """``B`` of all clusters beside each other, zero but for an output's own cluster, rows in the outputs' places."""
    is_own = jax.nn.one_hot(state[CLUSTER], subspaces, dtype=second.dtype)
    wide = is_own[..., None] * second[..., None, :]
    wide = wide.reshape(*wide.shape[:-2], -1)
    return jnp.take_along_axis(wide, state[PLACE][..., None], axis=-2)

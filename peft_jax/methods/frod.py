"""FRoD: W' = U (S + diag(l)) V', where W = U diag(l) V', V is that of all layers of a kind, and S is sparse.

FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees, AAAI 2026, https://doi.org/10.1609/aaai.v40i31.39813: a
hierarchical joint decomposition gives V and U, which are frozen, and S and l are trained. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import nested_adapters
from peft_jax.core.dropout import dropout
from peft_jax.core.paths import normal_by_names
from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError, Weight, as_leaf
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, unsupported
from peft_jax.methods.frozen_arrays import FrozenArrays, check_indices
from peft_jax.methods.joint_basis import category_of, count_of_places, joint_basis, layer_of, left_factor, places
from peft_jax.methods.on_host import on_host
from peft_jax.methods.packed_tensors import KeyOf, PackedTensors
from peft_jax.methods.starts_from_weight import Neighbours, StartsAmongWeights
from peft_jax.methods.target_fields import LayerFields, TargetFields

LENGTHS, VALUES = "frod_lambda_l", "frod_lambda_s_values"
BASIS, PLACES, SIZE = "frod_V", "frod_s_indices", "frod_s_size"
OF_KIND = (BASIS, PLACES, SIZE)
LEFT = "frod_U"
NOT_FOR_PEFT = (
    "A FROD adapter that is made here has a basis of its own. Its files are read here; PEFT would read that basis "
    "beside a U that it makes of another one. For PEFT train on from an adapter that PEFT saved, where it was made."
)


@register("FROD")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrodConfig(TargetFields, LayerFields, StartsAmongWeights, PackedTensors, FrozenArrays):
    """Trains the lengths and a few rotations between the directions of a weight; fields and defaults are PEFT's.

    V is as large as inputs by inputs. In a file it is there once for the modules of a kind, such as all ``q_proj``; in
    a tree each of their layers has it, and U beside it, which is made again of the weight and of V.

    PEFT makes V, and U of it, anew when it reads a file, and takes V of the file then without making U again. That is
    the adapter only if both V are the same. Eigenvectors have signs that libraries choose, and those of a single layer
    are free altogether. So a file of PEFT's is read here with its own V, and saved again it is what PEFT had. An
    adapter that is initialized here does not compute the same in PEFT; a warning says so.

    It goes on the modules that the fields of `TargetFields` and `LayerFields` say.

    Attributes:
        projection_prng_key: Seed of the places of S, which are those that PyTorch draws from it.
        frod_dropout: Probability of zeroing an input of the change in training, in [0, 1).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"frod_only"`` (those of adapted modules).
        init_weights: True starts at no change; False at a random one.
        sparse_rate: Share of the elements of S that are trained, in [0, 1].
        regularization_alpha: Number that keeps the inverses stable of which V is made, above 0.
        progressbar: Ignored: PEFT's progress bar.
        runtime_offload_base_weight: Of PEFT's memory; it changes no number.

    ``save_projection=False`` is refused: without V a file does not determine the adapter.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> import warnings
        >>> params = {"q": {"kernel": jnp.arange(30.0).reshape(6, 5) % 7}}
        >>> with warnings.catch_warnings(action="ignore"):
        ...     params = pj.apply_adapter(params, FrodConfig(sparse_rate=0.1, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'frod_lambda_l': (6,), 'frod_lambda_s_values': (3,)}
    """

    counts_modules: ClassVar[bool] = True
    reads_base: ClassVar[bool] = True
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        LENGTHS: ("directions",),
        VALUES: ("places",),
        BASIS: ("in", "directions"),
        PLACES: ("row_column", "places"),
        SIZE: ("row_column",),
    }

    projection_prng_key: int = 0
    save_projection: bool = unsupported(True)
    frod_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_weights: bool = True
    sparse_rate: float = 0.01
    regularization_alpha: float = 1e-3
    progressbar: bool = True
    runtime_offload_base_weight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "frod_dropout")
        if not self.save_projection:
            raise ValueError(
                "FrodConfig(save_projection=False) is not supported: eigenvectors that are computed again have other "
                "signs and digits. Save the adapter with save_projection=True."
            )
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"sparse_rate is a share, from 0 to 1, got {self.sparse_rate}.")
        if self.regularization_alpha <= 0:
            raise ValueError(f"regularization_alpha is a number above 0, got {self.regularization_alpha}.")

    @property
    def dropout_rate(self) -> float:
        """``frod_dropout``."""
        return self.frod_dropout

    @property
    def frozen(self) -> tuple[str, ...]:
        """V, and the places of S."""
        return OF_KIND

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """A length for each input, a value for each place, and the frozen arrays."""
        if lookup:
            raise ValueError(f"FROD is not for embeddings, as '{module}' is. Target other modules.")
        count = count_of_places(n_in, self.sparse_rate)
        return {LENGTHS: (n_in,), VALUES: (count,), BASIS: (n_in, n_in), PLACES: (2, count), SIZE: (2,)}

    def init_among(
        self, base: Weight, among: Neighbours, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """The arrays of the base without other adapters, with a basis of all modules of a kind."""
        if "has_warned" not in among.kept:
            among.kept["has_warned"] = True
            warnings.warn(NOT_FOR_PEFT, stacklevel=7)  # where `peft_jax.apply_adapter` is called
        n_in, stack = base.layout.sizes(base.shape)[0], adapted.shape
        count = count_of_places(n_in, self.sparse_rate)
        drawn = self._places(among.sizes)
        bases = [jnp.zeros((n_in, n_in))] * adapted.size
        chosen, sizes = np.zeros((adapted.size, 2, count), np.int32), np.zeros((adapted.size, 2), np.int32)
        for at in np.flatnonzero(adapted):
            category = category_of(str(names.flat[at]))
            bases[at], chosen[at] = self._basis(category, among), drawn[category]
            sizes[at] = n_in
        frozen = {
            BASIS: jnp.stack(bases).reshape(*stack, n_in, n_in),
            PLACES: jnp.asarray(chosen.reshape(*stack, 2, count)),
            SIZE: jnp.asarray(sizes.reshape(*stack, 2)),
        }
        state = self.state(names, adapted) | frozen
        left, lengths = _left_factors(base, frozen[BASIS], adapted)
        values = jnp.zeros((*stack, count))
        if not self.init_weights:
            first, second = jax.random.split(key)
            values = 0.1 * normal_by_names(first, names, values.shape)
            lengths = lengths + 0.1 * normal_by_names(second, names, lengths.shape)
        return {LENGTHS: lengths, VALUES: values}, state | {LEFT: left}, base

    def _basis(self, category: str, among: Neighbours) -> jax.Array:
        """V of a category, which the leaves of an adapter share."""
        found: jax.Array | None = among.kept.get(f"{BASIS}.{category}")
        if found is not None:
            return found
        modules: dict[int, str] = {}
        for number, module in enumerate(among.sizes):
            if category_of(module) == category:
                modules[layer_of(module, number)] = module  # the last of two counts
        ordered = [among.matrices[module] for _, module in sorted(modules.items())]
        n_in = ordered[0].shape[0]

        def made(*matrices: np.ndarray) -> np.ndarray:
            return joint_basis([matrix.T for matrix in matrices], self.regularization_alpha)

        found = on_host(made, jax.ShapeDtypeStruct((n_in, n_in), jnp.float32), *ordered)
        if not isinstance(found, jax.core.Tracer):  # which must not outlive its program
            among.kept[f"{BASIS}.{category}"] = found
        return found

    def _places(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """The places of S of each category."""
        widths: dict[str, set[int]] = {}
        for module, (n_in, _) in sizes.items():
            widths.setdefault(category_of(module), set()).add(n_in)
        for category, found in widths.items():
            if len(found) > 1:
                raise ValueError(
                    f"FROD has one basis for all modules of the kind '{category}', and these have {sorted(found)} "
                    "inputs. Target some of them alone."
                )
        categories = sorted(widths)
        every = tuple(min(widths[category]) for category in categories)
        return dict(zip(categories, places(self.projection_prng_key, every, self.sparse_rate), strict=True))

    def derived(self, frozen: Mapping[str, Any], base: Weight, adapted: np.ndarray) -> dict[str, jax.Array]:
        """U."""
        left, _ = _left_factors(base, frozen[BASIS], adapted)
        return {LEFT: left}

    def check_frozen(self, arrays: Mapping[str, np.ndarray], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if a place of a file is outside of S."""
        check_indices(PLACES, arrays[PLACES], n_in, path)
        sizes = np.asarray(arrays[SIZE])[np.asarray(arrays["hit"])]
        if (sizes != n_in).any():
            raise ValueError(f"{SIZE} of '{path}' is not {n_in} by {n_in}. Take an undamaged copy of the adapter.")

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The lengths and the values."""
        return np.asarray(state["hit"]) * (params[LENGTHS].shape[-1] + params[VALUES].shape[-1])

    def merge(
        self,
        params: Arrays,
        state: Arrays,
        matrix: Float[Array, "in out"],
        unadapted: Float[Array, "in out"] | None = None,
    ) -> Float[Array, "in out"]:
        """``W + V (S' + diag(l)) U' - X`` with ``unadapted`` as X, the weight without adapters; None if X is W."""
        first, middle, last = _factors(params, state)
        whole = (first @ middle) @ last
        if unadapted is not None:
            whole = matrix.astype(whole.dtype) + (whole - unadapted.astype(whole.dtype))
        return jnp.where(state["hit"], whole, matrix.astype(whole.dtype)).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """The product with the factors; on other adapters, or with dropout, ``x W`` and the change of what is given."""
        if base.layout.stack and "dropout" in state:
            raise MergeError(
                "FROD has no dropout where products are of several layers or experts at once. Write frod_dropout=0, or "
                "leave these modules out of target_modules."
            )
        if base.layout.stack:
            return super().apply(params, state, base, x, product)
        first, middle, last = _factors(params, state)
        given = x if product.looks_up else dropout(x, state)
        adapted = product.up(product.down(given, first) @ middle, last)
        y = base.apply(x, product)
        is_alone = not any(inner.active for inner in nested_adapters(as_leaf(base)).values())
        if given is x and is_alone:
            return jnp.where(state["hit"], adapted.astype(y.dtype), y)
        change = adapted.astype(y.dtype) - base.unadapted.apply(given, product)
        return product.added(y, jnp.where(state["hit"], change, 0))

    def misfits_of_file(
        self, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]], key: KeyOf
    ) -> list[str]:
        """Arrays of a kind that are missing or of another shape."""
        found: dict[str, None] = {}
        for module, (n_in, n_out) in sizes.items():
            shapes = self.shapes(module, n_in, n_out, lookup=False)
            for name in OF_KIND:
                whole = _key_of_kind(name, module)
                if whole not in tensors:
                    found[f"{whole} is missing"] = None
                elif tensors[whole].shape != shapes[name]:
                    found[f"{whole} has shape {tensors[whole].shape}, not {shapes[name]}"] = None
        return list(found)

    def packed_file(
        self, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]], key: KeyOf
    ) -> dict[str, np.ndarray]:
        """Each module's part of what a file has once for a kind."""
        found = dict(tensors)
        for module in sizes:
            for name in OF_KIND:
                whole = _key_of_kind(name, module)
                found.pop(whole, None)
                found[key(module, name)] = tensors[whole]
        return found

    def unpacked_file(
        self, tensors: Mapping[str, np.ndarray], modules: Collection[str], biased: Collection[str], key: KeyOf
    ) -> dict[str, np.ndarray]:
        """The arrays of a kind of modules, once."""
        found = dict(tensors)
        for module in modules:
            for name in OF_KIND:
                own = found.pop(key(module, name))
                whole = own if name == BASIS else own.astype(np.int64)
                found[_key_of_kind(name, module)] = whole
        return found


def _key_of_kind(name: str, module: str) -> str:
    """The key of an array that a file has once for all modules of a module's kind."""
    return f"base_model.{name}.{category_of(module)}"


def _left_factors(base: Weight, basis: jax.Array, adapted: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """``U'`` and the lengths of all layers; zeros where the adapter is not."""
    matrix = base.layout.matrix(base.unadapted.dense()).astype(jnp.float32)
    *stack, n_in, n_out = matrix.shape
    declared = (
        jax.ShapeDtypeStruct((*stack, n_in, n_out), jnp.float32),
        jax.ShapeDtypeStruct((*stack, n_in), jnp.float32),
    )

    def made(matrix: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lefts, lengths = (np.zeros(one.shape, one.dtype) for one in declared)
        for index in zip(*np.nonzero(adapted), strict=True) if adapted.ndim else [()]:
            left, lengths[index] = left_factor(matrix[index].T, basis[index])
            lefts[index] = left.T
        return lefts, lengths

    left, lengths = on_host(made, declared, matrix, jnp.asarray(basis))
    return left, lengths


def _factors(params: Arrays, state: Mapping[str, Any]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``V``, ``S' + diag(l)`` and ``U'`` of one layer."""
    lengths, values = params[LENGTHS], params[VALUES]
    rows, columns = state[PLACES]
    middle = jnp.diag(lengths).at[columns, rows].add(values)
    return state[BASIS].astype(lengths.dtype), middle, state[LEFT].astype(lengths.dtype)

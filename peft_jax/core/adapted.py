"""An adapted leaf: a base weight and one adapter on it. Several adapters are nested leaves."""

import dataclasses
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from peft_jax.core.file_names import check_folder_name
from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, FirstFactor, Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.serialized_nodes import register_node
from peft_jax.core.weight import Change, MergeError, Weight, as_leaf, as_weight, role_specs

LAYER = "layer"  # in the state of a bias: the arrays of the adapter of its layer's matrix, where both share them
ADAPTER = "adapter"  # in the state of a leaf: trained arrays that all leaves of an adapter share, and one of them has


class Rule(Protocol):
    """The computation with an adapted leaf's arrays: a method, or a role (`peft_jax.methods.roles`)."""

    @property
    def label(self) -> str:
        """Its name in tables."""

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """The probabilities of all that it drops in training, by name."""

    @property
    def side_path(self) -> bool:
        """Whether `apply` is cheaper than merging."""

    @property
    def first(self) -> str | None:
        """Role of the trained matrix that `apply` multiplies its inputs by, with ``product.down_by_role``."""

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Axes of the arrays of a file after the stacked ones, by role."""

    @property
    def carried(self) -> Collection[str]:
        """Roles of the trained arrays that leaves share.

        The first leaf has those of all leaves in ``params``, in its layer 0; those of groups of layers are in the
        layers that lead them.
        """

    @property
    def over_rows(self) -> bool:
        """Whether what it computes of a row depends on the other rows of a batch."""

    def structure(self) -> tuple[Any, ...]:
        """A key that is equal for two adapters exactly if they run in one compiled program."""

    @property
    def reads_base(self) -> bool:
        """Whether `merge` takes one argument more where there are adapters under this one: the matrix without them."""

    def stacks_on(self, inner: Any) -> bool:
        """Whether both can be active on one leaf, this rule on the weight that ``inner`` makes."""

    def for_bias(self, params: PyTree, state: PyTree, base: Weight) -> dict[str, Any]:
        """The arrays, stacked axes first, with which a layer's bias follows its matrix, of the weight ``base``."""

    def bias_roles(self, params: PyTree) -> set[str]:
        """Names of those of `for_bias`."""

    @staticmethod
    def sizes(params: PyTree, state: Any) -> np.ndarray:
        """Number of trained elements of each stacked layer."""

    def merge(self, params: PyTree, state: Any, matrix: jax.Array) -> jax.Array:
        """The adapted matrix of one layer."""

    def apply(self, params: PyTree, state: Any, base: Weight, x: jax.Array, product: Product) -> jax.Array:
        """``product.full(x, ...)`` with the adapted matrix of one layer."""


class Role(Protocol):
    """How a leaf takes part in an adapter if it is not the matrix of a target."""

    def rule(self, config: Any) -> Rule:
        """The computation with the leaf's arrays, in an adapter of a config."""


class Places(NamedTuple):
    """The modules that a leaf's stacked layers are, as numbers, and those whose arrays they use.

    Attributes:
        own: The number of each layer's module; -1 where the adapter is not.
        leaders: By role of the shared arrays, the number of the module that trains each layer's.
    """

    own: tuple[int, ...]
    leaders: tuple[tuple[str, tuple[int, ...]], ...]

    def leads(self, role: str) -> np.ndarray:
        """Which layers train their own array of a role."""
        return np.array([own == leader >= 0 for own, leader in zip(self.own, dict(self.leaders)[role], strict=True)])


@dataclasses.dataclass(frozen=True, eq=False)
class Tag:
    """The adapter that a leaf belongs to, and the leaf's role in it.

    Tags are equal if their rules compute the same from the same arrays: names and descriptive fields stay out of
    the tree's structure, so that adapters of one shape share their compiled programs.

    Attributes:
        name: The adapter's name.
        config: The adapter's config, the same for all of its leaves.
        role: The leaf's role; None for the matrix of a target.
        dtypes: The element types in which the adapter's file stored the leaf's tensors, by key, for saving again.
        places: Where each stacked layer's array is that groups of layers share.
    """

    name: str
    config: Any
    role: Any = None
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    places: Places | None = None

    def __post_init__(self) -> None:
        check_folder_name(self.name)

    @property
    def rule(self) -> Rule:
        """The computation with the leaf's arrays: the config, or the role's rule."""
        rule: Rule = self.config if self.role is None else self.role.rule(self.config)
        return rule

    def __repr__(self) -> str:
        return f"Tag({self.name!r}, {type(self.config).__name__})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tag) and self._structure() == other._structure()

    def __hash__(self) -> int:
        return hash(self._structure())

    def _structure(self) -> tuple[Any, ...]:
        return (*self.rule.structure(), self.places)


@partial(
    register_node,
    data_fields=("base", "params", "state"),
    meta_fields=("layout", "tag", "active", "trainable", "compute_dtype"),
)
@dataclasses.dataclass(frozen=True)
class Adapted(Weight):
    """A base leaf with an adapter on it.

    Attributes:
        base: The base: an array, a quantized leaf, or another adapted leaf.
        params: The adapter's trained arrays by role (``lora_A``, ...), stacked axes first.
        state: The adapter's frozen arrays (scales, ranks, dropout keys), stacked axes first.
        layout: Axes of the base.
        tag: The adapter's name and config, and the leaf's role in it.
        active: Whether the adapter takes part; if not, the leaf stands for its base.
        trainable: Whether `partition` gives ``params`` to the trainable partition while the adapter is active.
        compute_dtype: Element type of the adapter's own products; None for that of its arrays.
    """

    base: Any
    params: dict[str, jax.Array]
    state: dict[str, Any]
    layout: Layout
    tag: Tag
    active: bool = True
    trainable: bool = True
    compute_dtype: jnp.dtype | None = None

    @property
    def method(self) -> Rule:
        """The computation with the leaf's arrays."""
        return self.tag.rule

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the base."""
        return self.base.dtype

    @property
    def side_path(self) -> bool:
        """Whether a product with this leaf is cheaper than merging it."""
        return self.method.side_path if self.active else self._base.side_path

    @property
    def _base(self) -> Weight:
        return as_weight(self.base, self.layout)

    @property
    def array(self) -> jax.Array:
        """The array of the innermost base."""
        return self._base.array

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self._base.stored_shape

    def entries(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the base."""
        return self._base.entries(spec)

    def dense(self) -> jax.Array:
        """The adapter merged into the base, in the base's dtype."""
        if not self.active:
            return self._base.dense()
        if "dropout" in self.state:
            raise MergeError(
                f"Adapter '{self.tag.name}' has dropout switched on, and merging it would change what it computes. "
                "Merge a tree without pj.with_dropout, or use the weight in a matmul, where dropout applies."
            )
        self._check_stack()
        matrix = merged_matrix(self.method, self.params, self.state, self._base)
        return self.layout.unmatrix(matrix, self.shape)

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product with the adapted matrix, by the method's cheapest way."""
        if not self.active:
            return self._base.apply(x, product)
        self._check_stack()
        own = product.for_adapter(self._base.depth)
        leaf = self._in_compute_dtype()
        return self.method.apply(leaf.params, leaf.state, self._base, x, own)

    def ready(self) -> "Adapted":
        """The leaf with its arrays in the element type of its products, and so each adapter under it."""
        return dataclasses.replace(self._in_compute_dtype(), base=as_leaf(self._base.ready()))

    def _in_compute_dtype(self) -> "Adapted":
        """The leaf with the arrays that its products are of converted; a merge still has the arrays as they are.

        Methods convert their frozen floating-point arrays to the element type of the trained ones.
        """
        if self.compute_dtype is None:
            return self
        params = {role: array.astype(self.compute_dtype) for role, array in self.params.items()}
        state = dict(self.state)
        if ADAPTER in state:  # trained in another leaf
            state[ADAPTER] = {role: array.astype(self.compute_dtype) for role, array in state[ADAPTER].items()}
        return dataclasses.replace(self, params=params, state=state, compute_dtype=None)

    def _check_stack(self) -> None:
        """Raise ValueError if an adapter is active under this one whose kind does not go with it."""
        for inner in nested_adapters(self.base).values():
            if inner.active and not self.method.stacks_on(inner.method):
                raise ValueError(
                    f"Adapters '{inner.tag.name}' ({inner.method.label}) and '{self.tag.name}' ({self.method.label}) "
                    "are active on one leaf, and these do not go together: those of one method do, and LORA, LOHA, "
                    "LOKR, ADALORA and OFT in any mixture. Choose one: pj.set_adapter(params, NAME). Or make the first "
                    "one a part of the base, with pj.merge, before the second one is attached."
                )

    @property
    def depth(self) -> int:
        """Number of adapters here and in the base."""
        return 1 + self._base.depth

    @property
    def unadapted(self) -> Weight:
        """The innermost base."""
        return self._base.unadapted

    def first_factors(self) -> dict[FirstFactor, jax.Array]:
        """The method's, unless dropout changes its inputs, and the base's."""
        base, role = self._base, self.method.first
        factors = {}
        if role is not None and role in self.params and self.active and "dropout" not in self.state:
            factors[FirstFactor(base.depth, role)] = self.params[role]
        return factors | base.first_factors()

    def astype(self, dtype: jnp.dtype) -> "Adapted":
        """The leaf with its base converted; the adapter keeps its precision."""
        return dataclasses.replace(self, base=as_leaf(self._base.astype(dtype)))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Adapted":
        """The leaf with base, adapter and state changed along a stacked axis."""
        base = as_leaf(self._base.mapped(position, change, drop=drop))
        params, state = jax.tree.map(lambda array: change(array, position), (self.params, self.state))
        layout = self.layout.unstacked(position) if drop else self.layout
        return dataclasses.replace(self, base=base, params=params, state=state, layout=layout)

    def relaid(self, layout: Layout) -> "Adapted":
        """The leaf, and each one in it, with another layout."""
        return dataclasses.replace(self, base=as_leaf(self._base.relaid(layout)), layout=layout)

    def specs(self, entries: tuple[Any, ...]) -> "Adapted":
        """The adapter's axes are sharded as those of the base, its rank never."""
        roles = role_specs(self.layout, entries)

        def spec(role: str) -> PartitionSpec:
            found = list(roles["stack"])
            for axis in self.method.axes.get(role, ()):
                found += roles.get(axis, (None,))
            return PartitionSpec(*found)

        params: dict[str, Any] = {role: spec(role) for role in self.params}
        state = {role: jax.tree.map(lambda _, role=role: spec(role), value) for role, value in self.state.items()}
        base = self._base.specs(entries)
        return dataclasses.replace(self, base=base, params=params, state=state)


def merged_matrix(method: Any, params: PyTree, state: Any, base: Weight) -> jax.Array:
    """The adapted matrix, with the stacked axes of the base in front."""
    matrices = [base.layout.matrix(base.dense())]
    if method.reads_base and base.depth:
        matrices.append(base.layout.matrix(base.unadapted.dense()))
    merge = method.merge
    for _ in base.layout.stack:
        merge = jax.vmap(merge)
    return merge(params, state, *matrices)


def apply_merged(method: Any, params: PyTree, state: Any, base: Weight, x: jax.Array, product: Product) -> jax.Array:
    """``product.full(x, merged matrix)``, which backward merges again rather than keeps."""

    @jax.checkpoint
    def merged(params: PyTree, state: Any, base: Any, x: jax.Array) -> jax.Array:
        return product.full(x, merged_matrix(method, params, state, as_weight(base, layout)))

    layout = base.layout
    return merged(params, state, as_leaf(base), x)


def is_adapted(node: Any) -> bool:
    """Whether a node of a tree is an adapted leaf (for ``is_leaf``)."""
    return isinstance(node, Adapted)


def nested_adapters(leaf: Any) -> dict[str, Adapted]:
    """The adapters on one leaf by name, the outermost first; none on a leaf that is not adapted."""
    found = {}
    while is_adapted(leaf):
        found[leaf.tag.name] = leaf
        leaf = leaf.base
    return found


def changed_layers(leaf: Adapted) -> np.ndarray:
    """Which of the layers that a leaf stands for its adapter changes: booleans of the leaf's stacked shape.

    Example:
        >>> import peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((2, 2))}}, pj.LoraConfig(target_modules=["q"]))
        >>> changed_layers(params["q"]["kernel"]).tolist()
        True
    """
    return np.asarray(leaf.state["hit"] if "hit" in leaf.state else leaf.state["rank"]) > 0

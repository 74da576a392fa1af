"""Several adapters in one batch: each row is computed with one of them, or with the base alone."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from peft_jax.adapters.task_ids import TaskIds, check_tasks_of_rows, handed_over
from peft_jax.core.adapted import Adapted, Tag, is_adapted, nested_adapters
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.handle import Handle
from peft_jax.core.layout import Layout
from peft_jax.core.product import MATMUL, Lookup, Product
from peft_jax.core.selecting import picked, present, without
from peft_jax.core.weight import Change, MergeError, Weight, as_leaf, as_weight
from peft_jax.methods.lora.config import LoraConfig

T = TypeVar("T")
BASE = "__base__"  # PEFT's name for no adapter
FACTORS = {"lora_A", "lora_B"}
TOGETHER = 16  # adapters times tokens of a row, up to which all rows are multiplied with all adapters


def with_adapter_rows(params: T, names: Sequence[str], task_ids: TaskIds | None = None) -> T:
    """The tree, or handle, whose products use one adapter for each row of a batch: PEFT's ``adapter_names=``.

    A row's numbers are those of running it alone with `pj.set_adapter`. All products must have the batch as the first
    axis of their inputs, and so must what is added to a vector (a bias) or multiplied by one (a norm's scale). LoRA's
    factors are gathered by row, but where adapters and tokens of a row are few, as in decoding: there all rows are
    multiplied with all factors. With other methods each product is computed once for each adapter. It is for inference:
    the adapters are no longer trained, merged or saved. Other names in the same number, of the same adapters, compile
    nothing.

    Args:
        params: A tree or model handle with the adapters; which of them are active does not matter.
        names: The adapter of each row; ``"__base__"`` for none.
        task_ids: The task of each row, for adapters that depend on it, as in `with_task_ids`.

    Raises:
        ValueError: if there is no such adapter or task, or tasks are given and no adapter depends on them.

    Example:
        >>> import peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((4, 4))}}
        >>> for name in "ab":
        ...     config = pj.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
        ...     params = pj.apply_lora(params, config, adapter_name=name, key=jax.random.key(ord(name)))
        >>> f = pj.adapt(lambda params, x: x @ params["q"]["kernel"])
        >>> y = f(pj.with_adapter_rows(params, ["a", "__base__", "b"]), jnp.ones((3, 4)))
        >>> bool(jnp.allclose(y[2], f(pj.set_adapter(params, "b"), jnp.ones(4)), rtol=1e-5))
        True
    """
    if isinstance(params, Handle):
        return params.replace(with_adapter_rows(params.params, names, task_ids))
    if task_ids is not None:
        check_tasks_of_rows(params, names, task_ids)
        params = handed_over(params, task_ids)
    known = adapters(params)
    if missing := sorted(set(names) - {BASE, *known}):
        raise ValueError(f"No adapters are named {missing}. Found: {sorted(known)}, and '{BASE}' for none.")
    used = [name for name in known if name in names]  # in the order of the tree

    def by_row(node: Any) -> Any:
        found = nested_adapters(node)
        innermost = list(found.values())[-1].base if found else node
        places, params, states, tags = dict[str, int](), [], [], []
        for name, one in present(found, used).items():
            ready = one.ready()
            params.append(dict(ready.params))
            states.append(without(ready.state, ["dropout"]))
            tags.append(ready.tag)
            places[name] = len(tags)
        if not tags:
            return innermost
        rows = np.array([places.get(name, 0) for name in names], np.int32)
        stack = node.layout.stack_shape(node.shape)
        whole = jnp.broadcast_to(jnp.asarray(rows), (*stack, len(rows)))
        return Rows(innermost, tuple(params), tuple(states), whole, node.layout, tuple(tags))

    return jax.tree.map(by_row, params, is_leaf=is_adapted)


@partial(
    jax.tree_util.register_dataclass, data_fields=("base", "params", "states", "rows"), meta_fields=("layout", "tags")
)
@dataclasses.dataclass(frozen=True)
class Rows(Weight):
    """A base leaf, adapters that are each on it alone, and which of them each row of a batch has.

    Attributes:
        base: An array or a quantized leaf.
        params: The trained arrays of each adapter.
        states: Its frozen arrays.
        rows: ``(*stack, batch)``, counted from 1; 0 for the base.
        layout: Axes of the base.
        tags: Names and configs of the adapters.
    """

    base: Any
    params: tuple[dict[str, jax.Array], ...]
    states: tuple[dict[str, Any], ...]
    rows: jax.Array
    layout: Layout
    tags: tuple[Tag, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base."""
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Element type of the base."""
        return self.base.dtype

    @property
    def _base(self) -> Weight:
        return as_weight(self.base, self.layout)

    @property
    def array(self) -> jax.Array:
        """That of the base."""
        return self._base.array

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """That of the base."""
        return self._base.stored_shape

    def entries(self, spec: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the base."""
        return self._base.entries(spec)

    def dense(self) -> jax.Array:
        """Raise MergeError: rows that have adapters of their own have no one merged array."""
        raise MergeError(
            "Its rows have adapters of their own (pj.with_adapter_rows), which one array cannot hold. Use a matrix in "
            "products, add or multiply rows by a vector, or run each adapter's rows by themselves."
        )

    def by_row(self) -> jax.Array | None:
        """Each row's own vector, ``(batch, *shape)``."""
        if self.layout.inp or self.rows.ndim > 1:
            return None
        every = [self._base.dense()]
        for leaf in self._alone():
            every.append(leaf.dense())
        return jnp.stack(every)[self.rows]

    def _alone(self) -> list[Adapted]:
        """The leaf with each of its adapters by itself."""
        own = zip(self.params, self.states, self.tags, strict=True)
        return [Adapted(self.base, params, state, self.layout, tag) for params, state, tag in own]

    def apply(self, x: jax.Array, product: Product = MATMUL) -> jax.Array:
        """The product, each row with its adapter."""
        batch = self.rows.shape[-1]
        if self.rows.ndim > 1 or x.ndim == 0 or x.shape[0] != batch:
            raise ValueError(
                f"A product has inputs of shape {x.shape} where each of {batch} rows has an adapter of its own. "
                f"The first axis has to be the batch of {batch}."
            )
        y = self._base.apply(x, product)
        gathered = [i for i, tag in enumerate(self.tags) if self._is_plain(i, product)]
        if gathered:
            y = self._with_factors(gathered, y, x, product)
        for i in range(len(self.tags)):
            if i not in gathered:
                own = self._of_adapter(i, x, product)
                y = jnp.where(jnp.reshape(self.rows == i + 1, (-1, *[1] * (y.ndim - 1))), own, y)
        return y

    def _of_adapter(self, i: int, x: jax.Array, product: Product) -> jax.Array:
        """The product of all rows with one adapter; each row by itself, if it would depend on the others."""
        rule, params, state = self.tags[i].rule, self.params[i], self.states[i]
        if not rule.over_rows:
            return rule.apply(params, state, self._base, x, product)
        return jax.vmap(lambda row: rule.apply(params, state, self._base, row[None], product)[0])(x)

    def _is_plain(self, i: int, product: Product) -> bool:
        """Whether an adapter is two factors and no more, and the product one that maps over rows."""
        maps = type(product) in (Product, Lookup) and product.out_sharding is None
        plain = isinstance(self.tags[i].config, LoraConfig) and self.params[i].keys() == FACTORS
        return maps and plain and self.states[i].keys() == {"scaling", "rank"}

    def _with_factors(self, which: Sequence[int], y: jax.Array, x: jax.Array, product: Product) -> jax.Array:
        """``y`` and what the factors of each row's adapter add to it."""
        own, states = picked(self.params, which), picked(self.states, which)
        width = max(params["lora_A"].shape[-1] for params in own)
        every_a, every_b = [], []
        for params in own:
            padded = _padded(params, width)
            every_a.append(padded["lora_A"])
            every_b.append(padded["lora_B"])
        dtype = jnp.result_type(*every_a)
        scaling = jnp.stack([state["scaling"].astype(dtype) for state in states])
        place = jnp.zeros(len(self.tags) + 1, jnp.int32).at[jnp.array(which) + 1].set(jnp.arange(1, len(which) + 1))
        of_row = place[self.rows]  # from 1; 0 for rows of the base, or of an adapter of another kind
        tokens = math.prod(x.shape[1:-1])
        factors = _Factors(of_row, every_a, every_b, scaling)
        if type(product) is Product and (len(own) == 1 or len(own) * tokens <= TOGETHER):
            return product.added(y, factors.together(x, product))
        return product.added(y, factors.gathered(x, product))

    def astype(self, dtype: jnp.dtype) -> "Rows":
        """The leaf with its base converted."""
        return dataclasses.replace(self, base=as_leaf(self._base.astype(dtype)))

    def mapped(self, position: int, change: Change, *, drop: bool) -> "Rows":
        """The leaf with all arrays changed along a stacked axis."""
        base = as_leaf(self._base.mapped(position, change, drop=drop))
        own = (self.params, self.states, self.rows)
        params, states, rows = jax.tree.map(lambda array: change(array, position), own)
        layout = self.layout.unstacked(position) if drop else self.layout
        return dataclasses.replace(self, base=base, params=params, states=states, rows=rows, layout=layout)

    def relaid(self, layout: Layout) -> "Rows":
        """The leaf with another layout."""
        return dataclasses.replace(self, base=as_leaf(self._base.relaid(layout)), layout=layout)

    def specs(self, entries: tuple[Any, ...]) -> "Rows":
        """Those of the adapters by themselves; which row has which is known everywhere."""
        params, states = [], []
        for leaf in self._alone():
            part = leaf.specs(entries)
            params.append(part.params)
            states.append(part.state)
        stack = picked(entries, self.layout.stack)
        rows: Any = PartitionSpec(*stack)
        base = self._base.specs(entries)
        return dataclasses.replace(self, base=base, params=tuple(params), states=tuple(states), rows=rows)


def _padded(params: Mapping[str, jax.Array], width: int) -> dict[str, jax.Array]:
    a, b = params["lora_A"], params["lora_B"]
    more = width - a.shape[-1]
    return {"lora_A": jnp.pad(a, ((0, 0), (0, more))), "lora_B": jnp.pad(b, ((0, more), (0, 0)))}


class _Factors(NamedTuple):
    """LoRA's factors of several adapters, of one rank, and whose each row takes.

    Attributes:
        of_row: The number of each row's adapter, from 1; 0 for none.
        every_a: The first factors, (in, rank).
        every_b: The second factors, (rank, out).
        scaling: The scale of each adapter.
    """

    of_row: jax.Array
    every_a: Sequence[jax.Array]
    every_b: Sequence[jax.Array]
    scaling: jax.Array

    def together(self, x: jax.Array, product: Product) -> jax.Array:
        """The update of each row, from two products with the factors of all adapters side by side.

        Zero times what is not finite is not zero: a second factor with such numbers goes into its own rows alone.
        """
        inner = product.down(x, jnp.concatenate(self.every_a, axis=1))
        b = jnp.concatenate(self.every_b)
        is_finite = jnp.isfinite(b)
        rank = self.every_a[0].shape[1]
        owner = jnp.repeat(jnp.arange(1, len(self.every_a) + 1), rank)  # of each column
        scales = jnp.where(is_finite.all(axis=1), jnp.repeat(self.scaling, rank), jnp.nan).astype(inner.dtype)
        shape = (len(self.of_row), *[1] * (inner.ndim - 2), len(owner))
        is_own = jnp.reshape(self.of_row[:, None] == owner[None], shape)
        own = jnp.where(is_own, inner * jnp.broadcast_to(scales, shape), 0)
        return product.up(own, jnp.where(is_finite, b, 0))

    def gathered(self, x: jax.Array, product: Product) -> jax.Array:
        """The update of each row, by the factors of its adapter, which are copied for each row."""
        a = jnp.stack([jnp.zeros_like(self.every_a[0]), *self.every_a])  # zeros for rows without such an adapter
        b = jnp.stack([jnp.zeros_like(self.every_b[0]), *self.every_b])
        scales = jnp.concatenate([jnp.zeros_like(self.scaling[:1]), self.scaling])

        def added(x: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
            return product.up(product.down(x, a) * scale, b)

        return jax.vmap(added)(x, a[self.of_row], b[self.of_row], scales[self.of_row])

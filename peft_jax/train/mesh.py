"""Many devices: a mesh with the axes data, fsdp, tensor and expert, and the rules by which each array is sharded.

``data``, ``fsdp`` and ``expert`` split the rows of a batch. ``fsdp``, ``expert`` and ``tensor`` split weights, adapters
and the optimizer's moments, so that each device holds a part. Of the experts of a mixture, ``expert`` and ``tensor``
split the number, and of all other weights ``expert`` splits what ``fsdp`` does. XLA puts in the communication, but for
experts (`peft_jax.models.modules.expert_parallel`), which need `in_use`. Devices may be those of several processes:
each makes the same arrays, and keeps the parts of its own devices.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted, tied
from peft_jax.core.mesh_axes import AXES, BATCH_AXES, EXPERT_AXES, WEIGHT_AXES
from peft_jax.core.partition_specs import dividing_spec, put
from peft_jax.core.paths import dotted
from peft_jax.core.selecting import present
from peft_jax.core.weight import is_weight
from peft_jax.models.registry import FAMILIES
from peft_jax.train.data.batches import Batch
from peft_jax.train.loop import State

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# By the end of a path, the mesh axes of an array's last dimensions. Other arrays are replicated. Each
# architecture names its modules (`peft_jax.models.family.Sharding`), and the rules of all hold for any tree.
# Quantized weights and adapters are sharded like the weight that they represent or adapt: the axes that they share with
# it are split as its are, and a rank never is. The optimizer's moments are sharded like their parameters.
# Of embeddings only the rows are split: with split features, what is looked up has them too, and XLA then has every
# device compute all rows of a batch.
EXPERTS, EXPERT_VECTORS = P(EXPERT_AXES, "fsdp", None), P(EXPERT_AXES, None)
COLUMNS, ROWS, TABLE = P(WEIGHT_AXES, "tensor"), P("tensor", WEIGHT_AXES), P(("tensor", *WEIGHT_AXES), None)


def _rules() -> tuple[tuple[str, P], ...]:
    """The rules of all architectures, those for columns first: of several that match a path the first counts."""
    columns, rows, tables, experts, vectors = [], [], [], [], []
    for family in FAMILIES:
        names = family.sharding
        columns.append((rf"({names.columns})\.kernel", COLUMNS))
        rows.append((rf"({names.rows})\.kernel", ROWS))
        tables.append((rf"({names.tables})\.embedding", TABLE))
        if names.experts:
            experts.append((names.experts, EXPERTS))
            vectors.append((rf"({names.experts})_bias", EXPERT_VECTORS))
    return (*columns, *rows, *tables, *experts, *vectors)


RULES = _rules()


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of the first devices with the axes data, fsdp, tensor and expert; those not named have size 1.

    Raises:
        ValueError: If an axis is unknown, or there are too few devices.

    Example:
        >>> dict(make_mesh({"data": 1}).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1, 'expert': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"a mesh has no axis {', '.join(unknown)}. Name {', '.join(AXES)}.")
    shape = [sizes.get(axis, 1) for axis in AXES]
    needed = int(np.prod(shape))
    if not 1 <= needed <= len(devices):
        asked = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"the mesh {asked} needs {needed} devices, but there are {len(devices)}. Give smaller sizes.")
    return Mesh(np.asarray(devices[:needed]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Read sizes as they are typed.

    Raises:
        ValueError: If they are not pairs of a name and a number.

    Example:
        >>> parse_mesh("data=4,tensor=2")
        {'data': 4, 'tensor': 2}
    """
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {}
    for name, _, size in pairs:
        if name not in AXES or not size.isdigit():
            raise ValueError(f"--mesh is '{text}'. Give sizes of {', '.join(AXES)}, such as data=4,fsdp=2.")
        sizes[name] = int(size)
    return sizes


def spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """How a weight is sharded on a mesh: by the first rule for its path; an axis that does not divide is left out.

    Raises:
        ValueError: If the mesh has an axis for experts that does not divide their number.

    Example:
        >>> tuple(spec("model.layers.mlp.up_proj.kernel", (2, 6, 8), make_mesh({})))
        (None, ('fsdp', 'expert'), 'tensor')
    """
    for pattern, rule in RULES:
        if not re.search(rf"(^|\.){pattern}$", path):
            continue
        if rule in (EXPERTS, EXPERT_VECTORS):
            _check_experts(path, shape[-len(rule)], mesh)
        return dividing_spec(P(*(None,) * (len(shape) - len(rule)), *rule), shape, mesh)
    return P()


def _check_experts(path: str, count: int, mesh: Mesh) -> None:
    """Raise ValueError if a number of experts cannot be split over a mesh's axis for them."""
    devices = mesh.shape.get("expert", 1)
    if count % devices:
        raise ValueError(
            f"the mesh has expert={devices}, which does not divide the {count} experts of {path}. "
            f"Give a divisor of {count}."
        )


def batch_parts(mesh: Mesh | None) -> int:
    """The number of parts that a batch's rows are split into; 1 without a mesh.

    Example:
        >>> batch_parts(make_mesh({}))
        1
    """
    return 1 if mesh is None else math.prod(present(mesh.shape, BATCH_AXES).values())


def batch_spec(mesh: Mesh) -> P:
    """How the rows of a batch are sharded.

    Example:
        >>> tuple(batch_spec(make_mesh({})))
        (('data', 'fsdp', 'expert'),)
    """
    return P(tuple(present(mesh.shape, BATCH_AXES)))


def with_mesh_in_use(fn: F, mesh: Mesh | None) -> F:
    """The function, which runs with a mesh `in_use`; without a mesh the function itself.

    Example:
        >>> with_mesh_in_use(lambda: jax.sharding.get_abstract_mesh().shape["data"], make_mesh({"data": 1}))()
        1
    """
    if mesh is None:
        return fn

    @functools.wraps(fn)
    def run(*args: Any, **options: Any) -> Any:
        with in_use(mesh):
            return fn(*args, **options)

    return run  # type: ignore[return-value]


def in_use(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which models run on a mesh, as ``jax.set_mesh``; without a mesh it does nothing.

    A mixture needs it to compute its experts on the devices that hold them. Without it the numbers are the same, but
    each device gets the weights of all experts.

    Example:
        >>> with in_use(make_mesh({"data": 1})):
        ...     jax.sharding.get_abstract_mesh().shape["data"]
        1
    """
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def layout(tree: T, mesh: Mesh) -> T:
    """How a tree or model handle is sharded on a mesh: a `NamedSharding` in place of every array.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> params = pj.apply_lora({"q_proj": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(target_modules=["q_proj"]))
        >>> tuple(layout(params, make_mesh({}))["q_proj"]["kernel"].params["lora_B"].spec)
        (None, 'tensor')
    """

    def sharding_of(key_path: Any, leaf: Any) -> Any:
        found = spec(dotted(key_path), leaf.shape, mesh)
        if not is_weight(leaf):
            return NamedSharding(mesh, found)
        specs = leaf.specs((*found, *(None,) * (leaf.ndim - len(found))))
        return jax.tree.map(
            lambda array, part: NamedSharding(mesh, dividing_spec(part, array.shape, mesh)), leaf, specs
        )

    return jax.tree_util.tree_map_with_path(sharding_of, tree, is_leaf=is_weight)


def place(tree: T, mesh: Mesh) -> T:
    """Shard a tree or model handle on a mesh; the state that `peft_jax.train.start` makes of it is sharded like it.

    An adapter may be on it, or be attached afterwards: it is sharded like its base.
    """
    return tied(jax.tree.map(put, tree, layout(tree, mesh)))


def place_state(state: State, mesh: Mesh) -> State:
    """Give each device what of a run's state does not come from arrays on the mesh: counters, schedules, keys."""

    def there(array: Any) -> jax.Array:
        sharding = getattr(array, "sharding", None)
        on_mesh = isinstance(sharding, NamedSharding) and sharding.mesh == mesh
        return array if on_mesh else put(array, NamedSharding(mesh, P()))

    return State(state.step, *jax.tree.map(there, tuple(state[1:])))


def shardings(tree: T) -> T:
    """Return the sharding of each array in its place, as `jax.jit` takes it."""
    return jax.tree.map(lambda array: array.sharding, tree)


def with_whole_adapters(model: T, mesh: Mesh) -> T:
    """The model with the arrays of its adapters whole on a device of this process; all processes call this at once."""
    arrays = {(path, leaf.tag.name): (leaf.params, leaf.state) for path, leaf in adapted_leaves(model)}

    def give(path: str, leaf: Adapted) -> Adapted:
        params, state = found[path, leaf.tag.name]
        return dataclasses.replace(leaf, params=params, state=state)

    gathered = jax.jit(lambda arrays: arrays, out_shardings=NamedSharding(mesh, P()))(arrays)
    found = jax.tree.map(lambda array: array.addressable_data(0), gathered)
    return map_adapted(give, model)


def place_batch(batch: Batch, mesh: Mesh) -> Any:
    """Split a batch's rows over the mesh.

    Raises:
        ValueError: If they do not divide.
    """
    return {name: put(array, NamedSharding(mesh, batch_spec(mesh))) for name, array in batch.items()}


class PlacedBatches(Sequence[Any]):
    """Batches, or their micro batches, that are laid out on a mesh when they are asked for."""

    def __init__(self, batches: Sequence[Batch] | Sequence[Sequence[Batch]], mesh: Mesh) -> None:
        self.batches, self.mesh = batches, mesh

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        """Return a batch, laid out."""
        batch: Any = self.batches[index]
        if isinstance(batch, list):
            return [place_batch(part, self.mesh) for part in batch]
        return place_batch(batch, self.mesh)

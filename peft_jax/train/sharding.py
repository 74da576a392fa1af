"""Many devices: a mesh with the axes data, fsdp and tensor, and one table that says how each array lies on it.

``data`` and ``fsdp`` split the rows of a batch. ``fsdp`` and ``tensor`` split weights, adapters and the optimizer's
moments, so that each device holds a part; XLA puts in the communication.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.paths import dotted
from peft_jax.train.batches import Batch

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))

# By the end of an array's path: the mesh axes of its last dimensions. What is not here lies whole on every device.
_OUTWARD = r"((q|k|v|gate|up)_proj|c_attn|c_fc|self\.(query|key|value)|intermediate\.dense)\.kernel"
_INWARD = r"((o|down)_proj|c_proj|output\.dense)\.kernel"
RULES: tuple[tuple[str, P], ...] = (
    (_OUTWARD + r"(\.base)*(\.q)?", P("fsdp", "tensor")),
    (_INWARD + r"(\.base)*(\.q)?", P("tensor", "fsdp")),
    (_OUTWARD + r"(\.base)*\.scale", P("tensor")),  # of int8
    (_INWARD + r"(\.base)*\.scale", P("fsdp")),
    (_OUTWARD + r".*\.lora_A", P("fsdp", None)),
    (_OUTWARD + r".*\.lora_B", P(None, "tensor")),
    (_INWARD + r".*\.lora_A", P("tensor", None)),
    (_INWARD + r".*\.lora_B", P(None, "fsdp")),
    (r"(embed_tokens|wte|word_embeddings)\.embedding(\.base)*", P("tensor", "fsdp")),
    (r"lm_head\.kernel(\.base)*", P("fsdp", "tensor")),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of the first devices with the axes data, fsdp and tensor; those not named have size 1.

    Raises:
        ValueError: If an axis is unknown, or there are too few devices.

    Example:
        >>> dict(make_mesh({"data": 1}).shape)
        {'data': 1, 'fsdp': 1, 'tensor': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    if unknown := sorted(set(sizes) - set(AXES)):
        raise ValueError(f"a mesh has no axis {', '.join(unknown)}. Name {', '.join(AXES)}.")
    shape = [sizes.get(axis, 1) for axis in AXES]
    needed = int(np.prod(shape))
    if not 1 <= needed <= len(devices):
        told = ",".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"the mesh {told} needs {needed} devices, but there are {len(devices)}. Give smaller sizes.")
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
    if not all(name in AXES and size.isdigit() for name, _, size in pairs):
        raise ValueError(f"--mesh is '{text}'. Give sizes of {', '.join(AXES)}, such as data=4,fsdp=2.")
    return {name: int(size) for name, _, size in pairs}


def spec(path: str, shape: Sequence[int], mesh: Mesh) -> P:
    """How an array lies on a mesh: by the first rule for its path; an axis that does not divide is left out.

    Example:
        >>> tuple(spec("params.model.layers.mlp.up_proj.kernel", (2, 6, 8), make_mesh({})))
        (None, 'fsdp', 'tensor')
    """
    for pattern, rule in RULES:
        if re.search(pattern + "$", path):
            axes = (*(None,) * (len(shape) - len(rule)), *rule)
            fits = [axis and size % mesh.shape[axis] == 0 for axis, size in zip(axes, shape, strict=True)]
            return P(*(axis if fit else None for axis, fit in zip(axes, fits, strict=True)))
    return P()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree with a sharding in place of every array."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(dotted(path), np.shape(leaf), mesh)), tree
    )


def place(tree: Any, mesh: Mesh) -> Any:
    """Lay a tree (a model handle, a state's twins) out on a mesh."""
    return jax.device_put(tree, shardings(tree, mesh))


def place_batch(batch: Batch, mesh: Mesh) -> Any:
    """Split a batch's rows over the mesh.

    Raises:
        ValueError: If they do not divide.
    """
    return jax.device_put(dict(batch), NamedSharding(mesh, BATCH))


class PlacedBatches(Sequence[Any]):
    """Batches that are laid out on a mesh when they are asked for."""

    def __init__(self, batches: Sequence[Batch], mesh: Mesh) -> None:
        self.batches, self.mesh = batches, mesh

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.batches)

    def __getitem__(self, index: Any) -> Any:
        """Return a batch, laid out."""
        return place_batch(self.batches[index], self.mesh)

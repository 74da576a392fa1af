"""The axes of a mesh of devices, and the arrays that each of them splits."""

import math
from collections.abc import Mapping, Sequence

AXES = ("data", "fsdp", "tensor", "expert")
BATCH_AXES = ("data", "fsdp", "expert")  # the rows of a batch, and so its tokens
EXPERT_AXES = ("expert", "tensor")  # the experts of a mixture
WEIGHT_AXES = ("fsdp", "expert")  # an axis of each other weight, which is gathered when it is used


def dividing(names: Sequence[str], size: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh that split an axis of an array evenly: of those named, the last ones are left out if need be.

    Args:
        names: Axes of the mesh.
        size: Length of the array's axis.
        mesh: The number of devices along each axis of the mesh. Axes that it lacks are left out.

    Example:
        >>> dividing(("expert", "tensor"), 6, {"expert": 2, "tensor": 4})
        ('expert',)
    """
    kept = tuple(name for name in names if name in mesh)
    while size % math.prod(mesh[name] for name in kept):
        kept = kept[:-1]
    return kept

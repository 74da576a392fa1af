"""Where each leaf of a tree of parameters lies in a checkpoint."""

from collections.abc import Sequence
from typing import NamedTuple


class Row(NamedTuple):
    """One leaf of ours and where it lies in a checkpoint.

    Attributes:
        path: Dotted path of the leaf.
        shape: Its shape, the axis of stacked layers in front if it is stacked.
        key: The tensor's key; for a stacked leaf with ``{}`` where the layer's number stands.
        transposed: Whether the tensor has the last two axes of our (one layer's) leaf the other way around.
        numbers: The layers of a stacked leaf, where these are not 0, 1, 2 and so on.
        parts: Other keys that checkpoints hold the tensor under, as ``key``; with one more ``{}`` for the number of an
            expert if they hold experts one by one. Several of them follow one another along the first axis of each.
    """

    path: str
    shape: tuple[int, ...]
    key: str
    transposed: bool
    numbers: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        """Whether the leaf has one tensor a layer."""
        return "{}" in self.key

    @property
    def keys(self) -> list[str]:
        """The keys of all its tensors, by layer."""
        if not self.stacked:
            return [self.key]
        return [self.key.format(number) for number in self.layers]

    @property
    def layers(self) -> Sequence[int]:
        """The numbers of the layers of a stacked leaf."""
        return self.numbers or range(self.shape[0])

    @property
    def part_keys(self) -> list[list[list[str]]]:
        """The other keys of each tensor, by layer, part and expert; of a tensor without experts one a part."""
        experts = self.tensor_shape[0] if len(self.tensor_shape) > 2 else 1
        found = []
        for layer in self.layers:
            of_layer = []
            for part in self.parts:
                of_layer.append([part.format(layer, expert) for expert in range(experts)])
            found.append(of_layer)
        return found

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return (*shape[:-2], *shape[:-3:-1]) if self.transposed else shape

"""Base class of methods whose arrays are not one tensor of a file for each module."""

from collections.abc import Callable, Collection, Mapping

import numpy as np

KeyOf = Callable[[str, str], str]


class PackedTensors:
    """A method whose arrays are several tensors of a file each, or one for several modules.

    `peft_jax.interop` reads a file through `packed_file`, whose result has one tensor for each array of each module,
    and writes one through `unpacked_file`. Most methods need `misfits`, `packed` and `unpacked` alone.
    """

    def packed(self, tensors: Mapping[str, np.ndarray], n_in: int, n_out: int) -> dict[str, np.ndarray]:
        """The tensors of a module by their names, without `misfits`, as one tensor for each array."""
        raise NotImplementedError

    def unpacked(self, tensors: Mapping[str, np.ndarray], *, biased: bool) -> dict[str, np.ndarray]:
        """The inverse of `packed`; ``biased`` says whether the adapter changes the module's bias too."""
        raise NotImplementedError

    def misfits(self, tensors: Mapping[str, np.ndarray], n_in: int, n_out: int) -> list[str]:
        """Problems of a module's tensors that cannot be packed, each beginning with a tensor's name."""
        return []

    def misfits_of_file(
        self, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]], key: KeyOf
    ) -> list[str]:
        """Problems of a file's tensors that cannot be packed, each beginning with a tensor's key."""
        found = []
        for module, (n_in, n_out) in sizes.items():
            own = _taken(dict(tensors), key(module, ""), key(module, self._stem))
            for problem in self.misfits(own, n_in, n_out):
                found.append(f"{key(module, '')}{problem}")
        return found

    def packed_file(
        self, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, tuple[int, int]], key: KeyOf
    ) -> dict[str, np.ndarray]:
        """The tensors of a file, without `misfits_of_file`, with one for each array of each module.

        Args:
            tensors: The tensors by key.
            sizes: Sizes of the matrices of all modules by name.
            key: Gives the key of a module's tensor of a name.
        """
        found = dict(tensors)
        for module, (n_in, n_out) in sizes.items():
            own = _taken(found, key(module, ""), key(module, self._stem))
            packed = self.packed(own, n_in, n_out)
            found |= {key(module, name): tensor for name, tensor in packed.items()}
        return found

    def unpacked_file(
        self, tensors: Mapping[str, np.ndarray], modules: Collection[str], biased: Collection[str], key: KeyOf
    ) -> dict[str, np.ndarray]:
        """The inverse of `packed_file`; the adapter changes the biases of the modules ``biased``."""
        found = dict(tensors)
        for module in modules:
            own = _taken(found, key(module, ""), key(module, self._stem))
            whole = self.unpacked(own, biased=module in biased)
            found |= {key(module, name): tensor for name, tensor in whole.items()}
        return found

    @property
    def _stem(self) -> str:
        """How the names of its tensors begin."""
        return f"{self.peft_type.lower()}_"  # type: ignore[attr-defined]  # of the config


def _taken(tensors: dict[str, np.ndarray], path: str, start: str) -> dict[str, np.ndarray]:
    """Those whose keys begin so, taken out, by what is behind the path of their module."""
    keys = [key for key in tensors if key.startswith(start)]
    return {key.removeprefix(path): tensors.pop(key) for key in keys}

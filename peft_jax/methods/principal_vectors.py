"""The largest singular values of a matrix and their vectors, with the signs that PyTorch gives the vectors.

A pair of singular vectors is determined up to its sign, which the library chooses: another build of LAPACK, or another
device, may choose the other one. This is the only code here that asks for PyTorch.
"""

import importlib
import warnings
from types import ModuleType
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

WITHOUT_TORCH = (
    "PSOFT without PyTorch takes NumPy's singular vectors. Some of their signs may not be PyTorch's, which no file "
    "holds, so that a file of PEFT's may mean something else here, and a file of ours elsewhere. Install PyTorch's CPU "
    "build: pip install torch --index-url https://download.pytorch.org/whl/cpu"
)


class Principal(NamedTuple):
    """The largest singular values of a weight ``(out, in)`` in descending order, and their vectors.

    Attributes:
        left: A column for each value.
        values: The values.
        right: A row for each value.
    """

    left: Float[np.ndarray, "out rank"]
    values: Float[np.ndarray, " rank"]
    right: Float[np.ndarray, "rank in"]


def principal_vectors(weight: Float[np.ndarray, "out in"], rank: int) -> Principal:
    """Those of the whole decomposition, as ``torch.linalg.svd`` computes it on the CPU.

    NumPy computes it where PyTorch is not installed; a warning says what that means.
    """
    torch = _torch()
    if torch is None:
        warnings.warn(WITHOUT_TORCH, stacklevel=2)
        left, values, right = np.linalg.svd(weight, full_matrices=False)
    else:
        found = torch.linalg.svd(torch.tensor(weight), full_matrices=False)
        left, values, right = (one.numpy() for one in found)
    return Principal(left[:, :rank], values[:rank], right[:rank])


def random_principal_vectors(weight: Float[np.ndarray, "out in"], rank: int, passes: int, seed: int) -> Principal:
    """Approximate ones, as ``torch.svd_lowrank`` finds them from random numbers; PyTorch's generator stays as it was.

    Raises:
        ValueError: if PyTorch is not installed.
    """
    torch = _torch()
    if torch is None:
        raise ValueError(
            "psoft_svd='lowrank' is PyTorch's svd_lowrank, and PyTorch is not installed. Install its CPU build (pip "
            "install torch --index-url https://download.pytorch.org/whl/cpu), or start with psoft_svd='full'."
        )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would seed accelerators too
        left, values, right = torch.svd_lowrank(torch.tensor(weight), q=rank, niter=passes)
    return Principal(left.numpy(), values.numpy(), right.numpy().T)


def _torch() -> ModuleType | None:
    """PyTorch, or None where it is not installed."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":  # a part of it is missing
            raise
        return None

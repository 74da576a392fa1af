"""The tensors of an adapter's file."""

import pathlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from peft_jax.core.finite import non_finite


def read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter's file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No {path.name} in '{path.parent}'. Save the adapter with safe_serialization=True.")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or cut off ({error}). Copy or save the adapter again.") from None
    if broken := non_finite(tensors):
        raise ValueError(f"'{path}' holds NaN or infinity in its tensor '{broken}'. Take another copy of the adapter.")
    return tensors

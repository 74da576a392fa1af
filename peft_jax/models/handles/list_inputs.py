"""Inputs as a tokenizer gives them: lists of ids, of one text or of several."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def as_batch(ids: Any, name: str) -> Any:
    """Ids or a mask with an axis of texts: a list of one text is a batch of one. Arrays stay as they are.

    Args:
        ids: A list of numbers, a list of such lists, or an array.
        name: The argument's name, for an error.

    Raises:
        ValueError: if the lists have several lengths, or the outputs of a tokenizer are given as a whole.

    Example:
        >>> as_batch([3, 1], "input_ids").shape, as_batch([[3, 1], [2, 2]], "input_ids").shape
        ((1, 2), (2, 2))
    """
    if isinstance(ids, Mapping):
        raise ValueError(f"{name} got all of a tokenizer's outputs ({', '.join(ids)}). Write model(**inputs).")
    if not isinstance(ids, list | tuple):
        return ids
    try:
        array = np.asarray(ids)
    except ValueError:
        array = np.asarray([], object)
    if array.ndim == 0 or array.dtype.kind not in "iub":
        lengths = sorted({len(one) for one in ids if isinstance(one, list | tuple)})
        raise ValueError(
            f"{name} is a list of texts of {lengths or 'no'} tokens, which is no array of numbers. Pad them: "
            'tokenizer(texts, padding=True, return_tensors="np").'
        )
    return array[None] if array.ndim == 1 else array

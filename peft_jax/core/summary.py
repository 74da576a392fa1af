"""Descriptions of an adapted tree: a table of its leaves, and the number of trained elements."""

import numpy as np

from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.partition import count_parameters
from peft_jax.core.pytree import PyTree


def trainable_parameters(params: PyTree) -> str:
    """The line that PEFT's ``print_trainable_parameters`` prints.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((30, 30))}}
        >>> trainable_parameters(pj.apply_lora(params, pj.LoraConfig(r=1, target_modules=["q"])))
        'trainable params: 60 || all params: 960 || trainable%: 6.2500'
    """
    trained, total = count_parameters(params)
    return (
        f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / max(total, 1):.4f}"
    )


def summary(params: PyTree) -> str:
    """A table of the adapted leaves: path, shape, adapter, method, trained elements; then the trainable count.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((30, 30))}}
        >>> print(summary(pj.apply_lora(params, pj.LoraConfig(r=1, target_modules=["q"]))))
        path      shape     adapter  method  trainable
        q.kernel  (30, 30)  default  LORA    60
        trainable params: 60 || all params: 960 || trainable%: 6.2500
    """
    rows = [("path", "shape", "adapter", "method", "trainable")]
    for path, leaf in adapted_leaves(params):
        size = 0
        if leaf.active and leaf.trainable:
            size = int(np.sum(leaf.method.sizes(leaf.params, leaf.state)))
        rows.append((path, str(leaf.shape), leaf.tag.name, leaf.method.label, f"{size:,d}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, trainable_parameters(params)])

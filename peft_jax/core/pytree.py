"""Annotations of pytrees and of the paths in them."""

from typing import Any

# Any pytree: nested containers of arrays, adapted and quantized leaves, or a model handle. JAX has no type for it.
PyTree = Any

KeyPath = tuple[Any, ...]  # the keys, indices and names of attributes that lead to a node

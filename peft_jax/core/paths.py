"""Names of leaves: key paths as dotted strings, module paths, and random keys made from names."""

import collections
import itertools
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.layout import LEAF_NAMES, Layout
from peft_jax.core.pytree import KeyPath, PyTree

# PyTorch's name of a leaf.
TORCH_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "weight": "weight", "bias": "bias"}


def dotted(key_path: KeyPath) -> str:
    """A JAX key path as a dotted string; the box that Flax NNX puts around each array adds nothing to it.

    Example:
        >>> [(path, _)] = jax.tree_util.tree_leaves_with_path({"mlp": [{"kernel": 1.0}]})
        >>> dotted(path)
        'mlp.0.kernel'
    """
    if len(key_path) > 1 and isinstance(key_path[-1], jax.tree_util.GetAttrKey) and key_path[-1].name == "value":
        key_path = key_path[:-1]
    return jax.tree_util.keystr(key_path, simple=True, separator=".")


def named_leaves(tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None) -> dict[str, Any]:
    """The leaves of a tree by their dotted paths, in order.

    Args:
        tree: Any pytree.
        is_leaf: As in ``jax.tree.leaves``.

    Raises:
        ValueError: if two leaves have the same dotted path, of which every table by paths would have one alone.

    Example:
        >>> named_leaves({"mlp": [{"kernel": 1.0}]})
        {'mlp.0.kernel': 1.0}
    """
    found: dict[str, Any] = {}
    key_paths: dict[str, KeyPath] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf):
        path = dotted(key_path)
        if path in found:
            first, second = jax.tree_util.keystr(key_paths[path]), jax.tree_util.keystr(key_path)
            raise ValueError(
                f"The leaves {first} and {second} are both called '{path}', and cannot be told apart by name. "
                "Rename one of them, or write keys without dots."
            )
        found[path], key_paths[path] = leaf, key_path
    return found


def module_path(leaf_path: str) -> str:
    """The path of the module that owns a leaf: without ``kernel``, ``weight``, ``embedding``, ``bias`` or ``scale``.

    Example:
        >>> module_path("model.norm.scale"), module_path("encoder.w1")
        ('model.norm', 'encoder.w1')
    """
    head, _, last = leaf_path.rpartition(".")
    return head if last in LEAF_NAMES else leaf_path


def matrix_path(leaf_path: str, layout: Layout) -> str:
    """The path of the leaf that names a leaf's module: of a bias its matrix's, of all others their own.

    Example:
        >>> matrix_path("layers.b1", Layout(inp=(), out=(0,), bias_of=("b1", "w1")))
        'layers.w1'
    """
    if layout.bias_of is None:
        return leaf_path
    own, matrix = layout.bias_of
    return leaf_path.removesuffix(own) + matrix


def leaf_names(path: str, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """Names of the modules that a leaf belongs to, one for each of its layers; those of a bias are its matrix's.

    Raises:
        ValueError: as `stacked_names`.

    Example:
        >>> list(leaf_names("layers.mlp.kernel", Layout(stack=(0,), inp=(1,), out=(2,)), (2, 8, 8)))
        ['layers.0.mlp', 'layers.1.mlp']
    """
    return stacked_names(module_path(matrix_path(path, layout)), layout, shape)


def stacked_names(path: str, layout: Layout, shape: tuple[int, ...]) -> np.ndarray:
    """Names of the layers that a leaf stands for, an object array of the leaf's stacked shape.

    Raises:
        ValueError: if the path has no component after which the index of a stacked axis belongs.

    Example:
        >>> list(stacked_names("layers.mlp", Layout(stack=(0,), inp=(1,), out=(2,)), (2, 8, 8)))
        ['layers.0.mlp', 'layers.1.mlp']
    """
    stack = layout.stack_shape(shape)
    names = np.empty(stack, dtype=object)
    for index in itertools.product(*map(range, stack)):
        parts, front = path.split(".") if path else [], []
        if layout.stack_name:
            parts.remove(layout.stack_name)
        for axis, (after, place) in enumerate(zip(layout.index_after, index, strict=False)):
            i = layout.numbers[place] if layout.numbers and axis == 0 else place
            if after is None:
                continue
            if after == "":
                front.append(str(i))
                continue
            if after not in parts:
                raise ValueError(
                    f"Stacked leaf '{path}' has no path component '{after}' after which its layer index would stand. "
                    f"Write Layout(..., index_after=(NAME,)) with one of {parts}, '' for the front of the path, or "
                    "None for a parameter's experts."
                )
            parts.insert(parts.index(after) + 1, str(i))
        names[index] = ".".join([*front, *parts])
    return names


def keys_from_names(key: jax.Array, names: np.ndarray) -> jax.Array:
    """One random key per name, independent of which other names there are; same shape as ``names``.

    Layers of one name, the experts of a parameter, have unlike keys by their number.
    """
    return keys_from_codes(key, name_codes(names))


def normal_by_names(key: jax.Array, names: np.ndarray, shape: tuple[int, ...]) -> jax.Array:
    """Normal numbers of this shape, whose first axes are those of ``names``, drawn with the keys of the names."""
    return _normals(keys_from_names(key, names), shape[names.ndim :])


@partial(jax.jit, static_argnames="shape")
def _normals(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return drawn_in_turn(lambda key: jax.random.normal(key, shape), keys)


def drawn_in_turn(draw: Callable[..., jax.Array], keys: jax.Array, *others: jax.Array) -> jax.Array:
    """Draw with one key after the other.

    The numbers are those of all keys at once by `jax.vmap`, which XLA takes two to three times as long to compile for
    a CPU. Call it in a function that is compiled: outside of one, each call is compiled anew.

    Args:
        draw: Draws with a key and an element of each of the others.
        keys: Random keys.
        *others: Arrays of the same shape.

    Returns:
        What is drawn, with the axes of the keys in front.

    Example:
        >>> drawn_in_turn(lambda key: jax.random.normal(key, (3,)), jax.random.split(jax.random.key(0), (2, 4))).shape
        (2, 4, 3)
    """
    in_a_row = [jnp.reshape(array, (-1,)) for array in (keys, *others)]
    drawn = jax.lax.map(lambda arguments: draw(*arguments), in_a_row)
    return jnp.reshape(drawn, (*keys.shape, *drawn.shape[1:]))


def name_codes(names: np.ndarray) -> np.ndarray:
    """One number per name, of which `keys_from_codes` makes its key; uint32, of the shape of ``names``."""
    seen = collections.Counter[str]()
    codes = np.empty(names.shape, np.uint32)
    for index in np.ndindex(names.shape):
        name = str(names[index])
        numbered = f"{name}.{seen[name]}" if seen[name] else name
        codes[index] = zlib.crc32(numbered.encode())
        seen[name] += 1
    return codes


def keys_from_codes(key: jax.Array, codes: np.ndarray | jax.Array) -> jax.Array:
    """One random key per code; same shape as ``codes``."""
    fold = jax.random.fold_in
    for _ in range(codes.ndim):
        fold = jax.vmap(fold, in_axes=(None, 0))
    return fold(key, codes)

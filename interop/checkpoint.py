"""Hugging Face checkpoints: a folder with ``config.json`` and safetensors files, whole or in shards.

Tensors are mapped into memory, not read. Where they are only cast and the device is the CPU, `host_read` fills the
leaves; elsewhere one tensor at a time goes to the device, is converted there, and is written into its place in the
stacked leaf. A table of `Row`, one for each leaf, says which tensor belongs where.
"""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peft_jax.interop.checkpoint_rows import Row
from peft_jax.interop.files import (
    CONFIG,
    GENERATION_CONFIG,
    LazyArray,
    Tensor,
    matches_some,
    open_tensors,
    read_config,
    some,
    write_files,
)
from peft_jax.interop.host_read import Cast, is_host_device, read_leaves, why_not_finite
from peft_jax.interop.packed_codes import Codes, Kept, Packed, kept_weight

from peft_jax.core.finite import holds_finite
from peft_jax.core.hub import HubOptions, find_folder
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import is_weight

__all__ = ["Row", "find_checkpoint", "load_params", "open_tensors", "read_config", "save_checkpoint", "shapes_alone"]

PIECE = 1 << 21  # bytes of a matrix that are in flight between file and leaf
HUB_FILES = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt")

Path = str | os.PathLike[str]
Convert = Callable[[str, jax.Array], Any]

_reads_shapes: ContextVar[bool] = ContextVar("_reads_shapes", default=False)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Inside, `load_params` reads no tensor and gives zeros, which under `jax.eval_shape` are shapes alone.

    Example:
        >>> tensors = {"norm.weight": np.ones(4, np.float16)}
        >>> row = Row("norm.scale", (4,), "norm.weight", transposed=False)
        >>> with shapes_alone():
        ...     jax.eval_shape(partial(load_params, tensors, [row], Cast(lambda path: "float32")))
        {'norm': {'scale': ShapeDtypeStruct(shape=(4,), dtype=float32)}}
    """
    token = _reads_shapes.set(True)
    try:
        yield
    finally:
        _reads_shapes.reset(token)


def find_checkpoint(
    name_or_path: Path, files: Sequence[str] = HUB_FILES, options: HubOptions | None = None
) -> pathlib.Path:
    """Return the folder of a checkpoint, which is downloaded if it is an id on the Hugging Face hub.

    Args:
        name_or_path: Folder or id.
        files: Patterns of the files to download.
        options: Where on the hub.

    Raises:
        FileNotFoundError: if there is no such folder and no such id, or the hub cannot be reached.
    """
    file = pathlib.Path(name_or_path)
    if file.suffix == ".gguf" and file.is_file():
        raise FileNotFoundError(f"'{file}' is no folder. Name '{file.parent}', and gguf_file='{file.name}' in it.")
    return find_folder(name_or_path, files, options, kind="a checkpoint's folder")


def load_params(
    tensors: Mapping[str, LazyArray],
    rows: Sequence[Row],
    convert: Convert,
    *,
    ignored: Sequence[str] = (),
    kept: Mapping[str, Kept] | None = None,
) -> dict[str, Any]:
    """Make a tree of parameters from a checkpoint's tensors, piece by piece.

    Beside the tree itself, memory holds no more than one tensor, and of a large matrix only a part.

    Args:
        tensors: Tensors by key, as from `open_tensors`. Each is read as an array when its turn has come.
        rows: What the tree consists of.
        convert: ``convert(path, array) -> leaf``, run in a compiled program on each tensor in our orientation, in its
            stored element type. A layer of a stacked leaf comes as a stack of one, ``(1, in, out)``; the leaf may be
            any pytree, whose arrays then all have the layers in front. Large kernels come in several parts of their
            output columns, which are the last axis of all arrays of their leaf. A `Cast` is done on the host where the
            device is the CPU.
        ignored: Patterns of keys that may be there and are not used.
        kept: The leaves, by path, whose tensors stay in their own bits instead; those are `Packed` and of one form.

    Raises:
        ValueError: if tensors are missing or left over or of a wrong shape, all of which are listed; or if one holds a
            NaN or an infinity, or becomes infinite in the element type of its leaf.
    """
    _check(tensors, rows, ignored)
    read: Mapping[str, jax.Array] = {}
    if not _reads_shapes.get() and isinstance(convert, Cast) and is_host_device():
        of_host = [row for row in rows if row.path not in (kept or {})]
        read = read_leaves(of_host, tensors, convert)
    tree: dict[str, Any] = {}
    for row in rows:
        *modules, name = row.path.split(".")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        if row.path in read:
            node[name] = read[row.path]
        elif kept is not None and row.path in kept:
            node[name] = _load_kept(row, tensors, kept[row.path])
        else:
            node[name] = _load(row, tensors, convert)
    return tree


def _check(tensors: Mapping[str, LazyArray], rows: Sequence[Row], ignored: Sequence[str]) -> None:
    wanted: dict[str, tuple[int, ...]] = {}
    for row in rows:
        wanted |= dict.fromkeys(row.keys, row.tensor_shape)
    unlike = []
    for key in sorted(wanted.keys() & tensors.keys()):
        if tensors[key].shape != wanted[key]:
            unlike.append(f"{key} {tensors[key].shape}, not {wanted[key]}")
    surplus = tensors.keys() - wanted.keys()
    problems = {
        "missing": sorted(wanted.keys() - tensors.keys()),
        "left over": sorted(key for key in surplus if not matches_some(ignored, key)),
        "of a wrong shape": unlike,
    }
    if any(problems.values()):
        told = "; ".join(f"{what}: {some(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"The checkpoint's tensors do not fit its {CONFIG}. {told}. Use the config of these weights.")


def _load(row: Row, tensors: Mapping[str, LazyArray], convert: Convert) -> Any:
    first = tensors[row.keys[0]]
    abstract = jax.ShapeDtypeStruct(first.shape, first.dtype)
    whole = jax.eval_shape(partial(_leaf, row=row, convert=convert), abstract)
    buffers = _zeros(row, whole)
    if _reads_shapes.get():
        return buffers
    for layer, key in enumerate(row.keys):
        tensor = np.asarray(tensors[key])
        in_pieces = row.transposed and not (is_weight(whole) and not whole.in_pieces)
        in_pieces = in_pieces or tensor.ndim > 2  # pieces of experts are whole matrices
        count = max(1, -(-tensor.nbytes // PIECE)) if in_pieces else 1
        step = -(-len(tensor) // count)
        finite = []
        for start in range(0, len(tensor), step):
            # Waiting keeps one piece in flight: dispatch runs ahead and would copy all of them to the device.
            piece = tensor[start : start + step]
            buffers, is_finite = jax.block_until_ready(_fill(buffers, piece, layer, start, row, convert))
            finite.append(is_finite)
        if not all(jax.device_get(finite)):
            raise ValueError(why_not_finite(key, tensor, jax.tree.leaves(buffers)[0].dtype))
    return buffers


def _zeros(row: Row, one_layer: Any) -> Any:
    """Buffers for a leaf, given the shapes that its arrays have for one layer."""
    front = row.shape[:1] if row.stacked else ()
    return jax.tree.map(lambda one: jnp.zeros((*front, *one.shape[len(front) :]), one.dtype), one_layer)


def _load_kept(row: Row, tensors: Mapping[str, Any], kept: Kept) -> Any:
    buffers = None
    for layer, key in enumerate(row.keys):
        tensor: Packed = tensors[key]
        codes = tensor.codes()
        if buffers is None:
            buffers = _zeros(row, jax.eval_shape(partial(kept_weight, kept=kept), codes))
        buffers, is_finite = jax.block_until_ready(_fill_kept(buffers, codes, layer, kept))
        if not is_finite:
            raise ValueError(why_not_finite(key, np.asarray(tensor), kept.dtype))
    return buffers


@partial(jax.jit, static_argnames="kept", donate_argnums=0)
def _fill_kept(buffers: PyTree, codes: Codes, layer: int, kept: Kept) -> tuple[Any, jax.Array]:
    """The buffers with the weight of a tensor in its place, and whether its values are finite."""
    weight = kept_weight(codes, kept)
    finite = jnp.all(jnp.isfinite(weight.dense()))
    if not kept.layout.stack:
        return weight, finite
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return jax.tree.map(lambda buffer, part: put(buffer, part[0]), buffers, weight), finite


def _leaf(piece: jax.Array, row: Row, convert: Convert) -> Any:
    array = jnp.swapaxes(piece, -1, -2) if row.transposed else piece
    return convert(row.path, array[None] if row.stacked else array)


@partial(jax.jit, static_argnames=("row", "convert"), donate_argnums=0)
def _fill(
    buffers: PyTree, piece: jax.Array, layer: int, place: int, row: Row, convert: Convert
) -> tuple[Any, jax.Array]:
    """The buffers with a piece in its place, and whether what it was converted to is finite.

    The place of a matrix's piece is a column of our leaf, that of experts their first number.
    """

    def put(buffer: jax.Array, part: jax.Array) -> jax.Array:
        start = [0] * part.ndim
        start[0] = layer if row.stacked else 0
        if piece.ndim > 2:
            start[int(row.stacked)] = place
        elif row.transposed:
            start[-1] = place
        return jax.lax.dynamic_update_slice(buffer, part, start)

    converted = _leaf(piece, row, convert)
    floats = [one for one in jax.tree.leaves(converted) if jnp.issubdtype(one.dtype, jnp.inexact)]
    finite = [jnp.all(jnp.isfinite(one)) for one in floats]
    return jax.tree.map(put, buffers, converted), jnp.all(jnp.array(finite))


def save_checkpoint(
    folder: Path,
    params: Mapping[str, Any],
    rows: Sequence[Row],
    config: Mapping[str, Any],
    *,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write a checkpoint that transformers reads: ``config.json`` and safetensors in the leaves' element types.

    Files are written under other names and then renamed, ``config.json`` last: a run that is killed leaves the old
    checkpoint, or a folder without ``config.json``, which nobody loads. Memory holds one shard at a time.

    Args:
        folder: Folder to write to; made if need be. Weights of a former checkpoint in it are removed.
        params: The tree of parameters, dense arrays.
        rows: What the tree consists of.
        config: Contents of ``config.json``.
        generation_config: Contents of ``generation_config.json``, if it shall be there.
        max_shard_size: Bytes above which the weights are split into several files.

    Raises:
        ValueError: if a leaf holds values that are not finite; nothing is written then.

    Example:
        >>> import tempfile
        >>> params, rows = {"head": {"kernel": jnp.ones((2, 3))}}, [Row("head.kernel", (2, 3), "head.weight", True)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(folder, params, rows, {"model_type": "mine"})
        ...     open_tensors(folder)["head.weight"].shape
        (3, 2)
    """
    for row in rows:
        if not holds_finite(_at(params, row.path)):
            raise ValueError(
                f"the checkpoint is not written: leaf '{row.path}' holds NaN or infinity in "
                f"{_at(params, row.path).dtype}. Repair it, or write a wider element type."
            )
    tensors = list[Tensor]()
    for row in rows:
        tensors += _tensors(_at(params, row.path), row)
    texts = {} if generation_config is None else {GENERATION_CONFIG: generation_config}
    write_files(pathlib.Path(folder), tensors, {**texts, CONFIG: config}, max_shard_size)


def _tensors(leaf: Any, row: Row) -> Iterator[Tensor]:
    def make(layer: int) -> np.ndarray:
        array = np.asarray(leaf[layer] if row.stacked else leaf)
        return np.ascontiguousarray(np.swapaxes(array, -1, -2) if row.transposed else array)

    def make_part(layer: int, number: int, expert: int) -> np.ndarray:
        one = leaf[layer, expert] if leaf.ndim > 3 else leaf[layer]
        array = np.asarray(one).T if row.transposed else np.asarray(one)
        return np.ascontiguousarray(np.split(array, len(row.parts))[number])

    if not row.parts:
        for layer, key in enumerate(row.keys):
            yield Tensor(key, leaf.nbytes // len(row.keys), partial(make, layer))
        return
    for layer, names in enumerate(row.part_keys):
        nbytes = leaf.nbytes // (len(row.part_keys) * len(names) * len(names[0]))
        for number, part in enumerate(names):
            for expert, key in enumerate(part):
                yield Tensor(key, nbytes, partial(make_part, layer, number, expert))


def _at(tree: Mapping[str, Any], path: str) -> Any:
    node: Any = tree
    for name in path.split("."):
        node = node[name]
    return node

"""Quantize the weights of a tree."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from peft_jax.adapt.infer_layouts import read_program
from peft_jax.adapt.left_out import left_out, report
from peft_jax.core.adapted import is_adapted
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import (
    Layouts,
    Leaf,
    find_leaves,
    is_matmul,
    is_matrix,
    module_names,
    own_names,
    replace_leaves,
)
from peft_jax.core.repeated import is_repeated
from peft_jax.core.targets import names_module, names_some, no_matrix, nothing_hit, spelled_out_names, spelled_out_regex
from peft_jax.core.weight import is_weight
from peft_jax.quant.kinds import Quantizer
from peft_jax.quant.quantized import Quantized

T = TypeVar("T")

LEFT_OUT = (
    "Name what to quantize in target_modules: these too, which are then dequantized at each use, or only the others, "
    "to say that these are meant to be left out; or let the program multiply by them as they are."
)


def quantize(
    params: T,
    bits: int | None = None,
    *,
    kind: str | None = None,
    group_size: int | None = None,
    double_quant: bool = False,
    target_modules: str | Sequence[str] | None = None,
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> T:
    """A new tree with quantized weights; composes with every adapter method, before or after it.

    NaN and infinities are refused. Under `jax.jit` there are no values to look at; a block or output channel that holds
    one then becomes NaN as a whole.

    Args:
        params: Any pytree of arrays, or a model handle. The base of an adapted leaf is quantized under its adapter.
        bits: 8, which is ``kind="int8"``.
        kind: ``"nf4"`` or ``"fp4"``, as bitsandbytes rounds to them; ``"int4"`` or ``"int8"``, symmetrically to the
            nearest integer. None for int8.
        group_size: Inputs that share a scale: 64 of nf4 and fp4, 128 of int4, and all of int8 where it is None.
        double_quant: Whether the scales of nf4 and fp4 are rounded to 8 bits too.
        target_modules: What to quantize, by PEFT's rules for ``target_modules``; None for every matmul weight, fused
            experts included, which leaves embeddings, vectors, and the routers and the output head of a model handle
            in float.
        layout: Axes by regex over whole leaf paths, as in `peft_jax.apply_adapter`.
        fn: The function that uses the leaves, to read their axes off its program, as in `peft_jax.apply_adapter`. By
            default every leaf that is the weight of a product in it is quantized. One that reaches its product through
            what is not followed, as ``x @ jnp.tanh(w)``, is left out with a warning.
        args: The other arguments of ``fn``.

    Raises:
        ValueError: if there is no such format, a target hits nothing, every weight in ``fn`` would be left out, a leaf
            is in another format already, its axes are ambiguous, or its values not all finite.

    Example:
        >>> import jax.numpy as jnp
        >>> params = quantize({"mlp": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}})
        >>> params["mlp"]["kernel"].q.dtype, params["mlp"]["bias"].dtype
        (dtype('int8'), dtype('float32'))
    """
    if bits is not None and kind is not None:
        raise ValueError(f"quantize got bits={bits} and kind={kind!r}. Write kind= alone.")
    if bits not in (None, 8):
        raise ValueError(f"quantize(bits={bits}) is not supported. Write bits=8, or kind='nf4', 'fp4' or 'int4'.")
    quantizer = Quantizer(kind or "int8", group_size, double_quant)
    return quantize_as(quantizer, params, target_modules=target_modules, layout=layout, fn=fn, args=args)


def quantize_as(
    quantizer: Quantizer,
    params: T,
    *,
    target_modules: str | Sequence[str] | None = None,
    layout: Layouts | None = None,
    fn: Callable[..., Any] | None = None,
    args: Sequence[Any] = (),
) -> T:
    """`quantize` to the format of a quantizer; the other arguments and errors are the same."""
    if isinstance(params, Handle):
        layouts = {**params.layouts(), **(layout or {})}
        if target_modules is None:
            names = _matmul_names(find_leaves(params.params, layouts))
            target_modules = [name for name in names if name != params.output_module]
        return params.replace(quantize_as(quantizer, params.params, target_modules=target_modules, layout=layouts))
    read = None if fn is None else read_program(params, fn, args)
    found = find_leaves(params, layout, read=read)
    matrices = [leaf for leaf in found if is_matrix(leaf)]
    used = found if read is None else [leaf for leaf in found if leaf.path in read.matrices or is_weight(leaf.value)]
    targets = _matmul_names(used) if target_modules is None else target_modules
    modules = module_names(matrices)
    own = own_names(found)
    if isinstance(targets, str):
        targets = spelled_out_regex(targets, own)
    else:
        targets = spelled_out_names(list(targets), modules, own)
    for target in [targets] if isinstance(targets, str) else targets:
        one = target if isinstance(targets, str) else [target]
        if not names_some(one, modules):
            vectors = module_names([leaf for leaf in found if not is_matrix(leaf)])
            raise ValueError(nothing_hit(f"Target module '{target}'", target, modules, no_matrix(one, vectors)))
    nodes = {}
    for position, leaf in enumerate(found):
        if is_matrix(leaf) and _is_whole_target(leaf, targets):
            nodes[position] = _quantized(quantizer, leaf, leaf.value)
    if read is not None and target_modules is None:
        rest = [leaf.path for position, leaf in enumerate(found) if is_matrix(leaf) and position not in nodes]
        report("quantize(fn=...)", left_out(read.reading, rest), LEFT_OUT, alone=not nodes, stacklevel=3)
    return replace_leaves(params, nodes)


def _matmul_names(found: list[Leaf]) -> list[str]:
    return module_names([leaf for leaf in found if is_matmul(leaf) or _is_experts(leaf)])


def _is_experts(leaf: Leaf) -> bool:
    """Whether a leaf is the fused experts of a mixture; unlike a router they are quantized by default."""
    return is_matrix(leaf) and leaf.layout is not None and leaf.layout.is_experts


def _is_whole_target(leaf: Leaf, targets: str | Sequence[str]) -> bool:
    hit = np.vectorize(lambda name: names_module(targets, name), otypes=[bool])(leaf.names)
    if hit.any() and not hit.all():
        raise ValueError(
            f"Leaf '{leaf.path}' stacks {hit.size} layers, of which {hit.sum()} are to be quantized. "
            "Name all of them or none: a leaf has one element type."
        )
    return bool(hit.any())


def _quantized(quantizer: Quantizer, leaf: Leaf, node: Any) -> Any:
    if is_adapted(node) or is_repeated(node):
        return dataclasses.replace(node, base=_quantized(quantizer, leaf, node.base))
    if isinstance(node, Quantized):
        if (node.kind, node.group_size) == (quantizer.kind, quantizer.size):
            return node
        found, wanted = _spelled(node.kind, node.group_size), _spelled(quantizer.kind, quantizer.size)
        raise ValueError(
            f"Leaf '{leaf.path}' is {found} already, and was to be {wanted}. Quantize the float weights, or name the "
            "leaves to quantize in target_modules."
        )
    layout = leaf.required_layout()
    try:
        return quantizer(node, layout)
    except ValueError as error:
        raise ValueError(f"Leaf '{leaf.path}' cannot be quantized: {error}") from None


def _spelled(kind: str, size: int | None) -> str:
    """A format as messages name it."""
    return kind if size is None else f"{kind} by {size}"

"""What is read off programs: their multiplications, gradients of frozen weights, weights in float."""

import itertools
import math
import re
from collections.abc import Collection, Iterator
from typing import Any

Shapes = Collection[tuple[int, ...]]
GROUPED = "ragged_dot_general"


def products(program: Any, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Every product in a jaxpr and the jaxprs in it, and how often it runs (once in loops of unknown length)."""
    program = getattr(program, "jaxpr", program)
    for equation in program.eqns:
        if equation.primitive.name in ("dot_general", GROUPED):
            yield equation, times
        often = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in _parameters(equation):
            for part in value if isinstance(value, tuple | list) else (value,):
                if hasattr(part, "eqns") or hasattr(getattr(part, "jaxpr", None), "eqns"):
                    yield from products(part, often)


def _parameters(equation: Any) -> Iterator[Any]:
    """The parameters of an equation; of the forms for several platforms that for accelerators alone."""
    platforms = equation.params.get("branches_platforms")
    for name, value in equation.params.items():
        if name == "branches" and platforms is not None:
            forms = dict(zip((names and names[0] for names in platforms), value, strict=True))
            yield forms.get("tpu", forms.get(None))
        else:
            yield value


def multiplications(program: Any) -> int:
    """Floating-point operations of all products, two for each multiplication.

    A row of a grouped product is multiplied by the matrix of its group alone, as on TPU and GPU.
    """
    return sum(operations_of_product(equation) * times for equation, times in products(program))


def operations_of_product(equation: Any) -> int:
    """Two for each row, input and output of a product; a row of a grouped one meets the matrix of its group alone."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    numbers, groups = equation.params.get("dimension_numbers"), ()
    if equation.primitive.name == GROUPED:
        ragged = equation.params["ragged_dot_dimension_numbers"]
        numbers, groups = ragged.dot_dimension_numbers, tuple(ragged.rhs_group_dimensions)
    (_, contracted), (_, batched) = numbers
    shared = {*contracted, *batched, *groups}
    outputs = math.prod(size for axis, size in enumerate(right) if axis not in shared)
    return 2 * math.prod(left) * outputs


def frozen_gradients(program: Any, matrices: Shapes) -> set[tuple[int, ...]]:
    """Shapes of products that are those of a matrix, one way or the other: a weight's gradient is such a product."""
    both = {*matrices, *((*shape[:-2], shape[-1], shape[-2]) for shape in matrices)}
    return {equation.outvars[0].aval.shape for equation, _ in products(program)} & both


def dequantized(text: str, matrices: Shapes, mesh: Any, own: Shapes = (), *, in_blocks: bool = True) -> set[str]:
    """Buffers between the fusions of a compiled program that are a matrix in float, whole or in a device's parts.

    Args:
        text: The program.
        matrices: Shapes of the matrices, which may have an axis of experts in front.
        mesh: The mesh.
        own: Shapes of arrays that the program is given, such as scales and routers, which are no such buffers.
        in_blocks: Whether the inputs of a matrix may be several axes, as those of blocks are. Half of them is a matrix
            too then: that of one number of each byte.
    """
    parts = {1, *mesh.shape.values(), mesh.size}
    wanted = set()
    for shape in matrices:
        for divisors in itertools.product(parts, repeat=len(shape)):
            part = tuple(size // divisor for size, divisor in zip(shape, divisors, strict=True))
            wanted |= {part, (*part[:-2], part[-1], part[-2])}
    found = set()
    for line in _between_fusions(text):
        for kind, sizes in re.findall(r"\b(bf16|f16|f32)\[([\d,]+)\]", line.split(" = ", 1)[1].split("(%")[0]):
            shape = tuple(int(size) for size in sizes.split(",") if int(size) != 1)
            if shape in own:
                continue
            stacked = len(shape) >= 3 and math.prod(shape) > 2**28  # layers are one more axis in front
            forms = (shape, shape[1:]) if stacked else (shape,)
            if any(form in wanted or (in_blocks and _is_in_blocks(form, wanted)) for form in forms):
                found.add(f"{kind}[{sizes}]")
    return found


def _is_in_blocks(shape: tuple[int, ...], wanted: set[tuple[int, ...]]) -> bool:
    """Whether a shape is one of the matrices with its inputs as several axes in front of its outputs."""
    if len(shape) <= 2:
        return False
    inputs = math.prod(shape[:-1])
    return (inputs, shape[-1]) in wanted or (2 * inputs, shape[-1]) in wanted


def _between_fusions(text: str) -> Iterator[str]:
    """The instructions that are not in a fused computation."""
    inside = False
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            inside = "fused" in line.split("(")[0]
        elif " = " in line and not inside:
            yield line

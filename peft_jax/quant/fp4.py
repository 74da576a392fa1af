"""FP4: 4-bit floats of one sign, two exponent bits and one bit of mantissa, with one scale for each 64 elements.

The values are bitsandbytes', whose exponents have a bias of their own: 0, 0.0625, 2, 3, 4, 6, 8 and 12, over 12.
"""

import dataclasses
from functools import partial
from typing import ClassVar

from peft_jax.core.serialized_nodes import register_node
from peft_jax.quant.float_blocks import FloatBlocks

POSITIVE = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)


@partial(
    register_node,
    data_fields=("packed", "scale"),
    meta_fields=("layout", "dense_dtype", "axes", "compute_dtype", "file_dtype"),
)
@dataclasses.dataclass(frozen=True)
class FP4(FloatBlocks):
    """A matrix in FP4; attributes are those of `peft_jax.quant.blockwise.Blockwise`.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> FP4.of(jnp.array([[0.1], [-2.0], [0.6], [1.9]]), pj.Layout()).dense().ravel().tolist()
        [0.010416666977107525, -2.0, 0.6666666865348816, 2.0]
    """

    kind: ClassVar[str] = "fp4"
    table: ClassVar[tuple[float, ...]] = (*POSITIVE, *(-value for value in POSITIVE))

"""NF4: 4-bit floats whose 16 values are quantiles of a normal distribution, with one scale for each 64 elements.

Dettmers et al., 2023, https://arxiv.org/abs/2305.14314, section 3 and appendix E.
"""

import dataclasses
from functools import partial
from typing import ClassVar

from peft_jax.core.serialized_nodes import register_node
from peft_jax.quant.float_blocks import FloatBlocks

# fmt: off
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@partial(
    register_node,
    data_fields=("packed", "scale"),
    meta_fields=("layout", "dense_dtype", "axes", "compute_dtype", "file_dtype"),
)
@dataclasses.dataclass(frozen=True)
class NF4(FloatBlocks):
    """A matrix in NF4; attributes are those of `peft_jax.quant.blockwise.Blockwise`.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> weight = NF4.of(jnp.array([[0.1], [-2.0], [0.3], [1.9]]), pj.Layout())
        >>> weight.packed.dtype, weight.dense().ravel().tolist()
        (dtype('uint8'), [0.15916059911251068, -2.0, 0.3218604028224945, 2.0])
    """

    kind: ClassVar[str] = "nf4"
    table: ClassVar[tuple[float, ...]] = VALUES

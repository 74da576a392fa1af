"""The random numbers that PyTorch's CPU generator draws from a seed, for the arrays that PEFT makes of one.

The generator is the Mersenne Twister of NumPy's legacy generator.
"""

import functools
import math

import numpy as np
from jaxtyping import Float


def seeded(seed: int) -> np.random.RandomState:
    """The generator as ``torch.Generator().manual_seed(seed)`` starts it."""
    return np.random.RandomState(seed % 2**32)


def kaiming_uniform(generator: np.random.RandomState, shape: tuple[int, int]) -> Float[np.ndarray, "out in"]:
    """The numbers of ``kaiming_uniform_`` for ``(out, in)``.

    Of 32 random bits it takes the lower 24; the product and the sum are rounded once, as by a fused instruction.
    """
    return uniform_within(generator, shape, math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1])))


def uniform_within(
    generator: np.random.RandomState, shape: tuple[int, ...], bound: float
) -> Float[np.ndarray, "*shape"]:
    """The numbers of ``uniform_(-bound, bound)``."""
    limit = np.float32(bound)
    return (uniform(generator, shape) * np.float64(limit + limit) - np.float64(limit)).astype(np.float32)


def uniform(generator: np.random.RandomState, shape: tuple[int, ...]) -> Float[np.ndarray, "*shape"]:
    """The numbers of ``torch.rand``, float64 and exact."""
    return generator.randint(0, 2**32, size=shape, dtype=np.uint32) % 2**24 * 2.0**-24


@functools.lru_cache(maxsize=64)
def permutation(seed: int, size: int, count: int) -> np.ndarray:
    """The first ``count`` of PyTorch's random permutation of ``size`` numbers.

    It is a shuffle by exchanges from the front (Fisher and Yates), of which the first numbers need only the first
    exchanges.

    Example:
        >>> permutation(0, 10, 3).tolist()  # torch.randperm(10, generator=torch.Generator().manual_seed(0))[:3]
        [4, 1, 7]
    """
    steps = min(count, size - 1)
    bits = seeded(seed).randint(0, 2**32, size=steps, dtype=np.uint32)
    moved: dict[int, int] = {}
    drawn = []
    for step, random in enumerate(bits.tolist()):
        other = step + random % (size - step)
        drawn.append(moved.get(other, other))
        moved[other] = moved.get(step, step)
    drawn += [moved.get(size - 1, size - 1)] * (count - steps)
    return np.array(drawn)

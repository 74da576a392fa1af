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


def normal(generator: np.random.RandomState, size: int) -> Float[np.ndarray, " size"]:
    """The numbers of ``torch.randn(size)``: pairs of uniform ones, turned into normal ones (Box and Muller).

    They are made in blocks of 16, the first half of which has the cosines; the last block is drawn again where the size
    is no multiple of 16. Fewer than 16 are made one pair after the other, of 53 random bits each.
    """
    if size < 16:
        pairs = [_double_pair(generator) for _ in range((size + 1) // 2)]
        return np.ravel(pairs)[:size].astype(np.float32)
    drawn = uniform(generator, (size,)).astype(np.float32)
    blocks = size // 16 * 16
    drawn[:blocks] = _block_normal(drawn[:blocks].reshape(-1, 16)).ravel()
    if blocks < size:
        drawn[-16:] = _block_normal(uniform(generator, (1, 16)).astype(np.float32))[0]
    return drawn


def _block_normal(uniform: Float[np.ndarray, "blocks 16"]) -> Float[np.ndarray, "blocks 16"]:
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - uniform[:, :8]))
    angle = np.float32(2 * math.pi) * uniform[:, 8:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def _double_pair(generator: np.random.RandomState) -> tuple[float, float]:
    """Two normal numbers, of two uniform ones whose 64 random bits are two draws, the upper half first."""
    first, second, third, fourth = (int(bits) for bits in generator.randint(0, 2**32, size=4, dtype=np.uint32))
    angle = 2 * math.pi * (((first << 32 | second) % 2**53) * 2.0**-53)
    radius = math.sqrt(-2 * math.log1p(-(((third << 32 | fourth) % 2**53) * 2.0**-53)))
    return radius * math.cos(angle), radius * math.sin(angle)

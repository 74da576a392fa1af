"""WaveFT: W' = W + α X, where X is the inverse wavelet transform of a sparse matrix, whose elements are trained.

Bilican et al., 2025, https://arxiv.org/abs/2505.12532. Numbers follow PEFT 0.21.2: the sparse matrix is
padded so that the transform, of one level, is as large as W, of whose middle it is.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import unsupported
from peft_jax.methods.sparse_spectrum import SparseSpectrum
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

SPECTRUM = "waveft_spectrum"
FAMILIES = tuple(f"db{moments}" for moments in range(1, 11))


@register("WAVEFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WaveFTConfig(TargetFields, ExcludeFields, LayerFields, SparseSpectrum):
    """Trains some wavelet coefficients of a change of the matrix; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        n_frequency: Number of trained coefficients of a module, at least 1 and at most the elements of its matrix.
        scaling: The factor α of the change.
        wavelet_family: Daubechies' wavelets, ``"db1"`` to ``"db10"``. PEFT's symlets and coiflets are refused.
        use_idwt: Whether there is a transform; without it the coefficients are elements of the change.
        random_loc_seed: Seed of the coefficients' places, which are those that PyTorch draws from it.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"waveft_only"`` (those of adapted modules).
        n_frequency_pattern: Number of coefficients by pattern of module paths, where it differs from ``n_frequency``.
        init_weights: True starts at no change; False at small normal numbers.

    ``proportional_parameters`` of PEFT's ``WaveFTConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, WaveFTConfig(n_frequency=5, target_modules=["q"]))
        >>> params["q"]["kernel"].params["waveft_spectrum"].shape
        (5,)
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {SPECTRUM: ("frequencies",)}
    structural: ClassVar[tuple[str, ...]] = ("random_loc_seed", "wavelet_family", "use_idwt")

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    proportional_parameters: bool = unsupported(False)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wavelet_family not in FAMILIES:
            raise ValueError(
                f"WaveFTConfig(wavelet_family={self.wavelet_family!r}) is not supported yet. Write one of "
                f"{', '.join(FAMILIES)}."
            )

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Zeros, or small normal numbers."""
        return jnp.zeros(shape) if self.init_weights else 0.01 * jax.random.normal(key, shape)

    def change(self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int) -> Float[Array, "in out"]:
        """``α X``, in float32."""
        values = state["scaling"] * self.coefficients(params, state)
        outputs, inputs = np.unravel_index(self.places(n_in, n_out, len(values)), (n_out, n_in))
        if not self.use_idwt:
            return jnp.zeros((n_in, n_out)).at[inputs, outputs].set(values)
        low = daubechies(FAMILIES.index(self.wavelet_family) + 1)
        size_in, size_out = (size + len(low) - 2 + size % 2 for size in (n_in, n_out))
        inputs, outputs = inputs + (size_in - n_in) // 2, outputs + (size_out - n_out) // 2
        # PEFT's transform takes the quarters of high frequencies of inputs alone and of outputs alone for each other.
        half_in, half_out = size_in // 2, size_out // 2
        high_in, high_out = outputs // half_out, inputs // half_in
        inputs, outputs = inputs % half_in + high_in * half_in, outputs % half_out + high_out * half_out
        spectrum = jnp.zeros((size_in, size_out)).at[inputs, outputs].set(values)
        synthesized = synthesis(synthesis(spectrum, low).T, low).T
        first_in, first_out = ((size - n) // 2 for size, n in zip(synthesized.shape, (n_in, n_out), strict=True))
        return synthesized[first_in : first_in + n_in, first_out : first_out + n_out]


def synthesis(coefficients: Float[Array, "coefficients n"], low: np.ndarray) -> Float[Array, "rows n"]:
    """One level of the inverse transform along the first axis: first the coefficients of ``low``, then the others.

    Coefficient i adds the filter at place 2 i. Of the result the places are cut off that fewer coefficients reach.
    """
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    halves = jnp.split(coefficients, 2)
    count, reach = len(halves[0]), len(low) // 2
    places = []
    for offset in (0, 1):  # even places, and odd ones
        total = jnp.zeros((count + reach - 1, coefficients.shape[1]))
        for half, taps in zip(halves, (low, high), strict=True):
            for start, tap in enumerate(taps[offset::2]):
                total = total + jnp.float32(tap) * jnp.pad(half, ((start, reach - 1 - start), (0, 0)))
        places.append(total)
    full = jnp.stack(places, axis=1).reshape(-1, coefficients.shape[1])
    return full[len(low) - 2 : len(full) - len(low) + 2]


@functools.lru_cache
def daubechies(moments: int) -> np.ndarray:
    """The filter of Daubechies' wavelet with that many vanishing moments: the spectral factor of minimal phase.

    Example:
        >>> daubechies(2).round(4).tolist()
        [0.483, 0.8365, 0.2241, -0.1294]
    """
    # Daubechies' polynomial in y = (2 - z - 1/z) / 4, whose roots give pairs z and 1/z; those within the circle count.
    polynomial = [math.comb(moments - 1 + k, k) for k in range(moments)][::-1]
    taps = np.ones(1, complex)
    for y in np.roots(polynomial):
        pair = np.roots([1, 4 * y - 2, 1])
        taps = np.convolve(taps, [1, -pair[np.argmin(np.abs(pair))]])
    for _ in range(moments):
        taps = np.convolve(taps, [1, 1])
    return np.asarray(taps.real * math.sqrt(2) / taps.real.sum())

"""FourierFT: W' = W + α Re(F⁻¹(S)) with a sparse spectrum S, whose coefficients at random frequencies are trained.

Gao et al., 2024, https://arxiv.org/abs/2405.03003. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.targets import below_others
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.sparse_spectrum import SparseSpectrum
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields

SPECTRUM = "fourierft_spectrum"


@register("FOURIERFT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFTConfig(TargetFields, ExcludeFields, LayerFields, SparseSpectrum):
    """Trains some Fourier coefficients of a change of the matrix; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        n_frequency: Number of trained coefficients of a module, at least 1 and at most the elements of its matrix.
        scaling: The factor α of the change.
        random_loc_seed: Seed of the frequencies, which are those that PyTorch draws from it.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"fourierft_only"`` (those of adapted modules).
        n_frequency_pattern: Number of coefficients by pattern of module paths, where it differs from ``n_frequency``.
            As in PEFT a pattern is the end of a path, with a module in front of it.
        init_weights: True starts at no change; False, the default, at normal numbers, as in PEFT.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 3))}}
        >>> params = pj.apply_adapter(params, FourierFTConfig(n_frequency=5, target_modules=["q"]))
        >>> params["q"]["kernel"].params["fourierft_spectrum"].shape
        (5,)
    """

    learning_rate: ClassVar[float] = 3e-3
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {SPECTRUM: ("frequencies",)}
    structural: ClassVar[tuple[str, ...]] = ("random_loc_seed",)

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False
    bias: str = "none"
    n_frequency_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    init_weights: bool = False

    @staticmethod
    def pattern_rule(pattern: str) -> str:
        """PEFT's older rule."""
        return below_others(pattern)

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Normal numbers, or zeros."""
        return jnp.zeros(shape) if self.init_weights else jax.random.normal(key, shape)

    def change(self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int) -> Float[Array, "in out"]:
        """``α Re(F⁻¹(S))``, in float32, in which there are Fourier transforms."""
        values = self.coefficients(params, state)
        outputs, inputs = np.unravel_index(self.places(n_in, n_out, len(values)), (n_out, n_in))
        spectrum = jnp.zeros((n_in, n_out)).at[inputs, outputs].set(values)
        return state["scaling"] * jnp.fft.ifft2(spectrum).real

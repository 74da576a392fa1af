"""Super-Tuning: W' = W + S, where S is trained at the elements of W with the largest magnitudes, or the smallest.

https://arxiv.org/abs/2607.09287; with a rank it is the paper's Supra, W' = W + S + s A B. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.dropout import dropout
from peft_jax.core.float_types import wider_float
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, check_rank, kaiming
from peft_jax.methods.frozen_arrays import FrozenArrays, check_indices
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import TargetFields

VALUES, PLACES = "supertuning_values", "supertuning_indices"
FIRST, SECOND = "supertuning_lora_A", "supertuning_lora_B"


@register("SUPERTUNING")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SupertuningConfig(TargetFields, StartsFromWeight, FrozenArrays):
    """Trains the elements of a matrix that are largest, and with them a LoRA if asked; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields` say.

    Attributes:
        sparsity: The share of elements that are not trained, in [0, 1).
        select_top: Whether the largest magnitudes are trained; if not the smallest.
        r: Rank of the LoRA; None for none.
        lora_alpha: Its scale is ``lora_alpha / r``; None stands for ``2 * r``.
        lora_dropout: Probability of zeroing an input of the LoRA in training, in [0, 1); ignored
            where there is none, as in PEFT.
        init_weights: True starts at no change; False at a random one.
        save_precomputed_indices: Whether files hold the places of the trained elements. Without them they are found
            again in the base, which has to be the same to the last bit.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.arange(64.0).reshape(8, 8)}}
        >>> params = pj.apply_adapter(params, SupertuningConfig(sparsity=0.9, target_modules=["q"]))
        >>> params["q"]["kernel"].params["supertuning_values"].shape
        (6,)
    """

    takes_conv1d: ClassVar[bool] = False
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        VALUES: ("places",),
        PLACES: ("places",),
        FIRST: ("in", "rank"),
        SECOND: ("rank", "out"),
    }
    structural: ClassVar[tuple[str, ...]] = ("r", "lora_alpha")

    sparsity: float = 0.99
    select_top: bool = True
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "sparsity")
        check_probability(self, "lora_dropout")
        if self.r is not None:
            check_rank(self)
            if self.lora_alpha is None:
                object.__setattr__(self, "lora_alpha", 2 * self.r)
        elif self.lora_alpha is not None:
            raise ValueError(f"lora_alpha={self.lora_alpha} scales a LoRA, which r=None leaves out. Give r too.")

    @property
    def dropout_rate(self) -> float:
        """``lora_dropout``, if there is a LoRA."""
        return 0.0 if self.r is None else self.lora_dropout

    @property
    def frozen(self) -> tuple[str, ...]:
        """The places of the trained elements, if files have them."""
        return (PLACES,) if self.save_precomputed_indices else ()

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The trained elements, their places, and the two factors of the LoRA."""
        count = int(n_in * n_out * (1 - self.sparsity))
        if count < 1:
            raise ValueError(
                f"SUPERTUNING with sparsity={self.sparsity} trains none of the {n_in * n_out} elements of '{module}'. "
                "Lower sparsity."
            )
        found: dict[str, tuple[int, ...]] = {VALUES: (count,)}
        if self.save_precomputed_indices:
            found[PLACES] = (count,)
        if self.r is not None:
            found |= {FIRST: (n_in, self.r), SECOND: (self.r, n_out)}
        return found

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """No change, or normal numbers and a random LoRA."""
        if role == FIRST or (role == SECOND and not self.init_weights):
            return kaiming(key, shape, shape[0])
        is_random = role == VALUES and not self.init_weights
        return jax.random.normal(key, shape) if is_random else jnp.zeros(shape)

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init`, with the places of the elements in the base without other adapters."""
        params, state = self.init(base.layout, base.shape, names, adapted, key)
        return params, state | {PLACES: self._places(base)}, base

    def check_frozen(self, arrays: Mapping[str, np.ndarray], n_in: int, n_out: int, path: str) -> None:
        """Raise ValueError if a place of a file is outside of the matrix."""
        if PLACES in arrays:
            check_indices(PLACES, arrays[PLACES], n_in * n_out, path)

    def state_on(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The places, where files do not have them."""
        return {} if self.save_precomputed_indices else {PLACES: self._places(base)}

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + S + s A B``, added in the adapter's precision."""
        values = jnp.where(state["hit"], params[VALUES], 0)
        outputs, inputs = jnp.divmod(state[PLACES].astype(jnp.int32), matrix.shape[0])
        wide = wider_float(matrix.dtype, values.dtype)
        adapted = matrix.astype(wide).at[inputs, outputs].add(values.astype(wide))
        if FIRST in params:
            adapted = adapted + params[FIRST] @ self._second(params, state)
        return adapted.astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x (W + S) + (dropout(x) A) s B``."""
        sparse = {VALUES: params[VALUES]}
        y = apply_merged(self, sparse, {"hit": state["hit"], PLACES: state[PLACES]}, base, x, product)
        if FIRST not in params:
            return y
        inner = product.down(x if product.looks_up else dropout(x, state), params[FIRST])
        update = product.up(inner, self._second(params, state))
        return product.added(y, update)

    def _second(self, params: Arrays, state: Mapping[str, Any]) -> Float[Array, "*groups rank out"]:
        """``s B``, zero for layers that are not adapted."""
        assert self.r is not None and self.lora_alpha is not None, "there is a LoRA"
        second = params[SECOND]
        return jnp.where(state["hit"][..., None, None], self.lora_alpha / self.r * second, 0).astype(second.dtype)

    def _places(self, base: Weight) -> Shaped[Array, "*stack places"]:
        """Row-major indices ``(*stack, places)`` in PyTorch's ``(out, in)`` matrix, of equals the lower ones."""
        matrix = base.layout.matrix(base.unadapted.dense())
        n_in, n_out = matrix.shape[-2:]
        sizes = jnp.abs(jnp.swapaxes(matrix, -1, -2)).reshape(*matrix.shape[:-2], n_in * n_out)
        (count,) = self.shapes("", n_in, n_out, lookup=False)[VALUES]
        order = jnp.argsort(sizes, axis=-1, descending=self.select_top)
        return order[..., :count].astype(jnp.int32)

"""The interface of LoRA's variants with arrays, factors or noise of their own; its defaults are plain LoRA."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays
from peft_jax.methods.training_hooks import Leaves

Shapes = dict[str, tuple[int, ...]]


class Variant:
    """A variant of LoRA, which has a file and a row of `peft_jax.methods.lora.variants.VARIANTS`.

    Attributes:
        field: The field of `LoraConfig` that switches it on.
        options: The class of that field's value; None where it is a bool.
        axes: The axes of its arrays by role, as those of a method.
        frozen: Roles of its arrays that are not trained.
        reshapes: Whether its factors are stored in other shapes than ``(in, rank)`` and ``(rank, out)``.
        changes_base: Whether it changes the weight that it is put on.
        takes_conv1d: Whether it is for layers stored as transformers' Conv1D.
        penalizes: Whether it adds a penalty to the loss.
        in_training: The role in the state that shows that its first product is another one in training, if it is.
    """

    field: ClassVar[str] = ""
    options: ClassVar[type | None] = None
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    frozen: ClassVar[tuple[str, ...]] = ()
    reshapes: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    takes_conv1d: ClassVar[bool] = True
    penalizes: ClassVar[bool] = False
    in_training: ClassVar[str | None] = None

    def check(self, config: Any) -> None:
        """Raise ValueError if fields of a LoRA config do not suit it."""

    def shapes(self, config: Any, module: str, whole: Shapes) -> Shapes:
        """The shapes of a module's arrays, given those of plain factors."""
        return whole

    def drawn_roles(self, config: Any, module: str) -> tuple[str, ...]:
        """The roles of the arrays that are no plain factors."""
        return tuple(self.axes)

    def initial(self, config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, "..."]:
        """One of these arrays of one layer, fresh."""
        raise NotImplementedError(f"{type(self).__name__} has no array '{role}' of its own.")

    def state(self, config: Any, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The frozen arrays that show that it is on: one number for each stacked layer."""
        return {}

    def changed(self, config: Any, base: Weight, names: np.ndarray, adapted: np.ndarray) -> Weight:
        """The weight that it is put on, as it changes it."""
        return base

    def factors(
        self,
        params: Arrays,
        state: Mapping[str, Any],
        a: Float[Array, "*groups rows rank"],
        b: Float[Array, "*groups ranks out"],
        n_in: int,
    ) -> tuple[Float[Array, "*groups rows rank"], Float[Array, "*groups ranks out"]]:
        """The factors of the change, given those that are stored; as they are where the variant is not on."""
        return a, b

    def inner(
        self, x: Float[Array, "*rows in"], params: Arrays, state: Mapping[str, Any], product: Product
    ) -> Float[Array, "*rows rank"]:
        """The product with the first factor in training, if it is another one there."""
        raise NotImplementedError(f"The first product of {type(self).__name__} is the same in training.")

    def penalty(self, config: Any, leaves: Leaves) -> Float[Array, ""]:
        """The penalty that is added to the loss."""
        raise NotImplementedError(f"{type(self).__name__} has no penalty.")

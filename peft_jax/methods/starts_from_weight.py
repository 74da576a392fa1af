"""Base class of methods whose fresh arrays depend on the weight that they go on."""

from typing import Any

import jax
import numpy as np

from peft_jax.core.weight import Weight


class StartsFromWeight:
    """A method that looks at the base's numbers to initialize its arrays, or takes a part out of the base."""

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """Trained and frozen arrays as from `Method.init`, and the base that they go on."""
        raise NotImplementedError

    def rebased(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> Weight:
        """The base that `init_on` gave, made again for an adapter that is read from a file."""
        return base

    def state_on(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The frozen arrays that no file has: `init_on` makes them of the base, and reading a file makes them again."""
        return {}

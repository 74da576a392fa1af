"""Logits that some models change: they are multiplied by a number, and bent towards a cap."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class LogitsForm:
    """``cap * tanh(scale * logits / cap)``, or without a cap ``scale * logits``.

    Attributes:
        scale: The factor.
        cap: The cap; None for none.

    Example:
        >>> LogitsForm(cap=30.0)(jnp.array([0.0, 1000.0])).tolist()
        [0.0, 30.0]
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: jax.Array) -> jax.Array:
        """The logits in this form."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else softcapped(logits, self.cap)


def softcapped(x: jax.Array, cap: float) -> jax.Array:
    """Numbers bent towards a cap, which they do not exceed."""
    return jnp.tanh(x / cap) * cap


PLAIN = LogitsForm()

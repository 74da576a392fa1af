"""Arrow: of several LoRAs each token takes those whose direction it is nearest to.

Ostapenko et al., 2024, https://arxiv.org/abs/2405.11157, section 4: the direction p_e of a LoRA is the first right
singular vector of its change; a token x takes the k LoRAs of the largest abs(x p_e), by a softmax of these over the
temperature. General knowledge subtraction takes the mean of general LoRAs out of each of them first,
https://aclanthology.org/2025.acl-short.54/. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError, Weight
from peft_jax.methods.base import Arrays, Method
from peft_jax.methods.fields import check_kinds
from peft_jax.methods.torch_draws import normal, seeded

A, B, PROTOTYPES = "expert_A", "expert_B", "prototypes"
ITERATIONS, SMALL = 15, 1e-8  # of the power iteration, and what PEFT adds to its norms


@dataclasses.dataclass(frozen=True)
class ArrowConfig:
    """How tokens are routed; fields and defaults are PEFT's.

    PEFT writes the names of the adapters into it. Here they are those of the model: ``task_0`` and so on.

    Attributes:
        top_k: How many LoRAs a token takes.
        router_temperature: Divisor of the scores in the softmax, above 0.
        use_gks: Whether the mean of general LoRAs is taken out of the others first.
        rng_seed: Seed of the vector that the search for directions begins with, as PyTorch draws it. None is 0; PEFT
            draws another one in each run.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> ArrowConfig(top_k=2).router_temperature
        1.0
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.top_k < 1 or self.router_temperature <= 0:
            raise ValueError(f"Arrow takes top_k of at least 1 and a router_temperature above 0, got {self}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowRouter(Method):
    """The router that `peft_jax.create_arrow_model` puts over loaded LoRAs; it trains nothing, and has no file.

    Attributes:
        arrow_config: How it routes.
    """

    peft_type: ClassVar[str] = "LORA"
    structural: ClassVar[tuple[str, ...]] = ("arrow_config",)

    arrow_config: ArrowConfig

    @property
    def label(self) -> str:
        """Arrow: its type is LoRA's, as in PEFT."""
        return "ARROW"

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> NoReturn:
        """Raise ValueError: there is nothing."""
        raise ValueError(
            "An Arrow router has no file: it is made of the LoRAs that it routes. Name those in selected_adapters=; "
            "call pj.create_arrow_model for their folders again."
        )

    def merge(self, params: Arrays, state: Mapping[str, Any], matrix: Float[Array, "in out"]) -> NoReturn:
        """Raise MergeError: each token has another matrix."""
        raise MergeError(
            "An Arrow router chooses LoRAs for each token, which no merged weight does. Keep it apart, or take it off: "
            "pj.delete_adapter(model, 'arrow_router')."
        )

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + sum_e c_e s_e (x A_e) B_e``, with the coefficients ``c`` of each row of ``x``."""
        if not product.is_plain or state["hit"].ndim:
            raise MergeError(
                "Arrow routes the rows of plain products alone, and a module of its LoRAs is used in another way. Take "
                "LoRAs without it among their targets."
            )
        a, b = state[A], state[B]
        y, tokens = base.apply(x, product), x.astype(a.dtype)
        scores = jnp.abs(product.down(tokens, state[PROTOTYPES].T))
        chosen, places = jax.lax.top_k(scores, self.arrow_config.top_k)
        shares = jax.nn.softmax(chosen / self.arrow_config.router_temperature, axis=-1)
        is_chosen = jax.nn.one_hot(places, len(a), dtype=a.dtype)
        coefficients = jnp.einsum("...k,...ke->...e", shares, is_chosen) * jnp.expand_dims(
            state["scaling"], range(scores.ndim - 1)
        )
        inner = jnp.einsum("...i,eir->...er", tokens, a, precision=product.precision)
        update = jnp.einsum("...er,ero->...o", inner * coefficients[..., None], b, precision=product.precision)
        return product.added(y, update)


def routed(
    experts: Mapping[str, np.ndarray],
    general: Mapping[str, np.ndarray] | None,
    scaling: np.ndarray,
    adapted: np.ndarray,
    seed: int | None,
) -> dict[str, Any]:
    """The state of a leaf's router.

    Args:
        experts: Of ``lora_A`` and ``lora_B`` those of all LoRAs, ``(experts, *stack, ...)``.
        general: Those whose mean is taken out; None for none.
        scaling: The scale of each LoRA, ``(experts, *stack)``.
        adapted: Which of the stacked layers are adapted.
        seed: `ArrowConfig.rng_seed`.
    """
    a, b = (np.asarray(experts[role], np.float32) for role in ("lora_A", "lora_B"))
    if general is not None:
        a, b = a - np.mean(general["lora_A"], axis=0)[None], b - np.mean(general["lora_B"], axis=0)[None]
    prototypes = directions(a, b, normal(seeded(seed or 0), a.shape[-2]))
    last = adapted.ndim  # the axis of experts comes after those of the stack
    arrays = {A: a, B: b, PROTOTYPES: prototypes, "scaling": np.asarray(scaling, np.float32)}
    return {"hit": jnp.asarray(adapted), **{role: jnp.asarray(np.moveaxis(x, 0, last)) for role, x in arrays.items()}}


def directions(
    a: Float[np.ndarray, "*layers in rank"], b: Float[np.ndarray, "*layers rank out"], start: Float[np.ndarray, " in"]
) -> Float[np.ndarray, "*layers in"]:
    """The first left singular vectors of ``A B``, of either sign, as near as power iterations come from ``start``.

    Example:
        >>> a, b = np.float32([[3, 0], [0, 1]]), np.float32([[1, 0], [0, 1]])
        >>> np.round(np.abs(directions(a, b, np.float32([1, 1]))), 3).tolist()
        [1.0, 0.0]
    """
    inner = b @ np.swapaxes(b, -1, -2)
    found = np.broadcast_to(start / (np.linalg.norm(start) + SMALL), a.shape[:-1]).astype(np.float32)[..., None]
    for _ in range(ITERATIONS):
        moved = a @ (inner @ (np.swapaxes(a, -1, -2) @ found))
        found = moved / (np.linalg.norm(moved, axis=-2, keepdims=True) + SMALL)
    return found[..., 0].astype(np.float32)

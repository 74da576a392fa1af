"""VeLoRA: backward has the inputs of A in one direction for each group of features alone, which takes less memory.

Miles et al., 2024, https://arxiv.org/abs/2405.17991. What the layer computes is LoRA's; the gradient
of A is that of reconstructed inputs. Numbers follow PEFT 0.21.2. With ``"batch_average"`` the direction is made of the
inputs of each forward pass. PEFT's file holds the last one, which nothing reads; ours holds that of the file it came
from, or zeros.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError
from peft_jax.methods.base import Arrays
from peft_jax.methods.fields import check_kinds
from peft_jax.methods.lora.variant import Shapes, Variant

DIRECTION = "lora_velora_embed"
SCALE, AVERAGES = "velora_scale", "velora_averages"  # in the state: the scale, and whether inputs make the direction


@dataclasses.dataclass(frozen=True)
class VeloraConfig:
    """How VeLoRA compresses inputs.

    Attributes:
        num_groups: Number of groups of features, at least 1.
        scale: Factor of the reconstructed inputs.
        init_type: ``"batch_average"``, the direction of the mean of a forward pass's groups of features, or
            ``"random"``. PEFT's ``"batch_average_once"`` keeps the first pass's direction, which a step without side
            effects cannot hand on: an adapter of it is for inference.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> config = pj.LoraConfig(target_modules=["q"], velora_config=VeloraConfig(num_groups=2))
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((8, 6))}}, config)
        >>> params["q"]["kernel"].state["lora_velora_embed"].shape
        (4,)
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        check_kinds(self)
        kinds = ("batch_average", "batch_average_once", "random")
        if self.num_groups < 1 or self.init_type not in kinds:
            raise ValueError(f"VeLoRA takes num_groups of at least 1 and an init_type of {kinds}, got {self}.")


class Velora(Variant):
    """VeLoRA as a row of the table of variants."""

    field = "velora_config"
    options = VeloraConfig
    axes = {DIRECTION: ("part",)}
    frozen = (DIRECTION,)
    in_training = SCALE

    def check(self, config: Any) -> None:
        """Raise ValueError if the direction is the first batch's, and the adapter is to be trained."""
        if config.velora_config["init_type"] == "batch_average_once" and not config.inference_mode:
            raise ValueError(
                "velora_config with init_type='batch_average_once' is not supported in training: it keeps a direction "
                "of the first batch, which a step without side effects cannot. Write 'batch_average' or 'random', or "
                "load the adapter for inference."
            )

    def shapes(self, config: Any, module: str, whole: Shapes) -> Shapes:
        """Those of plain factors, and the direction's: the features of a group."""
        n_in, _ = whole["lora_A"]
        return {**whole, DIRECTION: (math.ceil(n_in / config.velora_config["num_groups"]),)}

    def initial(self, config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, " part"]:
        """A fresh direction: random of length 1, or zeros where inputs make it."""
        if config.velora_config["init_type"] != "random":
            return jnp.zeros(shape)
        return _unit(jax.random.normal(key, shape))

    def state(self, config: Any, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The scale, and whether inputs make the direction."""
        options = config.velora_config
        scale, averages = np.float32(options["scale"]), options["init_type"] != "random"
        return {SCALE: jnp.full(names.shape, scale), AVERAGES: jnp.full(names.shape, averages)}

    def inner(
        self, x: Float[Array, "*rows in"], params: Arrays, state: Mapping[str, Any], product: Product
    ) -> Float[Array, "*rows rank"]:
        """``x A``, whose gradient in A is that of the reconstructed inputs."""
        return down(x, params, state, product)


def down(
    x: Float[Array, "*rows in"], params: Arrays, state: Mapping[str, Any], product: Product
) -> Float[Array, "*rows rank"]:
    """``x A``, whose gradient in A is that of the reconstructed inputs.

    Raises:
        MergeError: if ``x`` is not multiplied as a plain matrix is.
    """
    a = params["lora_A"]
    if not product.is_plain or product.in_sizes or a.ndim > 2:
        raise MergeError(
            "VeLoRA compresses the rows of plain products alone, and a module of it is used in another way. Leave the "
            "module out of target_modules."
        )
    x = x.astype(a.dtype)
    groups = _grouped(jax.lax.stop_gradient(x), state[DIRECTION].shape[-1])
    average = _unit(jnp.mean(groups, axis=tuple(range(groups.ndim - 1))))
    direction = jnp.where(state[AVERAGES], average, state[DIRECTION]).astype(a.dtype)
    return _compressed(x, a, direction, state[SCALE].astype(a.dtype))


def _grouped(x: Float[Array, "*rows in"], size: int) -> Float[Array, "*rows groups part"]:
    """Features in groups, the last one filled up with zeros."""
    groups = math.ceil(x.shape[-1] / size)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, groups * size - x.shape[-1])]
    return jnp.pad(x, padding).reshape(*x.shape[:-1], groups, size)


def _unit(direction: Float[Array, " part"]) -> Float[Array, " part"]:
    """The direction with length 1; that of ones in place of zero."""
    direction = direction.astype(jnp.float32)
    direction = jnp.where(jnp.any(direction != 0), direction, 1)
    return direction / jnp.linalg.norm(direction)


@jax.custom_vjp
def _compressed(x: jax.Array, a: jax.Array, direction: jax.Array, scale: jax.Array) -> jax.Array:
    return x @ a


def _forward(
    x: jax.Array, a: jax.Array, direction: jax.Array, scale: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The product, and what backward has: of ``x`` one number for each group of features."""
    return x @ a, (_grouped(x, len(direction)) @ direction, a, direction, scale)


def _backward(kept: tuple[jax.Array, ...], slope: jax.Array) -> tuple[jax.Array | None, ...]:
    numbers, a, direction, scale = kept
    features = jnp.multiply.outer(numbers, direction).reshape(*numbers.shape[:-1], -1)
    inputs = features[..., : len(a)] * scale
    slope = slope.astype(a.dtype)
    gradient = inputs.reshape(-1, len(a)).T @ slope.reshape(-1, slope.shape[-1])
    return slope @ a.T, gradient, jnp.zeros_like(direction), jnp.zeros_like(scale)


_compressed.defvjp(_forward, _backward)

"""BD-LoRA: one of LoRA's factors is block-diagonal.

Wang et al., 2025, https://arxiv.org/abs/2510.23346. A is block-diagonal in layers whose rows are sharded, B in layers
whose columns are. Only the blocks are stored, side by side: A is ``(in / n, r)`` or B ``(r / n, out)``. The product
uses the dense factor. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.methods.base import Arrays
from peft_jax.methods.fields import check_kinds
from peft_jax.methods.lora.variant import Shapes, Variant

BLOCKS = "blocks"  # in the state: the number of blocks of one factor, of each stacked layer


@dataclasses.dataclass(frozen=True)
class BdLoraConfig:
    """Which factors are block-diagonal.

    Attributes:
        target_modules_bd_a: Parts of the paths of modules whose A is.
        target_modules_bd_b: Parts of the paths of modules whose B is.
        nblocks: Number of blocks, at least 1: of the devices that share a layer.
        match_strict: Whether each target has to be one of them; False leaves others plain LoRAs.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> options = BdLoraConfig(target_modules_bd_a=["down"], nblocks=2)
        >>> config = pj.LoraConfig(r=4, target_modules=["down"], use_bdlora=options)
        >>> params = pj.apply_lora({"down": {"kernel": jnp.ones((8, 6))}}, config)
        >>> params["down"]["kernel"].params["lora_A"].shape  # two blocks, side by side
        (4, 4)
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.nblocks < 1:
            raise ValueError(f"BD-LoRA's nblocks is at least 1, got {self.nblocks}.")


class BdLora(Variant):
    """BD-LoRA as a row of the table of variants."""

    field = "use_bdlora"
    options = BdLoraConfig
    reshapes = True

    def shapes(self, config: Any, module: str, whole: Shapes) -> Shapes:
        """Those of plain factors, one of them in blocks."""
        return shapes(config.use_bdlora, module, whole)

    def drawn_roles(self, config: Any, module: str) -> tuple[str, ...]:
        """The factor that is in blocks, if one is."""
        which = blocked(config.use_bdlora, module)
        return () if which is None else (which,)

    def initial(self, config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, "rows columns"]:
        """The blocks of a fresh factor: zero of B, and of A uniform as PyTorch's ``kaiming_uniform_``."""
        if role == "lora_B":
            return jnp.zeros(shape)
        return jax.random.uniform(key, shape, minval=-1.0) * (6 / shape[0]) ** 0.5

    def state(self, config: Any, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The number of blocks.

        Raises:
            ValueError: if layers that are stacked in one array have blocks in different factors.
        """
        options, modules = config.use_bdlora, names[adapted]
        kinds = {blocked(options, str(module)) for module in modules.flat}
        if len(kinds) > 1:
            raise ValueError(
                f"use_bdlora makes other factors block-diagonal in some of the layers of '{modules.flat[0]}' than in "
                "others, and their arrays are one. Name the modules without the number of a layer."
            )
        return {} if kinds <= {None} else {BLOCKS: jnp.full(names.shape, options["nblocks"])}

    def factors(
        self,
        params: Arrays,
        state: Mapping[str, Any],
        a: Float[Array, "*groups rows rank"],
        b: Float[Array, "*groups ranks out"],
        n_in: int,
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """Both factors with zeros around the blocks."""
        return expanded(a, b, state["rank"], n_in) if BLOCKS in state else (a, b)


def blocked(options: Mapping[str, Any], module: str) -> str | None:
    """The factor of a module that is block-diagonal: ``"lora_A"``, ``"lora_B"``, or None.

    Raises:
        ValueError: if both are, or none is and ``match_strict`` asks for one.

    Example:
        >>> blocked({"target_modules_bd_a": ["down"], "target_modules_bd_b": ["q_"], "match_strict": True}, "0.q_proj")
        'lora_B'
    """
    in_a = _is_named(options["target_modules_bd_a"], module)
    in_b = _is_named(options["target_modules_bd_b"], module)
    if in_a and in_b:
        raise ValueError(
            f"target_modules_bd_a and target_modules_bd_b of use_bdlora both have '{module}'. Remove it from one."
        )
    if not in_a and not in_b:
        if options["match_strict"]:
            raise ValueError(
                f"Neither target_modules_bd_a nor target_modules_bd_b of use_bdlora has '{module}'. Name it there, or "
                "write match_strict=False for a plain LoRA."
            )
        return None
    return "lora_A" if in_a else "lora_B"


def _is_named(parts: Sequence[str] | None, module: str) -> bool:
    return any(part in module for part in parts or ())


def shapes(options: Mapping[str, Any], module: str, whole: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays, given those of plain factors.

    Raises:
        ValueError: if the blocks do not divide the factor.
    """
    which, count = blocked(options, module), options["nblocks"]
    if which is None:
        return dict(whole)
    rows, columns = whole[which]
    if rows % count or columns % count:
        raise ValueError(
            f"use_bdlora makes {count} blocks of {which} of '{module}', which is {rows} x {columns}. Choose nblocks "
            "that divides both."
        )
    return {**whole, which: (rows // count, columns)}


def expanded(
    a: Float[Array, "*groups rows rank"], b: Float[Array, "*groups ranks out"], rank: jax.Array, n_in: int
) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
    """Both factors with zeros around the blocks.

    Args:
        a: ``(in, rank)``, or blocks of it ``(in / n, rank)``.
        b: ``(rank, out)``, or blocks of it ``(rank / n, out)``.
        rank: The rank, which padding may have made larger, of each group.
        n_in: Rows of the whole A.
    """
    width, n_out = a.shape[-1], b.shape[-1]
    if a.shape[-2] != n_in:
        rows, count = a.shape[-2], n_in // a.shape[-2]
        of_row = _numbers(n_in, rank) // rows
        of_column = _numbers(width, rank) // jnp.maximum(rank[..., None] // count, 1)
        is_inside = of_row[..., :, None] == of_column[..., None, :]
        return jnp.where(is_inside, jnp.concatenate([a] * count, axis=-2), 0), b
    if b.shape[-2] != width:
        count = width // b.shape[-2]
        of_each = jnp.maximum(rank[..., None] // count, 1)
        place, of_row = _numbers(width, rank) % of_each, _numbers(width, rank) // of_each
        of_column = _numbers(n_out, rank) // (n_out // count)
        taken = jnp.take_along_axis(b, place[..., None], axis=-2)
        return a, jnp.where(of_row[..., :, None] == of_column[..., None, :], taken, 0)
    return a, b


def _numbers(size: int, rank: jax.Array) -> jax.Array:
    """``0`` to ``size - 1``, with the axes of groups in front."""
    return jnp.expand_dims(jnp.arange(size), range(rank.ndim))

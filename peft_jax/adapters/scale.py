"""Make an adapter count more or less."""

import dataclasses
from typing import TypeVar

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapters, map_adapted

T = TypeVar("T")


def scale_adapter(params: T, scale: float, adapter_name: str | None = None) -> T:
    """A new tree in which what adapters add to the base counts ``scale`` times as much.

    It is PEFT's ``scale_layer`` and ``rescale_adapter_scale``; to undo it, keep the old tree. As there, weights that
    are trained whole stay as they are, and a saved adapter has the scale of its config.

    Args:
        params: A tree or model handle with adapters.
        scale: The factor.
        adapter_name: Which adapter; None for all that are active and have a scale.

    Raises:
        ValueError: if there is no such adapter, or it has no scale.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> config = pj.LoraConfig(r=2, lora_alpha=3, target_modules=["q"])
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, config)
        >>> pj.scale_adapter(params, 0.5)["q"]["kernel"].state["scaling"].item()
        0.75
    """
    known = adapters(params)
    if adapter_name is not None and adapter_name not in known:
        raise ValueError(f"No adapter is named '{adapter_name}'. Found: {sorted(known)}.")
    changed = set()

    def scaled(_: str, leaf: Adapted) -> Adapted:
        meant = leaf.active if adapter_name is None else leaf.tag.name == adapter_name
        if not meant or "scaling" not in leaf.state:
            return leaf
        changed.add(leaf.tag.name)
        factor = leaf.state["scaling"].dtype.type(scale)
        return dataclasses.replace(leaf, state={**leaf.state, "scaling": leaf.state["scaling"] * factor})

    new: T = map_adapted(scaled, params)
    if not changed:
        methods = sorted({config.peft_type for name, config in known.items() if adapter_name in (None, name)})
        raise ValueError(f"No adapter that is meant has a scale: found {methods or 'none'}. LORA has one, for example.")
    return new

"""The table of LoRA's variants that have arrays, factors or noise of their own, and what a `LoraConfig` asks it.

DoRA, aLoRA and the initializers stand by themselves, and at most one of all is on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.layout import Layout
from peft_jax.core.paths import keys_from_names
from peft_jax.core.product import Product
from peft_jax.methods.base import Arrays
from peft_jax.methods.lora.bdlora import BdLora
from peft_jax.methods.lora.checks import options_of
from peft_jax.methods.lora.kasa import Kasa
from peft_jax.methods.lora.monteclora import MonteClora
from peft_jax.methods.lora.qalora import QaLora
from peft_jax.methods.lora.variant import Shapes, Variant
from peft_jax.methods.lora.velora import Velora

VARIANTS: Mapping[str, Variant] = {
    variant.field: variant for variant in (Kasa(), BdLora(), Velora(), MonteClora(), QaLora())
}
PLAIN = Variant()
AXES = {role: axes for variant in VARIANTS.values() for role, axes in variant.axes.items()}


def variant_of(config: Any) -> str | None:
    """The field of a LoRA config that switches one of these variants on, if any does."""
    for field in VARIANTS:
        if getattr(config, field) not in (None, False):
            return field
    return None


def chosen(config: Any) -> Variant:
    """The variant of a LoRA config, or plain LoRA."""
    return VARIANTS.get(variant_of(config) or "", PLAIN)


def check(config: Any) -> None:
    """Make dictionaries of a LoRA config's options of variants.

    Raises:
        ValueError: if options are wrong, or go with another variant or field that is on.
    """
    for field, variant in VARIANTS.items():
        given = getattr(config, field)
        if variant.options is not None and given is not None:
            options: Any = given if isinstance(given, variant.options) else options_of(variant.options, given, field)
            object.__setattr__(config, field, dataclasses.asdict(options))
    variant = chosen(config)
    if variant is PLAIN:
        return
    others = {field: getattr(config, field) for field in VARIANTS if field != variant.field}
    others |= {
        "use_dora": config.use_dora,
        "alora_invocation_tokens": config.alora_invocation_tokens,
        "target_parameters": config.target_parameters,
    }
    if config.init_lora_weights not in (True, False, None, "gaussian"):
        others["init_lora_weights"] = config.init_lora_weights
    if variant.reshapes:
        others["lora_bias"] = config.lora_bias
    if variant.changes_base:  # weights that replicated layers share
        others["layer_replication"] = config.layer_replication
    if wrong := {field: value for field, value in others.items() if value}:
        raise ValueError(f"{variant.field} does not go with {wrong}. Remove one of them.")
    variant.check(config)


def check_layout(config: Any, module: str, layout: Layout) -> None:
    """Raise ValueError if a module is none that PEFT has a config's variant for."""
    variant = chosen(config)
    if variant is PLAIN:
        return
    kind = ""
    if layout.lookup:
        kind = "an embedding"
    elif layout.taps or layout.groups > 1:
        kind = "a convolution"
    elif layout.stored_in_out and not variant.takes_conv1d:
        kind = "stored as transformers' Conv1D"
    if kind:
        raise ValueError(
            f"{variant.field} is for linear layers, and '{module}' is {kind}. Leave it out of target_modules."
        )


def drawn(
    config: Any, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
) -> dict[str, jax.Array]:
    """The fresh arrays of a leaf that are no plain factors: padded, the stacked axes first."""
    variant = chosen(config)
    if variant is PLAIN:
        return {}
    layers = [Shapes()] * names.size
    for at in np.flatnonzero(adapted):
        layers[at] = config.leaf_shapes(names.flat[at], layout, shape)
    found = {}
    for number, role in enumerate(variant.drawn_roles(config, str(names[adapted].flat[0]))):
        largest = tuple(np.max([layer[role] for layer in layers if layer], axis=0).tolist())
        keys = jnp.reshape(keys_from_names(jax.random.fold_in(key, 3 + number), names), (-1,))
        arrays = [jnp.zeros(largest)] * names.size
        for at in np.flatnonzero(adapted):
            own = layers[at][role]
            padding = [(0, n - m) for n, m in zip(largest, own, strict=True)]
            arrays[at] = jnp.pad(variant.initial(config, role, own, keys[at]), padding)
        found[role] = jnp.reshape(jnp.stack(arrays), (*names.shape, *largest))
    return found


def factors(
    params: Arrays, state: Mapping[str, Any], b: Float[Array, "*groups rank out"], n_in: int
) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
    """The factors of the change, given B as it is stored; A is ``params["lora_A"]`` itself where that is whole."""
    a = params["lora_A"]
    for variant in VARIANTS.values():
        a, b = variant.factors(params, state, a, b, n_in)
    return a, b


def in_training(state: Mapping[str, Any]) -> Variant | None:
    """The variant whose first product is another one in training, where dropout is switched on."""
    if "dropout" not in state:
        return None
    return next((variant for variant in VARIANTS.values() if variant.in_training in state), None)


def inner(
    x: Float[Array, "*rows in"],
    a: Float[Array, "*groups in rank"],
    params: Arrays,
    state: Mapping[str, Any],
    product: Product,
) -> Float[Array, "*rows rank"]:
    """The product with the first factor, as training has it where dropout is switched on."""
    variant = in_training(state)
    if variant is not None:
        return variant.inner(x, params, state, product)
    return product.down_by_role(x, params, "lora_A") if a is params["lora_A"] else product.down(x, a)

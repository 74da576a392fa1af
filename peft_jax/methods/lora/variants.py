"""LoRA's variants that have arrays, factors or noise of their own: what a `LoraConfig` asks them.

They are KaSA, BD-LoRA, QA-LoRA, VeLoRA and MonteCLoRA. DoRA, aLoRA and the initializers stand by themselves, and at
most one of all is on.
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
from peft_jax.methods.lora import bdlora, kasa, monteclora, qalora, velora
from peft_jax.methods.lora.checks import options_of

Shapes = dict[str, tuple[int, ...]]

OPTIONS = {
    "kasa_config": kasa.KasaConfig,
    "use_bdlora": bdlora.BdLoraConfig,
    "velora_config": velora.VeloraConfig,
    "monteclora_config": monteclora.MontecloraConfig,
}
FIELDS = (*OPTIONS, "use_qalora")
RESHAPING = ("use_bdlora", "use_qalora")  # those whose factors are not (in, rank) and (rank, out)
AXES: dict[str, tuple[str, ...]] = {
    kasa.DIAGONAL: ("rank",),
    velora.DIRECTION: ("part",),
    monteclora.SPREAD: ("rank",),
    monteclora.CONCENTRATION: ("samples",),
    monteclora.WEIGHTS: ("samples",),
    monteclora.VARIANCE: ("rank", "column"),
}
FROZEN = {"velora_config": (velora.DIRECTION,), "monteclora_config": (monteclora.WEIGHTS, monteclora.VARIANCE)}


def variant_of(config: Any) -> str | None:
    """The field of a LoRA config that switches one of these variants on, if any does."""
    for field in FIELDS:
        if getattr(config, field) not in (None, False):
            return field
    return None


def check(config: Any) -> None:
    """Make dictionaries of a LoRA config's options of variants.

    Raises:
        ValueError: if options are wrong, or go with another variant or field that is on.
    """
    for field, options in OPTIONS.items():
        given = getattr(config, field)
        if given is not None:
            chosen: Any = given if isinstance(given, options) else options_of(options, given, field)
            object.__setattr__(config, field, dataclasses.asdict(chosen))
    variant = variant_of(config)
    if variant is None:
        return
    others = {field: getattr(config, field) for field in FIELDS if field != variant}
    others |= {
        "use_dora": config.use_dora,
        "alora_invocation_tokens": config.alora_invocation_tokens,
        "target_parameters": config.target_parameters,
    }
    if config.init_lora_weights not in (True, False, None, "gaussian"):
        others["init_lora_weights"] = config.init_lora_weights
    if variant in RESHAPING:
        others["lora_bias"] = config.lora_bias
    if variant == "kasa_config":  # it changes weights that replicated layers share
        others["layer_replication"] = config.layer_replication
    if wrong := {field: value for field, value in others.items() if value}:
        raise ValueError(f"{variant} does not go with {wrong}. Remove one of them.")
    if variant == "velora_config":
        velora.check_training(config)
    if config.use_qalora and config.qalora_group_size < 1:
        raise ValueError(f"qalora_group_size is at least 1, got {config.qalora_group_size}.")


def check_layout(config: Any, module: str, layout: Layout) -> None:
    """Raise ValueError if a module is none that PEFT has a config's variant for."""
    variant = variant_of(config)
    if variant is None:
        return
    kind = ""
    if layout.lookup:
        kind = "an embedding"
    elif layout.taps or layout.groups > 1:
        kind = "a convolution"
    elif layout.stored_in_out and variant == "kasa_config":
        kind = "stored as transformers' Conv1D"
    if kind:
        raise ValueError(f"{variant} is for linear layers, and '{module}' is {kind}. Leave it out of target_modules.")


def shapes(config: Any, module: str, whole: Shapes) -> Shapes:
    """The shapes of a module's arrays, given those of plain factors."""
    n_in, rank = whole["lora_A"]
    match variant_of(config):
        case "kasa_config":
            return {**whole, kasa.DIAGONAL: (rank,)}
        case "use_bdlora":
            return bdlora.shapes(config.use_bdlora, module, whole)
        case "use_qalora":
            return qalora.shapes(config.qalora_group_size, module, whole)
        case "velora_config":
            return {**whole, velora.DIRECTION: velora.direction_shape(config.velora_config, n_in)}
        case "monteclora_config":
            return whole | monteclora.shapes(config.monteclora_config, rank)
    return whole


def drawn(
    config: Any, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
) -> dict[str, jax.Array]:
    """The fresh arrays of a leaf that are no plain factors: padded, the stacked axes first."""
    if variant_of(config) is None:
        return {}
    layers = [Shapes()] * names.size
    for at in np.flatnonzero(adapted):
        layers[at] = config.leaf_shapes(names.flat[at], layout, shape)
    found = {}
    for number, role in enumerate(_drawn_roles(config, str(names[adapted].flat[0]))):
        largest = tuple(np.max([layer[role] for layer in layers if layer], axis=0).tolist())
        keys = jnp.reshape(keys_from_names(jax.random.fold_in(key, 3 + number), names), (-1,))
        arrays = [jnp.zeros(largest)] * names.size
        for at in np.flatnonzero(adapted):
            own = layers[at][role]
            padding = [(0, n - m) for n, m in zip(largest, own, strict=True)]
            arrays[at] = jnp.pad(_initial(config, role, own, keys[at]), padding)
        found[role] = jnp.reshape(jnp.stack(arrays), (*names.shape, *largest))
    return found


def _drawn_roles(config: Any, module: str) -> tuple[str, ...]:
    """The roles of the arrays that are no plain factors."""
    match variant_of(config):
        case "use_qalora":
            return ("lora_A",)
        case "use_bdlora":
            which = bdlora.blocked(config.use_bdlora, module)
            return () if which is None else (which,)
        case "kasa_config":
            return (kasa.DIAGONAL,)
        case "velora_config":
            return (velora.DIRECTION,)
    return (monteclora.SPREAD, monteclora.CONCENTRATION, monteclora.WEIGHTS, monteclora.VARIANCE)


def _initial(config: Any, role: str, shape: tuple[int, ...], key: jax.Array) -> Float[Array, "..."]:
    """One of these arrays of one layer, fresh."""
    if role == kasa.DIAGONAL:
        return jax.random.normal(key, shape)
    if role == velora.DIRECTION:
        return velora.initial(config.velora_config, shape, key)
    if config.use_qalora:
        return qalora.initial(shape, key)
    if config.use_bdlora is not None:
        return bdlora.initial(role, shape, key)
    return monteclora.initial(role, shape, key)


def state(config: Any, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
    """The frozen arrays that tell `factors` and `inner` which variant is on: one number for each stacked layer."""

    def everywhere(value: Any) -> jax.Array:
        return jnp.full(names.shape, value)

    match variant_of(config):
        case "use_bdlora":
            return _blocks(config.use_bdlora, names[adapted], names.shape)
        case "use_qalora":
            return {qalora.POOLED: everywhere(True)}
        case "velora_config":
            options = config.velora_config
            averages = everywhere(options["init_type"] != "random")
            return {velora.SCALE: everywhere(np.float32(options["scale"])), velora.AVERAGES: averages}
        case "monteclora_config":
            return {monteclora.SCALER: everywhere(np.float32(config.monteclora_config["sample_scaler"]))}
    return {}


def _blocks(options: Mapping[str, Any], modules: np.ndarray, stack: tuple[int, ...]) -> dict[str, Any]:
    """BD-LoRA's, of layers that are stacked in one array."""
    kinds = {bdlora.blocked(options, str(module)) for module in modules.flat}
    if len(kinds) > 1:
        raise ValueError(
            f"use_bdlora makes other factors block-diagonal in some of the layers of '{modules.flat[0]}' than in "
            "others, and their arrays are one. Name the modules without the number of a layer."
        )
    return {} if kinds <= {None} else {bdlora.BLOCKS: jnp.full(stack, options["nblocks"])}


def factors(
    params: Arrays, state: Mapping[str, Any], b: Float[Array, "*groups rank out"], n_in: int
) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
    """The factors of the change, given B as it is stored; A is ``params["lora_A"]`` itself where that is whole."""
    a = params["lora_A"]
    if bdlora.BLOCKS in state:
        a, b = bdlora.expanded(a, b, state["rank"], n_in)
    if qalora.POOLED in state:
        a = qalora.expanded(a, n_in)
    return a, kasa.scaled(b, params) if kasa.DIAGONAL in params else b


def differs_in_training(state: Mapping[str, Any]) -> bool:
    """Whether dropout is switched on in a variant whose first product is another one in training."""
    return "dropout" in state and (velora.SCALE in state or monteclora.SCALER in state)


def inner(
    x: Float[Array, "*rows in"],
    a: Float[Array, "*groups in rank"],
    params: Arrays,
    state: Mapping[str, Any],
    product: Product,
) -> Float[Array, "*rows rank"]:
    """The product with the first factor, as training has it where dropout is switched on."""
    if "dropout" in state and velora.SCALE in state:
        return velora.down(x, params, state, product)
    if "dropout" in state and monteclora.SCALER in state:
        return product.down(x, monteclora.first_factor(params, state))
    return product.down_by_role(x, params, "lora_A") if a is params["lora_A"] else product.down(x, a)


def penalty(config: Any, leaves: Mapping[str, Any]) -> Float[Array, ""]:
    """KaSA's penalty, the sum over all layers, or MonteCLoRA's, their mean."""
    total, count = jnp.zeros(()), jnp.zeros(())
    for leaf in leaves.values():
        if config.kasa_config is not None:
            total += kasa.penalty(leaf.params, leaf.state, config.kasa_config)
            continue
        of_layer = _of_options(config.monteclora_config)
        for _ in leaf.state["rank"].shape:
            of_layer = jax.vmap(of_layer)
        total += jnp.sum(of_layer(leaf.params, leaf.state))
        count += jnp.sum(leaf.state["rank"] > 0, dtype=jnp.float32)
    return total if config.kasa_config is not None else total / count


def _of_options(options: Mapping[str, Any]) -> Any:
    """MonteCLoRA's penalty of a layer."""
    return lambda params, state: monteclora.penalty(params, state, options)

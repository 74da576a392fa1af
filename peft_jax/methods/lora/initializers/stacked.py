"""Factors of each layer of a stack, from an initializer that sees one layer's matrix."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.finite import holds_finite
from peft_jax.core.paths import keys_from_names
from peft_jax.core.weight import Dense, Weight
from peft_jax.methods.lora.initializers.base import Factors, Initialize
from peft_jax.methods.lora.initializers.table import find
from peft_jax.quant.quantized import Quantized


def initialize_layers(
    config: Any,
    base: Weight,
    names: np.ndarray,
    adapted: np.ndarray,
    key: jax.Array,
    initialize: Sequence[Initialize],
) -> tuple[dict[str, jax.Array], Weight]:
    """Factors of each stacked layer, padded with zeros to the largest rank, and the base that they go on.

    Args:
        config: A `LoraConfig`.
        base: The weight that the adapter goes on.
        names: Names of its layers, of its stacked shape.
        adapted: Which of them are adapted.
        key: Random key.
        initialize: The initializer of each layer, in the order of ``names.flat``.

    Returns:
        ``lora_A`` ``(*stack, in, rank)`` and ``lora_B`` ``(*stack, rank, out)``, float32; and the base.

    Raises:
        ValueError: if the initializer does not take such a base, a rank does not suit it, or the base holds values
            that are not finite.
    """
    layout = base.layout
    dense = _dense_base(config, base, str(names.flat[0]))
    n_in, n_out = layout.sizes(base.shape)
    matrices = jnp.reshape(layout.matrix(dense), (-1, n_in, n_out))
    keys = jnp.reshape(keys_from_names(key, names), (-1,))
    width = max(config.rank(name) for name in names[adapted])
    layers = []
    for i, (name, is_adapted) in enumerate(zip(names.flat, adapted.flat, strict=True)):
        if not is_adapted:
            layers.append(Factors(jnp.zeros((n_in, width)), jnp.zeros((width, n_out))))
            continue
        rank = config.rank(name)
        _check_rank(config, name, rank, min(n_in, n_out))
        _check_finite(config, name, matrices[i])
        made = initialize[i](matrices[i].astype(jnp.float32), rank, config.scaling(name), keys[i])
        padding = width - rank
        a = jnp.pad(made.a, ((0, 0), (0, padding)))
        b = jnp.pad(made.b, ((0, padding), (0, 0)))
        layers.append(Factors(a, b, made.matrix))
    params = {
        "lora_A": jnp.reshape(jnp.stack([layer.a for layer in layers]), (*names.shape, n_in, width)),
        "lora_B": jnp.reshape(jnp.stack([layer.b for layer in layers]), (*names.shape, width, n_out)),
    }
    if all(layer.matrix is None for layer in layers):
        return params, base
    remaining = []
    for old, layer in zip(matrices, layers, strict=True):
        remaining.append(old if layer.matrix is None else layer.matrix.astype(dense.dtype))
    rest = layout.unmatrix(jnp.reshape(jnp.stack(remaining), (*names.shape, n_in, n_out)), base.shape)
    if isinstance(base, Quantized):
        return params, base.requantized(rest)
    return params, Dense(rest, layout)


def _check_rank(config: Any, name: str, rank: int, most: int) -> None:
    """Raise ValueError if an initializer takes ``rank`` directions of a matrix that has fewer."""
    if rank > most and not find(config.init_lora_weights).any_rank:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} starts at r directions of '{name}', which has "
            f"{most}, not {rank}. Choose a smaller r."
        )


def _check_finite(config: Any, name: str, matrix: jax.Array) -> None:
    """Raise ValueError if a matrix that an initializer looks at holds NaN or infinity."""
    if not holds_finite(matrix):
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} starts from the weight of '{name}', which holds NaN or "
            "infinity. Repair the base, or take another initialization."
        )


def _dense_base(config: Any, base: Weight, name: str) -> jax.Array:
    """The base's array, if the initializer may change such a base."""
    init, takes = config.init_lora_weights, find(config.init_lora_weights).bases
    if isinstance(base, Dense) or takes == "any" or (isinstance(base, Quantized) and takes == "float or quantized"):
        return base.dense()
    if isinstance(base, Quantized):
        raise ValueError(
            f"init_lora_weights={init!r} starts from the float weight of '{name}', which is {base.kind} already. "
            "Attach the adapter to the float model, and quantize it then."
        )
    raise ValueError(
        f"init_lora_weights={init!r} takes a part out of the weight of '{name}', on which an adapter is trained "
        "already. Attach this one first."
    )

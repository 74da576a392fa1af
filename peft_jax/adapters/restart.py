"""The base of a LoRA whose start took a part out of it, made again from the adapter as it was at its start."""

import dataclasses
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from peft_jax.adapters.from_data import starts_from_data
from peft_jax.adapters.statistics import layers_of
from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import map_adapted
from peft_jax.core.weight import as_leaf, as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.lora.initializers.base import Factors
from peft_jax.methods.lora.initializers.stacked import initialize_layers

T = TypeVar("T")


def leaves_base(config: Method) -> bool:
    """Whether an adapter starts at what data say, and takes that out of the base."""
    return starts_from_data(config) and config.initializer.changes_base


def without_starts(params: T, adapter_name: str = "default") -> T:
    """A tree or model handle whose base lacks what an adapter is at, as `peft_jax.apply_lora_from_data` left it.

    The adapter was saved right after that function, and is loaded onto the whole base: this takes its product out
    again, to the same bits, so that a run can go on whose start looked at data. Adapters of other starts, EVA's among
    them, take nothing out.

    Args:
        params: A tree or model handle with the adapter.
        adapter_name: Which one.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(r=2, target_modules=["up"], init_lora_weights="corda")
        >>> params, batches = {"up": {"kernel": jnp.eye(4)}}, [jax.random.normal(jax.random.key(0), (16, 4))]
        >>> started = pj.apply_lora_from_data(params, config, batches, fn=lambda params, x: x @ params["up"]["kernel"])
        >>> tensors = pj.get_peft_model_state_dict(started)
        >>> again = without_starts(pj.set_peft_model_state_dict(params, config, tensors))
        >>> bool(jnp.all(pj.unload(again)["up"]["kernel"] == pj.unload(started)["up"]["kernel"]))
        True
    """

    def take_out(path: str, leaf: Adapted) -> Adapted:
        config = leaf.tag.config
        is_matrix = leaf.tag.role is None and not leaf.layout.lookup
        if leaf.tag.name != adapter_name or not is_matrix or not leaves_base(config):
            return leaf
        names, hit = layers_of(path, leaf)
        a, b = leaf.params["lora_A"], leaf.params["lora_B"]
        a, b = jnp.reshape(a, (-1, *a.shape[-2:])), jnp.reshape(b, (-1, *b.shape[-2:]))
        initialize = [partial(_left, a=one, b=other) for one, other in zip(a, b, strict=True)]
        base = as_weight(leaf.base, leaf.layout)
        _, base = initialize_layers(config, base, names, hit, jax.random.key(0), initialize)
        return dataclasses.replace(leaf, base=as_leaf(base))

    return map_adapted(take_out, params)


def _left(matrix: jax.Array, rank: int, scale: float, key: jax.Array, a: jax.Array, b: jax.Array) -> Factors:
    a, b = a[:, :rank], b[:rank]
    return Factors(a, b, matrix - scale * a @ b)

"""Take from a LoRA the directions that it brought into a weight, so that less of what the base knew is lost.

Shuttleworth et al., 2024, https://arxiv.org/abs/2410.21228: a singular vector of the adapted weight that is like none
of the base's is an intruder. Numbers follow PEFT 0.21.2, ``tuners/lora/intruders.py``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from peft_jax.core.adapted import Adapted, nested_adapters
from peft_jax.core.adapted_tree import adapters, check_adapter_name, tied
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Leaf, find_leaves, replace_leaves
from peft_jax.core.merge import set_adapter
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import as_weight
from peft_jax.methods.lora.config import LoraConfig
from peft_jax.methods.lora.variants import variant_of

T = TypeVar("T")
FACTORS = ("lora_A", "lora_B")


def reduce_intruder_dimension(
    peft_model: T,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> T:
    """A new tree or handle with one more LoRA, active alone: the old one with less of its intruders.

    Args:
        peft_model: A tree or model handle with a LoRA.
        old_adapter_name: Its name.
        new_adapter_name: Name of the new one, of the same config.
        top_k: How many of the adapted weight's largest singular vectors are looked at.
        threshold_epsilon: A vector whose cosine with each of the base's is below is an intruder.
        mitigation_lambda: What is left of an intruder, as a part of it.
        logging_sink: Called with a line for each module; None for none.

    Raises:
        ValueError: if there is no such LoRA, it is more than a product of two factors, or the new name is taken.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.LoraConfig(r=1, lora_alpha=99, init_lora_weights=False, target_modules=["q"])
        >>> params = pj.apply_lora({"q": {"kernel": jnp.diag(jnp.arange(1.0, 65.0))}}, config)
        >>> params = reduce_intruder_dimension(params)
        q: Intruders: 1
        Enabling new adapter intruder_reduced
    """
    tree = peft_model.params if isinstance(peft_model, Handle) else peft_model
    _check(tree, old_adapter_name, new_adapter_name)
    log = logging_sink or (lambda line: None)
    nodes: dict[int, Adapted] = {}
    for position, leaf in enumerate(find_leaves(tree, None)):
        old = nested_adapters(leaf.value).get(old_adapter_name)
        if old is None:
            continue
        tag = dataclasses.replace(old.tag, name=new_adapter_name)
        new = dataclasses.replace(old, tag=tag, base=leaf.value)
        if old.tag.role is None:
            factors = _reduced(leaf, old, top_k, threshold_epsilon, mitigation_lambda, log)
            new = dataclasses.replace(new, params=_with(new.params, factors), state=_with(new.state, factors))
        nodes[position] = new
    log(f"Enabling new adapter {new_adapter_name}")
    tree = set_adapter(tied(replace_leaves(tree, nodes)), new_adapter_name)
    return peft_model.replace(tree) if isinstance(peft_model, Handle) else tree


def _check(tree: PyTree, old_adapter_name: str, new_adapter_name: str) -> None:
    """Raise ValueError unless there is such a LoRA, and no adapter of the new name."""
    known = adapters(tree)
    config = known.get(old_adapter_name)
    if not isinstance(config, LoraConfig):
        found = {name: one.peft_type for name, one in known.items()}
        raise ValueError(f"reduce_intruder_dimension is for a LORA named '{old_adapter_name}'. Found: {found}.")
    if variant := "use_dora" if config.use_dora else variant_of(config):
        raise ValueError(f"Adapter '{old_adapter_name}' has {variant}, and is no product of two factors alone.")
    check_adapter_name(new_adapter_name, tree)


def _with(arrays: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays with those of the same names changed: a factor that is not trained is part of the state."""
    return {name: changes.get(name, array) for name, array in arrays.items()}


def _reduced(
    leaf: Leaf, node: Adapted, top_k: int, epsilon: float, left: float, log: Callable[[str], object]
) -> dict[str, Float[Array, "..."]]:
    """Both factors of a leaf, in each of its layers with less of the intruders."""
    if node.layout.groups > 1:
        raise ValueError(
            f"Leaf '{leaf.path}' is a convolution of {node.layout.groups} groups, whose LoRA is no change of its "
            "kernel. reduce_intruder_dimension is for others."
        )
    arrays = {**node.state, **node.params}
    a, b = np.array(arrays["lora_A"], np.float32), np.array(arrays["lora_B"], np.float32)
    base = node.layout.matrix(as_weight(node.base, node.layout).unadapted.dense().astype(jnp.float32))
    ranks, scales = np.asarray(node.state["rank"]), np.asarray(node.state["scaling"])
    for index in np.ndindex(ranks.shape):
        rank, scale, name = int(ranks[index]), float(scales[index]), str(leaf.names[index])
        if rank == 0:
            continue
        change = scale * a[index] @ b[index]
        mitigated, count = _mitigated(base[index], jnp.asarray(change), top_k, epsilon, left, lookup=node.layout.lookup)
        log(f"{name}: Intruders: {count}" if count else f"{name}: No intruders")
        if count == 0 or scale == 0:
            continue
        u, s, vt = jnp.linalg.svd(mitigated / scale, full_matrices=False)
        kept, roots = min(rank, len(s)), jnp.sqrt(s)
        a[index], b[index] = 0, 0
        a[index][:, :kept] = u[:, :kept] * roots[None, :kept]
        b[index][:kept] = roots[:kept, None] * vt[:kept]
    return {
        "lora_A": jnp.asarray(a, arrays["lora_A"].dtype),
        "lora_B": jnp.asarray(b, arrays["lora_B"].dtype),
    }


def _mitigated(
    base: Float[Array, "in out"],
    change: Float[Array, "in out"],
    top_k: int,
    epsilon: float,
    left: float,
    *,
    lookup: bool,
) -> tuple[Float[Array, "in out"], int]:
    """The change with only a part of its intruders, and their number.

    As in PEFT the vectors are those of a layer's outputs, and of an embedding's tokens.
    """
    if not lookup:
        base, change = base.T, change.T
    adapted = base + change
    own = jnp.linalg.svd(base, full_matrices=False)[0]
    u, s, vt = jnp.linalg.svd(adapted, full_matrices=False)
    likeness = jnp.abs(u.T @ own).max(axis=1)
    intruders = np.flatnonzero(np.asarray(likeness[:top_k] < epsilon))
    parts = u[:, intruders] @ (s[intruders, None] * vt[intruders])
    mitigated = adapted + (left - 1) * parts - base
    return mitigated if lookup else mitigated.T, len(intruders)

"""Make one IA3 of several on the same base, as PEFT's ``IA3Model.add_weighted_adapter``: their vectors added up."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.build import build, initial_contents
from peft_jax.adapters.plan import Target
from peft_jax.core.adapted import Adapted, nested_adapters
from peft_jax.core.leaves import find_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import present
from peft_jax.core.weight import Weight
from peft_jax.methods.ia3 import IA3Config
from peft_jax.methods.roles import Follower

ROLES = ("ia3_in", "ia3_out")
FIELDS = ("target_modules", "feedforward_modules")


def weighted_ia3(tree: PyTree, weighted: Mapping[str, float], configs: Sequence[IA3Config], new_name: str) -> Any:
    """The tree with one more IA3, inactive, whose vectors are the weighted sums of others.

    As in PEFT an adapter that leaves a module out adds nothing there.

    Args:
        tree: A tree with the adapters.
        weighted: Their names and weights.
        configs: Their configs.
        new_name: Name of the new adapter.

    Raises:
        ValueError: if the adapters cannot be added up.
    """
    config = _united(configs, list(weighted))

    targets, vectors = [], {}
    for position, leaf in enumerate(find_leaves(tree, None)):
        there = nested_adapters(leaf.value)
        sources = present(there, weighted)
        if not sources:
            continue
        scales_inputs, scales_outputs = _used(sources.values(), ROLES[0]), _used(sources.values(), ROLES[1])
        if not leaf.layout.inp:
            targets.append(Target(position, leaf, scales_outputs, Follower()))
            continue
        if (scales_inputs & scales_outputs).any():
            raise ValueError(
                f"'{leaf.path}' is scaled at its inputs by some of {list(weighted)} and at its outputs by others."
            )
        targets.append(Target(position, leaf, scales_inputs | scales_outputs, None))
        vectors[position] = _weighted_sums(sources, weighted)

    def initialize(target: Target, base: Weight) -> Any:
        return vectors[target.position], config.state(target.leaf.names, target.adapted), base

    return build(tree, new_name, config, targets, initial_contents(config, targets, initialize), active=False)


def _used(sources: Iterable[Adapted], role: str) -> np.ndarray:
    """Which stacked layers any of some adapters scales, of inputs or of outputs by role."""
    masks = [np.asarray(source.state[role]) for source in sources]
    return np.any(masks, axis=0)


def _weighted_sums(sources: Mapping[str, Adapted], weighted: Mapping[str, float]) -> dict[str, jax.Array]:
    """The weighted sum of the vectors of each role that one of the adapters has."""
    sums = {}
    for role in ROLES:
        vectors = [weighted[name] * _vector(one, role) for name, one in sources.items() if role in one.params]
        if vectors:
            sums[role] = jnp.sum(jnp.stack(vectors), axis=0)
    return sums


def _vector(node: Adapted, role: str) -> jax.Array:
    return jnp.where(node.state[role][..., None], node.params[role], 0)


def _united(configs: Sequence[IA3Config], names: Sequence[str]) -> IA3Config:
    """The first adapter's config with the targets of all."""
    first = configs[0]
    if saved := [name for name, config in zip(names, configs, strict=True) if config.modules_to_save]:
        raise ValueError(f"Adapters {saved} have modules_to_save, which cannot be added up. Train them without.")
    if len({config.exclude_modules for config in configs}) > 1:
        raise ValueError(f"Adapters {list(names)} have unlike exclude_modules. Name the targets of each without it.")
    fields = {name: _union(configs, name) for name in FIELDS}
    return first.replace(**fields, init_ia3_weights=True)


def _union(configs: Sequence[IA3Config], field: str) -> Any:
    """The targets that the configs have in a field, of all of them."""
    regexes, names = list[str](), set[str]()
    for config in configs:
        targets = getattr(config, field)
        if isinstance(targets, str):
            regexes.append(targets)
        else:
            names |= set(targets or ())
    if not regexes:
        return sorted(names)
    if len(regexes) < len(configs):
        raise ValueError(f"{field} is a regex in some of the adapters and a list in others. Give all of one kind.")
    return regexes[0] if len(set(regexes)) == 1 else "|".join(f"({regex})" for regex in regexes)

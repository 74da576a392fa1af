"""Make one IA3 of several on the same base, as PEFT's ``IA3Model.add_weighted_adapter``: their vectors added up."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.plan import FOLLOWS
from peft_jax.core.adapted import Adapted, Tag, is_adapted, tied
from peft_jax.core.partition_specs import sharded_like_base
from peft_jax.core.paths import dotted, leaf_names
from peft_jax.methods.ia3 import IA3Config
from peft_jax.methods.whole import Follower

ROLES = ("ia3_in", "ia3_out")
FIELDS = ("target_modules", "feedforward_modules")


def weighted_ia3(tree: Any, weighted: Mapping[str, float], configs: Sequence[IA3Config], new_name: str) -> Any:
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

    def add(key_path: Any, node: Any) -> Any:
        found, inner = {}, node
        while is_adapted(inner):
            found[inner.tag.name] = inner
            inner = inner.base
        sources = {name: found[name] for name in weighted if name in found}
        if not sources:
            return node
        path = dotted(key_path)
        names = leaf_names(path, node.layout, node.shape)
        used = {role: np.any([np.asarray(one.state[role]) for one in sources.values()], axis=0) for role in ROLES}
        if not node.layout.inp:  # a bias that changes with its layer's outputs
            follower = Follower(config, FOLLOWS)
            arrays, state = follower.init(names, used["ia3_out"])
            return sharded_like_base(Adapted(node, arrays, state, node.layout, Tag(new_name, follower), active=False))
        if (used["ia3_in"] & used["ia3_out"]).any():
            raise ValueError(
                f"'{path}' is scaled at its inputs by some of {list(weighted)} and at its outputs by others."
            )
        params = {}
        for role in ROLES:
            own = [weighted[name] * _vector(one, role) for name, one in sources.items() if role in one.params]
            if own:
                params[role] = jnp.sum(jnp.stack(own), axis=0)
        state = config.state(names, used["ia3_in"] | used["ia3_out"])
        return sharded_like_base(Adapted(node, params, state, node.layout, Tag(new_name, config), active=False))

    return tied(jax.tree_util.tree_map_with_path(add, tree, is_leaf=is_adapted))


def _vector(node: Adapted, role: str) -> jax.Array:
    return jnp.where(node.state[role][..., None], node.params[role], 0)


def _united(configs: Sequence[IA3Config], names: Sequence[str]) -> IA3Config:
    """The first adapter's config with the targets of all."""
    first = configs[0]
    if saved := [name for name, config in zip(names, configs, strict=True) if config.modules_to_save]:
        raise ValueError(f"Adapters {saved} have modules_to_save, which cannot be added up. Train them without.")
    if any(config.exclude_modules != first.exclude_modules for config in configs):
        raise ValueError(f"Adapters {list(names)} have unlike exclude_modules. Name the targets of each without it.")
    fields = {name: _union([getattr(one, name) for one in configs], name) for name in FIELDS}
    return first.replace(**fields, init_ia3_weights=True)


def _union(given: Sequence[Any], field: str) -> Any:
    if len(kinds := {isinstance(one, str) for one in given}) > 1:
        raise ValueError(f"{field} is a regex in some of the adapters and a list in others. Give all of one kind.")
    if kinds == {True}:
        return given[0] if len(set(given)) == 1 else "|".join(f"({one})" for one in given)
    return sorted({name for one in given for name in one or ()})

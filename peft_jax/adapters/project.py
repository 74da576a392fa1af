"""Put what an adapter trains back to where it may be, as PEFT does in every forward pass."""

import dataclasses
from typing import Any

from peft_jax.core.adapted import Adapted, map_adapted
from peft_jax.methods.base import Method


def projected(params: Any) -> Any:
    """The tree with the trained arrays of active adapters put back to where they may be, as a step of training begins.

    `peft_jax.train.make_training_step` does it; it matters for CPT, and for OFT with ``coft``.

    Example:
        >>> import jax.numpy as jnp, peft_jax as pj
        >>> config = pj.OFTConfig(oft_block_size=2, coft=True, eps=0.1, target_modules=["q"], init_weights=False)
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.eye(2)}}, config)
        >>> float(jnp.abs(projected(params)["q"]["kernel"].params["oft_R"]).max()) <= 0.1
        True
    """

    def put_back(_: str, leaf: Adapted) -> Adapted:
        method = leaf.method
        if not (leaf.active and isinstance(method, Method)):
            return leaf
        return dataclasses.replace(leaf, params=dict(method.project(leaf.params, leaf.state)))

    return map_adapted(put_back, params)

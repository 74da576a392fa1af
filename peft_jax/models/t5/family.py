"""What the leaves of a T5 are: the tensors of a Hugging Face checkpoint, and an embedding that four modules share."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.models.family import Family, Tensors, dense_table, with_leaf

SHARED = "shared"
LOOKED_UP = ("encoder.embed_tokens", "decoder.embed_tokens")
HEAD = "lm_head"


class T5Family(Family):
    """The T5 family. What differs from others is the embedding: ``shared``, both ``embed_tokens`` and the head are one.

    Where a module is given a leaf of its own, ``shared`` stays, and nothing looks up in it, as in transformers.
    """

    def tied_modules(self, config: Any) -> tuple[str, ...]:
        """The modules that share its leaf."""
        head = (HEAD,) if config.tie_word_embeddings else ()
        return (SHARED, *LOOKED_UP, *head) if config.share_embeddings else ()

    def untied(self, config: Any, params: Any) -> tuple[Any, Any]:
        """Config and parameters with a leaf of its own for each of these."""
        if not config.share_embeddings:
            return config, params
        table = dense_table(self.embedding_table(config, params))
        for name in LOOKED_UP:  # copies: a step may donate a leaf
            params = with_leaf(params, f"{name}.embedding", jnp.array(table))
        if config.tie_word_embeddings:
            params = with_leaf(params, f"{HEAD}.kernel", jnp.transpose(table))
        return dataclasses.replace(config, share_embeddings=False, tie_word_embeddings=False), params

    def settled(self, config: Any, tensors: Tensors) -> tuple[Any, Tensors]:
        """Do as transformers 5: what a checkpoint lacks is the first that it has; what is there and differs stands."""
        names = (SHARED, *LOOKED_UP, HEAD)
        found = {name: tensors[key] for name in names if (key := f"{name}.weight") in tensors}
        if not found:
            return config, tensors
        table = next(iter(found.values()))
        differs = [name for name in names if name in found and not np.array_equal(found[name], table)]
        share = not set(LOOKED_UP) & set(differs)
        tied = share and HEAD not in differs
        kept = (SHARED,) if tied else (SHARED, HEAD) if share else names
        rest = {key: tensor for key, tensor in tensors.items() if key.removesuffix(".weight") not in names}
        own = {f"{name}.weight": found.get(name, table) for name in kept}
        return dataclasses.replace(config, share_embeddings=share, tie_word_embeddings=tied), {**own, **rest}

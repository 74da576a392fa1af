"""The record of the T5 family, and its embedding, which four modules share."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from peft_jax.core.pytree import PyTree
from peft_jax.models.config import SEQ_2_SEQ_LM
from peft_jax.models.family import (
    OTHERWISE,
    EncoderDecoder,
    Family,
    Sharding,
    Tensors,
    dense_table,
    stacked_layouts,
    targets,
    with_leaf,
)
from peft_jax.models.t5 import model
from peft_jax.models.t5.config import T5Config
from peft_jax.models.t5.gguf_t5 import GGUF

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

    def untied(self, config: Any, params: PyTree) -> tuple[Any, Any]:
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
        kept: tuple[str, ...] = names
        if share:
            kept = (SHARED,) if tied else (SHARED, HEAD)
        rest = {key: tensor for key, tensor in tensors.items() if key.removesuffix(".weight") not in names}
        own = {f"{name}.weight": found.get(name, table) for name in kept}
        return dataclasses.replace(config, share_embeddings=share, tie_word_embeddings=tied), {**own, **rest}


ALL_OF_UNGATED = targets("q", "k", "v", "o", "wi", "wo")
NORMS = targets("layer_norm", "final_layer_norm")

T5 = T5Family(
    config=T5Config,
    module=model.T5,
    layouts=stacked_layouts("block"),
    backbone="",
    embedding=SHARED,
    heads={SEQ_2_SEQ_LM: HEAD},
    peft_defaults={
        "t5": {
            OTHERWISE: targets("q", "v"),
            "ADALORA": ALL_OF_UNGATED,
            "BEFT": targets("v"),
            "IA3": targets("k", "v", "wo", feedforward_modules=("wo",)),
            "LN_TUNING": NORMS,
            "VBLORA": ALL_OF_UNGATED,
        },
        "mt5": {
            OTHERWISE: targets("q", "v"),
            "ADALORA": targets("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
            "BEFT": targets("v"),
            "IA3": targets("k", "v", "wi_1", feedforward_modules=()),
            "LN_TUNING": NORMS,
            "VBLORA": {},
        },
    },
    sharding=Sharding(
        columns=r"(Self|EncDec)Attention\.(q|k|v)|DenseReluDense\.(wi|wi_0|wi_1)|lm_head",
        rows=r"(Self|EncDec)Attention\.o|DenseReluDense\.wo",
        tables="shared|embed_tokens",
    ),
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),  # unused, in old ones
    float32=r".*\.wo\.kernel",
    encoder_decoder=EncoderDecoder(model.encode, model.init_cache, model.decode),
    gguf=GGUF,
)

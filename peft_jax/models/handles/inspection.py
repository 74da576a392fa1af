"""Descriptions of a handle by its parameters, and its forms in training and in evaluation."""

from collections.abc import Iterator
from typing import Self

import jax
import numpy as np

from peft_jax.core.adapted_tree import adapters
from peft_jax.core.discarded import warn_if_discarded
from peft_jax.core.dropout import with_dropout, without_dropout
from peft_jax.core.handle import Handle
from peft_jax.core.merge import active_adapters
from peft_jax.core.weight import is_weight
from peft_jax.models.config import ModelConfig
from peft_jax.models.family import Family
from peft_jax.models.named_parameters import named


class Inspection(Handle):
    """Base class of model handles: the parameters' number and names, and dropout."""

    config: ModelConfig

    @property
    def family(self) -> Family:
        """The architecture's functions and facts."""
        raise NotImplementedError

    def __repr__(self) -> str:
        """Class, origin, architecture, size and adapters; no weights."""
        active = active_adapters(self.params)
        parts = [] if self.name_or_path is None else [repr(self.name_or_path)]
        parts += [self.config.architecture, f"{self.num_parameters():,} parameters"]
        for name, config in adapters(self.params).items():
            parts.append(f"adapter {name!r}: {config.peft_type}{'' if name in active else ', not active'}")
        return f"<{type(self).__name__} {'; '.join(parts)}>"

    def num_parameters(self) -> int:
        """The number of elements of all parameters, quantized ones included; repeated layers count once."""
        count = 0
        for leaf in jax.tree.leaves(self.params, is_leaf=is_weight):
            shape = leaf.stored_shape if is_weight(leaf) else np.shape(leaf)
            count += int(np.prod(shape))
        return count

    def named_parameters(self, *, requires_grad: bool | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters under PyTorch's names: transformers', and PEFT's in a model with adapters.

        Each layer is a parameter of its own, in PyTorch's orientation, copied when its turn has come; quantized ones
        are dequantized. The copies change nothing here: gradients are for `peft_jax.partition`.

        Args:
            requires_grad: True for those that are trained, False for the others; None for all.

        Example:
            >>> from peft_jax.models import LlamaConfig
            >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
            ...                      num_attention_heads=2)
            >>> model = pj.AutoModelForCausalLM.from_config(config)
            >>> model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules=["q_proj"]))
            >>> [name for name, _ in model.named_parameters(requires_grad=True)][:1]
            ['base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight']
        """
        for parameter in named(self, self.family.written_rows(self.config)):
            if requires_grad in (None, parameter.requires_grad):
                yield parameter.name, parameter.make()

    def state_dict(self) -> dict[str, np.ndarray]:
        """All of `named_parameters` at once, in memory of the host. `peft_jax.interop.save_adapter` writes an adapter.

        A head that is tied to the embedding is there once, under the embedding's name, and so is an array that layers
        of an adapter share, under the first layer's.
        """
        return dict(self.named_parameters())

    def train(self, key: jax.Array | None = None) -> Self:
        """The model with the dropout of its adapters switched on for a key: `peft_jax.with_dropout`.

        Call it in the loss, with a new key every step. What is trained is what `peft_jax.partition` says, whether
        dropout is on or off.

        Args:
            key: A JAX random key.

        Raises:
            ValueError: if no key is given.
        """
        if not isinstance(key, jax.Array):
            raise ValueError(
                f"train() draws dropout from a JAX key, one a step, and got {key!r}. In the loss write model = "
                "model.train(key), and model.eval() for the model without dropout."
            )
        warn_if_discarded("model.train(...)")
        return with_dropout(self, key)

    def eval(self) -> Self:
        """The model with the dropout of its adapters switched off, as it is unless `train` switched it on."""
        return without_dropout(self)

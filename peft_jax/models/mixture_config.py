"""Base class of the configurations of decoders with a mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

from peft_jax.models.decoder_config import WindowedConfig
from peft_jax.models.modules.router_load import Routing

DENSE, SPARSE = "dense", "sparse"  # how the stacks of layers without experts and with them are called


@dataclasses.dataclass(frozen=True)
class MixtureConfig(WindowedConfig):
    """Architecture of a decoder with rotary positions, some or all of whose layers choose among experts.

    Attributes:
        num_experts: Experts of a layer.
        num_experts_per_tok: How many of them a token goes through.
        output_router_logits: Whether a call gives the routers' logits, and a language model's loss has theirs.
        router_aux_loss_coef: The factor of the routers' loss.

    Raises:
        ValueError: A field has a value that the family does not support, named in the message.
    """

    num_experts: int = 8
    num_experts_per_tok: int = 2
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        super().check()
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} of num_experts={self.num_experts} are not supported, "
                "only 1 to all of them."
            )
        if self.output_router_logits and not any(self.sparse_layers):
            raise ValueError(
                "output_router_logits=True is not supported where no layer has a router, only False: "
                f"all of the {self.num_hidden_layers} layers are dense."
            )

    @property
    def routing(self) -> Routing:
        """The facts on which the loss of routers depends."""
        return Routing(self.output_router_logits, self.num_experts_per_tok, self.router_aux_loss_coef)

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return (True,) * self.num_hidden_layers

    @property
    def stacks(self) -> tuple[str, ...]:
        """The name of the stack that each layer is in, where some have experts and others do not."""
        sparse = self.sparse_layers
        return tuple(SPARSE if one else DENSE for one in sparse) if len(set(sparse)) > 1 else ()


@dataclasses.dataclass(frozen=True)
class SteppedMixtureConfig(MixtureConfig):
    """Architecture of a mixture with dense layers among the sparse ones.

    Attributes:
        moe_intermediate_size: Features between the projections of an expert.
        norm_topk_prob: Whether the factors of a token's experts add up to 1.
        decoder_sparse_step: Every so many layers one has experts.
        mlp_only_layers: Numbers of layers that have none all the same.
    """

    moe_intermediate_size: int = 768
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_only_layers", tuple(self.mlp_only_layers))
        super().__post_init__()

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        steps = [(layer + 1) % self.decoder_sparse_step == 0 for layer in range(self.num_hidden_layers)]
        return tuple(step and layer not in self.mlp_only_layers for layer, step in enumerate(steps))

    def with_layers(self, order: Sequence[int]) -> Self:
        """The architecture whose layers are those of ``order``."""
        changed = super().with_layers(order)
        dense = [place for place, layer in enumerate(order) if not self.sparse_layers[layer]]
        return dataclasses.replace(changed, decoder_sparse_step=1, mlp_only_layers=tuple(dense))

    def written(self) -> dict[str, Any]:
        """As the base class, with the numbers of dense layers."""
        return {**super().written(), "mlp_only_layers": list(self.mlp_only_layers)}

"""The configuration of DeepSeek-V2 and V3, with the field names of Hugging Face transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

from peft_jax.core.selecting import picked
from peft_jax.models.decoder_config import tasks_of
from peft_jax.models.mixture_config import MixtureConfig
from peft_jax.models.modules.router_load import Routing

SECOND, THIRD = "deepseek_v2", "deepseek_v3"
GREEDY, BY_GROUP = "greedy", "group_limited_greedy"  # how V2 chooses experts: among all, or among those of some groups
TABLES = ("layer_types", "sliding_window", "router_aux_loss_coef")  # fields that neither of them has


@dataclasses.dataclass(frozen=True)
class DeepseekConfig(MixtureConfig):
    """Architecture of a DeepSeek, with the fields of `transformers.DeepseekV2Config` and `DeepseekV3Config`.

    ``head_dim`` is transformers' name for ``qk_rope_head_dim``, the features of a head that positions turn.

    Attributes:
        moe_intermediate_size: Features between the projections of an expert.
        n_shared_experts: Experts that all tokens go through, as one of their common size.
        first_k_dense_replace: How many of the first layers have no experts.
        q_lora_rank: Features of the vector that queries are projected from; None for the hidden states themselves.
        kv_lora_rank: Features of the vector that keys and values are projected from.
        qk_nope_head_dim: Features of a head's queries and keys that positions do not turn.
        qk_rope_head_dim: Those that they do; the keys of all heads share these.
        v_head_dim: Features of a head's values.
        n_group: Groups of experts, some of which a token chooses first.
        topk_group: How many of the groups it chooses.
        topk_method: How it chooses: `GREEDY` or `BY_GROUP` (V2).
        norm_topk_prob: Whether the factors of a token's experts add up to 1 before they are scaled (V3).
        routed_scaling_factor: What they are multiplied by.
        rope_interleave: Whether features 2i and 2i + 1 are turned as a pair, not i and i + half of them (V3).
        attention_bias: Whether the projections from hidden states and back have a bias.
        mlp_bias: Whether dense networks and shared experts have one (V2).

    Raises:
        ValueError: A field has a value that this family does not support, named in the message.

    Example:
        >>> DeepseekConfig.from_hf({"model_type": "deepseek_v3", "num_hidden_layers": 5}).stacks
        ('dense', 'dense', 'dense', 'sparse', 'sparse')
    """

    stems = MappingProxyType({THIRD: "DeepseekV3", SECOND: "DeepseekV2"})
    tasks = tasks_of("ForCausalLM", "ForSequenceClassification", "Model")
    spelled = MappingProxyType({"num_experts": "n_routed_experts"})
    lacking = MappingProxyType(
        {SECOND: (*TABLES, "rope_interleave"), THIRD: (*TABLES, "topk_method", "mlp_bias")},
    )

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    num_hidden_layers: int = 61
    num_attention_heads: int = 128
    max_position_embeddings: int = 4096
    model_type: str = THIRD
    rms_norm_eps: float = 1e-6
    num_experts: int = 256
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 2048
    n_shared_experts: int = 1
    first_k_dense_replace: int = 3
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_group: int | None = 8
    topk_group: int | None = 4
    topk_method: str = GREEDY
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    rope_interleave: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "head_dim", self.qk_rope_head_dim)
        super().__post_init__()

    def check(self) -> None:
        """Raise ValueError if there is no such architecture with such a head."""
        super().check()
        if self.kv_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} is not supported, only num_attention_heads="
                f"{self.num_attention_heads}: all heads' keys and values come from one vector."
            )
        if self.n_shared_experts < 1:
            raise ValueError(f"n_shared_experts={self.n_shared_experts} is not supported, only 1 or more.")
        if self.topk_method not in (GREEDY, BY_GROUP):
            raise ValueError(f"topk_method={self.topk_method!r} is not supported, only {GREEDY!r} and {BY_GROUP!r}.")
        if self.model_type == SECOND and self.norm_topk_prob:
            raise ValueError("norm_topk_prob=True is not supported for DeepSeek-V2, which transformers ignores there.")
        if self.chooses_groups:
            self.check_groups()

    def check_groups(self) -> None:
        """Raise ValueError if experts cannot be chosen by group."""
        groups, chosen = self.groups
        if groups < 1 or self.num_experts % groups:
            raise ValueError(
                f"n_group={self.n_group} is not supported, only numbers that num_experts={self.num_experts} is a "
                "multiple of."
            )
        least = 2 if self.model_type == THIRD else 1  # V3 judges a group by its two best experts
        if self.num_experts // groups < least:
            raise ValueError(f"n_group={self.n_group} is not supported, only groups of {least} experts or more.")
        if not 1 <= chosen <= groups or self.num_experts_per_tok > chosen * (self.num_experts // groups):
            raise ValueError(
                f"topk_group={self.topk_group} is not supported, only 1 to n_group={groups}, with "
                f"num_experts_per_tok={self.num_experts_per_tok} experts in them."
            )

    @property
    def chooses_groups(self) -> bool:
        """Whether a token chooses groups of experts first."""
        return self.model_type == THIRD or self.topk_method == BY_GROUP

    @property
    def groups(self) -> tuple[int, int]:
        """The number of groups of experts, and of those that a token chooses; 0 for None."""
        return self.n_group or 0, self.topk_group or 0

    @property
    def is_paired(self) -> bool:
        """Whether features 2i and 2i + 1 are turned as a pair."""
        return self.model_type == SECOND or self.rope_interleave

    @property
    def routing(self) -> Routing:
        """The facts about the routers, which have no loss."""
        return Routing(self.output_router_logits, self.num_experts_per_tok, 0.0, has_loss=False)

    @property
    def no_prefix(self) -> str:
        """Why a prefix cannot stand before the keys and values of all layers."""
        return "whose layers keep one vector for all heads in place of keys and values"

    @property
    def sparse_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return tuple(layer >= self.first_k_dense_replace for layer in range(self.num_hidden_layers))

    def with_layers(self, order: Sequence[int]) -> Self:
        """The architecture whose layers are those of ``order``.

        Raises:
            ValueError: A layer without experts would come after one that has some.
        """
        sparse = picked(self.sparse_layers, order)
        if list(sparse) != sorted(sparse):
            raise ValueError(
                f"layer_replication puts a layer without experts after one with experts: {list(order)}. No config of "
                f"{self.model_type} says so: repeat the first {self.first_k_dense_replace} layers in front."
            )
        changed = super().with_layers(order)
        return dataclasses.replace(changed, first_k_dense_replace=sparse.count(False), layer_types=None)

    @classmethod
    def translated(cls, full: Mapping[str, Any]) -> dict[str, Any]:
        """As the base class; where V2's config does not say how many experts a token chooses, as published ones do."""
        rope = full["rope_parameters"]
        if rope.get("mscale_all_dim") and rope["rope_type"] != "yarn":
            raise ValueError(f"mscale_all_dim is not supported with rope_type={rope['rope_type']!r}, only with 'yarn'.")
        values = super().translated(full)
        return {**values, "num_experts_per_tok": full["num_experts_per_tok"] or 6}

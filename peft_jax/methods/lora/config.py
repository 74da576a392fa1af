"""LoRA: W' = W + s A B with s = alpha / rank, or alpha / sqrt(rank).

Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation 3; rank-stabilized scale: Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.dropout import dropout
from peft_jax.core.float_types import added
from peft_jax.core.layout import Layout
from peft_jax.core.product import Product
from peft_jax.core.targets import pattern_value
from peft_jax.core.weight import MergeError, Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, unsupported
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.lora import alora, dora, grouped_conv, token_scales, variants
from peft_jax.methods.lora.bdlora import BdLoraConfig
from peft_jax.methods.lora.checks import (
    check_initializer,
    check_invocation,
    check_parameters,
    check_replication,
    options_of,
    without_finished_options,
)
from peft_jax.methods.lora.initializers import random
from peft_jax.methods.lora.initializers.stacked import initialize_layers
from peft_jax.methods.lora.initializers.table import Initializer, find
from peft_jax.methods.lora.kasa import KasaConfig
from peft_jax.methods.lora.monteclora import MontecloraConfig
from peft_jax.methods.lora.nested_configs import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)
from peft_jax.methods.lora.velora import VeloraConfig
from peft_jax.methods.ranked import Ranked
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.starts_from_weight import StartsFromWeight
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields
from peft_jax.methods.training_hooks import Leaves, TrainingHooks

BIAS = "lora_bias"
UNBIASED = "unbiased"  # in the state: the layer has no bias that the trained one could be added to


@register("LORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(
    TargetFields, ExcludeFields, LayerFields, BiasRule, StartsFromWeight, TrainingHooks, FrozenArrays, Ranked
):
    """Adds a trainable low-rank matrix to a frozen weight; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        r: Rank of the added matrix, at least 1; at a convolution with groups, which has no merged form, a multiple of
            their number.
        lora_alpha: Numerator of its scale ``lora_alpha / r``.
        lora_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted modules).
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` instead.
        init_lora_weights: True (A as PyTorch's Linear, B zero), False or None (both random), ``"gaussian"`` (A normal,
            B zero), ``"orthogonal"`` (a product of zero), or one that takes a part out of the base, which the adapter
            then is: ``"pissa"`` and ``"pissa_niter_N"`` (the largest singular values), ``"olora"`` (columns of a QR),
            ``"loftq"`` (what rounding leaves). ``"mica"``: B at the directions of the smallest singular values, and not
            trained, and A zero. Embeddings start as with True, but for ``"mica"``. Of data, by
            `peft_jax.apply_lora_from_data`: ``"eva"``, ``"corda"`` and ``"lora_ga"``; the file of an adapter that
            started with one of the last two goes on the base that the start left.
        trainable_token_indices: Ids of tokens that are trained beside the matrices, in the model's input embedding
            (``embed_tokens`` of a bare tree), or by the name of an embedding or head. A head that is tied to the
            embedding is changed with it.
        ensure_weight_tying: An adapter of an embedding, or its saved copy, is that of a tied head too.
        alora_invocation_tokens: Ids of an invocation; the adapter counts from its last one in a sequence on (aLoRA).
        loftq_config: Options of LoftQ, a `LoftQConfig`.
        eva_config: Options of EVA, an `EvaConfig`.
        corda_config: Options of CorDA, a `CordaConfig`.
        lora_ga_config: Options of LoRA-GA, a `LoraGAConfig`.
        kasa_config: Take the ``r`` smallest singular values out of the base, and train some between A and B (KaSA):
            options of its penalty, a `KasaConfig`.
        use_bdlora: Have one factor block-diagonal (BD-LoRA): which, a `BdLoraConfig`.
        velora_config: Keep less of the inputs for backward (VeLoRA): how, a `VeloraConfig`.
        monteclora_config: Sample A in training (MonteCLoRA): how, a `MontecloraConfig`.
        use_qalora: Have the inputs of a group share a row of A (QA-LoRA).
        qalora_group_size: Number of inputs of such a group.
        rank_pattern: Rank by pattern of module paths, where it differs from ``r``.
        alpha_pattern: Alpha by pattern of module paths, where it differs from ``lora_alpha``.
        use_dora: Train the norms of the weight's columns apart from their directions (DoRA).
        lora_bias: Train a bias beside B, which counts ``s`` times.
        target_parameters: Names of weights themselves, which are adapted expert by expert where they are fused
            (``(experts, out, in)``), beside ``target_modules`` or without (``[]``). Several of one module are listed in
            the order in which PyTorch's module declares them, since PEFT's file counts on it; of one shape they cannot
            be told apart there, but for transformers' experts, whose order is known.
        layer_replication: Ranges ``[start, end)`` of layers, which in this order are the layers of the model that is
            adapted: each with an adapter of its own, on weights that are shared. For handles of models whose
            layers PEFT replicates; targets are numbered in the new order. Merged, each layer has its own weights.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        runtime_config: A `LoraRuntimeConfig`, whose defaults are all that is supported; files do not hold it.

    Every other field of PEFT's ``LoraConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]).scaling("q_proj")
        2.0
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "lora_A": ("in", "rank"),
        "lora_B": ("rank", "out"),
        BIAS: ("out",),
        dora.MAGNITUDE: ("out",),
        **variants.AXES,
    }
    mixes: ClassVar[bool] = True

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    megatron_config: dict[str, Any] | None = unsupported(None)
    megatron_core: str | None = unsupported("megatron.core", switch="megatron_config")
    trainable_token_indices: Sequence[int] | dict[str, Sequence[int]] | None = None
    loftq_config: LoftQConfig | dict[str, int] = dataclasses.field(default_factory=dict)
    eva_config: EvaConfig | dict[str, Any] | None = None
    corda_config: CordaConfig | dict[str, Any] | None = None
    lora_ga_config: LoraGAConfig | dict[str, Any] | None = None
    velora_config: VeloraConfig | dict[str, Any] | None = None
    monteclora_config: MontecloraConfig | dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = unsupported(None)
    kasa_config: KasaConfig | dict[str, Any] | None = None
    use_bdlora: BdLoraConfig | dict[str, Any] | None = None
    use_dora: bool = False
    alora_invocation_tokens: Sequence[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    layer_replication: Sequence[Sequence[int]] | None = None
    lora_bias: bool = False
    target_parameters: Sequence[str] | None = None
    ensure_weight_tying: bool = False
    runtime_config: LoraRuntimeConfig | dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "lora_dropout")
        check_initializer(self)
        check_invocation(self)
        check_parameters(self)
        check_replication(self)
        variants.check(self)
        if not isinstance(self.runtime_config, LoraRuntimeConfig):
            options_of(LoraRuntimeConfig, self.runtime_config, "runtime_config")
        object.__setattr__(self, "runtime_config", {})  # no option of it is supported away from its default
        if self.lora_bias and (self.use_dora or self.init_lora_weights not in (True, False, None)):
            raise ValueError(
                f"lora_bias=True goes with init_lora_weights=True or False and without DoRA, got init_lora_weights="
                f"{self.init_lora_weights!r} and use_dora={self.use_dora}. Remove one of them."
            )

    def to_dict(self) -> dict[str, Any]:
        """As of every config, without ``runtime_config``, which PEFT does not save."""
        fields = super().to_dict()
        del fields["runtime_config"]
        return fields

    @classmethod
    def fields_of_file(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Those that are no options of a finished initialization."""
        return without_finished_options(fields)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The two factors of the added matrix."""
        rank = self.rank(module)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (n_in, rank), "lora_B": (rank, n_out)}
        shapes |= {BIAS: (n_out,)} if self.lora_bias else {}
        shapes |= {dora.MAGNITUDE: (n_out,)} if self.use_dora else {}
        return variants.chosen(self).shapes(self, module, shapes)

    def fits(self, module: str, layout: Layout) -> bool:
        """Whether the groups of a convolution, as of a depthwise one, can share the rank."""
        return self.rank(module) % layout.groups == 0

    def leaf_shapes(self, module: str, layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Those of the matrix, or of a convolution with groups."""
        variants.check_layout(self, module, layout)
        shapes = super().leaf_shapes(module, layout, shape)
        return shapes if layout.groups == 1 else grouped_conv.shapes(self, module, layout, shapes)

    @property
    def initializer(self) -> Initializer:
        """The row of ``init_lora_weights`` in the table of initializers."""
        return find(self.init_lora_weights)

    def scaling(self, module: str) -> float:
        """Scale of the adapter of a module."""
        rank, alpha = self.rank(module), pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)

    @property
    def first(self) -> str | None:  # type: ignore[override]  # of a config: not where A is stored in another shape
        """A, where it is stored whole."""
        return None if variants.chosen(self).reshapes else "lora_A"

    @property
    def dropout_rate(self) -> float:
        """``lora_dropout``."""
        return self.lora_dropout

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """That of inputs, and that VeLoRA and MonteCLoRA compute in another way in training."""
        is_other = variants.chosen(self).in_training is not None
        return {"rate": self.lora_dropout, **({"variant": 1.0} if is_other else {})}

    def structure(self) -> tuple[Any, ...]:
        """In training, the options of its penalty, too."""
        trained = () if self.inference_mode else (repr(self.kasa_config), repr(self.monteclora_config))
        return (*super().structure(), *trained)

    @property
    def penalizes(self) -> bool:  # type: ignore[override]  # of a config, not of the class
        """With KaSA and MonteCLoRA."""
        return variants.chosen(self).penalizes

    def penalty(self, leaves: Leaves) -> Float[Array, ""]:
        """That of KaSA or MonteCLoRA."""
        return variants.chosen(self).penalty(self, leaves)

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """``lora_A`` ``(*stack, in, rank)`` and ``lora_B`` ``(*stack, rank, out)``, float32, and what goes with them.

        Where ranks differ the smaller ones are padded with zeros, which stay zero in training.
        """
        for field in ("lora_bias", "alora_invocation_tokens"):
            if getattr(self, field) and layout.lookup:
                raise ValueError(f"{field} is not for embeddings, as '{names.flat[0]}' is. Target other modules.")
        init, ranks = self.init_lora_weights or False, self.ranks(names, adapted)
        if self.initializer.needs == "data":
            raise ValueError(f"init_lora_weights={init!r} looks at data. Write pj.apply_lora_from_data.")
        if layout.groups > 1 or variants.chosen(self) is not variants.PLAIN:
            for name in names[adapted]:
                self.leaf_shapes(name, layout, shape)  # raises where they do not suit
        params = random.drawn(init, layout, shape, names, ranks, key)
        params |= variants.drawn(self, layout, shape, names, adapted, key)
        if self.lora_bias:
            params[BIAS] = random.drawn_bias(init, layout.sizes(shape)[1], names, ranks // layout.groups, key)
        return params, self.state(names, adapted)

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """Rank and scale of each stacked layer, 0 where it is not adapted; and the invocation."""
        tokens = self.alora_invocation_tokens
        invocation = {} if tokens is None else alora.invocation_state(tokens, names)
        return super().state(names, adapted) | invocation | variants.chosen(self).state(self, names, adapted)

    @property
    def reads_input_ids(self) -> bool:
        """An aLoRA depends on where its invocation is."""
        return self.alora_invocation_tokens is not None

    def with_input_ids(
        self, state: Mapping[str, Any], ids: jax.Array, stack: tuple[int, ...], segment_ids: jax.Array | None
    ) -> dict[str, Any]:
        """The state with the places of the invocation, that of each text of a row if it has several."""
        return alora.with_places(state, ids, stack, segment_ids)

    def init_on(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any], Weight]:
        """`init`, or a start from the base, with the norms of its columns for DoRA."""
        params, state = self.init(base.layout, base.shape, names, adapted, key)
        row = self.initializer
        if row.embeddings == "refused" and base.layout.lookup:
            raise ValueError(
                f"init_lora_weights={row.value!r} is not for embeddings, as '{names.flat[0]}' is. Target others."
            )
        if row.make is not None and (row.embeddings == "own" or not base.layout.lookup):
            params, base = initialize_layers(self, base, names, adapted, key, [row.make(self)] * names.size)
        base = variants.chosen(self).changed(self, base, names, adapted)
        for role in self.frozen:
            state[role] = params.pop(role)
        if self.use_dora:
            params[dora.MAGNITUDE] = dora.initialize(params, state, base)
        return params, state, base

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``rank * (in + out)`` of each stacked layer, or a group's part of it for outputs, and ``out`` a vector."""
        rank, n_in = np.asarray(state["rank"]), params["lora_A"].shape[-2]
        if "lora_B" not in params:
            return rank * n_in
        n_out, inner = params["lora_B"].shape[-1], rank // grouped_conv.groups_of(params)
        sizes = rank * n_in + inner * n_out
        for role in params.keys() - {"lora_A", "lora_B"}:
            is_of_ranks = LoraConfig.axes[role] == ("rank",)
            sizes = sizes + (rank if is_of_ranks else (rank > 0) * params[role].shape[-1])
        return sizes

    @property
    def frozen(self) -> tuple[str, ...]:
        """Arrays that the initializer or a variant leaves untrained: B with ``"mica"``."""
        return (*self.initializer.frozen, *variants.chosen(self).frozen)

    @property
    def reads_base(self) -> bool:  # type: ignore[override]  # of a config, not of the class: with DoRA alone
        """With DoRA."""
        return self.use_dora

    def changes_bias(self, module: str) -> bool:
        """With ``lora_bias``, that of all tokens."""
        return self.lora_bias and self.alora_invocation_tokens is None

    def rebased(self, base: Weight, names: np.ndarray, adapted: np.ndarray) -> Weight:
        """The base without what the factors started at, or KaSA takes out, as PEFT takes it out again."""
        row, variant = self.initializer, variants.chosen(self)
        if variant.changes_base:
            return variant.changed(self, base, names, adapted)
        if row.make is None or not row.changes_base or base.layout.lookup:
            return base  # what data gave cannot be computed again: the base is the one that the initializer left
        return initialize_layers(self, base, names, adapted, jax.random.key(0), [row.make(self)] * names.size)[1]

    def state_beside_bias(self, names: np.ndarray, adapted: np.ndarray, biased: Collection[str]) -> dict[str, Any]:
        """With ``lora_bias``, whether the layers have none."""
        if not self.lora_bias or set(names[adapted].flat) <= set(biased):
            return {}
        return {UNBIASED: jnp.asarray(adapted)}

    def merge_bias(self, params: Arrays, state: Arrays, bias: Float[Array, " out"]) -> Float[Array, " out"]:
        """The layer's bias and ``s`` times the trained one."""
        own = state["scaling"] * params[BIAS]
        return added(bias, own)

    def merge(
        self,
        params: Arrays,
        state: Mapping[str, Any],
        matrix: Float[Array, "in out"],
        unadapted: Float[Array, "in out"] | None = None,
    ) -> Float[Array, "in out"]:
        """``W + s A B``, added in the adapter's precision; ``unadapted`` is for DoRA's norm."""
        if alora.TOKENS in state:
            raise MergeError(
                "An adapter with alora_invocation_tokens adds to some tokens of a sequence only, which no merged "
                "weight does. Keep it apart."
            )
        if UNBIASED in state:
            raise MergeError(
                "lora_bias=True adds a bias to a layer that has none to merge it into. Keep the adapter apart, or give "
                "the layer a bias of zeros."
            )
        token_scales.check_merge(state)
        grouped_conv.check_merge(params, state)
        if dora.MAGNITUDE in params:
            return dora.merge(params, state, matrix, unadapted)
        a, b = variants.factors(params, state, _second(params, state), len(matrix))
        return (matrix.astype(a.dtype) + (a * state["scaling"].astype(a.dtype)) @ b).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (dropout(x) A s) B``; the low-rank path runs in the adapter's precision."""
        if dora.MAGNITUDE in params:
            return dora.apply(self, params, state, base, x, product)
        y, (n_in, _) = base.apply(x, product), base.layout.sizes(base.shape)
        a, b = variants.factors(params, state, _second(params, state), n_in)
        scaling = state["scaling"].astype(a.dtype)
        dropped = x if product.looks_up else dropout(x, state)
        if scaling.ndim and not variants.in_training(state):  # each group has its own
            inner = product.down(dropped, a * scaling[..., None, None])
        else:  # the product is scaled, and not A, of which backward would keep a scaled copy
            inner = variants.inner(dropped, a, params, state, product) * scaling
        if token_scales.SCALES in state:
            inner = token_scales.scaled(inner, state, product)
        update = product.up(inner, b)
        if UNBIASED in state:
            update = update + product.scale(jnp.ones_like(update), scaling[..., None] * params[BIAS])
        if alora.TOKENS in state:
            update = alora.masked(update, state)
        return product.added(y, update)


def _second(params: Arrays, state: Mapping[str, Any]) -> Float[Array, "*groups rank out"]:
    """B, in the precision of A; it is frozen where only A is trained."""
    b: jax.Array = params["lora_B"] if "lora_B" in params else state["lora_B"]
    return b.astype(params["lora_A"].dtype)

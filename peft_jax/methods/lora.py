"""LoRA: W' = W + s A B with s = alpha / rank, or alpha / sqrt(rank).

Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation 3; rank-stabilized scale: Kalajdzievski, 2023,
https://arxiv.org/abs/2312.03732. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.dropout import dropout
from peft_jax.core.layout import Layout
from peft_jax.core.paths import keys_from_names
from peft_jax.core.product import Product
from peft_jax.core.targets import pattern_value
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, unsupported
from peft_jax.methods.ranked import Ranked


@register("LORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Ranked):
    """Adds a trainable low-rank matrix to a frozen weight; fields and defaults are PEFT's.

    Attributes:
        r: Rank of the added matrix, at least 1.
        lora_alpha: Numerator of its scale ``lora_alpha / r``.
        lora_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        target_modules: Names (ends of module paths), one regex for whole paths, or ``"all-linear"``.
        exclude_modules: Names, or one regex, of modules to leave out.
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted modules).
        use_rslora: Scale by ``lora_alpha / sqrt(r)`` instead.
        modules_to_save: Modules trained whole, beside the adapter.
        init_lora_weights: True (A as PyTorch's Linear, B zero), False (both random) or ``"gaussian"``.
        layers_to_transform: Index or indices of the layers to adapt; None for all.
        layers_pattern: Name of the list of layers, if it is not the first numbered one.
        rank_pattern: Rank by pattern of module paths, where it differs from ``r``.
        alpha_pattern: Alpha by pattern of module paths, where it differs from ``lora_alpha``.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.

    Every other field of PEFT's ``LoraConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]).scaling("q_proj")
        2.0
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"lora_A": ("in", "rank"), "lora_B": ("rank", "out")}

    r: int = 8
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Sequence[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)
    megatron_config: dict[str, Any] | None = unsupported(None)
    megatron_core: str | None = unsupported("megatron.core")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = unsupported(None)
    loftq_config: dict[str, Any] | None = unsupported({})
    eva_config: dict[str, Any] | None = unsupported(None)
    corda_config: dict[str, Any] | None = unsupported(None)
    lora_ga_config: dict[str, Any] | None = unsupported(None)
    velora_config: dict[str, Any] | None = unsupported(None)
    monteclora_config: dict[str, Any] | None = unsupported(None)
    arrow_config: dict[str, Any] | None = unsupported(None)
    kasa_config: dict[str, Any] | None = unsupported(None)
    use_bdlora: dict[str, Any] | None = unsupported(None)
    use_dora: bool = unsupported(False)
    alora_invocation_tokens: list[int] | None = unsupported(None)
    use_qalora: bool = unsupported(False)
    qalora_group_size: int = unsupported(16)
    layer_replication: list[tuple[int, int]] | None = unsupported(None)
    lora_bias: bool = unsupported(False)
    target_parameters: list[str] | None = unsupported(None)
    ensure_weight_tying: bool = unsupported(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "lora_dropout")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not supported yet. Write True, False or 'gaussian'."
            )

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The two factors of the added matrix."""
        rank = self.rank(module)
        return {"lora_A": (n_in, rank), "lora_B": (rank, n_out)}

    def scaling(self, module: str) -> float:
        """Scale of the adapter of a module."""
        rank, alpha = self.rank(module), pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)

    @property
    def dropout_rate(self) -> float:
        """``lora_dropout``."""
        return self.lora_dropout

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, hit: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """``lora_A`` ``(*stack, in, rank)`` and ``lora_B`` ``(*stack, rank, out)``, float32.

        Where ranks differ the smaller ones are padded with zeros, which stay zero in training.
        """
        rank = self.ranks(names, hit)
        n_in, n_out = layout.sizes(shape)
        width = int(rank.max())
        draw_a, draw_b = self._draws(n_in, n_out, width, layout.lookup)
        for _ in layout.stack:
            draw_a, draw_b = jax.vmap(draw_a), jax.vmap(draw_b)
        keys_a, keys_b = (keys_from_names(jax.random.fold_in(key, i), names) for i in range(2))
        used = jnp.asarray(np.arange(width) < rank[..., None])
        a = jnp.where(used[..., None, :], draw_a(keys_a, jnp.asarray(rank)), 0)
        b = jnp.where(used[..., :, None], draw_b(keys_b, jnp.asarray(rank)), 0)
        return {"lora_A": a, "lora_B": b}, self.state(names, hit)

    def _draws(self, n_in: int, n_out: int, width: int, lookup: bool) -> tuple[Callable[..., jax.Array], ...]:
        """Functions of (key, rank) that draw A and B as PEFT's ``reset_lora_parameters`` does."""

        def zeros(*shape: int) -> Callable[..., jax.Array]:
            return lambda key, rank: jnp.zeros(shape)

        def normal(*shape: int) -> Callable[..., jax.Array]:
            return lambda key, rank: jax.random.normal(key, shape)

        def uniform(shape: tuple[int, int], fan_in: int | None) -> Callable[..., jax.Array]:
            # PyTorch's Linear: kaiming_uniform with a = sqrt(5), which is uniform within 1 / sqrt(fan_in).
            return lambda key, rank: (
                jax.random.uniform(key, shape, minval=-1.0) / jnp.sqrt(jnp.float32(fan_in or jnp.maximum(rank, 1)))
            )

        shape_a, shape_b = (n_in, width), (width, n_out)
        if lookup:
            return (normal(*shape_a) if self.init_lora_weights is False else zeros(*shape_a)), normal(*shape_b)
        if self.init_lora_weights == "gaussian":
            return lambda key, rank: normal(*shape_a)(key, rank) / jnp.float32(jnp.maximum(rank, 1)), zeros(*shape_b)
        return uniform(shape_a, n_in), zeros(*shape_b) if self.init_lora_weights else uniform(shape_b, None)

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``rank * (in + out)`` of each stacked layer."""
        return np.asarray(state["rank"]) * (params["lora_A"].shape[-2] + params["lora_B"].shape[-1])

    def merge(self, params: Arrays, state: Mapping[str, Any], matrix: jax.Array) -> jax.Array:
        """``W + s A B``, added in the adapter's precision."""
        a, b = params["lora_A"], params["lora_B"]
        return (matrix.astype(a.dtype) + (a * state["scaling"].astype(a.dtype)) @ b).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: jax.Array, product: Product
    ) -> jax.Array:
        """``x W + (dropout(x) A s) B``; the low-rank path runs in the adapter's precision."""
        y, a = base.apply(x, product), params["lora_A"]
        scaling = state["scaling"].astype(a.dtype)
        if scaling.ndim:  # each group has its own
            a = a * scaling[..., None, None]
        inner = product.down(x if product.looks_up else dropout(x, state), a)
        inner = inner if scaling.ndim else inner * scaling  # not A: backward would keep a scaled copy of it
        update = product.up(inner, params["lora_B"])
        return (y.astype(update.dtype) + update).astype(y.dtype)

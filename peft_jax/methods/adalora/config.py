"""AdaLoRA: W' = W + s A diag(E) B, whose least important singular values E are set to zero while it is trained.

Zhang et al., 2023, https://openreview.net/forum?id=lq62uWRJjiY, equation 3; the penalty on A and B is equation 4, the
choice of singular values is in `peft_jax.methods.adalora.rank_allocator`. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.dropout import dropout
from peft_jax.core.layout import Layout
from peft_jax.core.paths import leaf_names
from peft_jax.core.product import Product
from peft_jax.core.weight import Weight
from peft_jax.methods.adalora import rank_allocator
from peft_jax.methods.adalora.rank_allocator import Allocation
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.fields import check_probability, unsupported
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields
from peft_jax.methods.training_hooks import Leaves, Trained, TrainingHooks


@register("ADALORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(TargetFields, ExcludeFields, LayerFields, TrainingHooks, Method):
    """Adds a low-rank matrix whose rank training takes from where it matters least; fields and defaults are PEFT's.

    The schedule counts optimizer updates from 1 and runs in the training step by itself (`peft_jax.train.start`,
    `peft_jax.train.make_training_step`); the last choice falls at ``total_step - tfinal``.

    It goes on the modules that the fields of `TargetFields`, `ExcludeFields` and `LayerFields` say.

    Attributes:
        init_r: Rank of each layer at the start, at least 1.
        target_r: Rank that is left in the end, on average over the layers.
        tinit: Steps at the start in which all ranks stay.
        tfinal: Steps at the end in which the choice stays.
        deltaT: Steps between two choices; in between, what was masked may grow again.
        beta1: Smoothing of the sensitivity, above 0 and below 1.
        beta2: Smoothing of its uncertainty, above 0 and below 1.
        orth_reg_weight: Factor of the penalty that keeps A and B orthogonal.
        total_step: Steps of the whole training. `peft-jax finetune` takes the run's.
        rank_pattern: Which ranks were kept, by module path and ``.lora_E``; found by training.
        lora_alpha: The added matrix is scaled by ``lora_alpha / init_r``; at 0 or below it is not scaled, as in PEFT.
        lora_dropout: Probability of zeroing an input of the low-rank path in training, in [0, 1).
        bias: Which biases are trained: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted modules).
        init_lora_weights: True (E zero, so that nothing is changed) or False (all random).
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        r: Not used, as in PEFT; a value of its own draws a warning.

    Every other field of PEFT's ``AdaLoraConfig`` is known, and refused away from its default.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((4, 8))}}
        >>> config = AdaLoraConfig(init_r=3, target_r=2, total_step=100, target_modules=["q"])
        >>> params = pj.apply_adapter(params, config)
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'lora_A': (4, 3), 'lora_E': (3,), 'lora_B': (3, 8)}
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "lora_A": ("in", "rank"),
        "lora_E": ("rank",),
        "lora_B": ("rank", "out"),
    }
    bias_only: ClassVar[str] = "lora_only"
    penalizes: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1  # noqa: N815  # PEFT's name
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None  # type: ignore[assignment]  # PEFT's field, of another kind here
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    init_lora_weights: bool = True
    fan_in_fan_out: bool = False
    r: int = dataclasses.field(default=8, metadata={"unused": True})
    use_rslora: bool = unsupported(False)
    alpha_pattern: dict[str, float] = unsupported({})
    megatron_config: dict[str, Any] | None = unsupported(None)
    megatron_core: str | None = unsupported("megatron.core", switch="megatron_config")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = unsupported(None)
    loftq_config: dict[str, Any] = unsupported({})
    eva_config: dict[str, Any] | None = unsupported(None)
    corda_config: dict[str, Any] | None = unsupported(None)
    use_dora: bool = unsupported(False)
    alora_invocation_tokens: list[int] | None = unsupported(None)
    use_qalora: bool = unsupported(False)
    qalora_group_size: int = unsupported(16, switch="use_qalora")
    layer_replication: list[tuple[int, int]] | None = unsupported(None)
    lora_bias: bool = unsupported(False)
    target_parameters: list[str] | None = unsupported(None)
    ensure_weight_tying: bool = unsupported(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "lora_dropout")
        if self.r != 8:
            warnings.warn(f"ADALORA does not use r={self.r}. Set init_r and target_r instead.", stacklevel=3)
        at_least = {"init_r": 1, "target_r": 0, "tinit": 0, "tfinal": 0, "deltaT": 1, "orth_reg_weight": 0}
        for name, least in at_least.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"ADALORA needs {name} of at least {least}, got {getattr(self, name)}.")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"ADALORA needs {name} above 0 and below 1, got {getattr(self, name)}.")
        if self.total_step is not None and not self.tinit < self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} in which "
                "ranks are chosen. Lower one of them, or raise total_step."
            )

    def structure(self) -> tuple[Any, ...]:
        """In training, what the step computes by, too."""
        trained = () if self.inference_mode else (self.beta1, self.beta2, self.orth_reg_weight)
        return (*super().structure(), *trained)

    @property
    def dropout_rate(self) -> float:
        """``lora_dropout``."""
        return self.lora_dropout

    @property
    def patterns(self) -> Mapping[str, str]:
        """None: the keys of ``rank_pattern`` are no patterns."""
        return {}

    def rank(self, module: str) -> int:
        """Rank of a module: what training left it, or ``init_r``."""
        return sum((self.rank_pattern or {}).get(f"{module}.lora_E", [True] * self.init_r))

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The singular values and their vectors."""
        rank = self.rank(module)
        return {"lora_A": (n_in, rank), "lora_E": (rank,), "lora_B": (rank, n_out)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Small vectors and no singular values, or normal numbers."""
        if not self.init_lora_weights:
            return jax.random.normal(key, shape)
        return jnp.zeros(shape) if role == "lora_E" else 0.02 * jax.random.normal(key, shape)

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As every method's, once the schedule is known."""
        self._check_schedule()
        return super().init(layout, shape, names, adapted, key)

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """Which layers are adapted, their ranks, and their scale, which stays that of ``init_r``."""
        ranks = np.vectorize(lambda name, on: self.rank(name) if on else 0, otypes=[np.int32])(names, adapted)
        scale = (self.lora_alpha if self.lora_alpha > 0 else float(self.init_r)) / (self.init_r + 1e-5)
        scaling = np.where(adapted, np.float32(scale), np.float32(0))
        return {"hit": jnp.asarray(adapted), "scaling": jnp.asarray(scaling), "rank": jnp.asarray(ranks)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """``rank * (in + 1 + out)`` of each stacked layer."""
        return np.asarray(state["rank"]) * (params["lora_A"].shape[-2] + 1 + params["lora_B"].shape[-1])

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``W + s A diag(E) B``, added in the adapter's precision."""
        a, e, b = _factors(params)
        return (matrix.astype(a.dtype) + ((a * e) @ b) * state["scaling"].astype(a.dtype)).astype(matrix.dtype)

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (dropout(x) A diag(E) s) B``; the low-rank path runs in the adapter's precision."""
        y, (a, e, b) = base.apply(x, product), _factors(params)
        scaled = a * (e * jnp.expand_dims(state["scaling"].astype(a.dtype), (-2, -1)))
        update = product.up(product.down(x if product.looks_up else dropout(x, state), scaled), b)
        return product.added(y, update)

    def for_run(self, max_steps: int) -> Self:
        """With the run's length as ``total_step``, if it has none."""
        return self if self.total_step is not None else self.replace(total_step=max_steps)

    def penalty(self, leaves: Leaves) -> Float[Array, ""]:
        """Mean distance of A' A and B B' from one, times ``orth_reg_weight``, over all matrices of all layers."""
        distances, count = jnp.zeros(()), jnp.zeros(())
        for leaf in leaves.values():
            adapted, rank = jnp.asarray(leaf.state["hit"]), leaf.state["rank"]
            a, b = leaf.params["lora_A"], leaf.params["lora_B"]
            one = jnp.broadcast_to(jnp.eye(a.shape[-1]), (*adapted.shape, *2 * a.shape[-1:]))
            number = jax.lax.broadcasted_iota(jnp.int32, one.shape, adapted.ndim)
            one = jnp.where(number < jnp.expand_dims(rank, (-2, -1)), one, 0)  # padding has none
            for gram in (jnp.swapaxes(a, -1, -2) @ a, b @ jnp.swapaxes(b, -1, -2)):
                square = jnp.sum((gram - one) ** 2, axis=(-2, -1))
                is_apart = adapted & (square > 0)  # the root has no slope at zero, as that of a layer without ranks
                distances += jnp.sum(jnp.where(is_apart, jnp.sqrt(jnp.where(is_apart, square, 1)), 0))
                count += jnp.sum(adapted, dtype=jnp.float32)
        return self.orth_reg_weight * distances / count

    def begin(self, leaves: Leaves) -> Allocation:
        """The allocator's state before the first step."""
        self._check_schedule()
        there = {
            path: np.arange(leaf.params["lora_E"].shape[-1]) < np.asarray(leaf.state["rank"])[..., None]
            for path, leaf in leaves.items()
        }
        times = {"tinit": self.tinit, "tfinal": self.tfinal, "total_step": self.total_step or 0}
        params = {path: leaf.params for path, leaf in leaves.items()}
        return rank_allocator.begin(params, there, self.target_r, self.deltaT, **times)

    def advance(self, params: Trained, gradients: Trained, schedule: Allocation) -> tuple[Trained, Allocation]:
        """`peft_jax.methods.adalora.rank_allocator.allocate`."""
        return rank_allocator.allocate(params, gradients, schedule, beta1=self.beta1, beta2=self.beta2)

    def finish(self, leaves: Leaves, schedule: Allocation) -> tuple[Self, Leaves]:
        """Without the singular values that are masked, which ``rank_pattern`` tells."""
        kept = {path: rank_allocator.needed(leaf.params, path, schedule) for path, leaf in leaves.items()}
        if all(np.array_equal(mask, schedule.there[path]) for path, mask in kept.items()):
            return self, leaves
        names = {path: leaf_names(path, leaf.layout, leaf.shape) for path, leaf in leaves.items()}
        pattern = dict(self.rank_pattern or {})
        for path, leaf in leaves.items():
            for index in zip(*np.nonzero(np.asarray(leaf.state["hit"])), strict=True) if names[path].ndim else [()]:
                key = f"{names[path][index]}.lora_E"
                pattern[key] = rank_allocator.narrowed(pattern.get(key, [True] * self.init_r), kept[path][index])
        config, trimmed = self.replace(rank_pattern=pattern), {}
        for path, leaf in leaves.items():
            state = {**leaf.state, **config.state(names[path], np.asarray(leaf.state["hit"]))}
            params = rank_allocator.compacted(leaf.params, kept[path])
            trimmed[path] = dataclasses.replace(leaf, params=params, state=state)
        return config, trimmed

    def _check_schedule(self) -> None:
        if self.total_step is None:
            raise ValueError(
                "AdaLoraConfig needs total_step, the number of steps of the whole training. Write total_step=..."
            )
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} is above init_r={self.init_r}, and ranks only fall. Lower it.")


def _factors(
    params: Arrays,
) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups one rank"], Float[Array, "*groups rank out"]]:
    """``A``, ``E`` as a row, ``B``."""
    return params["lora_A"], jnp.expand_dims(params["lora_E"], -2), params["lora_B"]

"""Options of LoRA's starts, as classes of their own; names and defaults are PEFT's. A config holds dictionaries."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft_jax.methods.lora.initializers.from_weight import changes_base

FROM_DATA = ("eva", "corda", "lora_ga")
STARTS = ("gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "loftq", "mica", *FROM_DATA)


@dataclasses.dataclass(frozen=True)
class LoftQConfig:
    """How LoftQ rounds the base.

    Attributes:
        loftq_bits: 4 for NF4, 8 for int8 with a scale for each output.
        loftq_iter: How often grid and factors are found in turns.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8) or self.loftq_iter < 1:
            raise ValueError(f"LoftQ takes loftq_bits=4 or 8, and loftq_iter of at least 1, got {self}.")


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """How EVA finds components and shares out ranks.

    Attributes:
        rho: A layer's rank is at most ``rho * r``; at least 1.
        tau: Cosine between a component before and after a batch from which on it counts as found, in [0, 1].
        use_label_mask: Whether tokens whose label is ``label_mask_value`` are left out.
        label_mask_value: That label.
        whiten: Divide components by the roots of their singular values.
        adjust_scaling_factors: Scale alphas with the ranks, so that all scales stay as they were.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if self.rho < 1 or not 0 <= self.tau <= 1:
            raise ValueError(f"EVA takes rho of at least 1 and tau in [0, 1], got {self}.")


@dataclasses.dataclass(frozen=True)
class CordaConfig:
    """Which directions CorDA takes.

    Attributes:
        corda_method: ``"ipm"``, those that the inputs use most, or ``"kpm"``, least, which keeps what the model knows.
        cache_file: PEFT's, of decompositions; not supported here.
        covariance_file: PEFT's, of covariances; not supported here.
        verbose: PEFT's; changes nothing here.
        use_float16_for_covariance: PEFT's; not supported here, covariances are float32.
        prune_temporary_fields: PEFT's; changes nothing here, where nothing is left behind.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ValueError(f"corda_method is 'ipm' or 'kpm', got {self.corda_method!r}.")


@dataclasses.dataclass(frozen=True)
class LoraGAConfig:
    """Which directions of the gradient LoRA-GA takes for A and B.

    Attributes:
        direction: ``"ArB2r"`` (A the first r, B the second), ``"A2rBr"`` (the other way), ``"ArBr"`` (in turns) or
            ``"random"``.
        scale: ``"stable"``, ``"weight_svd"``, ``"gd_scale"`` or ``"unit"``.
        stable_gamma: What ``"stable"`` divides by the root of.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        directions, scales = ("ArBr", "A2rBr", "ArB2r", "random"), ("stable", "weight_svd", "gd_scale", "unit")
        if self.direction not in directions or self.scale not in scales:
            raise ValueError(f"LoRA-GA's direction is one of {directions} and its scale one of {scales}, got {self}.")


def check_start(config: Any) -> None:
    """Make the options of a LoRA config's start dictionaries, and raise ValueError if they do not go with it."""
    init = config.init_lora_weights
    if not isinstance(init, bool) and init not in STARTS and not re.fullmatch(r"pissa_niter_\d+", str(init)):
        raise ValueError(
            f"init_lora_weights={init!r} is not supported. Write True, False or one of {', '.join(STARTS)}."
        )
    if init == "mica" and (config.use_dora or config.alora_invocation_tokens):
        raise ValueError(
            "init_lora_weights='mica' goes without use_dora and alora_invocation_tokens. Leave one of them."
        )
    if config.loftq_config and init != "loftq":
        raise ValueError(f"loftq_config goes with init_lora_weights='loftq', got {init!r}. Leave one of them.")
    if init == "loftq":
        given = config.loftq_config
        if not given:
            raise ValueError("loftq_config is not given. Write loftq_config=LoftQConfig(...).")
        options = given if isinstance(given, LoftQConfig) else _from_fields(LoftQConfig, given, "loftq_config")
        object.__setattr__(config, "loftq_config", dataclasses.asdict(options))
    cls: type[EvaConfig | CordaConfig | LoraGAConfig]
    for start, cls in zip(FROM_DATA, (EvaConfig, CordaConfig, LoraGAConfig), strict=True):
        name = f"{start}_config"
        given = getattr(config, name)
        if given is None and init == start and cls is not LoraGAConfig:
            given = cls()
        if given is None:
            continue
        if init not in (start, True):  # True is what a converted adapter's file says, beside these options
            raise ValueError(f"{name} goes with init_lora_weights={start!r}, got {init!r}. Leave one of them.")
        chosen = given if isinstance(given, cls) else _from_fields(cls, given, name)
        object.__setattr__(config, name, dataclasses.asdict(chosen))


def check_invocation(config: Any) -> None:
    """Raise ValueError if a LoRA config's invocation is no list of ids, or goes with another variant."""
    tokens = config.alora_invocation_tokens
    if tokens is None:
        return
    if not tokens or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise ValueError(f"alora_invocation_tokens are the ids of an invocation, at least one, got {tokens!r}.")
    if config.use_dora:
        raise ValueError("alora_invocation_tokens do not go with use_dora=True. Leave one of them.")


def check_parameters(config: Any) -> None:
    """Raise ValueError if a LoRA config has ``target_parameters`` and what PEFT has for modules alone."""
    if isinstance(config.target_parameters, str):
        raise ValueError(f"target_parameters is a list of names. Write [{config.target_parameters!r}].")
    if not config.target_parameters:
        return
    alone = {
        "lora_dropout": config.lora_dropout,
        "fan_in_fan_out": config.fan_in_fan_out,
        "lora_bias": config.lora_bias,
        "use_dora": config.use_dora,
        "alora_invocation_tokens": config.alora_invocation_tokens,
    }
    if config.init_lora_weights not in (True, False, "gaussian"):
        alone["init_lora_weights"] = config.init_lora_weights
    if given := {field: value for field, value in alone.items() if value}:
        raise ValueError(f"target_parameters do not go with {given}, which are for modules. Leave one of them.")


def _from_fields(cls: type, fields: Any, name: str) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(set(fields) - set(known)):
        raise ValueError(f"{name} does not know {unknown}. It has {known}.")
    return cls(**fields)


def layer_order(ranges: Iterable[Sequence[int]]) -> list[int]:
    """Which of a model's layers stands where, by the ranges of ``layer_replication``.

    Example:
        >>> layer_order([[0, 3], [1, 4]])
        [0, 1, 2, 1, 2, 3]
    """
    return [layer for start, end in ranges for layer in range(start, end)]


def check_replication(config: Any) -> None:
    """Make the ranges of ``layer_replication`` tuples; raise ValueError for what changes the shared weights."""
    if not config.layer_replication:
        return
    ranges = tuple(tuple(one) for one in config.layer_replication)
    if not all(len(one) == 2 and 0 <= one[0] < one[1] for one in ranges):
        raise ValueError(f"layer_replication is a list of ranges [start, end) with 0 <= start < end, got {ranges}.")
    object.__setattr__(config, "layer_replication", ranges)
    shared: dict[str, Any] = {"bias": config.bias} if config.bias != "none" else {}
    if config.target_parameters:
        shared["target_parameters"] = config.target_parameters
    init = config.init_lora_weights
    if changes_base(init):
        shared["init_lora_weights"] = init
    if shared:
        raise ValueError(
            f"layer_replication does not go with {shared}, which change weights that replicated layers share. Leave "
            "one of them."
        )

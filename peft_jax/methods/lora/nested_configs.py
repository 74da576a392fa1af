"""Options of LoRA's initializers, and of a run; names and defaults are PEFT's. A `LoraConfig` holds dictionaries."""

import dataclasses

from peft_jax.methods.fields import check_kinds


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
        check_kinds(self)
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
        check_kinds(self)
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
        check_kinds(self)


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
        check_kinds(self)
        if self.stable_gamma < 1:
            raise ValueError(f"LoRA-GA's stable_gamma is at least 1, got {self.stable_gamma}.")


@dataclasses.dataclass(frozen=True)
class LoraRuntimeConfig:
    """Where a run computes, which PEFT's files do not hold.

    Attributes:
        ephemeral_gpu_offload: PEFT's, to compute DoRA's norms on a GPU where the layer is in the host's memory. Not
            supported: arrays are computed where they are.

    Raises:
        ValueError: if it is True.

    Example:
        >>> "runtime_config" in pj.LoraConfig(runtime_config=LoraRuntimeConfig()).to_dict()
        False
    """

    ephemeral_gpu_offload: bool = False

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.ephemeral_gpu_offload:
            raise ValueError(
                "LoraRuntimeConfig(ephemeral_gpu_offload=True) is not supported: DoRA's norms are computed where the "
                "weights are. Put the weights on the GPU with jax.device_put, and leave it out."
            )

"""Settings of the CPU's compiler for programs that run once."""

from importlib.metadata import version

# Before JAX 0.11 loops can be written as LLVM's code at once, without MLIR between: a third of the compiler's time.
_HAS_FUSION_EMITTERS = tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11)
NO_FUSION_EMITTERS = "--xla_cpu_use_fusion_emitters=false" if _HAS_FUSION_EMITTERS else ""
NO_OPTIMIZATIONS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def flags(devices: int = 1) -> str:
    """The value of XLA_FLAGS for a process of this number of virtual devices."""
    return f"--xla_force_host_platform_device_count={devices} {NO_FUSION_EMITTERS}"


def environment(devices: int = 1) -> dict[str, str]:
    """Variables for a child process of this number of virtual devices."""
    return {"XLA_FLAGS": flags(devices), **NO_OPTIMIZATIONS}

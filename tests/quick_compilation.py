"""Settings of JAX and the CPU's compiler for programs that run once."""

import ctypes
import gc
import sys
import threading
from importlib.metadata import version

import jax
from jax._src.interpreters import mlir

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


def lower_in_shared_contexts(programs: int = 256) -> None:
    """Lets this number of programs of a thread be lowered in one MLIR context.

    JAX makes a context for each program, with all dialects: an eighth of the tests' processor time. A context keeps the
    constants and locations of its programs, so it is left behind after a while. JAX has no setting for it.
    """
    make = mlir.make_ir_context
    of_thread = threading.local()

    def shared() -> object:
        if getattr(of_thread, "left", 0) == 0:
            of_thread.context, of_thread.left = make(), programs
        of_thread.left -= 1
        return of_thread.context

    mlir.make_ir_context = shared  # type: ignore[assignment]


def collect_garbage_rarely() -> None:
    """Looks for cycles less often, and not among what is there now: modules, tests and their rows."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def forget_programs() -> None:
    """Lets all compiled programs go, and gives their memory back: glibc alone would keep it."""
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)

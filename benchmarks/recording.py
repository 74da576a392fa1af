"""The record of a benchmark: its rows and ratios, what it ran with and where, printed and as a JSON file."""

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "peft", "transformers", "bitsandbytes", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, accelerator, versions and date."""
    import jax  # not at the top: a contender of PyTorch is weighed without it

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "python": platform.python_version(),
        "versions": package_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def package_versions() -> dict[str, str]:
    """The versions of the packages that figures depend on, of those that are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def finish(program: str, settings: Any, rows: Mapping[str, Any], ratios: Sequence[Any]) -> None:
    """Print what a program found and write its record."""
    show(list(rows.values()), ratios)
    file = write_record(settings.build / "records", program, settings, list(rows.values()), ratios)
    print(f"Wrote {file}.")


def write_record(folder: Path, name: str, settings: Any, rows: Sequence[Any], ratios: Sequence[Any]) -> Path:
    """Write a record, as JSON named after the program, the size and the dtype."""
    chosen = {key: value for key, value in vars(settings).items() if key not in ("alone", "build")}
    record = {"program": name, "settings": chosen, "machine": machine(), "rows": rows, "ratios": ratios}
    folder.mkdir(parents=True, exist_ok=True)
    shape = "-".join(str(chosen[part]) for part in ("size", "dtype") if part in chosen)
    file = folder / f"{name}-{shape}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return file


def show(rows: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any]]) -> None:
    """Print a record's rows and ratios."""
    for one in rows:
        if "not_run" in one:
            print(f"{one['name']:28} not run: {one['not_run']}")
            continue
        parts = []
        if "median" in one:
            parts.append(f"{1e3 * one['median']:10.1f} ms ({1e3 * one['fastest']:.1f} to {1e3 * one['slowest']:.1f})")
        if "tokens_per_second" in one:
            parts.append(f"{one['tokens_per_second']:10,.0f} tokens/s")
        parts += [
            f"{key.removesuffix('_bytes')} {value / 2**20:,.0f} MiB"
            for key, value in one.items()
            if key.endswith("_bytes") and value is not None
        ]
        print(f"{one['name']:28}" + "  ".join(parts))
    for one in ratios:
        print(f"{one['what']}: {one['median']:.3f}", end="")
        print(
            "  (fastest {fastest:.3f}, turns {lowest:.3f} to {highest:.3f})".format(**one) if "fastest" in one else ""
        )

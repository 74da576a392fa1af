"""Several processes that train together: how they find each other, and what one of them does for all."""

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from peft_jax.cli.finetune.lost_service import service_watched
from peft_jax.cli.finetune.options import ProcessOptions, flag
from peft_jax.train.lost_peer import is_of_lost_peer

HOW = "Start all of them, each with a --process-id of its own and with the same --coordinator-address."
OTHER = "another process of the run cannot start. See what it says."
NAMED = ("coordinator_address", "num_processes", "process_id")
SECONDS_TO_LEAVE = 3


@contextlib.contextmanager
def joined(options: ProcessOptions) -> Iterator[None]:
    """Join the other processes of a run, if it has any, and leave them after the block. Process 0 alone prints.

    Raises:
        ValueError: If what finds them is missing or wrong, or they cannot be reached.
    """
    found: dict[str, Any] = {}
    for name in NAMED:
        value = getattr(options, name)
        found[name] = _from_environment(name) if value is None else value
    if not options.distributed and all(value is None for value in found.values()):
        yield
        return
    _check(found, by_cluster=options.distributed)
    if found["process_id"] == 0:
        wait = f"Waiting for {found['num_processes']} processes, {options.initialization_timeout} s at most."
        print(wait, file=sys.stderr)
    elif found["coordinator_address"] is not None:
        _reach(str(found["coordinator_address"]), options.initialization_timeout)
    # Where there is no accelerator. Programs that run at once would meet the other processes' in another order.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_enable_recoverability", True)  # else the end of another process aborts this one
    watched = service_watched(f"peft-jax: error: {_ended('process 0 does not answer')}")
    with contextlib.ExitStack() as stack:
        if found["process_id"]:
            stack.enter_context(watched)  # before the service is joined, which may end at any time
        try:
            jax.distributed.initialize(**found, initialization_timeout=options.initialization_timeout)
        except (RuntimeError, ValueError) as error:
            where = found["coordinator_address"] or "what the environment tells"
            reason = _reason(error)
            raise ValueError(f"the processes of the run cannot be joined at {where}: {reason}. {HOW}") from error
        stack.enter_context(_explained())
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            if found["process_id"] is None:  # the cluster says it
                stack.enter_context(watched)
        yield
        multihost_utils.sync_global_devices("the end of the run")  # process 0 has what the others need to leave
    if is_first():
        time.sleep(SECONDS_TO_LEAVE)  # the service to which the others say that they leave ends with this process
    jax.distributed.shutdown()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say what an error of JAX means that comes of another process's end."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if not is_of_lost_peer(error):
            raise
        raise ConnectionError(_ended(_reason(error))) from error


def _ended(reason: str) -> str:
    return (
        f"another process of the run ended, or cannot be reached: {reason}. See what it says, then start all of them "
        "again, with --resume if there is a checkpoint."
    )


def _from_environment(name: str) -> str | int | None:
    text = os.environ.get(f"JAX_{name.upper()}")
    if text is None or name == "coordinator_address":
        return text
    if not text.isdecimal():
        raise ValueError(f"JAX_{name.upper()} is '{text}'. Give a whole number.")
    return int(text)


def _reach(address: str, seconds: float) -> None:
    """Wait for process 0, as JAX's own client ends the Python process that waits in vain."""
    host, port = address.rsplit(":", 1)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > end:
                raise ValueError(f"no process 0 answers at {address} within {seconds:g} s: {error}. {HOW}") from error
        time.sleep(0.2)


def _check(found: Mapping[str, Any], *, by_cluster: bool) -> None:
    missing = [flag(name) for name, value in found.items() if value is None]
    if missing and not (by_cluster and len(missing) == len(found)):
        raise ValueError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing. Processes find each other by "
            "flags, by the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or on a cluster "
            "that JAX knows by --distributed alone."
        )
    address, count, number = (found[name] for name in NAMED)
    if address is not None and not re.fullmatch(r"\S+:\d+", str(address)):
        raise ValueError(f"--coordinator-address is '{address}'. Give address and port, such as 10.0.0.1:1234.")
    if isinstance(count, int) and isinstance(number, int) and not 0 <= number < count:
        raise ValueError(f"--process-id is {number} of {count} processes. Give 0 to {count - 1}.")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return re.sub(r"^[A-Z_]+: ", "", text[0]).rstrip(".") if text else type(error).__name__


def check_processes(mesh: Mesh | None) -> None:
    """Raise ValueError unless all devices of all processes are on the mesh, where there are several."""
    count, devices = jax.process_count(), jax.device_count()
    on_mesh = 0 if mesh is None else mesh.size
    if count > 1 and on_mesh != devices:
        lacks = "no --mesh was given" if mesh is None else f"the mesh has {on_mesh}"
        raise ValueError(
            f"{count} processes have {devices} devices, but {lacks}. Give a mesh of all, such as --mesh data={devices}."
        )


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """If the block raises in one of the processes, raise in all of them."""
    failed = True
    try:
        yield
        failed = False
    finally:
        others = in_any(failed)
    if others:
        raise ValueError(OTHER)


def in_any(said: bool) -> bool:
    """Whether any of the processes says so; all of them ask at the same time."""
    return bool(np.any(multihost_utils.process_allgather(np.array(said)))) if jax.process_count() > 1 else said


def found_by_first(find: Callable[[], bool]) -> bool:
    """Return in all processes what the first one finds; if it raises there, raise in all of them."""
    if jax.process_count() == 1:
        return find()
    found, failed = False, is_first()
    try:
        if is_first():
            found = find()
            failed = False
    finally:
        found, failed = map(bool, multihost_utils.broadcast_one_to_all(np.array([found, failed])))
    if failed:
        raise ValueError(OTHER)
    return found

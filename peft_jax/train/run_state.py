"""Checkpoints of a run through orbax: each is written whole or not at all, and restores the run bit-identically.

Each carries a hash of its arrays and one of its step and notes. Both are verified on reading, so that a checkpoint that
was damaged on the disk is refused. The hash of the arrays is over whole arrays, however devices and processes share
them. Once a checkpoint has its name, a list of its files and their hashes is added, which shows what is damaged before
the storage layer reads it. A run that is killed in between leaves a whole checkpoint without that list.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from peft_jax.core.paths import dotted, named_leaves
from peft_jax.core.short_errors import shortened
from peft_jax.core.strict_json import parse_json
from peft_jax.train.loop import State
from peft_jax.train.lost_peer import is_of_lost_peer

STATE, NOTES, FILES = "state", "notes", "files.json"
SPARE = 2**18  # bytes of a checkpoint beside its arrays, at most
logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax reports every step, and every error in each of its threads


class Checkpoints:
    """The checkpoints in a folder: arrays of the state by path, and notes in JSON.

    Args:
        folder: Their folder; made with the first one.
        keep: The number to keep; older ones are removed once a new one is whole.

    Example:
        >>> import optax, peft_jax as pj
        >>> from peft_jax.train import start
        >>> params = pj.apply_lora({"q": {"kernel": jax.numpy.ones((4, 4))}}, pj.LoraConfig(target_modules=["q"]))
        >>> state, _ = start(params, optax.adam(0.1), seed=0)
        >>> checkpoints = Checkpoints(Path("checkpoints"), keep=2)
        >>> checkpoints.save(state, {"data": "alpaca.json"})
        >>> state, notes = checkpoints.restore(state)
        >>> state.step, notes
        (0, {'data': 'alpaca.json'})
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self._keep = folder, keep
        self._opened: Any = None

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint, or None."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        """The steps whose folders have their final name, in order."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(entry.name) for entry in found if entry.name.isdecimal() and entry.is_dir())

    @property
    def _manager(self) -> Any:
        """Orbax's manager, which removes checkpoints that were not completed; made when a run reads or writes."""
        if self._opened is None:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, create=False, enable_async_checkpointing=False, cleanup_tmp_directories=True
            )
            self._opened = ocp.CheckpointManager(self.folder.absolute(), options=options)
        return self._opened

    def save(self, state: State, notes: Mapping[str, Any]) -> None:
        """Write a checkpoint, unless there is one of this step already.

        Raises:
            OSError: If it cannot be written; what was saved before stays.
        """
        if state.step == self.latest:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            arrays = _arrays(state)
            if shutil.disk_usage(self.folder).free < sum(array.nbytes for array in arrays.values()) + SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of which the storage layer makes much noise
            plain = _plain(notes)  # as they will be read
            sealed = _sealed(state.step, plain, _digest(arrays))
            items = {STATE: ocp.args.StandardSave(arrays), NOTES: ocp.args.JsonSave(sealed)}
            self._manager.save(state.step, args=ocp.args.Composite(**items))
            if jax.process_index() == 0:
                _list_files(self.folder / str(state.step))
        except Exception as error:  # a full disk is an OSError of Python or one of several kinds from the storage layer
            if is_of_lost_peer(error):
                raise
            for rest in self.folder.glob(f"{state.step}.*"):
                shutil.rmtree(rest, ignore_errors=True)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            code = re.search(r"os_error_code='(\d+)'", reason)
            reason = os.strerror(int(code[1])) if code else reason
            raise OSError(
                f"the checkpoint of step {state.step} cannot be written to {self.folder}: {reason}"
            ) from error

    def notes(self) -> dict[str, Any]:
        """Return the notes of the last checkpoint.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If it is damaged.
        """
        return self._unsealed(self._restore({NOTES: ocp.args.JsonRestore()})[NOTES])[0]

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Read the last checkpoint, onto the devices of ``like``'s arrays.

        Args:
            like: A state of the same run, as from `peft_jax.train.start`.

        Returns:
            The state and the notes.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If it is damaged, or of another run.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _arrays(like))
        items = {STATE: ocp.args.StandardRestore(shapes), NOTES: ocp.args.JsonRestore()}
        found = self._restore(items)
        notes, digest = self._unsealed(found[NOTES])
        arrays = found[STATE]
        if _digest(arrays) != digest:
            raise self._damaged("its arrays are not those that were saved")
        self._drop_old()
        trainable = _rebuilt("trainable", like.trainable, arrays)
        opt_state = _rebuilt("opt_state", like.opt_state, arrays)
        return State(self.latest or 0, trainable, opt_state, jax.random.wrap_key_data(arrays["key"])), notes

    def _restore(self, items: Mapping[str, Any]) -> Any:
        if self.latest is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}.")
        self._check_files(self.folder / str(self.latest))
        try:
            return self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        except Exception as error:
            if is_of_lost_peer(error):
                raise
            raise self._damaged(str(error).strip().splitlines()[0]) from error

    def _check_files(self, folder: Path) -> None:
        if not (folder / FILES).is_file():
            return
        try:
            wanted = parse_json((folder / FILES).read_text(encoding="utf-8"))
        except ValueError as error:  # not UTF-8, or not JSON
            raise self._damaged(f"{FILES} is not JSON") from error
        found = _file_digests(folder)
        if not isinstance(wanted, dict) or found.keys() != wanted.keys():
            raise self._damaged(f"its files are not those that {FILES} lists")
        for name, digest in found.items():
            if digest != wanted[name]:
                raise self._damaged(f"{name} is not as it was saved")

    def _unsealed(self, found: Any) -> tuple[dict[str, Any], str]:
        """The notes of the last checkpoint and the hash of its arrays, once their own hash is verified."""
        if not isinstance(found, dict) or found.keys() != _sealed(0, {}, "").keys():
            raise self._damaged("it carries no hashes, as those of earlier versions")
        if found["hash"] != _sealed(found["step"], found["notes"], found["arrays"])["hash"]:
            raise self._damaged("its notes are not those that were saved")
        if found["step"] != self.latest:
            raise self._damaged(f"it was saved as that of step {found['step']}")
        return found["notes"], found["arrays"]

    def _damaged(self, reason: str) -> ValueError:
        earlier = [step for step in self._steps() if step != self.latest]
        way = "There is none before it, so start a new run."
        if earlier:
            way = f"Remove that folder to go on from the one before, of step {earlier[-1]}."
        return ValueError(
            f"the checkpoint {self.folder / str(self.latest)} is damaged or of another run ({shortened(reason)}). {way}"
        )

    def _drop_old(self) -> None:
        """Remove what a run left that was killed between a new checkpoint's name and the removal of an old one."""
        for step in self._steps()[: -self._keep]:
            self._manager.delete(step)


def _arrays(state: State) -> dict[str, jax.Array]:
    trees = {"trainable": state.trainable, "opt_state": state.opt_state}
    return named_leaves(trees) | {"key": jax.random.key_data(state.key)}


def _list_files(folder: Path) -> None:
    part = folder / f".{FILES}.part"
    text = json.dumps(_file_digests(folder), indent=2)
    part.write_text(text)
    os.replace(part, folder / FILES)


def _file_digests(folder: Path) -> dict[str, str]:
    """Hashes of all files in a checkpoint's folder but their list."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / FILES:
            with open(file, "rb") as stream:
                found[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _digest(arrays: Mapping[str, jax.Array]) -> str:
    """Hash of the names, shapes, element types and bytes of arrays; all processes that hold parts call this at once."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = _on_host(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}\n".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _on_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _sealed(step: int, notes: dict[str, Any], arrays: str) -> dict[str, Any]:
    """The data written beside the arrays: step, notes, the hash of the arrays, and a hash of these three."""
    found = {"step": step, "notes": notes, "arrays": arrays}
    text = json.dumps(found, sort_keys=True)
    return {**found, "hash": hashlib.sha256(text.encode()).hexdigest()}


def _plain(value: Any) -> Any:
    """A value as JSON gives it back: lists in place of tuples, and names for keys."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _rebuilt(name: str, like: Any, arrays: Mapping[str, jax.Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[f"{name}.{dotted(path)}"], like)

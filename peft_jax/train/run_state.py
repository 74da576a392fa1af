"""Checkpoints of a run through orbax: each appears whole or not at all, and brings the run back bit for bit."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from peft_jax.core.paths import dotted, named_leaves
from peft_jax.train.loop import State

STATE, NOTES = "state", "notes"
SPARE = 2**18  # bytes of a checkpoint beside its arrays, at most
logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax tells every step, and every error in each of its threads


class Checkpoints:
    """The checkpoints in a folder: arrays of the state by path, and notes in JSON.

    Args:
        folder: Where they lie; made with the first one.
        keep: How many are kept; older ones are removed once a new one is whole.

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
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=False, enable_async_checkpointing=False, cleanup_tmp_directories=folder.is_dir()
        )
        self._open = lambda: ocp.CheckpointManager(folder.absolute(), options=options)
        self._manager = self._open() if folder.is_dir() else None

    @property
    def latest(self) -> int | None:
        """The step of the last whole checkpoint, or None."""
        return self._manager.latest_step() if self._manager else None

    def save(self, state: State, notes: Mapping[str, Any]) -> None:
        """Write a checkpoint, unless there is one of this step already.

        Raises:
            OSError: If it cannot be written; what was saved before stays.
        """
        if state.step == self.latest:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = self._manager or self._open()
            arrays = _arrays(state)
            if shutil.disk_usage(self.folder).free < sum(array.nbytes for array in arrays.values()) + SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # of which the storage layer makes much noise
            items = {STATE: ocp.args.StandardSave(arrays), NOTES: ocp.args.JsonSave(dict(notes))}
            self._manager.save(state.step, args=ocp.args.Composite(**items))
        except Exception as error:  # a full disk is an OSError of Python or one of several kinds from the storage layer
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
        return self._restore({NOTES: ocp.args.JsonRestore()})[NOTES]

    def restore(self, like: State) -> tuple[State, dict[str, Any]]:
        """Read the last checkpoint, onto the devices on which ``like``'s arrays lie.

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
        self._drop_old()
        arrays = found[STATE]
        trainable = _rebuilt("trainable", like.trainable, arrays)
        opt_state = _rebuilt("opt_state", like.opt_state, arrays)
        return State(self.latest or 0, trainable, opt_state, jax.random.wrap_key_data(arrays["key"])), found[NOTES]

    def _restore(self, items: Mapping[str, Any]) -> Any:
        if self.latest is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}.")
        assert self._manager is not None
        try:
            return self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        except Exception as error:
            raise ValueError(
                f"the checkpoint {self.folder / str(self.latest)} is damaged or of another run "
                f"({str(error).strip().splitlines()[0]}). Remove that folder to go on from the one before."
            ) from error

    def _drop_old(self) -> None:
        """Remove what a run left that was killed between a new checkpoint's name and the removal of an old one."""
        assert self._manager is not None
        for step in sorted(self._manager.all_steps())[: -self._keep]:
            self._manager.delete(step)


def _arrays(state: State) -> dict[str, jax.Array]:
    trees = {"trainable": state.trainable, "opt_state": state.opt_state}
    return named_leaves(trees) | {"key": jax.random.key_data(state.key)}


def _rebuilt(name: str, like: Any, arrays: Mapping[str, jax.Array]) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[f"{name}.{dotted(path)}"], like)

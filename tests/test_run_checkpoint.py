"""Checkpoints of a run that are damaged on the disk are refused by name, or come back as they were saved."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import peft_jax as pj
from peft_jax.train import State, start
from peft_jax.train.run_state import Checkpoints

NOTES: dict[str, Any] = {"metrics_bytes": 120, "best": {"loss": float("inf"), "step": 0}}


def state_of(step: int) -> State:
    """A state whose arrays depend on the step, and are large enough to have files of their own."""
    params = {"q": {"kernel": jnp.ones((64, 32))}}
    model = pj.apply_lora(params, pj.LoraConfig(target_modules=["q"]), key=jax.random.key(0))
    state, _ = start(model, optax.adam(0.1), seed=0)
    return state._replace(step=step, trainable=jax.tree.map(lambda array: array + step, state.trainable))


def arrays(state: State) -> list[np.ndarray]:
    plain = state._replace(key=jax.random.key_data(state.key))
    return [np.asarray(array) for array in jax.tree.leaves(plain)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    for step in (3, 6):
        Checkpoints(folder, keep=2).save(state_of(step), NOTES)
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))


def flipped(at: float) -> Callable[[bytes], bytes]:
    """Flip a bit at some share of a file's length."""

    def flip(content: bytes) -> bytes:
        place = int(at * (len(content) - 1))
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]

    return flip


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "missing": None,
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"x",
    **{f"flipped at {at}": flipped(at) for at in (0, 0.2, 0.4, 0.5, 0.6, 0.8, 1)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_by_name(copy: Path, damage: str) -> None:
    change = DAMAGES[damage]
    files = sorted(path for path in (copy / "6").rglob("*") if path.is_file())
    for file in files:
        content = file.read_bytes()
        if change is None:
            file.unlink()
        else:
            file.write_bytes(change(content))
        before = sorted(copy.rglob("*"))
        if file.name == "files.json" and damage == "missing":  # as of a run killed before it was written
            file.write_bytes(content)
            continue
        with pytest.raises(ValueError, match="is damaged or of another run") as error:
            Checkpoints(copy, keep=1).restore(state_of(0))
        assert str(error.value).startswith(f"the checkpoint {copy / '6'} is damaged")
        assert str(error.value).endswith("Remove that folder to go on from the one before, of step 3.")
        assert sorted(copy.rglob("*")) == before
        file.write_bytes(content)
    assert len(files) > 8
    read_as_saved(copy, 6)


def read_as_saved(folder: Path, step: int) -> None:
    state, notes = Checkpoints(folder, keep=2).restore(state_of(0))
    assert state.step == step and notes == NOTES
    for one, other in zip(arrays(state), arrays(state_of(step)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_checkpoint_of_a_run_killed_before_its_files_were_listed_is_read(copy: Path) -> None:
    (copy / "6" / "files.json").unlink()
    read_as_saved(copy, 6)


def test_every_flipped_byte_of_the_notes_is_noticed_without_the_list_of_files(copy: Path) -> None:
    (copy / "6" / "files.json").unlink()
    file = copy / "6" / "notes" / "metadata"
    content = file.read_bytes()
    for place in range(0, len(content), 3):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="checkpoints/6 is damaged"):
            Checkpoints(copy, keep=2).notes()


def test_the_one_before_is_taken_once_the_damaged_one_is_removed(copy: Path) -> None:
    shutil.rmtree(copy / "6")
    read_as_saved(copy, 3)


def _without_hashes(copy: Path) -> None:
    (copy / "6" / "files.json").unlink()
    file = copy / "6" / "notes" / "metadata"
    file.write_text(re.sub(r', "arrays": .*', "}", file.read_text()))


def _of_another_step(copy: Path) -> None:
    (copy / "6").rename(copy / "7")


def _with_arrays_of_another(copy: Path) -> None:
    (copy / "6" / "files.json").unlink()
    shutil.rmtree(copy / "6" / "state")
    shutil.copytree(copy / "3" / "state", copy / "6" / "state")


def _with_a_surplus_file(copy: Path) -> None:
    (copy / "6" / "state" / "d" / "more").write_bytes(b"x")


def _with_an_empty_one(copy: Path) -> None:
    (copy / "9").mkdir()


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no hashes": (_without_hashes, r"checkpoints/6 is .*\(it carries no hashes, as those of earlier versions\)"),
    "another step": (_of_another_step, r"checkpoints/7 is .*\(it was saved as that of step 6\)"),
    "other arrays": (_with_arrays_of_another, r"checkpoints/6 is .*\(its arrays are not those that were saved\)"),
    "a surplus file": (_with_a_surplus_file, r"\(its files are not those that files.json lists\)"),
    "a surplus checkpoint": (_with_an_empty_one, r"checkpoints/9 is damaged .*the one before, of step 6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_as_it_was_saved_is_named(copy: Path, case: str) -> None:
    prepare, said = REFUSED[case]
    prepare(copy)
    with pytest.raises(ValueError, match=said):
        Checkpoints(copy, keep=2).restore(state_of(0))


def test_a_damaged_one_that_is_the_only_one_says_so(copy: Path) -> None:
    shutil.rmtree(copy / "3")
    _without_hashes(copy)
    with pytest.raises(ValueError, match="There is none before it, so start a new run."):
        Checkpoints(copy, keep=2).notes()

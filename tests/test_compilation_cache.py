"""Compiled programs are kept between starts: where, when not, and what a folder that cannot be written does."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from peft_jax.cli.finetune.options import FREE
from peft_jax.cli.main import main
from peft_jax.cli.shared.common_options import CompilationOptions
from peft_jax.cli.shared.compilation_cache import LARGEST, default_folder, keep_programs

NAMES = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)
READ = "/jax/compilation_cache/cache_hits"


@pytest.fixture(autouse=True)
def as_users_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's settings are its defaults, and the user's cache folder is a new one."""
    before = {name: jax.config.values[name] for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def programs_read() -> int:
    """Compile a program as a new process does; how many programs came from the cache."""
    found = []
    listen = lambda event, **_: found.append(event)  # noqa: E731
    jax.clear_caches()
    reset_cache()
    x = jnp.ones((3, 3))
    jax.monitoring.register_event_listener(listen)
    try:
        jax.jit(lambda x: jnp.tanh(x @ x) + 2)(x).block_until_ready()
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return found.count(READ)


@pytest.mark.parametrize("named", [False, True], ids=["the user's folder", "a folder of one's own"])
def test_a_second_start_compiles_nothing(tmp_path: Path, named: bool) -> None:
    folder = tmp_path / "own" if named else default_folder()
    keep_programs(CompilationOptions(compilation_cache=folder if named else None))
    assert jax.config.values["jax_compilation_cache_max_size"] == LARGEST
    assert [programs_read(), programs_read()] == [0, 1]
    assert folder.stat().st_mode & 0o77 == 0, "others could put programs there"
    assert list(folder.glob("*-cache"))


def test_nothing_is_kept_if_the_user_says_so() -> None:
    keep_programs(CompilationOptions(no_compilation_cache=True))
    assert [programs_read(), programs_read()] == [0, 0] and not default_folder().exists()
    keep_programs(CompilationOptions())  # JAX_ENABLE_COMPILATION_CACHE=false
    assert [programs_read(), programs_read()] == [0, 0] and not default_folder().exists()


RUNS = {
    "finetune": ["--model", "m", "--data", "d", "--output", "o"],
    "generate": ["a"],
    "eval": ["--data", "d"],
    "merge": ["--adapter", "a", "--output", "o"],
    "demo": [],
}


@pytest.mark.parametrize("command", RUNS)
def test_each_command_keeps_programs_where_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    found: list[CompilationOptions] = []

    def stop(options: CompilationOptions) -> None:
        found.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_jax.cli.main.keep_programs", stop)
    for words in (["--compilation-cache", str(tmp_path)], ["--no-compilation-cache"]):
        assert main([command, *RUNS[command], *words]) == 130
    assert [(one.compilation_cache, one.no_compilation_cache) for one in found] == [(tmp_path, False), (None, True)]


def test_a_cache_that_is_set_up_already_stays(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "set"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.125)
    keep_programs(CompilationOptions())
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "set")
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0.125


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "caches").write_text("a file in its place")
    keep_programs(CompilationOptions())
    assert "compiled programs cannot be kept" in capsys.readouterr().err
    assert programs_read() == 0
    words = ["generate", "a", "--model", str(tmp_path), "--compilation-cache", str(tmp_path / "caches" / "x")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "caches/x" in line and "--no-compilation-cache" in line


def test_what_a_killed_process_left_of_a_program_is_removed(tmp_path: Path) -> None:
    """JAX, which finds no time of use beside it, would write no other program."""
    (tmp_path / "jit_half-cache").write_bytes(b"half")
    keep_programs(CompilationOptions(compilation_cache=tmp_path))
    assert [programs_read(), programs_read()] == [0, 1]
    assert list(tmp_path.glob("*-cache")) and not (tmp_path / "jit_half-cache").exists()


def test_a_run_may_go_on_with_another_folder() -> None:
    assert {"compilation_cache", "no_compilation_cache"} <= set(FREE)

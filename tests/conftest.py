"""Strict JAX settings for every test, and the tiny checkpoint that several of them load."""

import collections
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import quick_compilation

os.environ["XLA_FLAGS"] = quick_compilation.flags(devices=8)  # meshes of 8 devices on one CPU

import conformance
import jax
import pytest
from ignored_options import without_options
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

quick_compilation.lower_in_shared_contexts()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-free", action="store_true", help="skip the tests that import torch or peft")
    parser.addoption(
        "--grid",
        action="store_true",
        help="compare decoders under all switches of cases.py, and run the commands on each",
    )
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too, which take minutes together")
    parser.addoption(
        "--sample",
        type=int,
        default=1,
        metavar="N",
        help="run every N-th row of each test that has rows, and each test that has none",
    )
    parser.addoption(
        "--sample-tests",
        type=int,
        default=1,
        metavar="N",
        help="run every N-th test, with its rows or its sample of them",
    )
    parser.addoption("--fuzz", type=int, metavar="COUNT", help="damaged folders of each kind that tests/fuzz reads")
    parser.addoption("--kills", type=int, default=1, metavar="COUNT", help="kills at random moments of test_resume.py")
    parser.addoption("--field", action="store_true", help="adapt the nets of public packages in tests/field")
    parser.addoption(
        "--killed-pairs", type=int, default=1, metavar="COUNT", help="kills at random moments of one process of two"
    )
    parser.addoption(
        "--full-grid", action="store_true", help="try every file of test_file_grid.py, and note random combinations"
    )
    parser.addoption(
        "--combinations",
        type=int,
        default=2,
        metavar="COUNT",
        help="combinations of each type in test_random_configs.py",
    )
    parser.addoption(
        "--ignored-options", action="store_true", help="expect the test of each option to fail as the option is ignored"
    )
    parser.addoption("--conformance", type=Path, metavar="FILE", help="write how closely outputs agree with PEFT's")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of `make test`; `make test-slow` runs it")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without ``--field`` tests/field is left out: it needs packages that the other tests do not."""
    return True if collection_path.name == "field" and not config.getoption("--field") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out slow tests without ``--slow``, and what ``--sample`` and ``--sample-tests`` leave; pytest counts it.

    With ``--ignored-options`` the tests of options alone are left, each once for each option that is named for it.
    """
    if config.getoption("--ignored-options"):
        items[:] = without_options(items)
        return
    every, every_test = config.getoption("--sample"), config.getoption("--sample-tests")
    rows_before: collections.Counter[str] = collections.Counter()
    tests_before: dict[str, int] = {}
    kept, left_out = [], []
    for item in items:
        test = item.nodeid.partition("[")[0]
        is_slow = item.get_closest_marker("slow") is not None and not config.getoption("--slow")
        tests_before.setdefault(test, len(tests_before))
        is_sampled = rows_before[test] % every == 0 and tests_before[test] % every_test == 0
        rows_before[test] += 1
        (kept if is_sampled and not is_slow else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def pytest_collection_finish() -> None:
    quick_compilation.collect_garbage_rarely()


@contextlib.contextmanager
def skipped_where_torch_is_missing(config: pytest.Config) -> Iterator[None]:
    """With ``--torch-free``, and only then, a test that cannot import torch or peft is skipped."""
    try:
        yield
    except (ModuleNotFoundError, pytest.Collector.CollectError) as error:
        missing = getattr(error.__cause__ or error, "name", None)
        if not config.getoption("--torch-free") or missing not in ("torch", "peft"):
            raise
        pytest.skip(f"needs {missing}", allow_module_level=True)


class TestFile(pytest.Module):
    """A file that may import torch at its head."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        with skipped_where_torch_is_missing(self.config):
            return list(super().collect())


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return TestFile.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with skipped_where_torch_is_missing(item.config):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    conformance.seen.clear()
    with skipped_where_torch_is_missing(item.config):
        result = yield
    if (row := conformance.row_of(item)) is not None:
        item.user_properties.append(("conformance", row))  # goes from a worker to who writes the table
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        for name, row in report.user_properties:
            if name == "conformance":
                conformance.note(row)  # type: ignore[arg-type]


def pytest_sessionfinish(session: pytest.Session) -> None:
    file = session.config.getoption("--conformance")
    if file is not None and not hasattr(session.config, "workerinput"):
        conformance.write(file)


@pytest.fixture(scope="module", autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that run once need no optimizing compiler, and like programs of all files are compiled once.

    A worker keeps them in a folder of its own. At the end of a file they are let go from memory where they take much.
    """
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_enable_compilation_cache": True,  # which a command of another file may have switched off
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
    reset_cache()
    yield
    forget_many_programs()


def forget_many_programs() -> None:
    """Let compiled programs go from memory where they take much of it."""
    if holds_many_programs():
        quick_compilation.forget_programs()


def holds_many_programs() -> bool:
    """Whether 40,000 of the 65,000 memory maps that a process may have are taken, or 5 GiB of memory.

    Each compiled program takes maps. Where Linux's files do not tell, the answer is yes.
    """
    maps, sizes = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.exists():
        return True
    pages = int(sizes.read_text().split()[1])
    return maps.read_text().count("\n") > 40_000 or pages * os.sysconf("SC_PAGE_SIZE") > 5 * 2**30


@pytest.fixture
def optimizing_compiler() -> Iterator[None]:
    """For tests that look at the compiled program: it is what users' are."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


CORPUS = ["### Instruction:\nReverse the word.\n\n### Input:\nabc\n\n### Response:\ncba"] * 4


def save_tokenizer(folder: Path, *, bos: bool) -> None:
    """Saves a byte-level BPE tokenizer of some 270 tokens that puts `<s>` in front of a text where `bos` is set."""
    from transformers import PreTrainedTokenizerFast  # imports torch, which most tests do not need

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and random weights, written by `transformers`, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=288,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, bos=True)
    return folder

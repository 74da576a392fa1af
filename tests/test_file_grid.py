"""The files that PEFT itself writes, over a grid: each computes here what it computes there, or is refused in one line.

A sample runs with the suite; ``make conformance-full`` runs all of the grid.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conformance import close
from peft_jax.interop.tensors import misfits
from safetensors.numpy import load_file

import peft_jax as pj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights and saved embeddings
IDS = np.array([[5, 17, 2, 23, 9], [8, 8, 3, 21, 1]])
VOCABULARY, RESIZED = 24, 27


class Cell(NamedTuple):
    """A point of the grid."""

    targets: tuple[str, ...]
    saved: tuple[str, ...] | None
    tokens: Any
    save_embedding_layers: bool | str
    resized: bool
    tied: bool
    dtype: str

    def __str__(self) -> str:
        saved = "+".join(self.saved or ()) or "none"
        tokens = "+".join(self.tokens) if isinstance(self.tokens, dict) else "tokens" if self.tokens else "none"
        flags = (
            f"{self.save_embedding_layers}-{'resized' if self.resized else 'as_is'}-{'tied' if self.tied else 'own'}"
        )
        return f"{'+'.join(self.targets)}-{saved}-{tokens}-{flags}-{self.dtype}"


GRID = [
    Cell(*cell)
    for cell in itertools.product(
        [("q_proj",), ("q_proj", "embed_tokens"), ("q_proj", "lm_head"), ("q_proj", "embed_tokens", "lm_head")],
        [None, ("lm_head",), ("embed_tokens",), ("embed_tokens", "lm_head")],
        [None, [2, 5], {"lm_head": [2, 5]}],
        ["auto", True, False],
        [False, True],
        [False, True],
        ["float32", "bfloat16"],
    )
]
Q, BOTH = ("q_proj",), ("embed_tokens", "lm_head")
SAMPLE = [
    Cell(Q, ("lm_head",), None, True, False, False, "float32"),
    Cell(Q, ("lm_head",), None, "auto", True, True, "float32"),
    Cell(Q, None, [2, 5], True, True, True, "bfloat16"),
    Cell(Q, None, [2, 5], "auto", True, False, "float32"),
    Cell(Q, None, {"lm_head": [2, 5]}, True, False, True, "float32"),
    Cell(Q, BOTH, None, True, True, False, "bfloat16"),
    Cell(("q_proj", "embed_tokens"), None, None, "auto", True, False, "bfloat16"),
    Cell(("q_proj", "lm_head"), None, [2, 5], "auto", False, True, "float32"),
    Cell(("q_proj", "lm_head"), ("embed_tokens",), None, "auto", True, True, "float32"),
    Cell(("q_proj", *BOTH), None, None, True, True, False, "float32"),
    Cell(Q, ("embed_tokens",), [2, 5], "auto", False, False, "float32"),  # refused, as is the one of a tied head
    Cell(Q, None, None, "auto", True, True, "float32"),
]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = GRID if metafunc.config.getoption("--full-grid") else SAMPLE
        metafunc.parametrize("cell", cells, ids=map(str, cells))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for tied in (False, True):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=tied,
            initializer_range=0.5,
        )
        folders[tied] = tmp_path_factory.mktemp("tied" if tied else "own")
        LlamaForCausalLM(config).save_pretrained(folders[tied])
    return folders


def torch_base(folder: Path, cell: Cell, dtype: str = "float32") -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if cell.resized:
        model.resize_token_embeddings(RESIZED)
    return model.eval()


def written(folder: Path, cell: Cell, target: Path) -> bool:
    """Write the file of a cell, as PEFT does after training; False where PEFT has no such adapter."""
    model = torch_base(folder, cell, cell.dtype)
    tokens = {name: list(ids) for name, ids in cell.tokens.items()} if isinstance(cell.tokens, dict) else cell.tokens
    config = peft.LoraConfig(
        r=2,
        target_modules=list(cell.targets),
        modules_to_save=None if cell.saved is None else list(cell.saved),
        trainable_token_indices=tokens,
    )
    try:
        model = peft.get_peft_model(model, config)
    except (TypeError, ValueError):
        return False
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(target, save_embedding_layers=cell.save_embedding_layers)
    return True


def covers_new_rows(file: Path, cell: Cell) -> bool:
    """Whether a file has all of what a resized model adds, so that nothing drawn at random is compared."""
    tables = {key for key, tensor in load_file(file).items() if tensor.shape == (RESIZED, 8) and "lora" not in key}
    trained = {key for key in tables if key.rsplit(".", 2)[-2] in (cell.saved or ()) or "modules_to_save" in key}
    if cell.tied and tables - trained:
        return True
    return len({"lm_head" in key for key in tables}) == 2


def test_a_file_of_pefts_computes_the_same_or_is_refused_in_one_line(
    cell: Cell, bases: dict[bool, Path], tmp_path: Path
) -> None:
    if not written(bases[cell.tied], cell, tmp_path):
        return
    theirs = torch_base(bases[cell.tied], cell)
    ours = pj.AutoModelForCausalLM.from_pretrained(bases[cell.tied])
    if cell.resized and covers_new_rows(tmp_path / "adapter_model.safetensors", cell):
        ours = ours.resize_token_embeddings(RESIZED)
    elif cell.resized:  # the rows that are drawn at random are those of one checkpoint
        theirs.save_pretrained(tmp_path / "resized")
        ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    config = pj.LoraConfig.from_pretrained(tmp_path)
    shapes = {key: tensor.shape for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    try:
        refusals = misfits(ours, config, shapes)
    except ValueError as error:
        refusals = [str(error)]
    try:
        model = pj.PeftModel.from_pretrained(ours, tmp_path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).endswith("."), error
        assert refusals, error
        assert cell.tokens, "an adapter without trained tokens is refused"
        pytest.skip(f"refused: {error}")
    assert refusals == []
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.float().numpy()
    close(model(IDS).logits, expected)

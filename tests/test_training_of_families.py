"""Twenty steps of AdamW on GPT-2, a classifier of BERT and T5, in PyTorch PEFT and here: equal losses and adapters.

Each of the methods that PEFT has for the model, from one adapter on equal batches; Llama is trained in
test_training_equivalence.py and test_prompt_parity.py.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from cases import ARCHITECTURES, auto_class, trained_elsewhere
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import train

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from peft_training import train_in_peft  # noqa: E402
from test_prompt_parity import torch_arrays, with_arrays  # noqa: E402
from test_training_equivalence import kept  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS, RATE, ROWS = 20, 1e-3, 4
MODELS = {name: row.training for name, row in ARCHITECTURES.items() if row.training is not None}
METHODS = trained_elsewhere()
CASES = [(family, method) for family in MODELS for method in METHODS if method not in ARCHITECTURES[family].not_trained]


def batches(family: str) -> list[dict[str, np.ndarray]]:
    """Three in turn, with padding."""
    found = []
    for n in range(STEPS):
        draw = np.random.default_rng(n % 3)
        ids = draw.integers(2, 60, (ROWS, 10)).astype(np.int32)
        mask = (np.arange(10) < draw.integers(6, 11, (ROWS, 1))).astype(np.int32)
        if family == "bert":
            labels = draw.integers(0, 3, ROWS).astype(np.int32)
        elif family == "t5":
            labels = draw.integers(2, 60, (ROWS, 6)).astype(np.int32)
            labels[0, 4:] = -100
        else:
            labels = np.where((mask == 1) & (np.arange(10) >= 2), ids, -100).astype(np.int32)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            task, changes = MODELS[family]
            config = transformers.AutoConfig.for_model(family, **{**ARCHITECTURES[family].sizes, **changes})
            model = auto_class(transformers, task).from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return get


def apply(model: Any, ids: jax.Array, mask: jax.Array, **more: Any) -> jax.Array:
    logits: jax.Array = model(ids, attention_mask=mask, **more).logits
    return logits


def train_ours(model: Any, family: str) -> tuple[list[float], Any]:
    """The same here, by the library's own loop."""
    optimizer = optax.adamw(RATE, weight_decay=0.01)
    state, frozen = train.start(model, optimizer, seed=0)
    step = train.make_training_step(apply, optimizer, next_token=family == "gpt2")
    found: list[Any] = batches(family)
    if family == "t5":
        found = [batch | {"decoder_input_ids": np.asarray(model.shifted_right(batch["labels"]))} for batch in found]
    losses = []
    for now, metrics in train.train(step, state, frozen, found, max_steps=STEPS):
        losses.append(float(metrics.loss))
        state = now
    return losses, train.finished(state.trainable, frozen, state.opt_state)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(*case, id="-".join(case), marks=[pytest.mark.slow] if case == ("t5", "ADALORA") else [])
        for case in CASES
    ],
)
def test_twenty_steps_are_those_of_peft(family: str, method: str, bases: Any, tmp_path: Path) -> None:
    import transformers

    task, _ = MODELS[family]
    adapter = METHODS[method]
    torch.manual_seed(1)
    base = auto_class(transformers, task).from_pretrained(bases(family), attn_implementation="eager")
    theirs = peft.get_peft_model(base, adapter.make(peft, task_type=task))
    has_encoder = not getattr(adapter.method, "file_is_whole", True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad and not has_encoder:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "start")
    base = auto_class(pj, task).from_pretrained(bases(family), dtype="float32")
    if has_encoder:
        ours = pj.get_peft_model(base, adapter.make(pj, task_type=task))
        ours = with_arrays(ours, {role: array.copy() for role, array in torch_arrays(theirs).items()})
    else:
        ours = pj.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)

    want = train_in_peft(theirs, batches(family), RATE)
    got, ours = train_ours(ours, family)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    first, want_file, got_file = (
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("start", "theirs", "ours")
    )
    configs = [pj.PeftConfig.from_pretrained(tmp_path / folder) for folder in ("theirs", "ours")]
    assert got_file.keys() == want_file.keys() == first.keys()
    pattern = getattr(configs[0], "rank_pattern", None) or {}
    assert bool(pattern) == getattr(adapter.method, "narrows", False) and (
        not pattern or pattern == configs[1].rank_pattern
    )
    moved: dict[str, float] = {}
    frozen = {role.rpartition(".")[2] for role in getattr(configs[0], "frozen", ())}
    for key, tensor in want_file.items():
        np.testing.assert_allclose(got_file[key], tensor, rtol=0, atol=5e-5, err_msg=key)
        role = key.removesuffix(".weight").rsplit(".", 1)[-1]
        if role in frozen:
            continue
        before = kept(first[key], key, configs[0]) if pattern and "lora_" in key else first[key]
        size = float(np.abs(tensor - before).max(initial=0))
        assert size > 1e-4 or not tensor.size, f"{key} has not moved"
        moved[role] = max(size, moved.get(role, 0))
    assert min(moved.values()) > 1e-2, moved

"""Random combinations of the fields of each of PEFT's types: we compute and write what PEFT does, or an error says no.

Two of each type run with the suite, and more until one is no refusal; ``make conformance-full`` runs a hundred and
writes docs/combinations.md.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import TOLERANCE, same_files, tolerance
from peft_jax.interop.tensors import misfits
from random_configs import (
    BOTH,
    DIFFERENT,
    EQUAL,
    IGNORED_BY_PEFT,
    OURS,
    REREAD,
    THEIRS,
    UNREADABLE,
    combination,
    reason_of,
)
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax import interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights, of what it changes and of what it saves
IDS = np.array([[5, 17, 2, 40, 9, 61, 33], [8, 8, 50, 3, 21, 77, 1]])
SIZES = {
    **{"vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2},
    **{"attention_bias": True, "mlp_bias": True, "bos_token_id": 0, "eos_token_id": 1, "use_cache": False},
}
FILE = "adapter_model.safetensors"
RECORDS = Path(__file__).parents[1] / "build" / "combinations"

CLASSIFIER = "base_model.internal_xlora_classifier."
MANY = 20
MORE = 8  # combinations that are tried where none of those that are asked for is equal to PEFT's
ROUNDING = 1e-4  # what float32 may lose in a network that an adapter of random numbers makes unruly
STARTED = 4  # every so many combinations an adapter is started here too
WITH_TASKS = ("POLY", "MULTITASK_PROMPT_TUNING")

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a combination ended.

    Attributes:
        kind: One of the ways of `random_configs`.
        words: Why, or of equal ones why there is no merged model.
        moves: Whether the adapter changes the outputs by 100 times the tolerance.
        by_double: Whether float32 has lost too many digits, so that both were compared in float64.
    """

    kind: str
    words: str = ""
    moves: bool = False
    by_double: bool = False


class Base(NamedTuple):
    """The model of all combinations, in both libraries, and the folders it is in."""

    folder: Path
    theirs: Any
    ours: Any


@pytest.fixture(autouse=True, scope="module")
def quick_peft() -> Iterator[None]:
    """PEFT without what makes no difference: cards of models, a compiler for BOFT in each layer, and threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.PeftModel.create_or_update_model_card", lambda *_: None)
        patch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder: Path) -> Base:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("bias") or "norm" in path:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    conftest.save_tokenizer(folder, bos=True)
    for number, options in enumerate([{"r": 2, "lora_alpha": 3}, {"r": 3, "lora_alpha": 5}, {"r": 2, "lora_alpha": 4}]):
        config = peft.LoraConfig(**options, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        lora = peft.get_peft_model(copy.deepcopy(model), config)
        lora.save_pretrained(folder / f"lora{number}")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Base(folder, theirs, pj.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))


def placed(value: Any, folder: Path) -> Any:
    """A value of a field with the paths of the base and of its LoRAs in place of {base} and {lora0} to {lora2}."""
    if isinstance(value, dict):
        return {key: placed(one, folder) for key, one in value.items()}
    if isinstance(value, str) and re.fullmatch(r"{(base|lora\d)}", value):
        return str(folder / value[1:-1].replace("base", ""))
    return copy.deepcopy(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "peft_type" in metafunc.fixturenames:
        metafunc.parametrize("peft_type", sorted(peft_types()))


def peft_types() -> list[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]


def config_class(peft_type: str) -> type:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        tasks = {name: torch.tensor(ids) for name, ids in tasks_of(model).items()}
        return model(input_ids=torch.tensor(IDS), **tasks).logits.numpy()


def our_logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS, **tasks_of(model)).logits)


def tasks_of(model: Any) -> dict[str, np.ndarray]:
    """The tasks of rows, for the models that ask for them, of either library."""
    for config in getattr(model, "peft_config", {}).values():
        if config.peft_type in WITH_TASKS:
            count = config.num_tasks if config.peft_type.startswith("MULTI") else config.n_tasks
            return {"task_ids": np.array([count - 1, 0])}
    return {}


def made_by_peft(fields: dict[str, Any], peft_type: str, base: Base, folder: Path) -> np.ndarray:
    """Write the file of an adapter of PEFT's with random weights; the logits of its model."""
    torch.manual_seed(2)
    model = peft.get_peft_model(copy.deepcopy(base.theirs), config_class(peft_type)(**fields)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                # PEFT's TinyLoRA with init_weights=False starts from memory as it is.
                start = torch.where(parameter.abs() < 100, parameter, 0)
                parameter.copy_(start + 0.2 * torch.randn_like(parameter))
    logits = torch_logits(model)
    model.save_pretrained(folder)
    if peft_type == "XLORA":  # PEFT leaves a part of the classifier out
        state = model.base_model.internal_xlora_classifier.state_dict()
        arrays = {f"{CLASSIFIER}{key}": value.numpy().copy() for key, value in state.items()}
        save_file(arrays, folder / FILE)
    return logits


def read_by_peft(base: Base, folder: Path, *, double: bool = False) -> np.ndarray:
    """The logits of what PEFT reads from its own file, in float32 or in float64."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.theirs), folder).eval()
    return torch_logits(model.double() if double else model)


class Wanted:
    """PEFT's logits: in float32, and in float64 to compare with where float32 has lost too many digits.

    Where float64 is compared, it is in both libraries. Norms and softmax stay in float32 there, in both.
    """

    def __init__(self, logits: np.ndarray, base: Base, folder: Path) -> None:
        self.logits, self._base, self._folder = logits, base, folder
        self.in_double: np.ndarray | None = None

    def off(self, model: Any, *, merged: bool = False) -> float:
        """How far a model's logits are from PEFT's; ``merged`` says that it is the merged model."""
        difference = off(our_logits(model), self.logits)
        if difference <= TOLERANCE or difference > ROUNDING:  # another function is not what rounding explains
            return difference
        if self.in_double is None:
            self.in_double = read_by_peft(self._base, self._folder, double=True)
        with jax.enable_x64(True):
            read = pj.PeftModel.from_pretrained(jax.tree.map(doubled, self._base.ours), self._folder)
            ours = jax.tree.map(doubled, read)
            return off(our_logits(ours.merge_and_unload() if merged else ours), self.in_double)


def doubled(array: jax.Array) -> jax.Array:
    """An array of float32 in float64."""
    return array.astype(jnp.float64) if array.dtype == jnp.float32 else array


def refusal_here(fields: dict[str, Any], peft_type: str, base: Base, shapes: Shapes | None, *, started: bool) -> str:
    """Why we refuse an adapter of these fields, or "".

    Args:
        fields: The fields, as PEFT takes them.
        peft_type: PEFT's name of the type.
        base: The model.
        shapes: Those of PEFT's file, if there is one; an adapter with other tensors is an assertion's error.
        started: Whether its arrays are initialized too, which takes as long as all else.
    """
    try:
        config = pj.PeftConfig.from_dict({"peft_type": peft_type, **copy.deepcopy(fields)})
        if started:
            model = pj.get_peft_model(base.ours, config)
            if shapes is not None and peft_type != "XLORA":  # whose file PEFT leaves a part out of
                tensors = interop.get_peft_model_state_dict(model)
                ours = {key: tensor.shape for key, tensor in tensors.items()}
                unlike = sorted(key for key in {*ours, *shapes} if ours.get(key) != shapes.get(key))
                assert not unlike, [(key, ours.get(key), shapes.get(key)) for key in unlike]
        elif peft_type != "XLORA":
            unlike = misfits(base.ours, config.replace(inference_mode=True), shapes)
            assert not unlike, unlike
    except ValueError as error:
        return said(error)
    return ""


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def off(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference of logits, as the other comparisons measure it."""
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / max(1, np.abs(want).max()))


def refused_file(base: Base, folder: Path) -> str:
    """Why we refuse a file of PEFT's; "" if we do not."""
    try:
        pj.PeftModel.from_pretrained(base.ours, folder)
    except ValueError as error:
        return said(error)
    return ""


def outcome(peft_type: str, number: int, base: Base, folder: Path) -> Outcome:
    """What becomes of one combination."""
    fields = placed(combination(peft_type, config_class(peft_type), number), base.folder)
    try:
        want = made_by_peft(copy.deepcopy(fields), peft_type, base, folder / "theirs")
        theirs = ""
    except Exception as error:  # of whatever class
        theirs = said(error)
    file = folder / "theirs" / FILE
    shapes = None if theirs else {key: tensor.shape for key, tensor in load_file(file).items()}
    unlike = ""
    try:
        refusal = refusal_here(fields, peft_type, base, shapes, started=theirs != "" or number % STARTED == STARTED - 1)
    except AssertionError as error:
        if re.search(IGNORED_BY_PEFT, str(error)):
            return Outcome(OURS, refused_file(base, folder / "theirs"))
        refusal, unlike = "", f"a fresh adapter has other tensors: {said(error)}"
    if refusal:
        return Outcome(BOTH if theirs else OURS, refusal)
    if theirs:
        return Outcome(THEIRS, theirs)
    wanted = Wanted(want, base, folder / "theirs")
    faults, merges = compared(peft_type, wanted, base, folder)
    if not faults and unlike:
        return Outcome(DIFFERENT, unlike)
    if not faults:
        moves = np.abs(want[:, -IDS.shape[1] :] - our_logits(base.ours)).max() > 100 * tolerance(want)
        return Outcome(EQUAL, merges, bool(moves), wanted.in_double is not None)
    try:
        again = read_by_peft(base, folder / "theirs")
    except Exception as error:
        return Outcome(UNREADABLE, said(error))
    if off(again, want) > TOLERANCE:
        faults, _ = compared(peft_type, Wanted(again, base, folder / "theirs"), base, folder)
    return Outcome(DIFFERENT if faults else REREAD, faults)


def compared(peft_type: str, wanted: Wanted, base: Base, folder: Path) -> tuple[str, str]:
    """How what we make of PEFT's file differs from PEFT, or "", and why there is no merged model, or ""."""
    try:
        model = pj.PeftModel.from_pretrained(base.ours, folder / "theirs")
    except ValueError as error:
        return f"PEFT's file is refused: {said(error)}", ""
    if (difference := wanted.off(model)) > TOLERANCE:
        return f"other logits, by {difference:.0e}", ""
    chosen = {"selected_adapters": ["default"]} if peft_type == "XLORA" else {}
    model.save_pretrained(folder / "ours", **chosen)
    try:
        same_files(folder / "ours", folder / "theirs")
    except AssertionError as error:
        return f"saved again it is another file: {error}", ""
    try:
        merged = model.merge_and_unload()
    except ValueError as error:
        return "", said(error)
    if (difference := wanted.off(merged, merged=True)) > TOLERANCE:
        return f"other logits when it is merged, by {difference:.0e}", ""
    return "", ""


def test_combinations_equal_peft_or_are_refused(
    peft_type: str, base: Base, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    outcomes, faults = [], []
    asked, equals = request.config.getoption("--combinations"), 0
    for number in range(asked + MORE):
        if number >= asked and equals:
            break
        found = outcome(peft_type, number, base, tmp_path)
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
        fields = combination(peft_type, config_class(peft_type), number)
        reason = reason_of(peft_type, found.kind, found.words, fields)
        outcomes.append({**dataclasses.asdict(found), "reason": reason})
        equals += found.kind == EQUAL
        conftest.forget_many_programs()
        if reason is None:
            faults.append(f"{number}: {found.kind}: {found.words}\n    {fields}")
    if request.config.getoption("--full-grid"):
        RECORDS.mkdir(parents=True, exist_ok=True)
        (RECORDS / f"{peft_type}.json").write_text(json.dumps(outcomes, indent=1))
    assert not faults, "\n".join(faults)
    assert equals, "nothing is compared"
    if len(outcomes) > MANY:
        equal = [one["moves"] for one in outcomes if one["kind"] == EQUAL]
        assert sum(equal) > len(outcomes) / 5, "most combinations compare nothing"

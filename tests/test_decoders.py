"""Every decoder against PyTorch: numbers, tokens, adapters, checkpoints. The cases are the switches of cases.py."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES, Architecture, Options, auto_class, filled
from conformance import close, same_files, tolerance
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.core.chunks import chunk_size
from peft_jax.core.paths import named_leaves
from peft_jax.models.config import CAUSAL_LM, QUESTION_ANS, SEQ_CLS, TOKEN_CLS
from peft_jax.models.defaults import method_defaults
from peft_jax.models.modules.lazy_logits import LazyLogits
from peft_jax.models.registry import BY_MODEL_TYPE, family_of, read_architecture
from peft_jax.models.weights_io import load_model, save_model
from peft_jax.train import chunked_loss, cross_entropy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


class Case(NamedTuple):
    """A decoder of the row ``row`` under some switches."""

    row: Architecture
    kind: str
    options: Options


def cases_of(field: str) -> dict[str, Case]:
    """The cases of all rows, by name."""
    found = {}
    for row in ARCHITECTURES.values():
        for name, (kind, options) in getattr(row, field).items():
            assert name not in found, f"two cases are called {name}"
            found[name] = Case(row, kind, options)
    return found


CASES, GRID, REFUSED = cases_of("switches"), cases_of("grid"), cases_of("refused")
WHOLE = [next(iter(row.switches)) for row in ARCHITECTURES.values() if row.switches]  # one of each architecture
KINDS = [kind for row in ARCHITECTURES.values() if row.switches for kind in row.model_types]
# Those whose layers have a form of their own: what is slow is compared for these alone, but for ``--grid``.
FORMS = ["llama", "gemma4", "cohere", "phi3-long", "gpt_neox", "falcon-new", "qwen3_5", "qwen3_moe"]
ALWAYS = "gemma3"  # the case of what is compared for one architecture alone, but for ``--grid``
METHODS: dict[str, Options] = {
    "LoraConfig": {"r": 4, "target_modules": ["{first}", "{second}", "{last}"]},
    "IA3Config": {"target_modules": ["{second}", "{last}"], "feedforward_modules": ["{last}"]},
    "LoHaConfig": {"r": 2, "target_modules": ["{first}", "{last}"]},
}


def config_of(kind: str, task: str) -> Any:
    """The config of a tiny model for a task; None if there is no such model."""
    row = ROW_OF[kind]
    config = read_architecture({"model_type": kind, **row.sizes, **row.model_types[kind]})
    try:
        return dataclasses.replace(config, task_type=task)
    except ValueError:
        return None


ROW_OF = {kind: row for row in ARCHITECTURES.values() for kind in row.model_types}
OUTPUTS = {SEQ_CLS: ("logits",), TOKEN_CLS: ("logits",), QUESTION_ANS: ("start_logits", "end_logits")}
HEADED = [f"{kind}-{task}" for kind in KINDS for task in OUTPUTS if config_of(kind, task) is not None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``each`` is each case, ``form`` one of `FORMS`, ``headed`` one, the others a few; with ``--grid`` all."""
    with_grid = metafunc.config.getoption("--grid")
    if "each" in metafunc.fixturenames:
        metafunc.parametrize("each", [*CASES, *GRID] if with_grid else [*CASES])
    if "form" in metafunc.fixturenames:
        metafunc.parametrize("form", WHOLE if with_grid else FORMS)
    if "meshed" in metafunc.fixturenames:
        metafunc.parametrize("meshed", WHOLE if with_grid else ["llama", "qwen3_moe"])
    if "name_and_method" in metafunc.fixturenames:
        adapters = [(name, method) for name in WHOLE for method in METHODS]
        kept = [(name, method) for name, method in adapters if with_grid or name in FORMS or method == "LoraConfig"]
        metafunc.parametrize("name_and_method", kept, ids=["-".join(pair) for pair in kept])
    if "some" in metafunc.fixturenames:
        metafunc.parametrize("some", WHOLE if with_grid else [ALWAYS])
    if "half" in metafunc.fixturenames:  # OLMo turns queries and keys in float32
        metafunc.parametrize("half", WHOLE if with_grid else [ALWAYS, "olmo3"])
    if "headed" in metafunc.fixturenames:
        metafunc.parametrize("headed", HEADED if with_grid else [f"{CASES[ALWAYS].kind}-{SEQ_CLS}"])


IDS = np.random.default_rng(0).integers(3, 50, (3, 12))
MASK = np.ones_like(IDS)
MASK[1, :5] = 0
MASK[2, 9:] = 0
LABELS = np.where(MASK == 1, IDS, -100)
LABELS[1, 5] = -100  # the position before it is padding that sees nothing
INERT = ("k_proj.bias", "fullshared.layer_scalar")  # what a softmax, or the final norm, takes away again


def torch_config(case: Case) -> Any:
    fields = {**case.row.sizes, **case.row.model_types[case.kind], **case.options}
    return transformers.AutoConfig.for_model(case.kind, **copy.deepcopy(fields))  # it adds to nested dicts


def torch_model(case: Case) -> Any:
    """A model with random weights everywhere, norms, biases and buffers included, large enough that all matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(torch_config(case), dtype=torch.float32).eval()
    return moved_all_over(model, case.row.noise)


def moved_all_over(model: Any, noise: float) -> Any:
    """The model, all of whose tensors, buffers included, are moved by random numbers."""
    with torch.no_grad():
        stored = model.state_dict(keep_vars=True).values()
        for tensor in {id(one): one for one in stored}.values():
            tensor.add_(noise * torch.randn_like(tensor))
    return model


class Pair(NamedTuple):
    """A PyTorch model, its checkpoint, and ours read from it."""

    folder: Any
    theirs: Any
    ours: pj.models.CausalLM


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Pair] = {}

    def get(name: str) -> Pair:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = torch_model({**CASES, **GRID}[name])
            model.save_pretrained(folder)
            made[name] = Pair(folder, model, pj.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"))
        return made[name]

    return get


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK), use_cache=False).logits.numpy()


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS, MASK).logits)


def test_logits_and_loss_at_all_positions(each: str, pairs: Any) -> None:
    pair = pairs(each)
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK), "use_cache": False}
        want = pair.theirs(**inputs, labels=torch.tensor(LABELS), output_hidden_states=True)
    got = pair.ours(IDS, MASK, labels=LABELS, output_hidden_states=True)
    # "Eager" attention gives a query that may see nothing the mean of all values, future ones included; "sdpa", zeros.
    sees = MASK.cumsum(axis=1) > 0 if pair.theirs.config._attn_implementation == "eager" else MASK >= 0
    close(np.asarray(got.logits)[sees], want.logits.numpy()[sees])
    np.testing.assert_allclose(got.loss, want.loss.item(), rtol=1e-5)
    assert len(got.hidden_states) == len(want.hidden_states)
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        np.testing.assert_allclose(one[sees], other[sees], rtol=0, atol=2 * tolerance(other.numpy()))


def test_tokens_of_a_padded_batch(each: str, pairs: Any) -> None:
    pair = pairs(each)
    ids, mask = torch.tensor(IDS[:2]), torch.tensor(MASK[:2])
    options = {"max_new_tokens": 8, "do_sample": False}
    want = pair.theirs.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **options)
    got = pair.ours.generate(IDS[:2], MASK[:2], generation_config={"pad_token_id": 0, "eos_token_id": None}, **options)
    np.testing.assert_array_equal(np.asarray(got), want.numpy())


@pytest.mark.parametrize("length", [3, 7, 8, 9])
def test_tokens_across_the_length_of_pretraining(length: int, pairs: Any) -> None:
    """A cache of Phi-3 is computed again when the ids, padding included, are more than those of pretraining."""
    pair = pairs("phi3-long")
    assert pair.ours.config.renewed_at == 8
    mask = np.ones((2, length), int)
    mask[1, :2] = 0
    options = {"max_new_tokens": 10, "do_sample": False}
    for rows in (slice(0, 2), slice(1, 2)):  # the second alone is longer than its positions
        ids, seen = IDS[:2, :length][rows], mask[rows]
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen)}
        want = pair.theirs.generate(**tensors, eos_token_id=None, pad_token_id=0, **options)
        given = {"pad_token_id": 0, "eos_token_id": None}
        got = pair.ours.generate(ids, seen, generation_config=given, **options)
        np.testing.assert_array_equal(np.asarray(got), want.numpy())


def test_reading_a_config_does_not_change_it() -> None:
    rope = {"rope_type": "default", "rope_theta": 100.0}
    given = {"model_type": "olmo3", **ROW_OF["olmo3"].sizes, "rope_parameters": rope}
    with pytest.raises(ValueError, match="of all layers are not supported"):
        read_architecture(given)
    assert rope == {"rope_type": "default", "rope_theta": 100.0} and given["rope_parameters"] is rope


def test_config_survives_a_file(each: str) -> None:
    config = read_architecture(torch_config({**CASES, **GRID}[each]))
    again = read_architecture(json.loads(json.dumps(config.to_hf())))
    assert again == config and hash(again) == hash(config)


def test_adapters_both_ways(name_and_method: tuple[str, str], pairs: Any, tmp_path: Any) -> None:
    name, method = name_and_method
    pair, case = pairs(name), CASES[name]
    options = filled(METHODS[method], case.row.modules)
    plain = torch_logits(pair.theirs)
    theirs = peft.get_peft_model(pair.theirs, getattr(peft, method)(**options, task_type=CAUSAL_LM))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(case.row.adapter_noise * torch.randn_like(parameter))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    want = torch_logits(theirs)
    assert np.abs(want - plain).max() > 100 * tolerance(want), "the adapter is dead"
    model = pj.PeftModel.from_pretrained(pair.ours, tmp_path / "theirs")
    close(logits(model), want)
    close(logits(model.merge_and_unload()), want)
    model.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    for parameter in theirs.parameters():  # ours is read back by PEFT
        if parameter.requires_grad:
            parameter.data.zero_()
    tensors = peft.utils.load_peft_weights(str(tmp_path / "ours"))
    result = peft.set_peft_model_state_dict(theirs, tensors)
    assert result.unexpected_keys == []
    close(torch_logits(theirs), want)
    fresh = pj.get_peft_model(pair.ours, getattr(pj, method)(**options, task_type=CAUSAL_LM))
    assert interop.get_peft_model_state_dict(fresh).keys() == tensors.keys()
    pair.theirs.load_state_dict(theirs.unload().state_dict())


@pytest.mark.parametrize("name", WHOLE)
def test_checkpoint_keys_and_bytes(name: str, pairs: Any, tmp_path: Any) -> None:
    pair = pairs(name)
    config, params = load_model(pair.folder, dtype="float32")
    save_model(params, config, tmp_path)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, pair.folder))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].tobytes() == theirs[key].tobytes(), key
    assert load_model(tmp_path)[0] == config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    close(torch_logits(again), torch_logits(pair.theirs))


def test_int8_base_with_an_adapter(form: str, pairs: Any) -> None:
    pair = pairs(form)
    small = pj.AutoModelForCausalLM.from_pretrained(pair.folder, dtype="float32", load_in_8bit=True)
    assert any(path.endswith(".q") for path in named_leaves(small.params))
    found, want = logits(small), logits(pair.ours)
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    assert 0 < error < 0.1, error
    options = filled(METHODS["LoraConfig"], CASES[form].row.modules)
    model = pj.get_peft_model(small, pj.LoraConfig(**options, task_type=CAUSAL_LM))
    close(logits(model), found)


@pytest.mark.parametrize("name", WHOLE)
def test_every_leaf_matters(name: str, pairs: Any) -> None:
    """Leaves that do not move the logits could hold anything, and parity would not notice."""
    model = pairs(name).ours
    want = logits(model)
    leaves, treedef = jax.tree.flatten(model.params)
    for index, path in enumerate(named_leaves(model.params)):
        noise = 0.1 * jax.random.normal(jax.random.key(index), leaves[index].shape)
        changed = [*leaves[:index], leaves[index] + noise, *leaves[index + 1 :]]
        moved = logits(model.replace(jax.tree.unflatten(treedef, changed)))
        assert np.abs(moved - want).max() > 1e-3 or path.endswith(INERT), path


@pytest.mark.parametrize("kind", KINDS)
def test_the_default_model_has_pytorchs_names_and_shapes(kind: str) -> None:
    """transformers' default configuration is that of a published model; nothing of its size is made."""
    row = next(row for row in ARCHITECTURES.values() if kind in row.model_types)
    theirs_config = transformers.AutoConfig.for_model(kind, **row.to_build.get(kind, {}))
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(theirs_config)
    config = read_architecture(theirs_config)
    rows = family_of(config).rows(config)
    ours = {key: row.tensor_shape for row in rows for key in row.keys}
    tied = set(theirs.all_tied_weights_keys) if config.tie_word_embeddings else set()
    want = {key: tuple(one.shape) for key, one in theirs.state_dict().items() if key not in tied}
    assert ours == want
    assert sum(np.prod(row.shape) for row in rows) == sum(int(np.prod(shape)) for shape in want.values())


@pytest.mark.parametrize("method", ["Lora", "IA3", "AdaLora", "VBLoRA", "LNTuning", "Beft", "FourierFT", "OFT", "LoHa"])
@pytest.mark.parametrize("kind", KINDS)
def test_default_targets_are_those_of_pefts_tables(kind: str, method: str) -> None:
    from peft.utils import constants

    peft_type = {"AdaLora": "ADALORA"}.get(method) or getattr(peft, f"{method}Config")().peft_type.value
    ours = method_defaults(peft_type, kind)
    name = f"TRANSFORMERS_MODELS_TO_{peft_type.replace('LN_', 'LN')}_TARGET_MODULES_MAPPING"
    table = getattr(constants, name, constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
    assert list(ours.get("target_modules", [])) == list(table.get(kind, []))
    if peft_type == "IA3":
        table = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        assert list(ours.get("feedforward_modules", [])) == table.get(kind, [])


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_not_supported_is_refused_by_name(refused: str) -> None:
    row, kind, options = REFUSED[refused]
    (field,) = options
    with pytest.raises(ValueError, match=r".* (is|are) not supported") as caught:
        read_architecture({"model_type": kind, **row.sizes, **row.model_types[kind], **options})
    nested = options[field] if isinstance(options[field], dict) else {}
    assert any(word in str(caught.value) for word in (field, *nested)), caught.value
    assert "\n" not in str(caught.value)


def test_one_step_on_eight_devices_is_that_on_one(meshed: str, pairs: Any) -> None:
    from peft_jax.train.mesh import make_mesh, place

    model = pairs(meshed).ours
    options = filled(METHODS["LoraConfig"], CASES[meshed].row.modules)
    model = pj.get_peft_model(model, pj.LoraConfig(**options, task_type=CAUSAL_LM, init_lora_weights=False))
    model = dataclasses.replace(model, remat=True)
    ids = np.tile(IDS[:1], (8, 1))

    @jax.jit
    def step(model: Any) -> Any:
        trainable, frozen = pj.partition(model)
        return jax.value_and_grad(lambda own: pj.combine(own, frozen)(ids, labels=ids).loss)(trainable)

    want, grads = step(model)
    found, parts = step(place(model, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, largest))


def test_the_chunked_loss_is_that_of_all_logits(some: str, pairs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, factors and caps of heads go into it; each on its own is in test_chunks.py."""
    ours = pairs(some).ours
    monkeypatch.setattr(chunked_loss, "CHUNK", 5 * len(IDS) * ours.config.vocab_size // jax.device_count())
    lazy = ours(IDS, MASK, lazy_logits=True).logits
    assert isinstance(lazy, LazyLogits) and chunk_size(lazy.shape, chunked_loss.CHUNK) < IDS.shape[1]
    close(np.asarray(lazy.compute()), logits(ours))
    found, want = (cross_entropy(one, jnp.asarray(LABELS))[0] for one in (lazy, logits(ours)))
    np.testing.assert_allclose(found, want, rtol=1e-5)


def test_heads_of_classes_and_spans(headed: str, tmp_path: Any) -> None:
    kind, task = headed.split("-")
    ours, row = config_of(kind, task), ROW_OF[kind]
    pad = 1
    labels = 2 if task == QUESTION_ANS else 3  # GPT-J's head of spans has as many outputs as there are labels
    fields = copy.deepcopy({**row.sizes, **row.model_types[kind], "pad_token_id": pad, "num_labels": labels})
    if "text_config" in fields:
        fields["text_config"]["pad_token_id"] = pad
    torch.manual_seed(0)
    theirs = getattr(transformers, ours.architecture)(transformers.AutoConfig.for_model(kind, **fields)).eval()
    moved_all_over(theirs, row.noise).save_pretrained(tmp_path)
    ids = np.where(MASK == 1, IDS, pad)
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(ids), attention_mask=torch.tensor(MASK), use_cache=False)
    got = auto_class(pj, task).from_pretrained(tmp_path, dtype="float32")(ids, MASK)
    sees = MASK.cumsum(axis=1) > 0  # what padding gets that sees nothing depends on transformers' kind of attention
    for name in OUTPUTS[task]:
        one, other = np.asarray(getattr(got, name)), getattr(want, name).numpy()
        assert one.shape == other.shape
        seen = slice(None) if task == SEQ_CLS else sees
        close(one[seen], other[seen])
        assert np.ptp(other) > 100 * tolerance(other), "the head is dead"


def test_bfloat16_is_as_close_as_that_of_pytorch(half: str, pairs: Any) -> None:
    """Both round to 8 bits, in other places; so neither is right, and what is compared is how far each is off.

    The reference is float32 on the rounded weights. Were the errors independent and of one size, the two would be
    1.4 times as far from each other as from the reference; twice is what is allowed, as the sample is small.
    """
    folder = pairs(half).folder
    # PyTorch's grouped product refuses rows of these sizes, so that experts run one after the other.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, experts_implementation="eager"
    ).eval()
    ours = pj.AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK), "use_cache": False}
        want = theirs(**inputs).logits.float().numpy()
        exact = theirs.float()(**inputs).logits.numpy()
    found = np.asarray(ours(IDS, MASK).logits, np.float32)
    sees = MASK.cumsum(axis=1) > 0

    def distance(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm((one - other)[sees]) / np.linalg.norm(exact[sees]))

    of_theirs = distance(want, exact)
    assert 2**-10 < of_theirs < 0.1, of_theirs
    assert distance(found, exact) < 1.5 * of_theirs
    assert distance(found, want) < 2 * of_theirs


@pytest.mark.parametrize("kind", [kind for kind, row in ROW_OF.items() if "text_config" not in row.sizes])
def test_the_row_of_padding_is_that_of_pytorchs_embedding(kind: str) -> None:
    row = ROW_OF[kind]
    theirs_config = transformers.AutoConfig.for_model(kind, **{**row.sizes, **row.model_types[kind], "pad_token_id": 3})
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(theirs_config)
    assert theirs.get_input_embeddings().padding_idx == read_architecture(theirs_config).untrained_row


def test_every_model_type_of_a_row_is_compared() -> None:
    for row in ARCHITECTURES.values():
        if row.switches:
            compared = {kind for kind, _ in [*row.switches.values(), *row.grid.values()]}
            assert compared == set(row.model_types) <= set(BY_MODEL_TYPE)

"""Prompts on GPT-2, encoders, classifiers and T5: the same outputs, losses, files and tokens as PyTorch PEFT's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES, PROMPTS, auto_class, prompts
from conformance import close
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.prompts.attach_prompt import attach_prompt

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IDS = np.array([[5, 17, 2, 40, 1, 1], [8, 8, 50, 3, 21, 77]])
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
TYPES = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
CLASSES = {"labels": np.array([2, 0])}
TAGS = {"labels": np.where(MASK, IDS % 3, -100)}
SPANS = {"start_positions": np.array([1, 3]), "end_positions": np.array([2, 4])}
NEXT = {"labels": np.where(MASK, IDS, -100)}
ANSWER = {"labels": np.array([[7, 9, 1, -100], [30, 31, 32, 1]])}
INPUTS = {
    "CAUSAL_LM": NEXT,
    "SEQ_CLS": CLASSES,
    "TOKEN_CLS": TAGS,
    "QUESTION_ANS": SPANS,
    "FEATURE_EXTRACTION": {},
    "SEQ_2_SEQ_LM": ANSWER,
}
CASES = [
    (family, task, row)
    for family, architecture in ARCHITECTURES.items()
    for task, rows in architecture.prompts.items()
    for row in rows
]
every_case = pytest.mark.parametrize(("family", "task", "row"), CASES, ids=["-".join(case) for case in CASES])
ROWS = prompts()
FIELDS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of checkpoints, by family and task, made when first asked for."""
    import transformers

    made = {}

    def folder(family, task):
        if (family, task) not in made:
            torch.manual_seed(1)
            architecture = ARCHITECTURES[family]
            padding = {} if task == "SEQ_2_SEQ_LM" else {"pad_token_id": 1}
            sizes = {**architecture.sizes, **architecture.model_types[family], **padding}
            config = transformers.AutoConfig.for_model(family, **sizes, num_labels=3)
            config.num_labels = 2 if task == "QUESTION_ANS" else 3
            model = auto_class(transformers, task).from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(architecture.lively * torch.randn_like(parameter))
            made[family, task] = tmp_path_factory.mktemp(f"{family}-{task}")
            model.save_pretrained(made[family, task])
        return made[family, task]

    return folder


def described(family, task, row):
    return ROWS[row].config, f"{family} {task}", row


def torch_base(folder, task):
    import transformers

    return auto_class(transformers, task).from_pretrained(folder, dtype=torch.float32).eval()


def load(folder, task):
    return auto_class(pj, task).from_pretrained(folder, dtype="float32")


def inputs_of(family, task, row):
    given = {"input_ids": IDS, "attention_mask": MASK, **INPUTS[task]}
    if ARCHITECTURES[family].types and task in ("SEQ_CLS", "TOKEN_CLS"):  # PEFT drops types for the other tasks
        given["token_type_ids"] = TYPES
    if task == "TOKEN_CLS" and row != "prefix":
        given.pop("labels")  # PEFT has none for virtual tokens, and fails
    return given | tasks_of(row)


def tasks_of(row):
    has_tasks = row in [prompt.row for prompt in PROMPTS.values() if prompt.has_tasks]
    return {"task_ids": np.array([2, 0])} if has_tasks else {}


def as_torch(arrays):
    return {name: torch.tensor(array) for name, array in arrays.items()}


def same_outputs(ours, theirs, inputs):
    with torch.no_grad():
        want = theirs(**as_torch(inputs))
    got = ours(**inputs)
    compared = 0
    for field in FIELDS:
        if (expected := getattr(want, field, None)) is not None:
            close(getattr(got, field), expected.numpy())
            compared += 1
    assert compared
    if getattr(want, "loss", None) is not None:
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    return compared


def first_output(output):
    return np.asarray(next(getattr(output, field) for field in FIELDS if getattr(output, field, None) is not None))


@every_case
def test_pefts_prompt_gives_the_same_outputs_losses_and_file(family, task, row, bases, tmp_path):
    folder = bases(family, task)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(torch_base(folder, task), ROWS[row].make(peft, task_type=task)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    base = load(folder, task)
    model = interop.load_adapter(base, tmp_path / "theirs")
    inputs = inputs_of(family, task, row)
    same_outputs(model, theirs, inputs)
    interop.save_adapter(model, tmp_path / "ours")
    configs = [json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("ours", "theirs")]
    assert configs[0] == configs[1]
    ours, file = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("ours", "theirs"))
    assert {key: array.tobytes() for key, array in ours.items()} == {key: a.tobytes() for key, a in file.items()}
    # Without the prompt's own tensors, or the saved head, outputs are others.
    want = first_output(model(**inputs))
    for key, array in file.items():
        if key.endswith("prompt_embeddings") and task == "SEQ_2_SEQ_LM" and row != "prefix":
            array = array[:3]  # PEFT stores virtual tokens of the decoder too, and reads them nowhere
        without = {**file, key: np.concatenate([np.zeros_like(array), file[key][len(array) :]])}
        config = pj.PeftConfig.from_pretrained(tmp_path / "ours")
        changed = first_output(interop.set_peft_model_state_dict(base, config, without)(**inputs))
        assert np.abs(changed - want).max() > 1e-3 * max(1, np.abs(want).max()), f"{key} is dead"


@every_case
def test_our_prompt_gives_the_same_outputs_in_peft(family, task, row, bases, tmp_path):
    folder = bases(family, task)
    model = attach_prompt(load(folder, task), ROWS[row].make(pj, task_type=task))
    trainable, frozen = pj.partition(model)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    model = pj.combine(jax.tree.unflatten(treedef, leaves), frozen)
    interop.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_base(folder, task), tmp_path).eval()
    saved, known = load_file(tmp_path / "adapter_model.safetensors"), peft.get_peft_model_state_dict(theirs)
    assert {key: array.shape for key, array in saved.items()} == {key: tuple(t.shape) for key, t in known.items()}
    same_outputs(model, theirs, inputs_of(family, task, row))


GENERATED = [(family, row) for family, architecture in ARCHITECTURES.items() for row in architecture.generates]


@pytest.mark.parametrize(("family", "row"), GENERATED, ids=["-".join(case) for case in GENERATED])
def test_generation_gives_pefts_tokens(family, row, bases, tmp_path):
    (task,) = {"CAUSAL_LM", "SEQ_2_SEQ_LM"} & set(ARCHITECTURES[family].prompts)
    folder = bases(family, task)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(torch_base(folder, task), ROWS[row].make(peft, task_type=task)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    given = {"input_ids": IDS[:, ::-1].copy(), "attention_mask": MASK[:, ::-1].copy()}
    told = tasks_of(row)
    want = theirs.generate(**as_torch(given | told), max_new_tokens=12, do_sample=False, eos_token_id=None).numpy()
    base = load(folder, task)
    model = pj.PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_array_equal(model.generate(**given, **told, max_new_tokens=12, eos_token_id=[]), want)
    assert (np.asarray(base.generate(**given, max_new_tokens=12, eos_token_id=[])) != want).any()


def test_labels_of_tokens_leave_virtual_tokens_out(bases):
    base = load(bases("bert", "TOKEN_CLS"), "TOKEN_CLS")
    model = attach_prompt(base, pj.PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["classifier"]))
    out = model(IDS, MASK, labels=TAGS["labels"])
    logits = jax.nn.log_softmax(out.logits[:, 3:])
    chosen = jnp.take_along_axis(logits, jnp.maximum(TAGS["labels"], 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.loss, -np.asarray(chosen)[MASK == 1].mean(), rtol=1e-5)


def test_token_types_that_peft_drops_are_an_error(bases):
    model = attach_prompt(
        load(bases("bert", "QUESTION_ANS"), "QUESTION_ANS"), pj.PrefixTuningConfig(num_virtual_tokens=3)
    )
    with pytest.raises(ValueError, match="token_type_ids= cannot be given beside a prompt for QUESTION_ANS"):
        model(IDS, MASK, token_type_ids=TYPES)

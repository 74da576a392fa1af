"""Prompts on GPT-2, encoders, classifiers and T5: the same outputs, losses, files and tokens as PyTorch PEFT's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    pad_token_id=1,
)
MODELS = {
    "gpt2": dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2, pad_token_id=1),
    "bert": SIZES,
    "roberta": {**SIZES, "type_vocab_size": 2},
    "llama": {**SIZES, "num_key_value_heads": 2},
    "t5": dict(vocab_size=96, d_model=32, d_kv=8, d_ff=40, num_layers=3, num_heads=4, decoder_start_token_id=0),
}
TASKS = {
    "CAUSAL_LM": ("AutoModelForCausalLM", NEXT),
    "SEQ_CLS": ("AutoModelForSequenceClassification", CLASSES),
    "TOKEN_CLS": ("AutoModelForTokenClassification", TAGS),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", SPANS),
    "FEATURE_EXTRACTION": ("AutoModel", {}),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", ANSWER),
}
PROMPTS = {
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}),
    "CPT": ("CPTConfig", {"cpt_token_ids": [3, 14, 15, 9], "cpt_tokens_type_mask": [1, 2, 3, 4]}),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
}
CASES = [
    *[("gpt2", "CAUSAL_LM", row) for row in ("prefix", "p-tuning", "CPT", "adaption")],
    ("gpt2", "SEQ_CLS", "prompt"),
    ("llama", "SEQ_CLS", "prefix"),
    ("llama", "TOKEN_CLS", "p-tuning"),
    ("bert", "SEQ_CLS", "prefix"),
    ("bert", "SEQ_CLS", "multitask"),
    ("bert", "TOKEN_CLS", "prompt"),
    ("bert", "QUESTION_ANS", "prefix"),
    ("bert", "QUESTION_ANS", "prompt"),
    ("bert", "FEATURE_EXTRACTION", "p-tuning"),
    ("roberta", "SEQ_CLS", "p-tuning"),
    ("roberta", "TOKEN_CLS", "prefix"),
    ("t5", "SEQ_2_SEQ_LM", "prefix"),
    ("t5", "SEQ_2_SEQ_LM", "prompt"),
    ("t5", "SEQ_2_SEQ_LM", "p-tuning"),
    ("t5", "SEQ_2_SEQ_LM", "multitask"),
]
every_case = pytest.mark.parametrize(("family", "task", "row"), CASES, ids=["-".join(case) for case in CASES])
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
            config = transformers.AutoConfig.for_model(family, **MODELS[family], num_labels=3)
            config.num_labels = 2 if task == "QUESTION_ANS" else 3
            model = getattr(transformers, TASKS[task][0]).from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_((0.2 if family == "t5" else 0.05) * torch.randn_like(parameter))
            made[family, task] = tmp_path_factory.mktemp(f"{family}-{task}")
            model.save_pretrained(made[family, task])
        return made[family, task]

    return folder


def described(family, task, row):
    return PROMPTS[row][0], f"{family} {task}", row


def torch_base(folder, task):
    import transformers

    return getattr(transformers, TASKS[task][0]).from_pretrained(folder, dtype=torch.float32).eval()


def load(folder, task):
    return getattr(pj, TASKS[task][0]).from_pretrained(folder, dtype="float32")


def inputs_of(family, task, row):
    given = {"input_ids": IDS, "attention_mask": MASK, **TASKS[task][1]}
    if family in ("bert", "roberta") and task in ("SEQ_CLS", "TOKEN_CLS"):  # PEFT drops types for the other tasks
        given["token_type_ids"] = TYPES
    if task == "TOKEN_CLS" and row != "prefix":
        given.pop("labels")  # PEFT has none for virtual tokens, and fails
    return given | ({"task_ids": np.array([2, 0])} if row == "multitask" else {})


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
    name, options = PROMPTS[row]
    torch.manual_seed(2)
    theirs = peft.get_peft_model(torch_base(folder, task), getattr(peft, name)(task_type=task, **options)).eval()
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
    name, options = PROMPTS[row]
    model = attach_prompt(load(folder, task), getattr(pj, name)(task_type=task, **options))
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


GENERATED = [("gpt2", row) for row in ("prefix", "prompt", "multitask", "adaption")] + [
    ("t5", "prefix"),
    ("t5", "prompt"),
    ("t5", "multitask"),
]


@pytest.mark.parametrize(("family", "row"), GENERATED, ids=["-".join(case) for case in GENERATED])
def test_generation_gives_pefts_tokens(family, row, bases, tmp_path):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    folder, (name, options) = bases(family, task), PROMPTS[row]
    torch.manual_seed(3)
    theirs = peft.get_peft_model(torch_base(folder, task), getattr(peft, name)(task_type=task, **options)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    given = {"input_ids": IDS[:, ::-1].copy(), "attention_mask": MASK[:, ::-1].copy()}
    told = {"task_ids": np.array([2, 0])} if row == "multitask" else {}
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

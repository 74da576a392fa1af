"""BERT, RoBERTa and the heads of decoders against PyTorch transformers: outputs, losses, checkpoints, fresh heads."""

import dataclasses
import json
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES, TASKS
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.models.bert.config import BertConfig, RobertaConfig
from peft_jax.models.gemma.config import GemmaConfig
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.registry import BY_MODEL_TYPE, family_of, read_architecture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PAD = 1
NAMES = dict(id2label={0: "A", 1: "B", 2: "C"}, label2id={"A": 0, "B": 1, "C": 2})


def architecture_of(kind):
    """The row of a model type."""
    return next(row for row in ARCHITECTURES.values() if kind in row.model_types)


KINDS = {
    kind: {**architecture.sizes, "vocab_size": 61, "max_position_embeddings": 40, "pad_token_id": PAD, **options}
    for name, architecture in ARCHITECTURES.items()
    for kind, options in architecture.model_types.items()
    if options or kind == name  # the others are of the same fields
}


def offers(kind, head):
    """Whether transformers has such a class: not each head of a row is there for all of its model types."""
    if not head:
        return True
    tasks = BY_MODEL_TYPE[kind].config.tasks
    task = next((task for task, (end, _) in TASKS.items() if end == head), "MASKED_LM")
    try:
        dataclasses.replace(read_architecture({"model_type": kind, **KINDS[kind]}), task_type=task)
    except ValueError:
        return False
    return task in tasks


CASES = [(kind, head) for kind in KINDS for head in architecture_of(kind).heads if offers(kind, head)]
cases = pytest.mark.parametrize(("kind", "head"), CASES, ids=[f"{kind}-{head or 'bare'}" for kind, head in CASES])

IDS = np.random.default_rng(0).integers(2, 61, (3, 9))
MASK = np.ones_like(IDS)
MASK[1, 6:] = 0
MASK[2, :2] = 0
IDS[MASK == 0] = PAD
TYPES = np.random.default_rng(1).integers(0, 2, IDS.shape)
POSITIONS = np.random.default_rng(2).integers(2, 30, IDS.shape)
LABELS = {
    "MaskedLM": {"labels": np.where(TYPES == 1, IDS, -100)},
    "SequenceClassification": {"labels": np.array([2, 0, 1])},
    "TokenClassification": {"labels": np.where(MASK == 1, IDS % 3, -100)},
    "QuestionAnswering": {"start_positions": np.array([0, 3, 50]), "end_positions": np.array([4, 3, 8])},
    "": {},
}


def auto(library, head):
    return getattr(library, f"AutoModelFor{head}" if head else "AutoModel")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = {}

    def get(kind, head):
        if (kind, head) not in made:
            torch.manual_seed(0)
            names = {} if head == "QuestionAnswering" else NAMES
            config = transformers.AutoConfig.for_model(kind, **KINDS[kind], **names)
            model = auto(transformers, head).from_config(config).eval()
            with torch.no_grad():  # biases and norms that are not those of a start
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(f"{kind}{head}")
            model.save_pretrained(folder)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                made[kind, head] = model, auto(pj, head).from_pretrained(folder), folder
        return made[kind, head]

    return get


def torch_outputs(model, **inputs):
    with torch.no_grad():
        return model(**{k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()})


def close(got, want):
    want = want.detach().numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1, np.abs(want).max()))


def all_close(got, want):
    """Every field that ours has, whole."""
    compared = 0
    for name, value in got._asdict().items():
        if value is not None:
            theirs = want[name]
            close(value, torch.stack(theirs) if isinstance(theirs, tuple) else theirs)
            compared += 1
    return compared


@cases
def test_outputs_and_loss(kind, head, pair):
    model, ours, _ = pair(kind, head)
    takes_types = architecture_of(kind).types and kind != "xlm-roberta"
    types = {"token_type_ids": TYPES} if takes_types else {}
    inputs = {"input_ids": IDS, "attention_mask": MASK, **types, **LABELS[head], "output_hidden_states": True}
    assert all_close(ours(**inputs), torch_outputs(model, **inputs)) >= 2
    assert all_close(ours(IDS), torch_outputs(model, input_ids=IDS)) >= 1  # nothing said of padding


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_positions_and_embeddings(kind, pair):
    model, ours, _ = pair(kind, "")
    for inputs in (
        {"input_ids": IDS, "position_ids": POSITIONS},
        {"inputs_embeds": np.random.default_rng(3).normal(size=(3, 9, 32)).astype(np.float32), "attention_mask": MASK},
    ):
        assert all_close(ours(**inputs), torch_outputs(model, **inputs)) == 2


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "of each row"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_prefix_is_transformers_past(kind, rows, pair):
    model, ours, _ = pair(kind, "")
    keys, values = np.random.default_rng(1).normal(size=(2, 3, rows, 5, 4, 8)).astype(np.float32)
    cache = transformers.DynamicCache()
    for layer, arrays in enumerate(zip(keys, values, strict=True)):
        wide = (torch.tensor(np.broadcast_to(a, (3, 5, 4, 8)).transpose(0, 2, 1, 3).copy()) for a in arrays)
        cache.update(*wide, layer)
    mask = np.concatenate([np.ones((3, 5), int), MASK], axis=1)
    want = torch_outputs(model, input_ids=IDS, attention_mask=mask, past_key_values=cache)
    run = partial(family_of(ours.config).apply, ours.config, ours.params)
    inputs = ForwardInputs(input_ids=jnp.asarray(IDS), attention_mask=jnp.asarray(MASK))
    got = run(dataclasses.replace(inputs, prefix=(jnp.asarray(keys), jnp.asarray(values))))
    close(got.last_hidden_state, want.last_hidden_state)
    assert np.abs(run(inputs).last_hidden_state - got.last_hidden_state).max() > 1e-2


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("regression", np.random.default_rng(4).normal(size=(3, 3)).astype(np.float32)),
        ("multi_label_classification", np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)),
        (None, np.array([[0, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)),
        ("single_label_classification", np.array([[2], [-100], [1]])),
    ],
)
def test_losses_of_sequence_classifiers(problem, labels, pair):
    _, _, folder = pair("bert", "SequenceClassification")
    load = {"problem_type": problem} if problem else {}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **load).eval()
    ours = pj.AutoModelForSequenceClassification.from_pretrained(folder, problem_type=problem)
    want = torch_outputs(model, input_ids=IDS, labels=labels)
    got = ours(IDS, labels=labels)
    close(got.loss, want.loss)
    assert float(got.loss) > 0.01


def test_a_single_output_is_a_regression(pair):
    _, _, folder = pair("bert", "")
    with pytest.warns(UserWarning, match=r"has no classifier.bias, classifier.kernel: they start at random. Train"):
        ours = pj.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    labels = np.array([0.5, -1.0, 2.0], np.float32)
    got = ours(IDS, labels=labels)
    assert float(got.loss) == pytest.approx(float(np.mean((np.asarray(got.logits)[:, 0] - labels) ** 2)), rel=1e-5)


def test_labels_out_of_range_are_said(pair):
    _, ours, _ = pair("bert", "SequenceClassification")
    with pytest.raises(
        ValueError, match="labels are from 0 to 3, but this model has classes 0 to 2. Load it with num_"
    ):
        ours(IDS, labels=np.array([0, 3, 1]))
    with pytest.raises(ValueError, match=r"labels for single_label_classification must be \(3,\), got \(2,\)"):
        ours(IDS, labels=np.array([0, 1]))
    _, ours, _ = pair("bert", "QuestionAnswering")
    with pytest.raises(ValueError, match="needs start_positions and end_positions, got one of them"):
        ours(IDS, start_positions=np.array([0, 1, 2]))


@cases
def test_checkpoints_come_back_whole(kind, head, pair, tmp_path):
    model, ours, folder = pair(kind, head)
    ours.save_pretrained(tmp_path)
    again, loading = auto(transformers, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path, folder))
    config = again.config.to_dict()
    # transformers notes the problem in the model itself once that has given a loss.
    rest = {"dtype", "_name_or_path", "transformers_version", "use_cache", "problem_type"}
    assert {k: config[k] for k, v in model.config.to_dict().items() if k not in rest and v != config[k]} == {}
    assert ours["architectures"] == theirs["architectures"]
    saved, file = (load_file(f / "model.safetensors") for f in (tmp_path, folder))
    assert {key: array.tobytes() for key, array in saved.items()} == {key: a.tobytes() for key, a in file.items()}


@pytest.mark.parametrize(("kind", "head"), [("bert", "MaskedLM"), ("roberta", ""), ("gpt2", ""), ("qwen2", "")])
def test_a_checkpoint_of_another_task_lends_its_backbone(kind, head, pair, tmp_path):
    """A fresh head and pooler, said once; saved, they are all that transformers needs for the same logits."""
    _, _, folder = pair(kind, head)
    with pytest.warns(UserWarning) as said:
        ours = pj.AutoModelForSequenceClassification.from_pretrained(
            folder, id2label={0: "no", 1: "yes"}, key=jax.random.key(7)
        )
    assert len(said) == 1 and ("pooler" in str(said[0].message)) == (kind == "bert")
    ours.save_pretrained(tmp_path)
    model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values()) and model.config.id2label == {0: "no", 1: "yes"}
    close(ours(IDS, MASK).logits, torch_outputs(model.eval(), input_ids=IDS, attention_mask=MASK).logits)
    fresh = [np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(ours.params) if "kernel" in str(path[-1])]
    assert min(array.std() for array in fresh) > 0.05


def test_a_bare_model_of_a_checkpoint_with_a_head(pair):
    model, _, folder = pair("bert", "SequenceClassification")
    close(pj.AutoModel.from_pretrained(folder)(IDS).last_hidden_state, torch_outputs(model.bert, input_ids=IDS)[0])


def test_old_names_and_buffers(pair, tmp_path):
    _, ours, folder = pair("bert", "SequenceClassification")
    file = load_file(folder / "model.safetensors")
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for key, array in file.items()
    }
    old |= {"bert.embeddings.position_ids": np.arange(40)[None], "cls.seq_relationship.bias": np.zeros(2, np.float32)}
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = pj.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(IDS).logits, ours(IDS).logits)
    assert dict(again.source.id2label) == {0: "A", 1: "B", 2: "C"}


def test_a_head_of_another_width_is_an_error(pair):
    _, _, folder = pair("bert", "SequenceClassification")
    with pytest.raises(ValueError, match=r"of a wrong shape: classifier.bias \(3,\), not \(5,\)"):
        pj.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=5)


def test_an_untied_masked_language_model(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**KINDS["bert"], tie_word_embeddings=False)
    model = transformers.BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.bias.normal_()
    model.save_pretrained(tmp_path)
    close(pj.AutoModelForMaskedLM.from_pretrained(tmp_path)(IDS).logits, torch_outputs(model, input_ids=IDS).logits)


def test_int8_and_remat(pair):
    _, ours, folder = pair("roberta", "TokenClassification")
    model = pj.AutoModelForTokenClassification.from_pretrained(folder, load_in_8bit=True, remat=True)
    assert model.params["roberta"]["encoder"]["layer"]["attention"]["self"]["query"]["kernel"].q.dtype == jnp.int8
    assert model.params["classifier"]["kernel"].dtype == jnp.float32
    dense = model.replace(pj.merge(model.params))
    np.testing.assert_allclose(model(IDS, MASK).logits, dense(IDS, MASK).logits, rtol=0, atol=1e-4)
    assert "policy=None" in str(jax.make_jaxpr(lambda model: model(IDS).logits)(dense))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BertConfig.from_hf({"model_type": "bert", "is_decoder": True}), "is_decoder=True is not supported"),
        (lambda: BertConfig(hidden_act="xielu"), "hidden_act='xielu' is not supported. Supported: silu"),
        (lambda: BertConfig(hidden_size=30), "hidden_size=30 is not a multiple of num_attention_heads=12"),
        (lambda: RobertaConfig(pad_token_id=None), "pad_token_id=None is not supported"),
        (
            lambda: pj.AutoModelForQuestionAnswering.from_config(GemmaConfig()),
            "A gemma model for QUESTION_ANS is not supported. Supported: CAUSAL_LM, SEQ_CLS",
        ),
        (lambda: pj.AutoModelForCausalLM.from_config(BertConfig()), "A bert model for CAUSAL_LM is not supported"),
    ],
)
def test_what_is_not_supported_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 2, "id2label": {0: "x"}}, "num_labels=2, but id2label has 1 names"),
        ({"id2label": {1: "x", 2: "y"}}, r"names the classes \[1, 2\]. Name 0 to 1"),
        ({"num_labels": 0}, "num_labels is at least 1, got 0"),
        ({"problem_type": "ranking"}, "problem_type is one of regression, single_label"),
    ],
)
def test_wrong_options_are_said(options, message, pair):
    with pytest.raises(ValueError, match=message):
        pj.AutoModelForSequenceClassification.from_pretrained(pair("bert", "")[2], **options)


def test_too_many_positions(pair):
    for kind, length in (("bert", 41), ("roberta", 39)):
        with pytest.raises(ValueError, match="41 positions are needed, but this model has 40. Shorten"):
            pair(kind, "")[1](np.zeros((1, length), int))


def test_several_texts_need_to_know_their_padding(pair):
    _, ours, folder = pair("gpt2", "SequenceClassification")
    import dataclasses

    blind = dataclasses.replace(ours, config=dataclasses.replace(ours.config, pad_token_id=None))
    with pytest.raises(ValueError, match="needs pad_token_id in the model's config.json"):
        blind(IDS)
    close(blind(IDS[:1]).logits, torch.tensor(np.asarray(ours(IDS[:1]).logits)))

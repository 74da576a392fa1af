"""Adapters between PyTorch PEFT and us on other architectures and tasks: GPT-2, and BERT and RoBERTa as classifiers."""

import copy
import dataclasses
import json
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from cases import ARCHITECTURES, TASKS, adapters_of, auto_class, refused_of
from conformance import close, only_task, plain, same_files, tolerance
from peft_jax.interop.extras import tied_copies
from peft_jax.interop.formats import PREFIX
from safetensors.numpy import load_file
from test_peft_parity import clean, module_of

import peft_jax as pj
from peft_jax import interop
from peft_jax.models.defaults import method_defaults

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# PEFT warns of Conv1D, of tied weights and of heads that are not there.
pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.array([[5, 17, 2, 40, 9, 61, 33], [8, 8, 50, 3, 21, 77, 1]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


class Model(NamedTuple):
    """A model type for a task of PEFT."""

    kind: str
    task: str


FAMILIES = {
    f"{kind}{TASKS[task][1]}": Model(kind, task)
    for kind, architecture in ARCHITECTURES.items()
    for task in architecture.adapters
    if task != "SEQ_2_SEQ_LM"  # see test_t5_peft.py
}


def pairs_of(name):
    """The adapters that are compared on a model, by model and name."""
    kind, task = FAMILIES[name]
    rows = ARCHITECTURES[kind].adapters[task]
    return {
        (name, row): adapter for row, adapter in adapters_of(ARCHITECTURES[kind]).items() if rows is None or row in rows
    }


PAIRS = {pair: adapter for name in FAMILIES for pair, adapter in pairs_of(name).items()}
REFUSED = refused_of(ARCHITECTURES["gpt2"])
pairs = pytest.mark.parametrize(("name", "row"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
COPY = r"\.(original_module|modules_to_save)\."  # with bias="all" PEFT saves biases of saved modules three times
# PEFT's words for it.
NO_CONV1D = "Conv1D.* is not supported|not supported|does not support .*Conv1D|Conv1D.* does not support this layer"
SHIFTS = ("self.key",)  # its bias adds the same to all scores of a query, and so changes nothing


def described(name, row):
    family = FAMILIES[name]
    return PAIRS[name, row].config, f"{family.kind} {family.task}", row


def without_copies(keys):
    return {key for key in keys if not re.search(COPY, key)}


@pytest.fixture(autouse=True)
def no_cuda_extension(monkeypatch):
    """BOFT in PEFT would try to compile one for every layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    import transformers

    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(1)
            family = FAMILIES[name]
            labels = 2 if family.task == "QUESTION_ANS" else 3
            sizes = {**ARCHITECTURES[family.kind].sizes, "num_labels": labels}
            config = transformers.AutoConfig.for_model(family.kind, **sizes)
            model = auto_class(transformers, family.task).from_config(config)
            with torch.no_grad():
                for path, parameter in model.named_parameters():
                    if path.endswith("bias") or "orm" in path or "ln_" in path:
                        parameter.add_(0.1 * torch.randn_like(parameter))
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return get


def torch_base(name, bases):
    return auto_class(transformers, FAMILIES[name].task).from_pretrained(bases(name), dtype=torch.float32).eval()


def load(name, bases):
    return auto_class(pj, FAMILIES[name].task).from_pretrained(bases(name), dtype="float32")


def output(out):
    """What a model gives, in one array."""
    fields = ("start_logits", "end_logits") if hasattr(out, "start_logits") else ("logits",)
    fields = ("last_hidden_state", "pooler_output") if hasattr(out, "last_hidden_state") else fields
    arrays = [getattr(out, field) for field in fields]
    return np.concatenate([np.asarray(a.detach() if hasattr(a, "detach") else a).ravel() for a in arrays])


def torch_output(model):
    with torch.no_grad():
        given = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(MASK)}
        return output(model(**given, **only_task(model, len(IDS))))


def config_of(library, name, row):
    return PAIRS[name, row].make(library, task_type=FAMILIES[name].task)


@pairs
def test_pefts_adapter_gives_the_same_outputs_file_and_merge(name, row, bases, tmp_path):
    torch.manual_seed(2)
    theirs = peft.get_peft_model(torch_base(name, bases), config_of(peft, name, row)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    want = torch_output(theirs)
    base = load(name, bases)
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    assert type(model).__name__ == f"PeftModelFor{TASKS[FAMILIES[name].task][0] or 'FeatureExtraction'}"
    close(output(model(IDS, MASK)), want)
    assert np.abs(want - output(base(IDS, MASK))).max() > 100 * tolerance(want), "the adapter is dead"
    if PAIRS[name, row].method.merges:
        close(output(model.merge_and_unload()(IDS, MASK)), want)
    else:
        with pytest.raises(ValueError, match="no one matrix"):
            model.merge_and_unload()
    if row != "layer_replication":
        close(output(model.unload()(IDS, MASK)), output(base(IDS, MASK)))
    model.save_pretrained(tmp_path / "ours")
    file = same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_no_module_is_dead(base, model.peft_config["default"], file, want)
    fresh = pj.get_peft_model(base, config_of(pj, name, row))
    same_config(
        fresh.peft_config["default"].to_dict(), json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    )
    assert interop.get_peft_model_state_dict(fresh).keys() == without_copies(file)


def same_config(ours, theirs):
    """A fresh adapter's config is PEFT's, but for names of targets that PEFT spells out in other words."""
    for field in ours.keys() - {"inference_mode", "peft_version", "target_modules"}:
        assert plain(ours[field]) == plain(theirs.get(field)), field


def assert_no_module_is_dead(base, config, tensors, want):
    """Zeroing the adapter of any one module moves the outputs by 100 times the tolerance."""
    own = interop.get_peft_model_state_dict
    fresh = own(interop.set_peft_model_state_dict(base, config, tensors))
    start = own(pj.get_peft_model(base, dataclasses.replace(config, inference_mode=False)))
    fresh = {key: array for key, array in fresh.items() if key not in tied_copies(base, config, fresh)}
    of_modules = [key for key in without_copies(fresh) if key.startswith(PREFIX)]  # without what all layers share
    modules = {module_of(key) for key in of_modules if not key.endswith("base_layer.weight")}
    for module in modules:
        if module.endswith(SHIFTS):
            continue
        own = [key for key in fresh if key.startswith(module)]
        own = [key for key in own if key.removesuffix(".weight").rpartition(".")[2] not in config.carried]
        own_start = {key: start.get(key, fresh[key]) for key in own}
        if {key.rpartition(".")[2] for key in own_start} <= set(getattr(config, "frozen", ())):
            own_start = {key: np.zeros_like(array) for key, array in own_start.items()}
        without = {**fresh, **own_start}
        changed = output(interop.set_peft_model_state_dict(base, config, without)(IDS, MASK))
        assert np.abs(changed - want).max() > 100 * tolerance(want), f"{module} is dead"


@pairs
def test_our_adapter_gives_the_same_outputs_in_peft(name, row, bases, tmp_path):
    if PAIRS[name, row].method.starts_in_peft:
        peft.get_peft_model(torch_base(name, bases), config_of(peft, name, row)).save_pretrained(tmp_path / "start")
        model = pj.PeftModel.from_pretrained(load(name, bases), tmp_path / "start", is_trainable=True)
    else:
        model = pj.get_peft_model(load(name, bases), config_of(pj, name, row))
    trainable, frozen = pj.partition(model)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    model = clean(load(name, bases), pj.combine(jax.tree.unflatten(treedef, leaves), frozen))
    model.save_pretrained(tmp_path)
    want = output(model(IDS, MASK))
    assert np.abs(want - output(model.unload()(IDS, MASK))).max() > 100 * tolerance(want)
    theirs = peft.get_peft_model(torch_base(name, bases), peft.PeftConfig.from_pretrained(tmp_path))
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(theirs, load_peft_weights(tmp_path))
    assert result.unexpected_keys == []
    saved = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert without_copies(peft.get_peft_model_state_dict(theirs)) == saved, "a key is missing"
    close(torch_output(theirs.eval()), want)
    close(torch_output(peft.PeftModel.from_pretrained(torch_base(name, bases), tmp_path).eval()), want)


@pytest.mark.parametrize("method", ["Lora", "IA3", "AdaLora", "VBLoRA", "LNTuning", "Beft", "FourierFT", "OFT"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta", "xlm-roberta", "t5"])
def test_default_targets_are_those_of_pefts_tables(kind, method):
    from peft.utils import constants

    config = getattr(peft, f"{method}Config")
    peft_type = config().peft_type.value if method != "AdaLora" else "ADALORA"
    ours = method_defaults(peft_type, kind)
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{peft_type.replace('LN_', 'LN')}_TARGET_MODULES_MAPPING")
    assert list(ours.get("target_modules", [])) == list(table.get(kind, []))
    if peft_type == "IA3":
        table = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        assert list(ours.get("feedforward_modules", [])) == table.get(kind, [])


def test_a_model_without_default_targets_asks_for_them():
    config = pj.models.RobertaConfig(
        model_type="xlm-roberta",
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(ValueError, match="target_modules is not given. Name some of"):
        pj.get_peft_model(pj.AutoModel.from_config(config), pj.IA3Config())
    with pytest.raises(ValueError, match="IA3Config needs feedforward_modules"):
        pj.get_peft_model(pj.AutoModel.from_config(config), pj.IA3Config(target_modules=["key"]))


@pytest.mark.parametrize("options", [{}, {"target_modules": []}, {"modules_to_save": ["classifier"]}], ids=str)
def test_a_head_alone_is_no_adapter(options):
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    theirs = transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(**sizes))
    with pytest.raises(ValueError, match="target_modules|feedforward_modules"):
        peft.get_peft_model(theirs, peft.IA3Config(task_type="SEQ_CLS", **copy.deepcopy(options)))
    config = pj.models.RobertaConfig(model_type="xlm-roberta", **sizes)
    base = pj.AutoModelForSequenceClassification.from_config(config)
    message = r"target_modules is not given. .* modules_to_save=\['classifier', 'score'\] is trained beside"
    with pytest.raises(ValueError, match=message):
        pj.get_peft_model(base, pj.IA3Config(**options))


def test_targets_that_are_all_saved_whole_are_no_adapter(bases):
    options = {"target_modules": ["query"], "modules_to_save": ["query"]}
    with pytest.raises(ValueError, match="You may also have only targeted modules that are marked to be saved"):
        peft.get_peft_model(torch_base("bert-seq", bases), peft.LoraConfig(**options))
    with pytest.raises(ValueError, match=r"Every module that \['query'\] names is excluded or in modules_to_save"):
        pj.get_peft_model(load("bert-seq", bases), pj.LoraConfig(**options))


@pytest.mark.parametrize("row", REFUSED)
def test_what_peft_has_not_for_conv1d_is_refused(row, bases):
    adapter = REFUSED[row]
    base, config = torch_base("gpt2", bases), adapter.make(peft, task_type="CAUSAL_LM")
    if row == "OSF":  # PEFT leaves such layers as they are, without a word
        assert not any(parameter.requires_grad for parameter in peft.get_peft_model(base, config).parameters())
    else:
        with pytest.raises((TypeError, NotImplementedError, ValueError), match=NO_CONV1D):
            peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=f"{row} takes no 'transformer.h.0..*': PyTorch stores it as .*Conv1D"):
        pj.get_peft_model(load("gpt2", bases), adapter.make(pj, task_type="CAUSAL_LM"))


def test_fan_in_fan_out_is_for_gpt2(bases):
    with pytest.raises(ValueError, match="fan_in_fan_out=True is for layers stored"):
        pj.get_peft_model(load("bert-seq", bases), pj.LoraConfig(fan_in_fan_out=True))
    model = pj.get_peft_model(load("gpt2", bases), pj.LoraConfig(fan_in_fan_out=True))
    assert model.peft_config["default"].fan_in_fan_out


def test_heads_are_trained_whole_for_their_task_alone(bases):
    base = load("roberta-token", bases)
    assert pj.get_peft_model(base, pj.LoraConfig()).peft_config["default"].modules_to_save == ("classifier", "score")
    other = pj.get_peft_model(base, pj.LoraConfig(task_type="FEATURE_EXTRACTION")).peft_config["default"]
    assert other.modules_to_save is None and other.task_type == "FEATURE_EXTRACTION"
    with pytest.raises(ValueError, match="modules_to_save 'scores' hits none"):
        pj.get_peft_model(base, pj.LoraConfig(modules_to_save=["scores"]))


def test_an_adapter_finds_its_base_and_its_head(bases, tmp_path):
    base = pj.AutoModelForSequenceClassification.from_pretrained(bases("bert-seq"))
    model = pj.get_peft_model(base, pj.LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = pj.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)
    assert float(again(IDS, labels=np.array([1, 2])).loss) > 0

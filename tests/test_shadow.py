"""SHADOW beyond what all prompts are tested for: other decoders, its small network as a model, its loss, its errors."""

import json
import pickle

import jax
import numpy as np
import optax
import pytest
from cases import ARCHITECTURES
from conformance import close, same_files

import peft_jax as pj
from peft_jax.models import LlamaConfig
from peft_jax.models.gemma4.config import Gemma4Config
from peft_jax.models.shadow_backbone import small_config
from peft_jax.prompts.base import ShadowSizes
from peft_jax.train import make_training_step

IDS = np.array([[1, 1, 5, 17, 2, 40], [8, 8, 50, 3, 21, 77]])
MASK = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
LABELS = np.where(MASK, IDS, -100)
SIZES = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
OTHER_SIZES = {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2, "shadow_num_hidden_layers": 2}
SLOW = (
    *("opt", "bloom", "falcon", "gemma2", "gemma3_text", "mixtral", "cohere", "phi3", "gpt_neox", "deepseek_v3"),
    *("gpt_oss", "starcoder2", "smollm3", "granite", "glm", "stablelm", "olmo2", "phi", "gptj", "qwen3_moe", "olmoe"),
)
EVERY = ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
pytestmark = pytest.mark.filterwarnings("ignore")


def llama(**options):
    return pj.AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **options}))


def adapted(model=None, **options):
    return pj.get_peft_model(llama() if model is None else model, pj.ShadowConfig(r=4, **options))


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft")


def torch_shadow(torch, peft, model_type, folder, **options):
    """The folder of a base, PEFT's model with random arrays, and the folder of its adapter."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (row,) = [row for row in ARCHITECTURES.values() if model_type in row.model_types]
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **{**row.sizes, **row.model_types[model_type]})
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(folder / "base")
    model = peft.get_peft_model(base, peft.ShadowConfig(task_type="CAUSAL_LM", r=4, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "theirs")
    return model


@pytest.mark.parametrize("model_type", EVERY)
def test_other_decoders_compute_what_pefts_do(model_type, torch, peft, tmp_path):
    """Logits, loss with the small network's own, file and tokens; its arrays alone change the outputs."""
    theirs = torch_shadow(torch, peft, model_type, tmp_path)
    base = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    given = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        want = theirs(**{name: torch.tensor(array) for name, array in {**given, "labels": LABELS}.items()})
    got = model(**given, labels=LABELS)
    close(got.logits, want.logits.numpy())
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    assert np.abs(np.asarray(got.logits) - base(**given).logits).max() > 1e-2, "the adapter is dead"
    model.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    tokens = theirs.generate(**{name: torch.tensor(array) for name, array in given.items()}, **options).numpy()
    options["eos_token_id"] = []
    np.testing.assert_array_equal(model.generate(**given, **options, generation_config={}), tokens)


@pytest.mark.parametrize("layer", [0, 2])
def test_on_one_layer_no_network_is_read(layer, torch, peft, tmp_path):
    """The state after the last layer that has the adapter is read by nothing, and so are that layer's networks."""
    theirs = torch_shadow(torch, peft, "llama", tmp_path, target_modules=[f"layers.{layer}"])
    model = pj.PeftModel.from_pretrained(
        pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32"), tmp_path / "theirs"
    )
    with torch.no_grad():
        want = theirs(torch.tensor(IDS)).logits.numpy()
    close(model(IDS).logits, want)
    assert np.abs(want - model.unload()(IDS).logits).max() > 1e-2, "the adapter is dead"


@pytest.mark.parametrize("options", [{}, OTHER_SIZES], ids=["shared table", "other sizes"])
def test_the_small_network_is_a_model_as_in_peft(options, torch, peft, tmp_path):
    """Its logits are those of PEFT's `unload_shadow`, and transformers reads its folder; the base plays no part."""
    from transformers import AutoModelForCausalLM

    theirs = torch_shadow(torch, peft, "llama", tmp_path, **options)
    base = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    small = pj.unload_shadow(model)
    with torch.no_grad():
        want = theirs.base_model.unload_shadow()(torch.tensor(IDS)).logits.numpy()
        small.save_pretrained(tmp_path / "small")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)(torch.tensor(IDS))
    close(small(IDS).logits, want)
    close(again.logits.numpy(), want)
    assert np.abs(want - np.asarray(model(IDS).logits)).max() > 1e-2
    assert not set(map(id, jax.tree.leaves(small))) & set(map(id, jax.tree.leaves(base)))


def test_a_fresh_one_changes_nothing_and_drops_in_training():
    model, plain = adapted(), llama()
    np.testing.assert_allclose(model(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-6)
    started = adapted(init_weights=False, shadow_alpha=1.0, shadow_dropout=0.5)
    logits = [pj.with_dropout(started, jax.random.key(seed))(IDS).logits for seed in (1, 1, 2)]
    np.testing.assert_array_equal(logits[0], logits[1])
    for other in (logits[2], started(IDS).logits, plain(IDS).logits):
        assert np.abs(np.asarray(logits[0]) - other).max() > 1e-3


def test_a_model_with_one_is_pickled():
    model = adapted(init_weights=False)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again(IDS).logits, model(IDS).logits)


def test_its_own_loss_is_that_of_the_small_network():
    """Equations 8 and 9: the same cross entropy, of the small network with the model's head."""
    model = adapted(auxiliary_loss_weight=0.5)
    without = adapted(auxiliary_loss_weight=0.0)(IDS, labels=LABELS).loss
    own = pj.unload_shadow(model)(IDS, labels=LABELS).loss
    np.testing.assert_allclose(model(IDS, labels=LABELS).loss, without + 0.5 * own, rtol=1e-5)
    step = make_training_step(lambda model, ids, mask: model(ids, mask).logits, tx := optax.sgd(0.1))
    trainable, frozen = pj.partition(model)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    with pytest.raises(ValueError, match="auxiliary_loss_weight above 0, and apply gives logits without.*lazy_logits"):
        step(trainable, tx.init(trainable), frozen, batch, jax.random.key(0))


def test_layers_to_transform_are_named_in_the_file(tmp_path):
    adapted(layers_to_transform=[1, 2]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1", "model.layers.2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadow_model": "some/checkpoint"}, "shadow_model='some/checkpoint'.*not supported"),
        ({"r": 0}, "needs r of at least 1, got 0"),
        ({"shadow_hidden_size": 0}, "needs shadow_hidden_size of at least 1, got 0"),
        ({"shadow_dropout": 1.0}, "shadow_dropout is a probability"),
        ({"auxiliary_loss_weight": -1.0}, "auxiliary_loss_weight is at least 0, got -1.0"),
        ({"target_modules": ["layers.0", "layers.2"]}, r"follow one another, and target_modules names \[0, 2\]"),
        ({"target_modules": ["q_proj"]}, "names none of the layers, model.layers.0 to model.layers.2"),
        ({"layers_to_transform": [5]}, "names none of the layers"),
        ({"shadow_num_attention_heads": 1}, "num_attention_heads=1 is not a multiple of num_key_value_heads=2"),
    ],
)
def test_what_does_not_go_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        pj.get_peft_model(llama(), pj.ShadowConfig(**options))


def test_models_that_it_is_not_for():
    with pytest.raises(ValueError, match="SHADOW is for CAUSAL_LM models, and this one is for SEQ_CLS"):
        adapted(pj.AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES, task_type="SEQ_CLS")))
    with pytest.raises(ValueError, match="SHADOW is not for gemma4_text models, whose layers have embeddings of their"):
        small_config(Gemma4Config(), ShadowSizes())
    with pytest.raises(ValueError, match="ShadowConfig is for a model handle"):
        pj.apply_adapter(llama().params, pj.ShadowConfig())
    lora = pj.get_peft_model(llama(), pj.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"no SHADOW adapter is active. Found: \[\]"):
        pj.unload_shadow(lora)

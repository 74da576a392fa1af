"""X-LoRA between PyTorch PEFT and us: the same logits, scales, tokens, files and training; and what it promises."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import XLORA
from conformance import close, same_files
from peft_jax.interop.describe import read_adapter
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.cli.inspect.servers import verdicts
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.methods.lora.token_scales import SCALES
from peft_jax.models.generation.filled_rows import can_fill
from peft_jax.train import make_training_step

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = np.array([[0, 0, 5, 17, 2, 29], [8, 8, 25, 3, 21, 7]])
LEFT = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
SIZES = {
    **{"vocab_size": 32, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "use_cache": False},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": None},
}
LORAS = [  # of several ranks, scales and targets
    {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    {"r": 2, "lora_alpha": 5, "target_modules": ["v_proj", "q_proj"], "layers_to_transform": [1]},
]
FILE, CLASSIFIER = "adapter_model.safetensors", "base_model.internal_xlora_classifier."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a Llama and three LoRAs."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("xlora")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)).save_pretrained(folder / "classifier")
    for number, options in enumerate(LORAS):
        model = LlamaForCausalLM.from_pretrained(folder / "base")
        config = peft.LoraConfig(**options, init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(folder / str(number), save_embedding_layers=False)
    return folder


def described(row):
    return "XLoraConfig", "llama", row


def paths(root, count=3):
    return {str(number): str(root / str(number)) for number in range(count)}


def torch_base(root):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(root / "base").eval()


def torch_xlora(root, options, model=None, task="CAUSAL_LM"):
    """A model of PEFT's whose classifier is sure enough of its choices to matter."""
    import peft
    import torch

    torch.manual_seed(1)
    config = peft.XLoraConfig(task_type=task, hidden_size=24, adapters=paths(root), **options)
    model = peft.get_peft_model(torch_base(root) if model is None else model, config).eval()
    for parameter in model.base_model.internal_xlora_classifier.parameters():
        parameter.data.mul_(4)
    return model


def classifier_of(theirs):
    state = theirs.base_model.internal_xlora_classifier.state_dict()
    return {f"{CLASSIFIER}{key}": value.detach().numpy().copy() for key, value in state.items()}


def with_classifier(model, tensors):
    """The model with the classifier that these tensors of PEFT's are."""
    arrays = {key.removeprefix(CLASSIFIER): jnp.asarray(tensor.T) for key, tensor in tensors.items()}

    def change(_, leaf):
        return dataclasses.replace(leaf, params=arrays) if leaf.tag.name == "default" else leaf

    return map_adapted(change, model)


def load(root, name="base"):
    auto = pj.AutoModelForCausalLM if name == "base" else pj.AutoModelForSequenceClassification
    return auto.from_pretrained(root / name, dtype="float32")


def sure_of(model, expert):
    """The model whose classifier chooses one LoRA for all tokens."""

    def choose(_, leaf):
        if leaf.tag.name != "default":
            return leaf
        bias = 200 * jax.nn.one_hot(expert, len(leaf.tag.config.experts))
        return dataclasses.replace(leaf, params={**leaf.params, "layers.0.bias": bias})

    return map_adapted(choose, model)


@pytest.mark.parametrize("row", XLORA)
def test_pefts_model_gives_the_same_logits_scales_and_file(row, root, tmp_path):
    import peft
    import torch

    theirs = torch_xlora(root, XLORA[row])
    theirs.save_pretrained(tmp_path / "theirs")
    base = load(root)
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    assert model.active_adapters == ["default"] and sorted(model.peft_config) == sorted(theirs.peft_config)
    with torch.no_grad():
        want = theirs(torch.tensor(IDS), attention_mask=torch.tensor(LEFT)).logits.numpy()
    seen = LEFT.astype(bool)
    close(np.asarray(model(IDS, LEFT).logits)[seen], want[seen])
    assert np.abs(want - np.asarray(base(IDS, LEFT).logits))[seen].max() > 1e-2
    scales = theirs.base_model.get_latest_scalings().detach().numpy()
    close(np.asarray(pj.xlora_scalings(model, IDS, LEFT))[seen], scales[seen])
    assert np.ptp(scales[seen], axis=0).max() > 0.05, "tokens have one mixture"

    model.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    save_file(classifier_of(theirs), tmp_path / "theirs" / FILE)  # PEFT leaves a part of it out
    same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(torch_base(root), tmp_path / "ours").eval()
    with torch.no_grad():
        np.testing.assert_array_equal(again(torch.tensor(IDS), attention_mask=torch.tensor(LEFT)).logits, want)


def test_tokens_are_pefts_though_both_passes_have_a_cache(root, tmp_path):
    """PEFT computes both passes over all tokens for each new one; here each pass reads on in a cache of its own."""
    import torch

    theirs = torch_xlora(root, {"layerwise_scalings": True, "scaling_pass_value": 0.5, "top_k_lora": 2})
    theirs.save_pretrained(tmp_path)
    base = load(root)
    model = pj.PeftModel.from_pretrained(base, tmp_path)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    asked = {"input_ids": torch.tensor(IDS), "attention_mask": torch.tensor(LEFT)}
    want = theirs.generate(**asked, **options, eos_token_id=None).numpy()
    got = np.asarray(model.generate(IDS, LEFT, **options))
    np.testing.assert_array_equal(got, want)
    assert (got != np.asarray(base.generate(IDS, LEFT, **options))).any()
    assert not can_fill(model.config, model.params), "its cache is another"
    streamed = []

    class Streamer:
        def put(self, value):
            streamed.append(value)

        def end(self):
            pass

    model.generate(IDS, LEFT, streamer=Streamer(), **options)
    np.testing.assert_array_equal(np.stack(streamed[1:], axis=1), got[:, IDS.shape[1] :])


@pytest.mark.parametrize(
    "trains_loras", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["classifier", "LoRAs too"]
)
def test_training_is_pefts_and_what_is_saved_is_read_again(trains_loras, root, tmp_path):
    import torch
    from peft_training import train_in_peft

    options = {"xlora_depth": 2, "xlora_size": 8, "xlora_dropout_p": 0.0, "layerwise_scalings": True}
    options |= {"scaling_pass_value": 0.2, "use_trainable_adapters": trains_loras}
    theirs = torch_xlora(root, options)
    model = pj.get_peft_model(load(root), pj.XLoraConfig(adapters=paths(root), **options))
    model = with_classifier(model, classifier_of(theirs))
    batch = {"input_ids": IDS, "attention_mask": LEFT, "labels": np.where(LEFT, IDS, -100)}
    want = train_in_peft(theirs, [batch] * 20, 1e-2)
    step = make_training_step(
        lambda model, ids, mask: model(ids, attention_mask=mask).logits, tx := optax.adamw(1e-2, weight_decay=0.01)
    )
    trainable, frozen = pj.partition(model)
    state, got = tx.init(trainable), []
    for number in range(20):
        trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(number))
        got.append(float(metrics.loss))
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
    assert want[0] - want[-1] > 0.02
    trained = pj.combine(trainable, frozen)
    ends = pj.get_peft_model_state_dict(trained)
    for key, array in classifier_of(theirs).items():
        # Adam divides by the root of small squares, which loses some of the last digits of small gradients.
        np.testing.assert_allclose(ends[key], array, rtol=0, atol=2e-4, err_msg=key)

    theirs.eval().save_pretrained(tmp_path / "theirs")
    trained.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        logits = theirs(torch.tensor(IDS)).logits.numpy()
    close(trained(IDS).logits, logits)
    close(pj.PeftModel.from_pretrained(load(root), tmp_path / "ours")(IDS).logits, logits)
    if not trains_loras:
        close(pj.PeftModel.from_pretrained(load(root), tmp_path / "theirs")(IDS).logits, logits)
    else:  # PEFT loses layers, and reads the LoRAs as they were
        with pytest.raises(ValueError, match="it lacks the layers whose numbers are names of other LoRAs"):
            pj.PeftModel.from_pretrained(load(root), tmp_path / "theirs")
        config = dataclasses.replace(trained.peft_config["default"], use_trainable_adapters=False)
        as_before = pj.PeftModel.from_pretrained(load(root), tmp_path / "ours", config=config)
        assert np.abs(as_before(IDS).logits - logits).max() > 1e-2
        with pytest.raises(FileNotFoundError, match="no folder '0' with the LoRA that was trained"):
            trained.save_pretrained(tmp_path / "alone", selected_adapters=["default"])
            pj.PeftModel.from_pretrained(load(root), tmp_path / "alone")


def test_a_classifier_of_texts_is_pefts(root, tmp_path):
    import torch
    from transformers import LlamaForSequenceClassification

    theirs = LlamaForSequenceClassification.from_pretrained(root / "classifier").eval()
    theirs = torch_xlora(root, {}, theirs, "SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    model = pj.PeftModel.from_pretrained(load(root, "classifier"), tmp_path)
    with torch.no_grad():
        close(model(IDS).logits, theirs(torch.tensor(IDS)).logits.numpy())
    assert np.abs(model(IDS).logits - model.unload()(IDS).logits).max() > 1e-2


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.slow), "bert"])
def test_models_that_peft_has_no_x_lora_for(family, tmp_path):
    """A classifier that is sure of a LoRA gives that LoRA's model, also where PEFT's keys or heads do not fit."""
    if family == "gpt2":
        config = pj.models.GPT2Config(vocab_size=32, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
        base, targets = pj.AutoModelForCausalLM.from_config(config), ["c_attn", "mlp.c_proj"]
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = pj.models.BertConfig(vocab_size=32, **sizes)
        base, targets = pj.AutoModelForMaskedLM.from_config(config), ["query", "intermediate.dense"]
    lora = pj.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    loras = [pj.get_peft_model(base, lora, key=jax.random.key(number)) for number in range(2)]
    for number, one in enumerate(loras):
        one.save_pretrained(tmp_path / str(number))
    model = pj.get_peft_model(base, pj.XLoraConfig(adapters=paths(tmp_path, 2)))
    for number, one in enumerate(loras):
        close(sure_of(model, number)(IDS).logits, one(IDS).logits)
        assert np.abs(one(IDS).logits - model(IDS).logits).max() > 1e-3


def test_what_it_promises_of_one_model(root):
    """On one model, for what compiles is its two passes: options, switching, dropout, int8, nf4 and the errors."""
    base = load(root)
    config = pj.XLoraConfig(adapters=paths(root), layerwise_scalings=False)
    model = pj.get_peft_model(base, config)
    own = model.peft_config["default"]
    assert (own.hidden_size, own.modules, own.task_type) == (24, 6, "CAUSAL_LM")
    assert "modules" not in own.to_dict()
    names = {leaf.tag.name for _, leaf in adapted_leaves(model) if leaf.active}
    assert names == {"default"} and not any(SCALES in leaf.state for _, leaf in adapted_leaves(model))
    trained = jax.tree.leaves(pj.partition(model)[0])
    assert sorted(array.shape for array in trained) == [(3,), (24, 3)]

    for number in range(3):
        one = pj.PeftModel.from_pretrained(base, root / str(number))
        close(sure_of(model, number)(IDS).logits, one(IDS).logits)
    close(model.set_adapter("2")(IDS).logits, one(IDS).logits)
    off = pj.set_xlora_options(model, global_scaling_weight=0.0)
    close(off(IDS).logits, base(IDS).logits)
    np.testing.assert_array_equal(model.unload()(IDS).logits, base(IDS).logits)
    again = pj.set_xlora_options(model, scaling_pass_value=None, top_k_lora=2)
    assert again.peft_config["default"].scaling_pass_value == 1 / 3
    assert np.abs(pj.xlora_scalings(again, IDS) - pj.xlora_scalings(model, IDS)).max() > 1e-4

    for narrow in pj.quantize(base, bits=8), pj.quantize(base, kind="nf4", group_size=32):
        wide = pj.get_peft_model(pj.merge(narrow), config)
        close(pj.get_peft_model(narrow, config)(IDS).logits, wide(IDS).logits)
        assert np.abs(wide(IDS).logits - model(IDS).logits).max() > 1e-4
    with pytest.raises(ValueError, match="scales LoRAs for each token, which no merged weight does"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"An X-LoRA of 3 LoRAs misses \['1'\]"):
        pj.delete_adapter(model, "1")(IDS)
    with pytest.raises(ValueError, match="The model has no active X-LoRA"):
        pj.xlora_scalings(base, IDS)
    with pytest.raises(TypeError, match="set_xlora_options has no option r"):
        pj.set_xlora_options(model, r=1)
    with pytest.raises(ValueError, match="has no X-LoRA 'other'"):
        pj.set_xlora_options(model, "other", top_k_lora=1)


def test_dropout_is_the_classifiers_between_its_layers(root):
    config = pj.XLoraConfig(adapters=paths(root), xlora_depth=3, xlora_size=8, xlora_dropout_p=0.5)
    model = pj.get_peft_model(load(root), config)
    (roles,) = [leaf.params for _, leaf in adapted_leaves(model) if leaf.tag.name == "default"]
    assert {role.split(".")[1] for role in roles} == {"0", "3", "6"}
    drawn = [pj.xlora_scalings(pj.with_dropout(model, jax.random.key(seed)), IDS) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 1e-3
    assert np.abs(drawn[0] - pj.xlora_scalings(model, IDS)).max() > 1e-3


def without_first_layer(folder):
    tensors = load_file(folder / FILE)
    save_file({key: array for key, array in tensors.items() if ".layers.0." not in key}, folder / FILE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": None}, "adapters are folders of LoRAs by number"),
        ({"adapters": {"math": "a", "code": "b"}}, "adapters are folders of LoRAs by number"),
        ({"top_k_lora": 3}, "top_k_lora is from 1 to the 2 LoRAs, got 3"),
        ({"xlora_depth": 0}, "xlora_depth is from 1 to 32"),
        ({"softmax_temperature": 0.0}, "softmax_temperature is above 0"),
        ({"xlora_dropout_p": 1.0}, "xlora_dropout_p is a probability"),
    ],
)
def test_wrong_fields_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        pj.XLoraConfig(**{"adapters": {"0": "a", "1": "b"}, **options})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "X-LoRA scales plain LoRAs, and '.*' has use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "has modules_to_save="),
        ({"bias": "all"}, "has bias='all'"),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights='pissa'"),
        ({"peft_type": "HRA", "r": 2}, "X-LoRA scales LoRAs, and '.*' is HRA"),
    ],
)
def test_loras_that_it_does_not_scale_are_errors(fields, message, root, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    with pytest.raises(ValueError, match=message):
        pj.get_peft_model(load(root), pj.XLoraConfig(adapters={"0": str(tmp_path)}))


def test_loras_on_the_output_head_are_trained_by_their_scales(root, tmp_path):
    base = load(root)
    config = pj.LoraConfig(r=2, init_lora_weights=False, target_modules=["lm_head", "q_proj"])
    for number in range(2):
        pj.get_peft_model(base, config, key=jax.random.key(number)).save_pretrained(tmp_path / str(number))
    adapters = {str(number): str(tmp_path / str(number)) for number in range(2)}
    model = pj.get_peft_model(base, pj.XLoraConfig(adapters=adapters))
    logits = model(IDS).logits
    assert float(jnp.abs(logits - base(IDS).logits).max()) > 0.1
    close(model(IDS, lazy_logits=True).logits, logits)
    assert not isinstance(load(root)(IDS, lazy_logits=True).logits, jax.Array)


def test_an_xlora_and_its_loras_are_swapped(root, tmp_path):
    base = load(root)
    first, second = (
        pj.get_peft_model(base, pj.XLoraConfig(adapters=paths(root)), key=jax.random.key(number)) for number in (1, 2)
    )
    second.save_pretrained(tmp_path / "whole")
    swapped = pj.hotswap_adapter(first, tmp_path / "whole", "default")
    close(swapped(IDS).logits, second(IDS).logits)
    assert float(jnp.abs(first(IDS).logits - second(IDS).logits).max()) > 1e-3
    config = pj.LoraConfig(**{**LORAS[0], "lora_alpha": 9}, init_lora_weights=False)
    pj.get_peft_model(base, config, key=jax.random.key(3)).save_pretrained(tmp_path / "other")
    adapters = {**paths(root), "0": str(tmp_path / "other")}
    wanted = pj.get_peft_model(base, pj.XLoraConfig(adapters=adapters), key=jax.random.key(1))
    close(pj.hotswap_adapter(first, tmp_path / "other", "0")(IDS).logits, wanted(IDS).logits)


def test_what_does_not_fit_is_said(root, tmp_path):
    base = load(root)
    with pytest.raises(ValueError, match=r"hidden_size=4096\) does not fit this model, whose hidden_size is 24"):
        pj.get_peft_model(base, pj.XLoraConfig(adapters=paths(root), hidden_size=4096))
    model = pj.get_peft_model(base, pj.XLoraConfig(adapters=paths(root)))
    with pytest.raises(ValueError, match="Adapter name '0' is taken"):
        model.add_adapter("second", pj.XLoraConfig(adapters=paths(root)))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    others = pj.get_peft_model(base, pj.XLoraConfig(adapters={**paths(root), "2": str(root / "0")}))
    with pytest.raises(ValueError, match="which stay as they are in a swap, and the new one of"):
        pj.hotswap_adapter(others, tmp_path, "default")
    assert not read_adapter(tmp_path).problems()
    without_first_layer(tmp_path)
    lost = read_adapter(tmp_path)
    assert lost.problems() == ["it lacks layers.0 of the classifier, which PEFT takes for a tensor of LoRA '0'"]
    assert [verdict.takes for verdict in verdicts(lost)[:2]] == [False, False]
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / FILE).touch()
    assert [verdict.takes for verdict in verdicts(lost)[:2]] == [True, False]
    shutil.rmtree(tmp_path / "0")
    with pytest.raises(ValueError, match=r"has no .*layers\.0\.weight: PEFT takes it for a tensor of the LoRA '0'"):
        pj.PeftModel.from_pretrained(base, tmp_path)
    config = pj.models.T5Config(vocab_size=32, hidden_size=8, head_dim=4, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(ValueError, match="XLORA is not for t5 models"):
        pj.get_peft_model(pj.AutoModelForSeq2SeqLM.from_config(config), pj.XLoraConfig(adapters=paths(root)))
    leaf = model.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    scaled = dataclasses.replace(leaf, active=True, state={**leaf.state, SCALES: jnp.ones((2, 2, 6))})
    with pytest.raises(ValueError, match="X-LoRA scales a LoRA for each token, which no merged weight does"):
        scaled.dense()
    with pytest.raises(ValueError, match="goes on a model handle"):
        interop.load_adapter(base.params, tmp_path)

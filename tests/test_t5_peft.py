"""Adapters of T5 between PyTorch PEFT and us: the same logits, files and tokens in both directions."""

import jax
import numpy as np
import pytest
from cases import ARCHITECTURES, adapters_of
from conformance import close, only_task, same_files, tolerance
from safetensors.numpy import load_file
from t5_pairs import SIZES, as_torch, lively_pair, pair

import peft_jax as pj
from peft_jax import interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from test_peft_parity import assert_no_module_is_dead, clean  # noqa: E402

__all__ = ["lively_pair", "pair"]
RANDOM = np.random.default_rng(4)
MASK = np.ones((2, 9), int)
MASK[1, 6:] = 0
INPUTS = {
    "input_ids": RANDOM.integers(2, SIZES["vocab_size"], (2, 9)),
    "attention_mask": MASK,
    "decoder_input_ids": RANDOM.integers(2, SIZES["vocab_size"], (2, 7)),
}
ROWS = adapters_of(ARCHITECTURES["t5"])
PAIRS = [("v1.0", row) for row in ROWS] + [("v1.1", row) for row in ("all-linear", "output head")]
# Methods that change a matrix as LoRA and OFT do meet nothing here that the other families do not have.
SLOW = {
    *("BOFT", "VERA", "HRA", "SHIRA", "FOURIERFT", "C3A", "ROAD", "GRALORA", "WAVEFT", "RANDLORA", "DEFT", "PEANUT"),
    *("POLY", "PVERA", "HIRA", "DELORA", "MISS"),
}
pairs_and_rows = pytest.mark.parametrize(
    ("name", "row"),
    [
        pytest.param(name, row, id=f"{name}-{row}", marks=[pytest.mark.slow] if row in SLOW else [])
        for name, row in PAIRS
    ],
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def no_cuda_extension(monkeypatch):
    """BOFT in PEFT would try to compile one for every layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def described(name, row):
    return ROWS[row].config, f"t5 {name} SEQ_2_SEQ_LM", row


def config_of(library, row):
    """The config of a row, as PEFT's class or ours."""
    return ROWS[row].make(library, task_type="SEQ_2_SEQ_LM")


def torch_base(ours):
    """The PyTorch model that ours was read from."""
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(ours.name_or_path).eval()


def torch_logits(model):
    with torch.no_grad():
        return model(**as_torch(INPUTS), **only_task(model, 2)).logits.numpy()


@pairs_and_rows
def test_pefts_adapter_gives_the_same_logits_file_and_merge(name, row, pair, tmp_path):
    _, base = pair(name)
    torch.manual_seed(2)
    theirs = peft.get_peft_model(torch_base(base), config_of(peft, row)).eval()
    assert type(theirs) is peft.PeftModelForSeq2SeqLM
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    want = torch_logits(theirs)
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    close(model(**INPUTS).logits, want)
    assert np.abs(want - base(**INPUTS).logits).max() > 100 * tolerance(want), "the adapter is dead"
    if not ROWS[row].method.changes_matrix:  # a bias, and T5 has none to merge it into
        with pytest.raises(ValueError, match="trains a bias for a layer that has none to merge it into"):
            model.merge_and_unload()
    elif not ROWS[row].method.merges:
        with pytest.raises(ValueError, match="no one matrix"):
            model.merge_and_unload()
    else:
        close(model.merge_and_unload()(**INPUTS).logits, want)
    model.save_pretrained(tmp_path / "ours")
    file = same_files(tmp_path / "ours", tmp_path / "theirs")
    if name == "v1.0":
        assert_no_module_is_dead(base, model.peft_config["default"], file, want, INPUTS)


@pairs_and_rows
def test_our_adapter_gives_the_same_logits_in_peft(name, row, pair, tmp_path):
    _, base = pair(name)
    if ROWS[row].method.starts_in_peft:
        peft.get_peft_model(torch_base(base), config_of(peft, row)).save_pretrained(tmp_path / "start")
        model = pj.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    else:
        model = pj.get_peft_model(base, config_of(pj, row))
    trainable, frozen = pj.partition(model)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    model = clean(base, pj.combine(jax.tree.unflatten(treedef, leaves), frozen))
    model.save_pretrained(tmp_path)
    want = np.asarray(model(**INPUTS).logits)
    fresh = peft.get_peft_model(torch_base(base), config_of(peft, row))
    saved = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert peft.get_peft_model_state_dict(fresh).keys() == saved, "PEFT of itself has other keys"
    loaded = peft.PeftModel.from_pretrained(torch_base(base), tmp_path)
    close(torch_logits(loaded.eval()), want)
    assert np.abs(want - model.unload()(**INPUTS).logits).max() > 100 * tolerance(want)


def test_generation_with_an_adapter_gives_pefts_tokens(lively_pair, tmp_path):
    _, base = lively_pair("v1.1")
    torch.manual_seed(3)
    theirs = peft.get_peft_model(torch_base(base), config_of(peft, "all-linear")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
        want = theirs.generate(**as_torch(inputs), max_new_tokens=12, do_sample=False).numpy()
    theirs.save_pretrained(tmp_path)
    model = pj.PeftModel.from_pretrained(base, tmp_path)
    np.testing.assert_array_equal(model.generate(**inputs, max_new_tokens=12), want)
    assert not np.array_equal(base.generate(**inputs, max_new_tokens=12), want)


def test_an_adapter_on_int8_equals_its_merged_twin(lively_pair):
    _, base = lively_pair("v1.0")
    model = pj.get_peft_model(pj.quantize(base), pj.LoraConfig(init_lora_weights=False))
    close(model(**INPUTS).logits, pj.merge(model)(**INPUTS).logits)
    assert np.abs(model(**INPUTS).logits - model.unload()(**INPUTS).logits).max() > 1e-2


def test_an_adapter_finds_its_base(lively_pair, tmp_path):
    _, base = lively_pair("v1.0")
    model = pj.get_peft_model(base, pj.LoraConfig(init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = pj.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(**INPUTS).logits, model(**INPUTS).logits)
    assert interop.get_peft_model_state_dict(again).keys() == interop.get_peft_model_state_dict(model).keys()


def test_modules_that_share_the_embedding_get_their_own(lively_pair):
    """A step that donates its leaves finds none twice, and what was one stays equal until it is trained."""
    _, base = lively_pair("v1.0")
    own = base.untied()
    assert set(own.params) - set(base.params) == {"lm_head"} and own.untied().config == own.config
    leaves = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(own.params)]
    assert len(set(leaves)) == len(leaves)
    close(own(**INPUTS).logits, base(**INPUTS).logits)
    assert base.untied().tied_modules == ()


PROJECTION = {"prefix_projection": True, "encoder_hidden_size": 12}


@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["plain", "projection"])
def test_a_prefix_of_a_decoder_alone_is_refused_on_an_encoder_decoder(options, lively_pair, tmp_path):
    """PEFT runs it, and its cross-attention then reads keys of later tokens: no model has such a value."""
    _, base = lively_pair("v1.0")
    torch.manual_seed(2)
    fields = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": 3, "num_transformer_submodules": 1, **options}
    fields["token_dim"] = base.config.num_attention_heads * base.config.head_dim
    theirs = peft.get_peft_model(torch_base(base), peft.PrefixTuningConfig(**fields)).eval()
    inputs = {name: INPUTS[name] for name in ("input_ids", "decoder_input_ids")}
    later = {**inputs, "decoder_input_ids": inputs["decoder_input_ids"].copy()}
    later["decoder_input_ids"][:, -1] += 1
    with torch.no_grad():
        one, other = (theirs(**as_torch(given)).logits[:, :-1].numpy() for given in (inputs, later))
    assert np.abs(one - other).max() > 100 * tolerance(one), "PEFT has become causal: give its numbers"
    theirs.save_pretrained(tmp_path)
    message = r"num_transformer_submodules=1\) is not supported on an encoder-decoder.*Write num_transformer_submodules"
    with pytest.raises(ValueError, match=message):
        pj.PeftModel.from_pretrained(base, tmp_path)
    with pytest.raises(ValueError, match=message):
        pj.get_peft_model(base, pj.PrefixTuningConfig(**fields))

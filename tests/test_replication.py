"""LoRA's layer_replication: more layers on the weights that there are, each with an adapter of its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close

import peft_jax as pj
from peft_jax.core.repeated import Repeated
from peft_jax.models import CausalLM, LlamaConfig
from peft_jax.models.gpt2.config import GPT2Config
from peft_jax.models.gpt2.family import GPT2
from peft_jax.models.llama.family import LLAMA

IDS = np.array([[5, 17, 2, 40, 9, 61, 33]])
ARCHITECTURE = LlamaConfig(
    vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4
)
RANGES = [[0, 2], [1, 3]]
ORDER = np.array([0, 1, 1, 2])


def lora(**options):
    return pj.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "up_proj"], **options)


@pytest.fixture(scope="module")
def base():
    return CausalLM(LLAMA.init_params(ARCHITECTURE, jax.random.key(0)), ARCHITECTURE)


def copied(base):
    """The model with its layers copied, as one without the field would have to be."""
    layers = jax.tree.map(lambda array: array[ORDER], base.params["model"]["layers"])
    params = {**base.params, "model": {**base.params["model"], "layers": layers}}
    return CausalLM(params, ARCHITECTURE.with_layers(ORDER.tolist()))


@pytest.mark.parametrize("quantized", [False, True])
def test_numbers_and_gradients_are_those_of_copied_layers(base, quantized):
    start = pj.quantize(base) if quantized else base
    model = pj.get_peft_model(start, lora(layer_replication=RANGES))
    twin = pj.get_peft_model(copied(start) if not quantized else pj.quantize(copied(base)), lora())

    def value_and_gradient(model):
        trainable, frozen = pj.partition(model)
        return jax.value_and_grad(lambda t: jnp.sum(pj.combine(t, frozen)(IDS).logits ** 2))(trainable)

    for got, want in zip(*map(jax.tree.leaves, map(value_and_gradient, (model, twin))), strict=True):
        close(got, want)
    if quantized:
        after = pj.quantize(pj.get_peft_model(base, lora(layer_replication=RANGES)))
        close(after(IDS).logits, model(IDS).logits)


def test_no_weight_is_copied_in_a_step(base):
    model = pj.get_peft_model(base, lora(layer_replication=RANGES))
    leaf = model.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    assert (
        isinstance(leaf.base, Repeated)
        and leaf.base.base is base.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"]
    )
    trainable, frozen = pj.partition(model)
    step = jax.grad(lambda t: jnp.sum(pj.combine(t, frozen)(IDS).logits))
    shapes = set(re.findall(r"f32\[4,(\d+,\d+)\]", str(jax.make_jaxpr(step)(trainable))))
    assert shapes and not shapes & {"24,24", "24,40", "40,24"}
    one, whole = pj.get_peft_model(base, lora()), copied(base)
    assert model.num_parameters() == one.num_parameters() < whole.num_parameters()


def test_tokens_counts_and_checkpoint_are_pefts(tiny_llama, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    options = dict(target_modules=["q_proj", "up_proj"], init_lora_weights=False, layer_replication=[[0, 2], [0, 1]])
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    base = pj.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = pj.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trained, total = theirs.get_nb_trainable_parameters()
    assert f"trainable params: {trained:,d} || all params: {total:,d} ||" in pj.summary(model)
    want = theirs.generate(input_ids=torch.tensor(IDS), max_new_tokens=12, do_sample=False)
    got = model.generate(IDS, max_new_tokens=12)
    np.testing.assert_array_equal(got, want.numpy())
    assert not np.array_equal(got, base.generate(IDS, max_new_tokens=12))
    # PEFT adds all replicas' changes to the one weight that they share; here each has its own.
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_hidden_layers == 3
    with torch.no_grad():
        close(merged(torch.tensor(IDS)).logits, theirs(torch.tensor(IDS)).logits)


WRONG = {
    "a layer that is not there": ({"layer_replication": [[0, 4]]}, "names layer 3, and the model has layers 0 to 2"),
    "no range": ({"layer_replication": [[2, 1]]}, r"\[start, end\) with 0 <= start < end, got \(\(2, 1\),\)"),
    "shared biases": ({"layer_replication": RANGES, "bias": "all"}, "does not go with {'bias': 'all'}, which change"),
    "a changed base": ({"layer_replication": RANGES, "init_lora_weights": "olora"}, "{'init_lora_weights': 'olora'}"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_suit_is_named(case, base):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        pj.get_peft_model(base, pj.LoraConfig(target_modules=["q_proj"], **options))


def test_models_that_have_no_such_layers_are_named(base):
    config = GPT2Config(vocab_size=64, hidden_size=24, num_hidden_layers=2, num_attention_heads=4)
    replicated = lora(layer_replication=RANGES)
    with pytest.raises(ValueError, match="PEFT has no layer_replication for models like this GPT2LMHeadModel"):
        pj.get_peft_model(CausalLM(GPT2.init_params(config, jax.random.key(0)), config), replicated)
    with pytest.raises(ValueError, match="is for a model handle, which knows its layers"):
        pj.apply_adapter(base.params, replicated)
    with pytest.raises(ValueError, match=r"on which there are adapters already: \['default'\]. Attach"):
        pj.get_peft_model(pj.get_peft_model(base, lora()), replicated, "more")
    second = pj.get_peft_model(pj.get_peft_model(base, replicated), lora(), "more")
    assert second.params["model"]["layers"]["self_attn"]["q_proj"]["kernel"].params["lora_A"].shape == (4, 24, 2)


def test_layers_of_other_kinds_keep_them():
    config = LlamaConfig(num_hidden_layers=2, sliding_window=4, layer_types=("sliding_attention", "full_attention"))
    assert config.with_layers([0, 1, 1]).kinds == ("sliding_attention", "full_attention", "full_attention")

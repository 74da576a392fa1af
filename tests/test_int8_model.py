"""A model on an int8 base: the right numbers, the right size, and no dequantized copy kept for backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.models import CausalLM, LlamaConfig
from peft_jax.models.llama.family import LLAMA
from peft_jax.quant import Int8

IDS = np.array([[5, 17, 2, 40, 9, 61, 33], [8, 8, 50, 3, 21, 77, 1]])


def int8_leaves(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, Int8))
    return [leaf for leaf in leaves if isinstance(leaf, Int8)]


def test_logits_equal_pytorchs_on_the_dequantized_weights(tiny_llama, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    full = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32")
    model = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32", load_in_8bit=True)
    assert len(int8_leaves(model.params)) == 7  # q, k, v, o, gate, up, down
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        block, name = path.split(".")
        leaf = model.params["model"]["layers"][block][name]["kernel"]
        exact = full.params["model"]["layers"][block][name]["kernel"]
        error = np.abs(np.asarray(leaf.q, np.float32) * np.asarray(leaf.scale)[:, None] - exact)
        assert leaf.q.dtype == jnp.int8 and (error <= np.asarray(leaf.scale)[:, None] * (0.5 + 1e-5)).all()
    for path, leaf in {"embed_tokens": "embedding", "norm": "scale"}.items():
        assert model.params["model"][path][leaf].dtype == jnp.float32
    assert model.params["lm_head"]["kernel"].dtype == jnp.float32

    pj.merge(model).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(IDS)).logits.numpy()
    got = model(IDS).logits
    tolerance = 1e-5 * max(1, np.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    assert np.abs(got - full(IDS).logits).max() > 100 * tolerance


def test_quantizing_a_loaded_model_equals_quantizing_while_loading(tiny_llama):
    while_loading = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32", load_in_8bit=True)
    after = pj.quantize(pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"))
    assert jax.tree.structure(after) == jax.tree.structure(while_loading)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(while_loading), strict=True):
        np.testing.assert_array_equal(a, b)
    everything = pj.quantize(after, target_modules=["lm_head", "embed_tokens"])
    assert len(int8_leaves(everything.params)) == 9
    np.testing.assert_allclose(everything(IDS).logits, pj.merge(everything)(IDS).logits, rtol=0, atol=1e-5)


def test_an_int8_model_is_not_saved_as_a_float_checkpoint(tiny_llama, tmp_path):
    model = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, load_in_8bit=True)
    with pytest.raises(ValueError, match=r"7 leaves are quantized, .* Save pj.merge\(model\)"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_trained_on_int8_keeps_the_base_and_unloads_to_it(tiny_llama):
    base = pj.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32", load_in_8bit=True)
    model = pj.get_peft_model(base, pj.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert np.abs(model(IDS).logits - base(IDS).logits).max() > 1e-3
    unloaded = model.unload()
    assert jax.tree.structure(unloaded) == jax.tree.structure(base)
    assert all(a is b for a, b in zip(jax.tree.leaves(unloaded), jax.tree.leaves(base), strict=True))
    np.testing.assert_allclose(model.merge_and_unload()(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert {leaf.dtype for leaf in jax.tree.leaves(pj.partition(model)[0])} == {jnp.dtype("float32")}


CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=12,
    num_attention_heads=4,
    num_key_value_heads=4,
)


def gradient_memory(apply):
    """The compiler's temporary bytes for a LoRA gradient of an int8 model, remat off."""
    model = pj.quantize(pj.AutoModelForCausalLM.from_config(CONFIG))
    model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules="all-linear"))
    trainable, frozen = pj.partition(model)

    def loss(trainable, frozen, ids):
        return jnp.mean(apply(pj.combine(trainable, frozen), ids) ** 2)

    program = jax.jit(jax.grad(loss)).lower(trainable, frozen, jnp.ones((1, 8), int)).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures("optimizing_compiler")
def test_no_dequantized_copy_is_kept_for_backward_and_the_check_can_fail():
    model = pj.quantize(pj.AutoModelForCausalLM.from_config(CONFIG))
    dense = sum(leaf.q.size * 4 for leaf in int8_leaves(model.params))
    ours = gradient_memory(lambda model, ids: model(ids).logits)

    def plain(model, ids):
        """The same with the base dequantized in the program, as plain autodiff code does it."""
        dense = jax.tree.map(
            lambda leaf: leaf.dense() if isinstance(leaf, Int8) else leaf,
            model.params,
            is_leaf=lambda node: isinstance(node, Int8),
        )
        return model.replace(dense)(ids).logits

    assert ours < 0.35 * dense, "a dequantized copy is kept"
    assert gradient_memory(plain) > dense, "the check would not see a copy that is kept"


SHAPES = {
    "Llama 2 7B": (LlamaConfig(), "float32"),
    # A vocabulary of 128256 stays in float, so the float leaves have to be bfloat16 for the ratio.
    "Llama 3 8B": (
        LlamaConfig(vocab_size=128256, intermediate_size=14336, num_key_value_heads=8, rope_theta=500000.0),
        "bfloat16",
    ),
}


@pytest.mark.parametrize(("config", "dtype"), SHAPES.values(), ids=SHAPES)
def test_the_base_takes_at_most_0_3_of_its_float32_bytes(config, dtype):
    make = partial(LLAMA.init_params, config, jax.random.key(0), dtype)
    shapes = jax.eval_shape(lambda: pj.quantize(CausalLM(make(), config)))
    full = sum(4 * int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(jax.eval_shape(make)))
    total = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert 0.25 < total / full <= 0.3

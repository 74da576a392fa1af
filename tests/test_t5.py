"""T5 against PyTorch transformers: whole logits tensors, losses and hidden states, in float32, at every position."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from t5_pairs import CASES, SIZES, as_torch, close, pair
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.t5.modeling_t5 import T5Attention as TorchAttention

import peft_jax as pj
from peft_jax.models import T5Config
from peft_jax.models.family import leaf_at
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import prefilled
from peft_jax.models.t5 import model as t5
from peft_jax.models.t5.family import T5
from peft_jax.models.t5.relative_attention import relative_buckets

__all__ = ["pair"]
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(2, SIZES["vocab_size"], (4, 15))
# No padding, left padding, right padding, and a hole.
MASK = np.ones_like(IDS)
MASK[1, :5] = 0
MASK[2, 8:] = 0
MASK[3, 4:6] = 0
DECODER_IDS = RANDOM.integers(2, SIZES["vocab_size"], (4, 13))
DECODER_MASK = np.ones_like(DECODER_IDS)
DECODER_MASK[0, :3] = 0
DECODER_MASK[2, 7:] = 0
LABELS = np.where(DECODER_MASK == 1, DECODER_IDS, -100)
INPUTS = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "decoder_input_ids": DECODER_IDS,
    "decoder_attention_mask": DECODER_MASK,
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def theirs(model, **inputs):
    with torch.no_grad():
        return model(**as_torch(inputs), output_hidden_states=True)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states_at_all_positions(name, pair):
    model, ours = pair(name)
    want, got = theirs(model, **INPUTS), ours(**INPUTS, output_hidden_states=True)
    close(got.logits, want.logits)
    close(got.encoder_last_hidden_state, want.encoder_last_hidden_state)
    for kind, layers in (("encoder", model.config.num_layers), ("decoder", model.config.num_decoder_layers)):
        states, wanted = getattr(got, f"{kind}_hidden_states"), getattr(want, f"{kind}_hidden_states")
        assert len(states) == len(wanted) == layers + 1
        for layer, (one, other) in enumerate(zip(states, wanted, strict=True)):
            close(one, other, factor=2)
            assert layer == 0 or np.abs(one - states[layer - 1]).max() > 0.1


@pytest.mark.parametrize("left_out", ["attention_mask", "decoder_attention_mask"])
def test_without_a_mask_all_is_seen(left_out, pair):
    model, ours = pair("v1.0")
    inputs = {name: array for name, array in INPUTS.items() if name != left_out}
    got = ours(**inputs).logits
    close(got, theirs(model, **inputs).logits)
    assert np.abs(got - ours(**INPUTS).logits).max() > 1e-2, "the mask is dead"


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_loss_of_labels_that_are_shifted_to_the_right(name, pair):
    model, ours = pair(name)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    want, got = theirs(model, **inputs), ours(**inputs)
    close(got.logits, want.logits)
    close(got.loss, want.loss)
    np.testing.assert_array_equal(ours.shifted_right(LABELS), model._shift_right(torch.tensor(LABELS)).numpy())
    want, got = theirs(model, **INPUTS, labels=LABELS), ours(**INPUTS, labels=LABELS)  # the ids given are kept
    close(got.loss, want.loss)


def test_embeddings_and_the_encoders_output_in_place_of_ids(pair):
    model, ours = pair("v1.1")
    want = theirs(model, **INPUTS)
    with torch.no_grad():
        embeds = {name: model.shared(torch.tensor(INPUTS[name])).numpy() for name in ("input_ids", "decoder_input_ids")}
    masks = {name: INPUTS[name] for name in ("attention_mask", "decoder_attention_mask")}
    got = ours(inputs_embeds=embeds["input_ids"], decoder_inputs_embeds=embeds["decoder_input_ids"], **masks)
    close(got.logits, want.logits)
    got = ours(encoder_outputs=want.encoder_last_hidden_state.numpy(), decoder_input_ids=DECODER_IDS, **masks)
    close(got.logits, want.logits)


@pytest.mark.parametrize("name", ["v1.0", "v1.1"])
def test_every_leaf_matters(name, pair):
    """Leaves that do not move the logits could hold anything, and parity would not notice."""
    _, ours = pair(name)
    logits = ours(**INPUTS).logits
    leaves, treedef = jax.tree.flatten(ours.params)
    for index, path in enumerate(T5.param_shapes(ours.config)):
        noise = 0.1 * jax.random.normal(jax.random.key(index), leaves[index].shape)
        changed = ours.replace(
            jax.tree.unflatten(treedef, [*leaves[:index], leaves[index] + noise, *leaves[index + 1 :]])
        )
        assert np.abs(changed(**INPUTS).logits - logits).max() > 1e-3, path


def test_buckets_of_relative_positions():
    positions = jnp.arange(600)
    for buckets, distance in [(32, 128), (8, 12), (16, 64), (10, 20), (64, 512), (6, 9), (4, 128)]:
        config = T5Config(relative_attention_num_buckets=buckets, relative_attention_max_distance=distance)
        relative = torch.arange(600)[None, :] - torch.arange(600)[:, None]
        for causal in (False, True):
            want = TorchAttention._relative_position_bucket(relative, not causal, buckets, distance)
            got = relative_buckets(config, positions, positions, causal=causal)
            np.testing.assert_array_equal(got, want.numpy())


def prefixes(config, length=3):
    """Keys and values of virtual tokens for self- and cross-attention, random and large."""
    shape = (config.num_decoder_layers, 1, length, config.num_attention_heads, config.head_dim)
    keys = jax.random.split(jax.random.key(5), 4)
    arrays = [jax.random.normal(key, shape) for key in keys]
    return (arrays[0], arrays[1]), (arrays[2], arrays[3])


def test_prefixes_stand_before_keys_and_values(pair):
    model, ours = pair("v1.0")
    config, rows = ours.config, len(IDS)
    prefix, cross_prefix = prefixes(config)
    wide = [torch.tensor(np.broadcast_to(a, (a.shape[0], rows, *a.shape[2:]))).transpose(2, 3) for a in prefix]
    own, cross = DynamicCache(), DynamicCache()
    encoded = theirs(model, **INPUTS).encoder_last_hidden_state
    for layer, block in enumerate(model.decoder.block):
        own.update(wide[0][layer], wide[1][layer], layer)
        attention = block.layer[1].EncDecAttention
        heads = [m(encoded).view(rows, -1, config.num_attention_heads, config.head_dim).transpose(1, 2)
                 for m in (attention.k, attention.v)]  # fmt: skip
        front = [torch.tensor(np.asarray(a[layer])).transpose(1, 2).expand(rows, -1, -1, -1) for a in cross_prefix]
        cross.update(*(torch.cat(both, dim=2) for both in zip(front, heads, strict=True)), layer)
    ones = np.ones((rows, 3), MASK.dtype)
    with torch.no_grad():
        h = model.decoder(
            **as_torch({"input_ids": DECODER_IDS, "attention_mask": np.concatenate([ones, DECODER_MASK], axis=1)}),
            encoder_hidden_states=torch.cat([encoded[:, :3], encoded], dim=1),  # for its length; all is in the cache
            encoder_attention_mask=torch.tensor(np.concatenate([ones, MASK], axis=1)),
            past_key_values=EncoderDecoderCache(own, cross),
        )[0]
        want = model.lm_head(h * model.config.d_model**-0.5)
    inputs = {name: jnp.asarray(array) for name, array in INPUTS.items()}
    apply = jax.jit(T5.apply, static_argnums=0)
    got = apply(config, ours.params, ForwardInputs(**inputs, prefix=prefix, cross_prefix=cross_prefix)).logits
    close(got, want)
    for given in ({"prefix": prefix}, {"cross_prefix": cross_prefix}):
        assert np.abs(got - apply(config, ours.params, ForwardInputs(**inputs, **given)).logits).max() > 1e-2


@pytest.mark.parametrize("with_prefixes", [False, True])
def test_a_cache_is_as_good_as_the_whole(with_prefixes, pair):
    _, ours = pair("v1.1")
    config, params = ours.config, ours.params
    given = dict(zip(("prefix", "cross_prefix"), prefixes(config), strict=True)) if with_prefixes else {}
    inputs = {name: jnp.asarray(array) for name, array in INPUTS.items()}
    want = jax.jit(T5.apply, static_argnums=0)(config, params, ForwardInputs(**inputs, **given)).logits
    mask, ids = inputs["attention_mask"], inputs["decoder_input_ids"]
    prefix, virtual = given.pop("prefix", None), 3 if with_prefixes else 0

    def begin(params):
        given_encoder = ForwardInputs(input_ids=inputs["input_ids"], attention_mask=mask)
        encoded = t5.encode(config, params, given_encoder).last_hidden_state
        return t5.init_cache(config, params, encoded, 16 + virtual, attention_mask=mask, **given)

    cache = jax.jit(begin)(params)
    cache = cache if prefix is None else prefilled(cache, prefix)
    step, found = jax.jit(t5.decode, static_argnums=0), []
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 13)]:
        seen = jnp.pad(inputs["decoder_attention_mask"][:, :end], ((0, 0), (virtual, 0)), constant_values=1)
        out = step(config, params, ForwardInputs(input_ids=ids[:, start:end], attention_mask=seen, cache=cache))
        found.append(out.logits)
        cache = out.cache
    alive = DECODER_MASK.cumsum(axis=1) > 0 if not with_prefixes else np.ones_like(DECODER_MASK, bool)
    close(jnp.concatenate(found, axis=1)[alive], want[alive])  # what sees nothing depends on how many slots there are


@pytest.mark.parametrize("name", CASES)
def test_a_saved_checkpoint_reads_back_in_transformers(name, pair, tmp_path):
    model, ours = pair(name)
    ours.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_array_equal(theirs(again, **INPUTS).logits, theirs(model, **INPUTS).logits)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    reread = pj.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert reread.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, reread.params, ours.params)


def test_old_checkpoints_hold_copies_and_a_bias_that_nothing_uses(pair, tmp_path):
    _, ours = pair("v1.0")
    ours.save_pretrained(tmp_path)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors["shared.weight"]
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 4), np.float32)
    del tensors["shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = pj.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    jax.tree.map(np.testing.assert_array_equal, again.params, ours.params)


@pytest.mark.parametrize(("dtype", "wide"), [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_half_precision_is_as_exact_as_in_transformers(dtype, wide, pair, tmp_path):
    """With float16 the last matrix of a feed-forward network stays float32."""
    model, ours = pair("v1.1")
    ours.save_pretrained(tmp_path)
    half = pj.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=dtype)
    dense = half.params["encoder"]["block"]["layer"]["1"]["DenseReluDense"]
    assert dense["wo"]["kernel"].dtype == wide
    assert dense["wi_0"]["kernel"].dtype == half.params["shared"]["embedding"].dtype == dtype
    theirs_half = type(model).from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    exact = theirs(model, **INPUTS).logits.numpy()
    alive = DECODER_MASK.cumsum(axis=1) > 0  # a query that sees nothing sees, in theirs, what half a mask leaves
    error = np.abs(theirs(theirs_half, **INPUTS).logits.float().numpy() - exact)[alive]
    got = half(**INPUTS).logits
    assert got.dtype == dtype
    assert np.abs(np.asarray(got.astype(jnp.float32)) - exact)[alive].max() < 2 * error.max()


def test_int8_blocks_equal_their_dense_twin(pair, tmp_path):
    _, ours = pair("v1.0")
    ours.save_pretrained(tmp_path)
    small = pj.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, load_in_8bit=True)
    kinds = {type(leaf).__name__ for leaf in jax.tree.leaves(small.params, is_leaf=lambda leaf: hasattr(leaf, "q"))}
    assert len(kinds) == 2 and not hasattr(small.params["shared"]["embedding"], "q")
    got, dense = small(**INPUTS).logits, pj.merge(small)(**INPUTS).logits
    close(got, dense)
    assert 1e-3 < np.abs(got - ours(**INPUTS).logits).max() < 0.1 * np.abs(dense).max()


def test_gradients_are_those_of_pytorch(pair):
    """Of all parameters, blocks being computed again in the backward pass."""
    model, ours = pair("v1.1")
    ours = dataclasses.replace(ours, remat=True)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    gradient = jax.jit(jax.grad(lambda params: ours.replace(params)(**inputs).loss))(ours.params)
    model.zero_grad()
    model(**as_torch(inputs)).loss.backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    for row in ours.family.rows(ours.config):
        want = np.stack([wanted[key].T if row.transposed else wanted[key] for key in row.keys])
        got = leaf_at(gradient, row.path)
        close(got, want if row.stacked else want[0])
        assert np.abs(got).max() > 1e-4, row.path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": IDS}, "needs decoder_input_ids or decoder_inputs_embeds, one of them, got neither"),
        ({"decoder_input_ids": IDS}, "needs input_ids or inputs_embeds, one of them, got neither"),
        ({**INPUTS, "attention_mask": MASK[:, :3]}, r"attention_mask must be \(4, 15\).*\(4, 3\)"),
        ({**INPUTS, "decoder_attention_mask": MASK}, r"decoder_attention_mask must be \(4, 13\).*\(4, 15\)"),
        ({**INPUTS, "encoder_outputs": np.ones((4, 15, 24))}, "encoder_outputs stand for the encoder's inputs"),
        ({**INPUTS, "decoder_input_ids": IDS + 50}, "the vocabulary has ids 0 to 49"),
    ],
)
def test_wrong_inputs_are_told(options, message, pair):
    with pytest.raises(ValueError, match=message):
        pair("v1.0")[1](**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward_proj": "gated-xielu"}, "feed_forward_proj='gated-xielu' is not supported"),
        ({"model_type": "umt5"}, "model_type='umt5' is not supported"),
        ({"model_type": "mt5", "scale_decoder_outputs": True}, "scale_decoder_outputs=True is for T5"),
        ({"share_embeddings": False}, "leaves the head no table"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets=2 has to be at least 4"),
    ],
)
def test_configs_that_are_not_supported(options, message):
    with pytest.raises(ValueError, match=message):
        T5Config(**options)


def test_a_checkpoint_of_another_task_is_told_of(pair, tmp_path):
    pair("v1.0")[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A t5 model for CAUSAL_LM is not supported. Supported: SEQ_2_SEQ_LM"):
        pj.AutoModelForCausalLM.from_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**hf, "dense_act_fn": "gelu"}))
    with pytest.raises(ValueError, match="dense_act_fn='gelu'.*Set feed_forward_proj alone"):
        pj.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_random_parameters_are_spread_as_in_transformers():
    config = T5Config(vocab_size=60, hidden_size=48, head_dim=16, intermediate_size=64, num_hidden_layers=2)
    ours = pj.AutoModelForSeq2SeqLM.from_config(config)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**config.to_hf()))
    state = theirs.state_dict()
    rows = ours.family.rows(config)
    assert {key for row in rows for key in row.keys} == set(state) - {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    for row in rows:
        want = np.stack([state[key].numpy() for key in row.keys])
        leaf = leaf_at(ours.params, row.path)
        np.testing.assert_allclose(np.std(leaf), want.std(), rtol=4 * (2 / leaf.size) ** 0.5 + 1e-6, err_msg=row.path)

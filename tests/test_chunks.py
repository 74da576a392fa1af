"""What is done in chunks of positions, against the same done at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.models import LlamaConfig
from peft_jax.models.modules import attention
from peft_jax.models.modules.lazy_logits import LazyLogits
from peft_jax.models.modules.logits_form import LogitsForm
from peft_jax.train import chunked_loss, cross_entropy
from peft_jax.train.mesh import (
    make_mesh,
    parse_mesh,
    place,
    place_batch,
)

ROWS, LENGTH, WIDTH, VOCABULARY = 2, 10, 6, 16
DRAW = np.random.default_rng(0)
LABELS = np.where(DRAW.random((ROWS, LENGTH)) < 0.3, -100, DRAW.integers(0, VOCABULARY, (ROWS, LENGTH)))
LORA = pj.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
WHOLE = pj.LoraConfig(r=2, target_modules=["other"], modules_to_save=["lm_head"])
TOKENS = pj.LoraConfig(r=2, target_modules=["other"], trainable_token_indices=[1, 3])
HEADS: dict[str, tuple[str, bool, Any]] = {
    "frozen": ("lm_head.kernel", False, None),
    "int8": ("lm_head.kernel", True, None),
    "LoRA on int8": ("lm_head.kernel", True, LORA),
    "trained whole": ("lm_head.kernel", False, WHOLE),
    "tied, int8": ("embed_tokens.embedding", True, None),
    "tied, with trained tokens": ("embed_tokens.embedding", False, TOKENS),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three positions, on however many devices there are."""
    monkeypatch.setattr(chunked_loss, "CHUNK", 3 * ROWS * VOCABULARY // jax.device_count())


def head(name: str, dtype: Any = jnp.float32) -> tuple[Any, bool]:
    """A head's leaf, and whether it is tied."""
    path, in_8_bits, config = HEADS[name]
    module, leaf = path.split(".")
    tied = leaf == "embedding"
    shape = (VOCABULARY, WIDTH) if tied else (WIDTH, VOCABULARY)
    weight = jax.random.normal(jax.random.key(1), shape, dtype)
    params: Any = {module: {leaf: weight}, "other": {"kernel": jnp.ones((2, 2))}}
    params = pj.quantize(params, target_modules=[module]) if in_8_bits else params
    params = params if config is None else pj.apply_lora(params, config)
    return params[module][leaf], tied


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_all_logits(name: str) -> None:
    leaf, tied = head(name)
    trainable, frozen = pj.partition(leaf)
    trainable = jax.tree.map(lambda array: array + 0.1, trainable)
    hidden = jax.random.normal(jax.random.key(2), (ROWS, LENGTH, WIDTH))
    weights = jnp.asarray(DRAW.random((ROWS, LENGTH)), jnp.float32)

    def loss(given: Any, lazily: bool) -> jax.Array:
        lazy = LazyLogits(given[1], pj.combine(given[0], frozen), tied)
        return cross_entropy(lazy if lazily else lazy.compute(), jnp.asarray(LABELS), weights)[0] / 5

    found, wanted = (jax.value_and_grad(loss)((trainable, hidden), lazily) for lazily in (True, False))
    np.testing.assert_allclose(loss((trainable, hidden), True), wanted[0], rtol=1e-6)
    assert len(jax.tree.leaves(wanted[1])) == 1 + {"LoRA on int8": 2}.get(name, int("trained" in name))
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        assert np.abs(want).max() > 1e-2


FORMS = {
    "bias": LogitsForm(),
    "cap": LogitsForm(cap=1.5),
    "scale": LogitsForm(scale=0.25),
    "bias, scale and cap": LogitsForm(scale=3.0, cap=2.0),
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", FORMS)
def test_heads_with_a_bias_or_a_form_have_the_loss_of_all_logits(name: str) -> None:
    """The wanted loss is written out here, without `LazyLogits`; the labels are those of the next tokens."""
    form, has_bias = FORMS[name], "bias" in name
    keys = jax.random.split(jax.random.key(4), 3)
    weight = jax.random.normal(keys[0], (WIDTH, VOCABULARY))
    bias = jax.random.normal(keys[1], (VOCABULARY,)) if has_bias else None
    hidden = jax.random.normal(keys[2], (ROWS, LENGTH, WIDTH))

    def lazily(weight: Any, bias: Any, hidden: Any) -> jax.Array:
        return cross_entropy(LazyLogits(hidden, weight, False, bias, form), jnp.asarray(LABELS))[0]

    def written_out(weight: Any, bias: Any, hidden: Any) -> jax.Array:
        logits = hidden @ weight
        if has_bias:
            logits = logits + bias[None, None]
        logits = logits * form.scale
        if form.cap is not None:
            logits = form.cap * jnp.tanh(logits / form.cap)
        chances = jax.nn.log_softmax(logits[:, :-1])
        wanted = jnp.asarray(LABELS)[:, 1:]
        of_labels = jnp.take_along_axis(chances, wanted.clip(0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(wanted >= 0, of_labels, 0))

    arguments = (0, 1, 2) if has_bias else (0, 2)
    found, gradients = jax.value_and_grad(lazily, arguments)(weight, bias, hidden)
    want, wanted = jax.value_and_grad(written_out, arguments)(weight, bias, hidden)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    for got, gradient in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, gradient, rtol=0, atol=1e-5)
        assert np.abs(gradient).max() > 1e-2


@pytest.mark.usefixtures("small")
def test_a_head_with_dropout_sees_all_positions_at_once() -> None:
    config = pj.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, lora_dropout=0.5)
    params = pj.apply_lora({"lm_head": {"kernel": jnp.ones((WIDTH, VOCABULARY))}}, config)
    lazy = LazyLogits(jnp.ones((ROWS, LENGTH, WIDTH)), params["lm_head"]["kernel"], False)
    without = float(cross_entropy(lazy, jnp.asarray(LABELS))[0])
    lazy = pj.with_dropout(lazy, jax.random.key(3))
    found, wanted = (float(cross_entropy(one, jnp.asarray(LABELS))[0]) for one in (lazy, lazy.compute()))
    assert found == pytest.approx(wanted, rel=1e-6) != pytest.approx(without, rel=1e-3)


def test_there_are_never_all_logits_and_the_frozen_head_is_multiplied_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, kernel = jnp.ones((1, 256, 8)), jnp.ones((8, 512))
    labels = jnp.zeros((1, 256), int)

    def program(limit: int) -> Any:
        monkeypatch.setattr(chunked_loss, "CHUNK", limit // jax.device_count())
        loss = jax.grad(lambda hidden, kernel: cross_entropy(LazyLogits(hidden, kernel, False), labels)[0])
        return jax.make_jaxpr(loss)(hidden, kernel), jax.jit(loss).lower(hidden, kernel).compile().memory_analysis()

    logits = 4 * 256 * 512
    jaxpr, memory = program(16 * 512)
    assert str(jaxpr).count("dot_general[") == 2  # forward, and the gradient of its inputs
    assert memory.temp_size_in_bytes < logits / 2
    assert program(256 * 512)[1].temp_size_in_bytes > logits / 2, "the check would not see them"


@pytest.mark.usefixtures("small", "quick_compiler")
def test_a_model_on_eight_devices_has_the_loss_and_gradients_of_all_logits_on_one() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, initializer_range=0.2, **sizes)
    lora = pj.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = pj.get_peft_model(pj.AutoModelForCausalLM.from_config(config), lora)
    ids = np.tile(LABELS.clip(0), (2, 1)).astype(np.int32)

    def gradient(model: Any, ids: Any, lazily: bool) -> Any:
        trainable, frozen = pj.partition(model)

        def loss(trainable: Any, ids: Any) -> jax.Array:
            logits = pj.combine(trainable, frozen)(ids, lazy_logits=lazily).logits
            return cross_entropy(logits, ids)[0] / ids.size

        return jax.jit(jax.value_and_grad(loss))(trainable, ids)

    wanted = gradient(model, ids, False)
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    batch: Any = {"ids": ids}
    found = gradient(place(model, mesh), place_batch(batch, mesh)["ids"], True)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        assert np.abs(want).max() > 1e-3


def test_lazy_logits_have_no_loss_of_their_own() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    model, ids = pj.AutoModelForCausalLM.from_config(config), jnp.array([[1, 2]])
    with pytest.raises(ValueError, match=r"lazy_logits=True leaves the loss to peft_jax.train.cross_entropy"):
        model(ids, labels=ids, lazy_logits=True)


def test_queries_that_take_turns_see_what_they_see_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (
        jax.random.normal(jax.random.key(n), (2, length, heads, 4))
        for n, length, heads in ((0, 7, 6), (1, 9, 2), (2, 9, 2))
    )
    last = jnp.arange(7)[None] + jnp.array([[2], [-3]])  # the second row's first queries see nothing
    mask = jnp.arange(9)[None, None] <= last[:, :, None]

    def gradient(scores: int) -> Any:
        monkeypatch.setattr(attention, "SCORES", scores // jax.device_count())
        loss = lambda q, k, v: jnp.sum(jnp.sin(attention.attend(q, k, v, mask)))  # noqa: E731
        jaxpr = str(jax.make_jaxpr(loss)(q, k, v))
        return ("scan" in jaxpr), jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

    (in_turns, found), (at_once, wanted) = gradient(3 * 2 * 6 * 9 + 8), gradient(2**20)
    assert (in_turns, at_once) == (True, False)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        assert np.abs(want).max() > 0.1

"""Qwen3.5 beside what every decoder is tested for: the delta rule, packed texts, the cache, checkpoints with images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import QWEN3_5
from conformance import close

import peft_jax as pj
from peft_jax import interop
from peft_jax.models.config import CAUSAL_LM
from peft_jax.models.modules.delta_rule import CHUNK, delta_rule, inverse_of_unit_lower
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.qwen3_5.config import Qwen35Config
from peft_jax.models.qwen3_5.model import init_cache
from peft_jax.models.registry import family_of, read_architecture

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
COUNT, LENGTH = 3, 5  # of texts packed into one row


@pytest.fixture(scope="module")
def model() -> tuple[Qwen35Config, Any]:
    config = read_architecture({"model_type": "qwen3_5_text", **QWEN3_5})
    assert isinstance(config, Qwen35Config)
    return config, jax.jit(family_of(config).init_params, static_argnums=0)(config, jax.random.key(0))


def logits(model: tuple[Qwen35Config, Any], ids: Any, **more: Any) -> Any:
    config, params = model
    inputs = ForwardInputs(input_ids=jnp.asarray(ids), **more)
    return jax.jit(family_of(config).apply, static_argnums=0)(config, params, inputs)


def tokens(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of the rule; decays and keys are such that much of the state lasts for longer than a chunk."""
    draw = np.random.default_rng(seed)
    shapes = {"q": (2, length, 2, 16), "k": (2, length, 2, 16), "v": (2, length, 4, 8)}
    made = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made["decay"] = -draw.exponential(0.05, (2, length, 4)).astype(np.float32)
    made["rate"] = draw.uniform(0, 1, (2, length, 4)).astype(np.float32)
    return made


def states(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 4, 16, 8)).astype(np.float32)


@pytest.mark.parametrize("length", [1, 7, 2 * CHUNK + 30])
def test_the_delta_rule_is_transformers(length: int) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

    inputs, state = tokens(length), states()
    names = {"q": "query", "k": "key", "v": "value", "decay": "g", "rate": "beta"}
    wanted = {names[name]: torch.tensor(array) for name, array in inputs.items()}
    options = {"initial_state": torch.tensor(state), "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    out, after = jax.jit(delta_rule)(**inputs, state=jnp.asarray(state))
    for rule in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        want, want_after = rule(**wanted, **options)
        close(out, want.numpy())
        close(after, want_after.numpy())


def test_gradients_in_chunks_are_those_of_tokens_one_by_one() -> None:
    length = CHUNK + 9
    inputs, state = {name: jnp.asarray(array) for name, array in tokens(length).items()}, jnp.asarray(states())

    def whole(inputs: Any) -> jax.Array:
        return jnp.sum(jnp.square(delta_rule(**inputs, state=state)[0]))

    def one_by_one(inputs: Any) -> jax.Array:
        def step(state: jax.Array, own: Any) -> Any:
            out, state = delta_rule(**{name: array[:, None] for name, array in own.items()}, state=state)
            return state, out

        by_token = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), inputs)
        return jnp.sum(jnp.square(jax.lax.scan(step, state, by_token)[1]))

    found, want = jax.jit(jax.grad(whole))(inputs), jax.jit(jax.grad(one_by_one))(inputs)
    jax.tree.map(close, found, want)


def test_a_system_of_like_keys_is_solved_exactly() -> None:
    """Repeated tokens: the powers of this matrix have entries of 10^18, though its inverse has none above 1."""
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK)), -1)
    want = np.linalg.inv(np.eye(CHUNK) + np.asarray(lower, np.float64))
    np.testing.assert_allclose(jax.jit(inverse_of_unit_lower)(lower), want, rtol=0, atol=1e-6)


def test_texts_in_one_row_of_the_rule_are_texts_by_themselves() -> None:
    """Texts that end within a chunk, with one, and after several."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    lengths = (CHUNK, 3, 2 * CHUNK + 5, 9)
    inputs = tokens(sum(lengths))
    text = np.repeat(np.arange(len(lengths)), lengths)
    rows = jnp.asarray(text[None].repeat(2, axis=0))
    out, after = jax.jit(delta_rule)(**inputs, state=jnp.zeros_like(states()), text=rows)
    for number in range(len(lengths)):
        own = [torch.tensor(array[:, text == number]) for array in inputs.values()]
        want, last = torch_recurrent_gated_delta_rule(*own, None, True, use_qk_l2norm_in_kernel=True)
        close(out[:, text == number], want.numpy())
    close(after, last.numpy())


def test_packed_texts_are_texts_by_themselves(model: Any) -> None:
    ids = np.random.default_rng(0).integers(3, 50, (2, COUNT * LENGTH))
    segments = jnp.asarray(np.repeat([3, 1, 2], LENGTH)[None].repeat(2, axis=0))
    packed = logits(model, ids, segment_ids=segments).logits
    own = logits(model, ids.reshape(-1, LENGTH)).logits
    close(packed, own.reshape(packed.shape))
    as_one = logits(model, ids, segment_ids=jnp.zeros_like(segments)).logits
    assert np.abs(packed - as_one)[:, LENGTH:].max() > 0.01


def test_a_text_in_pieces_is_the_whole_text(model: Any) -> None:
    """Pieces of several tokens and of one, the first with padding at the left."""
    ids = np.random.default_rng(0).integers(3, 50, (2, 10))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    mask = jnp.asarray(mask)
    want = logits(model, ids, attention_mask=mask).logits
    cache, found = init_cache(model[0], 2, 10), []
    for start, stop in ((0, 4), (4, 8), (8, 9), (9, 10)):
        out = logits(model, ids[:, start:stop], attention_mask=mask, cache=cache)
        cache = out.cache
        found.append(out.logits)
    close(jnp.concatenate(found, axis=1), want)
    assert cache.max_len == int(cache.index) == 10


def test_the_text_model_of_a_checkpoint_with_images(tmp_path: Any) -> None:
    """It is read as transformers' AutoModelForCausalLM reads it, and its adapters have that model's keys."""
    images = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.AutoConfig.for_model(
        "qwen3_5", text_config=QWEN3_5, vision_config={**images, "num_position_embeddings": 16}
    )
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    ids = np.random.default_rng(0).integers(3, 50, (2, 9))
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(ids), use_cache=False).logits.numpy()
    close(ours(ids).logits, want)
    adapted = pj.get_peft_model(ours, pj.LoraConfig(r=2, target_modules="all-linear", task_type=CAUSAL_LM))
    peft = pytest.importorskip("peft")
    wanted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules="all-linear", task_type=CAUSAL_LM))
    state = peft.get_peft_model_state_dict(wanted)
    assert interop.get_peft_model_state_dict(adapted).keys() == state.keys()


def test_a_prefix_is_refused(model: Any) -> None:
    """PEFT makes such a model, and fails when it is called: layers of linear attention have no keys."""
    config, params = model
    prefix = pj.PrefixTuningConfig(num_virtual_tokens=3, task_type=CAUSAL_LM)
    with pytest.raises(ValueError, match="PREFIX_TUNING is not for qwen3_5_text models"):
        pj.get_peft_model(pj.models.CausalLM(params, config), prefix)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"linear_num_value_heads": 3}, "linear_num_value_heads=3 is not a multiple of linear_num_key_heads=2."),
        ({"num_attention_heads": 3}, "num_attention_heads=3 is not a multiple of num_key_value_heads=2."),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types must name 'full_attention' or"),
        ({"head_dim": 6}, "Rotary embeddings turn pairs of features, got head_dim=6 with partial_rotary_factor=0.5"),
    ],
    ids=["groups", "heads", "kinds", "rope"],
)
def test_a_config_that_fits_no_model_is_refused(options: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_architecture({"model_type": "qwen3_5_text", **QWEN3_5, **options})

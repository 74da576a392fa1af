"""The parts that decoders share, against transformers' own functions: ropes, activations, scores, masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peft_jax.core.activations import ACTIVATIONS
from peft_jax.models.config import CHUNKED, FULL, SLIDING
from peft_jax.models.modules import attention
from peft_jax.models.modules.attention import Scoring, attend
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_views import View, chosen, masks_by_kind, rotations_by_kind
from peft_jax.models.modules.positions import causal_places
from peft_jax.models.modules.rope_parameters import USED, RopeParameters, ropes_by_kind
from peft_jax.models.modules.rotary import attention_factor, inverse_frequencies, rotate, rotation

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64},
    **{"short_factor": list(np.linspace(1, 2, 16)), "long_factor": list(np.linspace(1, 9, 16))},
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-bounds": {**YARN, "beta_fast": 4.0, "beta_slow": 0.25, "truncate": False},
    "yarn-mscale": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn-attention": {**YARN, "attention_factor": 1.3},
    "yarn-no-factor": {**YARN, "factor": None},
    "longrope": LONG,
    "longrope-factor": {**LONG, "factor": 2.0},
    "longrope-attention": {**LONG, "attention_factor": 1.1},
    "proportional": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    "proportional-factor": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 2.0},
    "partial-linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0, "partial_rotary_factor": 0.5},
    "partial-yarn": {**YARN, "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("seen", [None, 40, 300])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers(name: str, seen: int | None) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = ROPES[name]
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 128}
    config = transformers.LlamaConfig(**sizes, rope_parameters=dict(parameters))
    want, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=seen)
    rope = RopeParameters.from_hf(config.rope_parameters)
    got = inverse_frequencies(rope, 32, 128, None if seen is None else jnp.int32(seen))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6 if seen is None else 1e-5, atol=0)
    assert attention_factor(rope, 128) == pytest.approx(factor)
    assert RopeParameters.from_hf(rope.to_hf()) == rope and hash(rope) == hash(RopeParameters.from_hf(rope.to_hf()))


def test_each_kind_of_rope_of_transformers_is_compared() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = {parameters["rope_type"] for parameters in ROPES.values()}
    assert kinds == set(ROPE_INIT_FUNCTIONS) == set(USED) - {"default"}


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rotations_are_transformers(interleaved: bool) -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as of_pairs
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as of_halves

    rope = RopeParameters(rope_theta=100.0, partial_rotary_factor=0.5)
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 9, 3, 4]])
    turn = rotation(rope, 16, jnp.asarray(positions), 64, jnp.float32, interleaved=interleaved)
    got = rotate(jnp.asarray(x), turn, interleaved=interleaved)
    angles = torch.tensor(positions)[..., None] * torch.tensor(inverse_frequencies(rope, 16, 64))
    angles = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat([angles, angles], dim=-1)
    part = torch.tensor(x[..., :8])
    apply = of_pairs if interleaved else of_halves
    want, _ = apply(part, part, angles.cos(), angles.sin(), unsqueeze_dim=2)
    np.testing.assert_allclose(got[..., :8], want.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(got[..., 8:], x[..., 8:])
    assert rotate(x, None) is x


def test_kinds_of_layers_have_ropes_of_their_own() -> None:
    nested = {FULL: dict(ROPES["linear"]), SLIDING: {"rope_type": "default", "rope_theta": 10.0}, CHUNKED: None}
    ropes = ropes_by_kind(nested, nested)
    assert ropes[SLIDING] == RopeParameters(rope_theta=10.0) and ropes[CHUNKED] is None
    assert ropes[FULL].factor == 3.0
    assert ropes_by_kind(ROPES["linear"], [FULL, SLIDING])[SLIDING] == ropes[FULL]
    places = causal_places(1, 4, ForwardInputs())
    turns = rotations_by_kind({**ropes, "same": ropes[FULL]}, 8, places, 64, jnp.float32)
    assert turns[CHUNKED] is None and turns["same"] is turns[FULL]
    views = {kind: View(places.mask, turns[kind]) for kind in ropes}
    kinds = sorted(views)
    for number, kind in enumerate(kinds):
        view = chosen(views, kinds, jnp.int32(number))
        x = jnp.arange(32.0).reshape(1, 4, 1, 8)
        np.testing.assert_array_equal(rotate(x, view.turn), rotate(x, turns[kind]))
    with pytest.raises(ValueError, match="no entry for layers of kind 'full_attention', got \\['sliding"):
        ropes_by_kind({SLIDING: None}, [FULL])
    with pytest.raises(ValueError, match="rope_type='axial' is not supported. Supported: default, linear"):
        RopeParameters.from_hf({"rope_type": "axial"})
    with pytest.raises(ValueError, match=r"rope_parameters \['beta'\] are not supported with rope_type='default'"):
        RopeParameters.from_hf({"rope_type": "default", "beta": 1})
    assert RopeParameters.from_hf({"rope_type": "default", "beta": 1}, also=["beta"]) == RopeParameters()


def test_activations_are_transformers() -> None:
    from transformers.activations import ACT2CLS, ACT2FN

    assert set(ACTIVATIONS) == set(ACT2CLS) - {"prelu", "xielu"}
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, 3.0, -3.0, 6.0]]).astype(np.float32)
    for name, activation in ACTIVATIONS.items():
        want = ACT2FN[name](torch.tensor(x)).numpy()
        np.testing.assert_allclose(activation(jnp.asarray(x)), want, rtol=1e-5, atol=1e-6, err_msg=name)


def eager(q: Any, k: Any, v: Any, mask: Any, scale: float, softcap: float | None, sinks: Any, bias: Any) -> Any:
    """Attention as transformers' eager functions have it."""
    q, k, v = (torch.tensor(np.asarray(part)).transpose(1, 2) for part in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + torch.tensor(np.asarray(bias))
    scores = scores.masked_fill(~torch.tensor(np.asarray(mask))[:, None], torch.finfo(torch.float32).min)
    if sinks is not None:
        column = torch.tensor(np.asarray(sinks)).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return (weights @ v).transpose(1, 2).numpy()


@pytest.mark.parametrize("blocks", ["whole", "blocks", "turns"])
@pytest.mark.parametrize("bias", [None, "by key", "by query"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("scoring", [Scoring(), Scoring(0.7, 2.0)], ids=["plain", "capped"])
def test_scores_are_transformers(
    scoring: Scoring, sinks: bool, bias: str | None, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "blocks":
        monkeypatch.setattr(attention, "LEAST", 2)
    if blocks == "turns":
        monkeypatch.setattr(attention, "SCORES", 2 * 4 * 8 * 2)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 8, heads, 6)), jnp.float32) for heads in (4, 2, 2))
    mask = np.tril(np.ones((2, 8, 8), bool))
    mask[1, :, :2] &= np.eye(8, dtype=bool)[:, :2]
    added = None
    if bias is not None:
        length = 1 if bias == "by key" else 8
        added = jnp.asarray(rng.normal(size=(2, 4, length, 8)), jnp.float32)
    sink = jnp.asarray(rng.normal(size=4), jnp.float32) if sinks else None
    got = attend(q, k, v, jnp.asarray(mask), causal=True, scoring=scoring, sinks=sink, bias=added)
    scale = 6**-0.5 if scoring.scale is None else scoring.scale
    want = eager(q, k, v, mask, scale, scoring.softcap, sink, added)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_plain_attention_costs_nothing_more() -> None:
    q = jnp.ones((1, 4, 2, 8))
    mask = jnp.ones((1, 4, 4), bool)
    program = str(jax.make_jaxpr(lambda q: attend(q, q, q, mask))(q))
    assert "tanh" not in program and program.count(" add ") == 1


def test_masks_are_transformers() -> None:
    from transformers.masking_utils import create_chunked_causal_mask, create_sliding_window_causal_mask

    mask = np.ones((3, 9), int)
    mask[1, :4] = 0
    mask[2, 7:] = 0
    config = transformers.LlamaConfig(num_hidden_layers=1, attn_implementation="eager")
    config.sliding_window, config.attention_chunk_size = 3, 4
    inputs = ForwardInputs(attention_mask=jnp.asarray(mask))
    ours = masks_by_kind(causal_places(3, 9, inputs), inputs, [FULL, SLIDING, CHUNKED], window=3, chunk=4)
    given = {
        "inputs_embeds": torch.zeros(3, 9, 8),
        "attention_mask": torch.tensor(mask),
        "past_key_values": None,
        "position_ids": torch.arange(9)[None],
    }
    for kind, make in ((SLIDING, create_sliding_window_causal_mask), (CHUNKED, create_chunked_causal_mask)):
        want = make(config=config, **given)[:, 0].numpy() == 0
        np.testing.assert_array_equal(ours[kind], want)
        assert not np.array_equal(ours[kind], ours[FULL])

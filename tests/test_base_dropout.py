"""The base's own dropout: its places and rates are transformers', its masks are pure functions of a key.

In the comparisons both sides draw one mask that depends on a tensor's shape and the rate alone, and each field of the
config has a rate of its own, so that a mask in another place, or of another rate, gives other logits.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ARCHITECTURES, Options, auto_class

import peft_jax as pj
from peft_jax import train
from peft_jax.core import dropout as core_dropout
from peft_jax.models import BertConfig, GPT2Config, LlamaConfig, T5Config
from peft_jax.models.handles import base as handles
from peft_jax.models.modules import base_dropout
from peft_jax.models.modules.attention import attend, dropping_of
from peft_jax.models.modules.base_dropout import DropoutRates
from peft_jax.models.opt.config import OPTConfig

RATES = {
    "attention_dropout": 0.35,
    "attention_probs_dropout_prob": 0.35,
    "attn_pdrop": 0.35,
    "classifier_dropout": 0.45,
    "dropout": 0.2,
    "dropout_rate": 0.2,
    "embd_pdrop": 0.25,
    "embedding_dropout": 0.25,
    "hidden_dropout": 0.15,
    "hidden_dropout_prob": 0.15,
    "resid_pdrop": 0.1,
    "residual_dropout": 0.1,
}


class Case(NamedTuple):
    """A model type, its task, and what its config has beside the sizes and rates."""

    kind: str
    task: str = "CAUSAL_LM"
    options: Options = {}  # noqa: RUF012  # never changed
    attention: str = "eager"


CASES = {
    "llama-token": Case("llama", "TOKEN_CLS"),
    "gpt2": Case("gpt2"),
    "bert": Case("bert", "SEQ_CLS"),
    "roberta": Case("roberta", "SEQ_CLS"),
    "t5": Case("t5", "SEQ_2_SEQ_LM"),
    "phi": Case("phi"),
    "gpt_neox-sequential-token": Case("gpt_neox", "TOKEN_CLS", {"use_parallel_residual": False}),
    "opt": Case("opt"),
    "bloom-token": Case("bloom", "TOKEN_CLS", {"classifier_dropout": None}),
    "falcon-sequential": Case("falcon", options={"parallel_attn": False, "alibi": True}, attention="sdpa"),
}
# For ``--grid`` alone: those whose places are of the kinds above.
MORE = {
    "gemma4": Case("gemma4_text", options={"num_kv_shared_layers": 1}),
    "stablelm-parallel": Case("stablelm", options={"use_parallel_residual": True}),
    "llama": Case("llama"),
    "llama-token-default": Case("llama", "TOKEN_CLS", {"classifier_dropout": None}),
    "gemma2": Case("gemma2"),
    "qwen3_5": Case("qwen3_5_text"),
    "gpt2-token": Case("gpt2", "TOKEN_CLS"),
    "bert-token": Case("bert", "TOKEN_CLS", {"classifier_dropout": None}),
    "bert-spans": Case("bert", "QUESTION_ANS"),
    "stablelm": Case("stablelm"),
    "stablelm-token": Case("stablelm", "TOKEN_CLS", {"classifier_dropout": None}),
    "starcoder2": Case("starcoder2"),
    "phi3": Case("phi3"),
    "gpt_neox": Case("gpt_neox"),
    "opt-layerdrop": Case("opt", options={"layerdrop": 1.0}),
    "gptj": Case("gptj"),
    "bloom": Case("bloom"),
    "falcon": Case("falcon"),
    "falcon-new": Case("falcon", options={"new_decoder_architecture": True}),
}
OF_THEIR_KIND = ("mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "granite", "olmo2", "olmo3", "smollm3", "glm")
GRID = {kind: Case(kind) for kind in (*OF_THEIR_KIND, "glm4", "cohere", "cohere2", "ministral", "ministral3")}
GRID["xlm-roberta"] = Case("xlm-roberta", "SEQ_CLS")
GRID["mt5"] = Case("mt5", "SEQ_2_SEQ_LM")
GRID["qwen3-token"] = Case("qwen3", "TOKEN_CLS")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = {**CASES, **MORE, **GRID} if metafunc.config.getoption("--grid") else CASES
        metafunc.parametrize("case", cases.values(), ids=cases.keys())


def fixed_mask(shape: tuple[int, ...], rate: float) -> np.ndarray:
    """A mask that looks random, and is the same for each tensor of as many elements."""
    numbers = np.arange(int(np.prod(shape)), dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    return (numbers / 2**32 >= rate + 1e-6).reshape(shape)


@pytest.fixture
def same_masks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both libraries draw `fixed_mask`."""
    torch = pytest.importorskip("torch")

    def of_theirs(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return x * torch.from_numpy(fixed_mask(tuple(x.shape), p)) / (1 - p) if training and p else x

    def of_ours(key: jax.Array, keep: Any, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(fixed_mask(shape, 1 - float(keep)))

    def attention(q: Any, k: Any, v: Any, attn_mask: Any = None, dropout_p: float = 0.0, **_: Any) -> Any:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + attn_mask
        return of_theirs(torch.softmax(scores, -1), dropout_p) @ v

    monkeypatch.setattr(torch.nn.functional, "dropout", of_theirs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(base_dropout, "kept_elements", of_ours)
    handles._forward.cache_clear()  # programs with random masks
    yield
    handles._forward.cache_clear()


def tiny(case: Case) -> Any:
    """transformers' config of a tiny model that drops everywhere."""
    import transformers

    (row,) = [row for row in ARCHITECTURES.values() if case.kind in row.model_types]
    sizes = {**row.sizes, **row.model_types[case.kind]}
    known = transformers.AutoConfig.for_model(case.kind).to_dict()
    rates = {name: rate for name, rate in RATES.items() if name in known or name == "classifier_dropout"}
    return transformers.AutoConfig.for_model(case.kind, **{**sizes, **rates, **case.options})


@pytest.mark.filterwarnings("ignore")
def test_masks_are_where_transformers_has_them(case: Case, same_masks: Any, tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tiny(case)
    theirs = auto_class(transformers, case.task).from_config(config, attn_implementation=case.attention)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = auto_class(pj, case.task).from_pretrained(tmp_path, dtype="float32")
    assert type(ours.config).from_hf(ours.config.to_hf()) == ours.config
    ids = np.random.default_rng(0).integers(2, 60, (2, 7))
    given: dict[str, Any] = {"input_ids": ids}
    if case.task == "SEQ_2_SEQ_LM":
        given["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        want = theirs.train()(**{name: torch.tensor(array) for name, array in given.items()})
        still = theirs.eval()(**{name: torch.tensor(array) for name, array in given.items()})
    dropping = pj.with_dropout(ours, jax.random.key(0))
    got, eval_got = dropping(**given), ours(**given)
    for name in ("start_logits", "end_logits") if case.task == "QUESTION_ANS" else ("logits",):
        dropped = getattr(want, name).numpy()
        assert np.abs(dropped - getattr(still, name).numpy()).max() > 1e-3, "nothing is dropped"
        np.testing.assert_allclose(getattr(got, name), dropped, rtol=0, atol=1e-5 * max(1, np.abs(dropped).max()))
        np.testing.assert_allclose(getattr(eval_got, name), getattr(still, name).numpy(), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_training_with_dropout_is_that_of_peft(same_masks: Any, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers
    from peft_training import train_in_peft

    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny(Case("gpt2")), attn_implementation="eager")
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    theirs.save_pretrained(tmp_path / "start")
    ids = np.random.default_rng(0).integers(2, 60, (2, 7)).astype(np.int32)
    batches = [{"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}] * 4
    want = train_in_peft(theirs, batches, 1e-2)
    base = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = pj.PeftModel.from_pretrained(dataclasses.replace(base, remat=True), tmp_path / "start", is_trainable=True)
    np.testing.assert_allclose(losses_of(model, batches), want, rtol=0, atol=1e-5)
    without = losses_of(model, batches, base_dropout=False)
    assert np.abs(np.subtract(without, want)).max() > 1e-2


def losses_of(model: Any, batches: list[Any], **options: Any) -> list[float]:
    optimizer = optax.adamw(1e-2, weight_decay=0.01)
    state, frozen = train.start(jax.tree.map(jnp.copy, model), optimizer, seed=0)
    step = train.make_training_step(
        lambda model, ids, mask: model(ids, attention_mask=mask).logits, optimizer, **options
    )
    return [float(found.loss) for _, found in train.train(step, state, frozen, batches, max_steps=len(batches))]


SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDER: dict[str, Any] = {**SIZES, "intermediate_size": 8}
MODELS = {
    "llama": (pj.AutoModelForCausalLM, LlamaConfig(**WIDER, attention_dropout=0.5)),
    "gpt2": (pj.AutoModelForCausalLM, GPT2Config(**SIZES)),
    "opt": (pj.AutoModelForCausalLM, OPTConfig(**SIZES, ffn_dim=8, attention_dropout=0.5, layerdrop=0.5)),
    "bert": (pj.AutoModelForSequenceClassification, BertConfig(**WIDER)),
    "t5": (pj.AutoModelForSeq2SeqLM, T5Config(**WIDER, head_dim=4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_each_layer_and_site_has_a_mask_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config = MODELS[name]
    model, seen = kind.from_config(config), []

    def noted(key: jax.Array, keep: Any, shape: tuple[int, ...]) -> jax.Array:
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).tolist())), jax.random.key_data(key))
        return jnp.ones(shape, bool)

    monkeypatch.setattr(base_dropout, "kept_elements", noted)
    handles._forward.cache_clear()
    ids = jnp.array([[3, 4, 5]])
    given = {"decoder_input_ids": ids} if name == "t5" else {}
    pj.with_dropout(model, jax.random.key(0))(ids, **given)
    jax.effects_barrier()
    handles._forward.cache_clear()
    sites = {"llama": 3, "gpt2": 1 + 3 * 3, "opt": 3 * 4, "bert": 2 + 3 * 3, "t5": 2 + 3 * 4 + 2 + 3 * 6}
    assert len(seen) == len(set(seen)) == sites[name]


@pytest.mark.parametrize("name", MODELS)
def test_masks_are_pure_and_off_outside_of_training(name: str) -> None:
    kind, config = MODELS[name]
    model, ids = kind.from_config(config), jnp.array([[3, 4, 5, 6]])
    given = {"decoder_input_ids": ids} if name == "t5" else {}

    def logits(one: Any) -> np.ndarray:
        return np.asarray(one(ids, **given).logits)

    drawn = [logits(pj.with_dropout(model, jax.random.key(seed))) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0 and np.abs(drawn[0] - logits(model)).max() > 0
    np.testing.assert_array_equal(logits(pj.with_dropout(model, jax.random.key(1), base=False)), logits(model))
    if name != "bert":
        answers = [one.generate(ids, max_new_tokens=3) for one in (model, pj.with_dropout(model, jax.random.key(1)))]
        np.testing.assert_array_equal(*answers)


def test_masks_have_the_rate_that_is_asked_for() -> None:
    q = jnp.ones((4, 200, 2, 4))
    v = jnp.broadcast_to(jnp.eye(200)[None, :, None], (4, 200, 2, 200))
    seen = attend(q, q, v, jnp.ones((1, 200, 200), bool), dropping=dropping_of(jax.random.key(0), 0.25))
    weights = np.asarray(seen) * 200  # each is 0 or 1 / (1 - rate)
    assert abs((weights == 0).mean() - 0.25) < 0.01 and abs(weights.max() - 1 / 0.75) < 1e-5
    x = base_dropout.dropped(jnp.ones((400, 400)), jax.random.key(0), 0.25, base_dropout.Site.HEAD)
    assert abs(float((x == 0).mean()) - 0.25) < 0.01 and float(x.max()) == pytest.approx(1 / 0.75)


def test_queries_in_turns_and_blocks_have_masks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_jax.models.modules import attention

    q = jax.random.normal(jax.random.key(1), (2, 256, 2, 4))
    v = jnp.broadcast_to(jnp.eye(256)[None, :, None], (2, 256, 2, 256))
    mask = jnp.tril(jnp.ones((1, 256, 256), bool))
    for scores, causal in ((2**24, True), (2**18, False)):
        monkeypatch.setattr(attention, "SCORES", scores)
        plain = np.asarray(attend(q, q, v, mask, causal=causal))
        found = np.asarray(attend(q, q, v, mask, causal=causal, dropping=dropping_of(jax.random.key(0), 0.5)))
        kept = (found > 0)[:, -192:, :, :64]  # what all of these may see
        np.testing.assert_allclose(found[found > 0], 2 * plain[found > 0], rtol=1e-5)
        parts = np.split(kept, 3, axis=1)
        assert not (parts[0] == parts[1]).all() and not (parts[1] == parts[2]).all()
        assert abs(kept.mean() - 0.5) < 0.02


def test_a_rate_of_0_costs_nothing() -> None:
    model = pj.AutoModelForCausalLM.from_config(LlamaConfig(**WIDER))
    assert model.config.rates == DropoutRates()
    ids = jnp.array([[3, 4, 5]])

    def program(base: bool) -> str:
        return str(jax.make_jaxpr(lambda key: pj.with_dropout(model, key, base=base)(ids).logits)(jax.random.key(0)))

    assert program(True) == program(False)
    assert "random" not in program(True)


def test_parts_of_a_batch_have_masks_of_their_own_and_steps_too() -> None:
    config = GPT2Config(**{**SIZES, "num_hidden_layers": 1}, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.5)
    model = pj.AutoModelForCausalLM.from_config(config)
    model = pj.get_peft_model(model, pj.LoraConfig(r=1, target_modules=["c_attn"]))
    ids = np.array([[3, 4, 5, 6]] * 2, np.int32)
    batches = [{"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": ids}] * 3

    def losses(size: int | None) -> list[float]:
        optimizer = optax.sgd(0.0)
        state, frozen = train.start(jax.tree.map(jnp.copy, model), optimizer, seed=0)
        step = train.make_training_step(
            lambda model, ids, mask: model(ids, attention_mask=mask).logits, optimizer, micro_batch_size=size
        )
        return [float(one.loss) for _, one in train.train(step, state, frozen, batches, max_steps=3)]

    whole, parts = losses(None), losses(1)
    assert len(set(whole)) == 3, "two steps drew the same masks"
    assert whole != parts
    key = jax.random.fold_in(jax.random.key(0), 0)
    row = {name: array[:1] for name, array in batches[0].items()}
    by_hand = [
        pj.with_dropout(model, jax.random.fold_in(key, part))(row["input_ids"], labels=row["labels"]).loss
        for part in range(2)
    ]
    assert parts[0] == pytest.approx(float(np.mean(by_hand)), abs=1e-6)
    assert by_hand[0] != by_hand[1]


def test_adapters_draw_the_masks_that_they_drew() -> None:
    model = pj.AutoModelForCausalLM.from_config(GPT2Config(**SIZES))
    model = pj.get_peft_model(model, pj.LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.5))
    key = jax.random.key(3)
    both, alone = pj.with_dropout(model, key), pj.with_dropout(model, key, base=False)
    assert both.dropout_key is not None and alone.dropout_key is None
    for one, other in zip(jax.tree.leaves(both.params), jax.tree.leaves(alone.params), strict=True):
        as_data = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (one, other)]
        np.testing.assert_array_equal(*as_data)
    assert core_dropout.has_dropout(alone)

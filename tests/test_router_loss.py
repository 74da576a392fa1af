"""The routers' logits and their load balancing loss, as transformers has them, however a batch is dealt out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ARCHITECTURES
from conformance import close
from torch_mixtures import ROUTERS, ROWS, moved, torch_model

import peft_jax as pj
from peft_jax.cli.shared.forward_pass import apply, apply_lazily
from peft_jax.models.modules.router_load import Routing, router_load
from peft_jax.models.registry import read_architecture
from peft_jax.train import (
    MicroLayout,
    Padded,
    evaluate,
    init_optimizer,
    make_accumulating_step,
    make_evaluation_step,
    make_training_step,
    training_batches,
)
from peft_jax.train.batch_loss import losses_of
from peft_jax.train.data.encode import IGNORE, Example

pytestmark = pytest.mark.filterwarnings("ignore")

LOSSLESS = "deepseek_v3"  # the row of those whose routers have no loss
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.7}
RANDOM = np.random.default_rng(0)
IDS = RANDOM.integers(3, 50, (2, 9))
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3])
LABELS = np.where(MASK.astype(bool) & (RANDOM.random(IDS.shape) < 0.7), IDS, IGNORE)
LORA = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One kind is compared, that with a dense layer among the others; with ``--grid`` all are that have such a loss."""
    if "kind" in metafunc.fixturenames:
        lossy = [kind for kind, row in ROWS.items() if row != LOSSLESS]
        metafunc.parametrize("kind", lossy if metafunc.config.getoption("--grid") else ["qwen3_moe"])


def inputs_of(model: Any) -> dict[str, Any]:
    import torch

    arrays = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    return {name: torch.tensor(array) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("mask", "top_k", "dtype"),
    [(None, 1, "float32"), (MASK, 3, "float32"), (MASK[:, 2:], 3, "float32"), (MASK, 1, "bfloat16")],
    ids=["no padding", "padding", "virtual tokens", "rounded"],
)
def test_the_loss_and_its_gradient_are_transformers(mask: np.ndarray | None, top_k: int, dtype: str) -> None:
    """The slope in float32: PyTorch's is a product of rounded numbers in bfloat16."""
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = jnp.array(RANDOM.normal(size=(4, IDS.size, 5)), dtype)
    theirs = torch.tensor(np.asarray(logits.astype(jnp.float32))).to(getattr(torch, dtype)).requires_grad_()
    whole = None if mask is None else torch.tensor(np.pad(mask, ((0, 0), (9 - mask.shape[1], 0)), constant_values=1))
    want = mixtral.load_balancing_loss_func(tuple(theirs), 5, top_k, whole)
    want.backward()

    def loss(logits: jax.Array) -> jax.Array:
        return router_load(logits, None if mask is None else jnp.array(mask), Routing(True, top_k, 1.0)).loss()

    got, slope = jax.value_and_grad(loss)(logits)
    close(got, want.detach().numpy())
    if dtype == "float32":
        np.testing.assert_allclose(slope, theirs.grad.numpy(), rtol=0, atol=1e-6)
        assert np.abs(slope).max() > 1e-4


def test_logits_loss_and_gradients_of_a_model(kind: str, tmp_path: Path) -> None:
    """As the config says and as the call says; of the bare model the logits."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = torch_model(kind, **ROUTED)
    base.save_pretrained(tmp_path / "base")
    router = f"mlp.{ROUTERS.get(kind, 'gate')}.weight"
    theirs = peft.get_peft_model(base, peft.LoraConfig(**LORA, target_parameters=[router]))
    torch.manual_seed(1)
    moved(theirs, 0.2, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.train().save_pretrained(tmp_path / "adapter")
    inputs = inputs_of(theirs)
    want = theirs(**inputs)
    want.loss.backward()
    plain = theirs(**inputs, output_router_logits=False)
    assert want.aux_loss is not None and plain.aux_loss is None and want.loss > plain.loss + 1
    model = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    model = pj.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    trainable, frozen = pj.partition(model)

    def loss(own: Any, **options: Any) -> Any:
        out = pj.combine(own, frozen)(IDS, MASK, labels=LABELS, **options)
        return out.loss, out

    (total, got), slopes = jax.value_and_grad(loss, has_aux=True)(trainable)
    for one, other in ((total, want.loss), (got.aux_loss, want.aux_loss), (got.logits, want.logits)):
        close(one, other.detach().numpy())
    close(got.router_logits, torch.stack(want.router_logits).detach().numpy())
    found = pj.get_peft_model_state_dict(pj.combine(slopes, frozen))
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            one = found[name.replace(".default", "")]
            np.testing.assert_allclose(one, parameter.grad.numpy(), rtol=0, atol=1e-5 * max(1, np.abs(one).max()))
    without = model(IDS, MASK, labels=LABELS, output_router_logits=False)
    close(without.loss, plain.loss.detach().numpy())
    assert without.router_logits is None and without.aux_loss is None
    with theirs.disable_adapter():
        routers = theirs(**inputs).router_logits
    bare = pj.AutoModel.from_pretrained(tmp_path / "base", dtype="float32")
    close(bare(IDS, MASK).router_logits, torch.stack(routers).detach().numpy())


@pytest.mark.slow
def test_virtual_tokens_are_tokens_of_routers(tmp_path: Path) -> None:
    """Those before the inputs go through routers, and are counted."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    base = torch_model("qwen3_moe", **ROUTED)
    base.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    moved(theirs, 0.5, [parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "adapter")
    want = theirs(**inputs_of(theirs))
    want.loss.backward()
    model = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    model = pj.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    trainable, frozen = pj.partition(model)

    def loss(own: Any) -> Any:
        out = pj.combine(own, frozen)(IDS, MASK, labels=LABELS)
        return out.loss, out

    (total, got), slopes = jax.value_and_grad(loss, has_aux=True)(trainable)
    for one, other in ((total, want.loss), (got.aux_loss, want.aux_loss)):
        close(one, other.detach().numpy())
    close(got.router_logits, torch.stack(want.router_logits).detach().numpy())
    assert got.router_logits.shape[1] == IDS.size + 4 * len(IDS)
    [parameter] = [one for one in theirs.parameters() if one.requires_grad]
    [slope] = jax.tree.leaves(slopes)
    np.testing.assert_allclose(slope, parameter.grad.numpy(), rtol=0, atol=1e-5)


def test_routers_without_a_loss_give_their_logits_alone(tmp_path: Path) -> None:
    """As in transformers; the loss of a training step is that of the labels."""
    torch = pytest.importorskip("torch")
    theirs = torch_model(LOSSLESS, output_router_logits=True)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        want = theirs(**inputs_of(theirs))
    model = pj.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    got = model(IDS, MASK, labels=LABELS)
    close(got.router_logits, torch.stack(want.router_logits).numpy())
    np.testing.assert_allclose(got.loss, want.loss.item(), rtol=1e-5)
    assert got.aux_loss is None and len(got.router_logits) == 2
    batch: Any = {"input_ids": jnp.array(IDS), "attention_mask": jnp.array(MASK), "labels": jnp.array(LABELS)}
    total, own = losses_of(apply_lazily, model, batch, next_token=True)
    np.testing.assert_allclose(total / own.labels, want.loss.item(), rtol=1e-5)
    assert own.load is None


SIZES = {"model_type": "qwen3_moe", **ARCHITECTURES["qwen3_moe"].sizes, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny mixture with a router that is trained, without transformers' model."""
    config = read_architecture({**SIZES, "initializer_range": 0.2, **ROUTED})
    model = pj.AutoModelForCausalLM.from_config(config)
    config = pj.LoraConfig(**LORA, target_parameters=["mlp.gate.weight"], init_lora_weights=False)
    return pj.get_peft_model(model, config)


def examples() -> list[Example]:
    """Eight texts of random lengths, of few or many labels."""
    random, found = np.random.default_rng(3), []
    for number in range(8):
        ids = random.integers(3, 50, random.integers(6, 40)).astype(np.int32)
        labels = np.where(random.random(len(ids)) < 0.2 + 0.1 * number, ids, IGNORE).astype(np.int32)
        labels[0] = IGNORE  # as in all data here: the first token of a text is not to be learned
        found.append(Example(ids, labels))
    return found


def test_micro_batches_and_packing_train_as_one_batch(model: Any, request: pytest.FixtureRequest) -> None:
    """The loss is a product of two means over the whole batch: that of parts is another one.

    With ``--grid`` also the step of batches that are not in micro batches yet.
    """
    data = Padded(examples())
    layout = MicroLayout(2, (64,), packed=True)
    [whole], [dealt] = training_batches(data, 8, seed=0)[:1], training_batches(data, 8, seed=0, layout=layout)[:1]
    optimizer, found = optax.sgd(0.5), {}
    assert len(dealt) > 1 and any(one["segment_ids"].max() > 1 for one in dealt), "several micro batches, and packed"
    runs: dict[str, Any] = {
        "alone": (make_accumulating_step(apply_lazily, optimizer), [whole]),
        "packed": (make_accumulating_step(apply_lazily, optimizer), dealt),
    }
    if request.config.getoption("--grid"):
        runs["whole"] = make_training_step(apply_lazily, optimizer), whole
        runs["scanned"] = make_training_step(apply_lazily, optimizer, micro_batch_size=4), whole
    for name, (step, batch) in runs.items():
        trainable, frozen = pj.partition(jax.tree.map(jnp.copy, model))
        trained, _, metrics = step(trainable, init_optimizer(optimizer, model), frozen, batch, jax.random.key(0))
        found[name] = float(metrics.loss), [np.asarray(leaf) for leaf in jax.tree.leaves(trained)]
    loss, arrays = found["alone"]
    out = model(whole["input_ids"], whole["attention_mask"], labels=whole["labels"])
    np.testing.assert_allclose(loss, out.loss, rtol=1e-5)
    halves, masks = np.split(np.asarray(out.router_logits), 2, axis=1), np.split(whole["attention_mask"], 2)
    parts = [router_load(*half, model.config.routing).loss() for half in zip(halves, masks, strict=True)]
    assert abs(float(np.mean(parts) - out.aux_loss)) > 1e-3, "the loss of parts is that of the whole"
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(pj.partition(model)[0])]
    assert max(np.abs(new - old).max() for new, old in zip(arrays, before, strict=True)) > 1e-2, "nothing is trained"
    for name, (own, others) in found.items():
        np.testing.assert_allclose(own, loss, rtol=1e-5, err_msg=name)
        for one, other in zip(others, arrays, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5, err_msg=name)
    labels_alone = float(out.loss - 0.7 * out.aux_loss)
    np.testing.assert_allclose(evaluate(make_evaluation_step(apply_lazily), model, [whole]), labels_alone, rtol=1e-5)


def test_a_loss_that_would_be_left_out_is_refused(model: Any) -> None:
    batch: Any = {"input_ids": jnp.array(IDS), "attention_mask": jnp.array(MASK), "labels": jnp.array(LABELS)}
    off = dataclasses.replace(model, config=dataclasses.replace(model.config, output_router_logits=False))

    def asking(model: Any, ids: jax.Array, mask: jax.Array) -> Any:
        return model(ids, mask, lazy_logits=True, output_router_logits=True).logits

    for one, called, said in ((model, apply, "lazy_logits=True"), (off, asking, "Set the config's field")):
        trainable, frozen = pj.partition(one)
        step = make_training_step(called, optax.sgd(1.0))
        with pytest.raises(ValueError, match=said):
            step(trainable, init_optimizer(optax.sgd(1.0), one), frozen, batch, jax.random.key(0))
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = read_architecture({"model_type": "llama", "num_attention_heads": 2, **sizes})
    llama = pj.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="output_router_logits is given, which LlamaForCausalLM does not take"):
        llama(IDS, output_router_logits=True)
    with pytest.raises(ValueError, match="output_router_logits=True is not supported where no layer has a router"):
        read_architecture({**SIZES, **ROUTED, "mlp_only_layers": [0]})

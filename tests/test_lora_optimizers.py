"""Optimizers for LoRA's factors, step by step beside ``peft.optimizers``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from conformance import close

import peft_jax as pj
from peft_jax import train

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = np.array([[5, 17, 2, 23, 9], [8, 8, 3, 21, 1]])
SIZES = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.5,
}
RATE = 1e-2
OPTIONS = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["q_proj", "down_proj", "embed_tokens"],
    "rank_pattern": {"down_proj": 2},
    "use_dora": True,
}
Pair = tuple[Callable[[Any], Any], Callable[[Any], optax.GradientTransformation]]
OPTIMIZERS: dict[str, Pair] = {
    "LoRA+": (  # of SGD, as Adam turns roundoff of small gradients into steps
        lambda model: peft.optimizers.create_loraplus_optimizer(
            model, torch.optim.SGD, lr=RATE, loraplus_lr_ratio=4.0, loraplus_lr_embedding=3e-3
        ),
        lambda model: train.lora_plus(optax.sgd, RATE, 4.0, loraplus_lr_embedding=3e-3),
    ),
    "Riemannian": (
        lambda model: peft.optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=RATE, reg=1e-2),
        lambda model: train.riemannian(optax.sgd(RATE), reg=1e-2),
    ),
    "LoRA-FA": (
        lambda model: peft.optimizers.create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=RATE, weight_decay=0.1),
        lambda model: train.lora_fa(model, RATE, weight_decay=0.1),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_pefts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: False)  # which scales in bfloat16
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base.save_pretrained(tmp_path / "base")
    plain = {"target_modules": ["q_proj", "down_proj"], "use_dora": False} if name == "LoRA-FA" else {}
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{**OPTIONS, **plain}))
    with torch.no_grad():
        for path, parameter in theirs.named_parameters():
            if "lora_" in path and "magnitude" not in path:
                parameter.add_(0.3 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    ours = pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ours = pj.PeftModel.from_pretrained(ours, tmp_path / "adapter", is_trainable=True)
    make_theirs, make_ours = OPTIMIZERS[name]
    their_optimizer, optimizer = make_theirs(theirs), make_ours(ours)
    trainable, frozen = pj.partition(ours)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable: Any, state: Any) -> tuple[Any, Any]:
        grads = jax.grad(lambda trained: pj.combine(trained, frozen)(IDS, labels=IDS).loss)(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state

    before = pj.get_peft_model_state_dict(ours)
    for _ in range(3):
        trainable, state = step(trainable, state)
        theirs(torch.tensor(IDS), labels=torch.tensor(IDS)).loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
    got = pj.get_peft_model_state_dict(pj.combine(trainable, frozen))
    wanted = peft.get_peft_model_state_dict(theirs)
    moved = 0.0
    for key, tensor in got.items():
        close(tensor, wanted[key].numpy())
        moved = max(moved, float(np.max(np.abs(tensor - before[key]))))
        if name == "LoRA-FA" and "lora_A" in key:
            np.testing.assert_array_equal(tensor, before[key])
    assert moved > 1e-3


def test_lora_fa_needs_a_lora() -> None:
    with pytest.raises(ValueError, match="is for LoRA, and this tree has none"):
        train.lora_fa({"q": {"kernel": np.ones((2, 2))}}, 1e-3)

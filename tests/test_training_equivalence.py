"""Twenty steps of AdamW in PyTorch PEFT and here, from equal adapters on equal batches: equal losses and adapters."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from cases import METHODS, Adapter
from peft_jax.interop.formats import FIXED_OF_MODEL
from peft_training import train_in_peft
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import train
from peft_jax.cli.shared.forward_pass import apply

STEPS, RATE = 20, 1e-3
ROWS = {
    name: Adapter(method.config, options) for method in METHODS.values() for name, options in method.trained.items()
}
SLOW = ("VeLoRA", "MonteCLoRA")  # test_lora_kinds.py has their values, gradients and penalty in one layer
TARGETS = ["q_proj", "v_proj", "down_proj"]


def batches(tasks: int = 0) -> list[dict[str, np.ndarray]]:
    """Three in turn, so that there is something to learn, with padding and with tokens that are not asked for."""
    named = {"task_ids": np.arange(4, dtype=np.int32) % tasks} if tasks else {}
    found = []
    for n in range(STEPS):
        draw = np.random.default_rng(n % 3)
        ids = draw.integers(2, 60, (4, 10)).astype(np.int32)
        mask = (np.arange(10) < draw.integers(6, 11, (4, 1))).astype(np.int32)
        labels = np.where((mask == 1) & (np.arange(10) >= 2), ids, -100).astype(np.int32)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels, **named})
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=32, initializer_range=0.2, **sizes)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_theirs(base: Path, start: Path, end: Path, tasks: int) -> list[float]:
    """Train an adapter in PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, start, is_trainable=True)
    losses = train_in_peft(model, batches(tasks), RATE)
    model.save_pretrained(end)
    return losses


def train_ours(base: Path, start: Path, end: Path, tasks: int) -> list[float]:
    """Train the same one here."""
    model = pj.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model = pj.PeftModel.from_pretrained(model, start, is_trainable=True)
    optimizer = optax.adamw(RATE, weight_decay=0.01)
    state, frozen = train.start(model, optimizer, seed=0)
    step, losses = train.make_training_step(apply, optimizer), []
    for now, metrics in train.train(step, state, frozen, batches(tasks), max_steps=STEPS):
        losses.append(float(metrics.loss))
        state = now
    train.finished(state.trainable, frozen, state.opt_state).save_pretrained(end)
    return losses


@pytest.mark.filterwarnings("ignore")  # of PEFT's, which a loaded AdaLoRA's ranknum draws
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ROWS]
)
def test_twenty_steps_are_those_of_peft(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ROWS[name].make(pj, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = pj.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    if ROWS[name].method.starts_in_peft:
        import peft
        from transformers import AutoModelForCausalLM

        made = ROWS[name].make(peft, target_modules=TARGETS, task_type="CAUSAL_LM")
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), made).save_pretrained(tmp_path / "fresh")
        model = pj.PeftModel.from_pretrained(model, tmp_path / "fresh", is_trainable=True)
    else:
        model = pj.get_peft_model(model, config)
    trainable, frozen = pj.partition(model)
    leaves, treedef = jax.tree.flatten(trainable)
    draw = np.random.default_rng(1)
    leaves = [leaf + 0.1 * draw.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    pj.combine(jax.tree.unflatten(treedef, leaves), frozen).save_pretrained(tmp_path / "start")

    tasks = getattr(config, "tasks", 0)
    if tasks:
        with_equal_noise(monkeypatch)
    if is_sampled := getattr(config, "monteclora_config", None) is not None:
        with_equal_samples(monkeypatch)
    want = train_theirs(base, tmp_path / "start", tmp_path / "theirs", tasks)
    got = train_ours(base, tmp_path / "start", tmp_path / "ours", tasks)
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("start", "theirs", "ours")]
    configs = [pj.PeftConfig.from_pretrained(tmp_path / folder) for folder in ("theirs", "ours")]
    first, theirs, ours = files
    assert ours.keys() == theirs.keys() == first.keys()
    for key, tensor in theirs.items():
        if is_sampled and key.endswith((".expert_weights", ".gaussian_var_prior")):
            continue  # PEFT's last sample, which nothing reads
        np.testing.assert_allclose(ours[key], tensor, rtol=0, atol=5e-5, err_msg=key)
    frozen = set(getattr(config, "shared_axes", {})) - set(config.carried)  # random matrices, which a file may hold too
    frozen |= {role.rpartition(".")[2] for role in getattr(config, "frozen", ())}
    frozen |= {key.rpartition(".")[2] for key in theirs if key.startswith(FIXED_OF_MODEL)}
    parts = {key: key.removesuffix(".weight").rsplit(".", 1)[-1] for key in theirs if theirs[key].size}
    trained = [key for key, role in parts.items() if role not in frozen and theirs[key].dtype.kind not in "iu"]
    moved = {key: np.abs(theirs[key] - kept(first[key], key, configs[0])).max() for key in trained}
    assert min(moved.values()) > 2e-3, "a tensor has not moved"
    roles = {key.removesuffix(".weight").rsplit(".", 1)[-1] for key in moved}
    for role in roles:
        assert max(size for key, size in moved.items() if role in key) > 1e-2, f"{role} has hardly moved"
    assert configs[0].rank_pattern == configs[1].rank_pattern
    assert bool(configs[0].rank_pattern) == ROWS[name].method.narrows


def with_equal_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of POLY's routers is one number in both libraries: PEFT makes it of a uniform one."""
    import torch

    drawn = 0.7
    noise = np.log(drawn / (1 - drawn))
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.full(tuple(shape), drawn, **options))
    monkeypatch.setattr(jax.random, "logistic", lambda key, shape, dtype: jax.numpy.full(shape, noise, dtype))


def with_equal_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """MonteCLoRA's noise is the same in both libraries, and in every step."""
    import torch
    from peft.tuners.lora.monteclora import BufferedMontecloraSampler

    from peft_jax.methods.lora import monteclora

    def noise(samples: int, n_in: int, rank: int) -> list[np.ndarray]:
        draw = np.random.default_rng(n_in)
        shapes, squares = [(samples, n_in, rank), (samples,)], draw.chisquare(rank, rank)
        return [squares.astype(np.float32), *(draw.normal(size=shape).astype(np.float32) for shape in shapes)]

    def theirs(self: Any) -> dict[str, Any]:
        squares, normal, weights = noise(self.model.num_samples, self.model.in_features, self.model.out_features)
        wishart = torch.tensor(squares).diag() + 0.1  # what is beside its diagonal does not count
        wishart = wishart - 0.1 * torch.eye(len(squares))
        return {"z_mvn": torch.tensor(normal), "z_wishart": wishart, "z_dirichlet": torch.tensor(weights)}

    def ours(key: jax.Array, params: Any, rank: jax.Array) -> monteclora.Noise:
        squares, normal, weights = noise(params[monteclora.CONCENTRATION].shape[0], *params["lora_A"].shape)
        return monteclora.Noise(*map(jax.numpy.asarray, (normal, squares, weights)))

    monkeypatch.setattr(BufferedMontecloraSampler, "get", theirs)
    monkeypatch.setattr(monteclora, "drawn", ours)


def kept(tensor: np.ndarray, key: str, config: Any) -> np.ndarray:
    """A tensor of the start without the ranks that training took away."""
    module, role = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
    pattern = (config.rank_pattern or {}).get(f"{module}.lora_E", slice(None))
    return tensor[:, pattern] if role == "lora_B" else tensor[pattern]

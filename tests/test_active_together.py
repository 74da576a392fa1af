"""Several adapters active on one layer: PEFT's numbers for every pair that it can activate, and an error for others."""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close, tolerance

import peft_jax as pj
from peft_jax import interop

# By the names that pairs go by: the class of the config, and its options.
CONFIGS = {
    "LORA": ("LoraConfig", {"r": 3, "lora_alpha": 5}),
    "DORA": ("LoraConfig", {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "lora_bias": ("LoraConfig", {"r": 3, "lora_alpha": 5, "lora_bias": True}),
    "ADALORA": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 5}),
    "LOHA": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "LOKR": ("LoKrConfig", {"r": 1, "alpha": 2, "decompose_both": True}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "HIRA": ("HiraConfig", {"r": 3}),
    "HRA": ("HRAConfig", {"r": 4}),
    "DELORA": ("DeloraConfig", {"r": 3, "delora_lambda": 2}),
    "VERA": ("VeraConfig", {"r": 5}),
    "PVERA": ("PveraConfig", {"r": 5}),
    "RANDLORA": ("RandLoraConfig", {"r": 3}),
    "PEANUT": ("PeanutConfig", {"r": 3, "depth": 1}),
    "SUPERTUNING": ("SupertuningConfig", {"sparsity": 0.9, "r": 2}),
    "DEFT": ("DeftConfig", {"r": 3, "alpha": 5}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "IA3 of inputs": ("IA3Config", {"feedforward_modules": ["dense"]}),
    "BOFT": ("BOFTConfig", {"boft_block_size": 2}),
    "MISS": ("MissConfig", {"r": 4}),
    "MISS bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "MISS mini": ("MissConfig", {"r": 4, "mini_r": 4, "init_weights": "mini"}),
    "BEFT": ("BeftConfig", {}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [3, 5]}),
    "other tokens": ("TrainableTokensConfig", {"token_indices": [1, 7]}),
    "LN_TUNING": ("LNTuningConfig", {}),
}
MIXED = ("LORA", "DORA", "ADALORA", "LOHA", "LOKR", "OFT")  # what PeftMixedModel takes
NO_PAIR = ("LN_TUNING", "tokens", "other tokens")
TWICE = [(name, name) for name in CONFIGS if name not in NO_PAIR]
BIASED = [("lora_bias", "LORA"), ("LORA", "lora_bias"), ("DORA", "lora_bias"), ("lora_bias", "DORA")]
CONV1D = [(a, b) for a, b in itertools.product(("LORA", "DORA", "ADALORA"), repeat=2)] + [("HIRA", "HIRA")]
EMBEDDING = [(a, b) for a, b in itertools.product(("LORA", "DORA", "OFT"), repeat=2)] + [("HIRA", "HIRA")]
PAIRS = {
    "linear": TWICE + list(itertools.permutations(MIXED, 2)) + BIASED,
    "conv1d": CONV1D + [("VERA", "VERA"), ("IA3", "IA3")],
    "embedding": EMBEDDING + [("tokens", "other tokens"), ("other tokens", "tokens")],
}
ROWS = [(kind, *pair) for kind, pairs in PAIRS.items() for pair in pairs]
# PEFT's forward differs from its merge: rotations in the other order, and a bias that DoRA scales. Ours is the merge.
AS_MERGED = [("linear", "OFT", "OFT"), ("linear", "lora_bias", "DORA")]


def of(library, name):
    cls, options = CONFIGS[name]
    return getattr(library, cls)(target_modules=["dense"], **options)


def run(params, x):
    layer = params["dense"]
    return layer["embedding"][x] if "embedding" in layer else x @ layer["kernel"] + layer["bias"][None]


def torch_layer(torch, kind):
    """A model of one layer, which says that it is no model of transformers."""
    from transformers.pytorch_utils import Conv1D

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layers = {
                "linear": lambda: torch.nn.Linear(12, 8),
                "conv1d": lambda: Conv1D(8, 12),
                "embedding": lambda: torch.nn.Embedding(12, 8),
            }
            self.dense = layers[kind]()

        def forward(self, x):
            return self.dense(x)

    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return model


def tree_of(model, kind):
    weight = model.dense.weight.detach().numpy()
    if kind == "embedding":
        return {"dense": {"embedding": jnp.array(weight)}}
    kernel = weight if kind == "conv1d" else weight.T
    return {"dense": {"kernel": jnp.array(kernel), "bias": jnp.array(model.dense.bias.detach().numpy())}}


def save_of_mixed(peft, model, folder):
    """The files of a mixed model, which PEFT does not write; without the names of layers in layers."""
    from safetensors.torch import save_file

    for name, config in model.peft_config.items():
        os.makedirs(folder / name)
        tensors = peft.get_peft_model_state_dict(model, adapter_name=name)
        tensors = {key.replace(".base_layer.", "."): tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / name / "adapter_model.safetensors")
        config.save_pretrained(folder / name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "first", "second"), ROWS, ids=["-".join(row) for row in ROWS])
def test_two_active_adapters_give_pefts_outputs(kind, first, second, tmp_path, monkeypatch):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    base = torch_layer(torch, kind)
    tree = tree_of(base, kind)
    is_mixed = CONFIGS[first][0] != CONFIGS[second][0]
    theirs = peft.get_peft_model(base, of(peft, first), adapter_name="a", mixed=is_mixed)
    config = of(peft, second)
    config.inference_mode = second == "ADALORA"  # of which PEFT trains one
    theirs.add_adapter("b", config)
    (theirs if is_mixed else theirs.base_model).set_adapter(["a", "b"])
    theirs.eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if {"a", "b"} & set(name.split(".")) and "ranknum" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.arange(12) if kind == "embedding" else torch.randn(5, 12)
        want = theirs(x).numpy()
    if is_mixed:
        save_of_mixed(peft, theirs, tmp_path)
    else:
        theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    if (kind, first, second) in AS_MERGED:
        merged = (theirs if is_mixed else theirs.base_model).merge_and_unload()
        forward, want = want, merged(x).detach().numpy()
        assert np.abs(forward - want).max() > 100 * tolerance(want)
    params = tree
    for name in ("a", "b"):
        params = interop.load_adapter(params, tmp_path / name, adapter_name=name)
    x = jnp.array(x.numpy())
    close(pj.adapt(run)(params, x), want)
    close(run(pj.merge(params), x), want)
    for name in ("a", "b"):
        alone = pj.adapt(run)(pj.set_adapter(params, name), x)
        assert np.abs(alone - want).max() > 100 * tolerance(want), "the other adapter is dead"


def perturbed(params):
    trainable, frozen = pj.partition(params)
    leaves, treedef = jax.tree.flatten(trainable)
    moved = []
    for i, leaf in enumerate(leaves):
        moved.append(leaf + 0.3 * jax.random.normal(jax.random.key(i), leaf.shape))
    return pj.combine(jax.tree.unflatten(treedef, moved), frozen)


@pytest.mark.parametrize("second", ["DORA", "HIRA"])
def test_a_fresh_adapter_changes_nothing_on_an_adapted_layer(second):
    """Also where it looks at the base's weight: it starts from the weight that it will look at."""
    tree = {"dense": {"kernel": jax.random.normal(jax.random.key(1), (12, 8)), "bias": jnp.zeros(8)}}
    one = perturbed(pj.apply_adapter(tree, of(pj, "LORA" if second == "DORA" else second)))
    two = pj.apply_adapter(one, of(pj, second), adapter_name="second")
    x = jax.random.normal(jax.random.key(2), (5, 12))
    close(pj.adapt(run)(two, x), pj.adapt(run)(one, x))


OTHERS = [
    ("LORA", "HIRA"),
    ("HIRA", "LORA"),
    ("IA3", "LORA"),
    ("OFT", "BOFT"),
    ("VERA", "ADALORA"),
    ("MISS", "MISS bat"),
    ("MISS mini", "MISS"),
    ("LN_TUNING", "LN_TUNING"),
    ("tokens", "tokens"),
    ("tokens", "LORA"),
]


@pytest.mark.parametrize(("first", "second"), OTHERS, ids=["-".join(pair) for pair in OTHERS])
def test_other_pairs_take_turns(first, second):
    tree = {"dense": {"kernel": jax.random.normal(jax.random.key(1), (12, 8)), "bias": jnp.zeros(8)}}
    params = pj.apply_adapter(tree, of(pj, first), adapter_name="a")
    params = pj.apply_adapter(params, of(pj, second), adapter_name="b")
    x = jax.random.normal(jax.random.key(2), (5, 12))
    for use in (lambda params: pj.adapt(run)(params, x), pj.merge):
        with pytest.raises(ValueError, match=r"Adapters 'a' .* and 'b' .* are active on one leaf.*pj.set_adapter"):
            use(params)
    for name in ("a", "b"):
        close(pj.adapt(run)(pj.set_adapter(params, name), x), run(pj.merge(pj.set_adapter(params, name)), x))

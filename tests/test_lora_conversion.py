"""Adapters of other methods as LoRA: PEFT's products where it converts, and the same change where it refuses."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import METHODS
from conformance import close
from peft_jax.interop.nearest_lora import nearest_lora

import peft_jax as pj
from peft_jax import interop

SIZES = {"up": (8, 12), "down": (12, 8)}
REFUSED = {"LN_TUNING", "BEFT", "TRAINABLE_TOKENS"}  # they change no matrix
CONVERTED = sorted(name for name in METHODS.keys() - REFUSED if METHODS[name].merges)
RANKS: tuple[float, ...] = (4, 0.8)


def tree(seed: int = 0) -> dict[str, Any]:
    keys = dict(zip(SIZES, jax.random.split(jax.random.key(seed)), strict=True))
    return {name: {"kernel": jax.random.normal(keys[name], shape)} for name, shape in SIZES.items()}


def shaken(params: Any) -> Any:
    """The tree with random numbers added to all that is trained."""
    trainable, frozen = pj.partition(params)
    leaves, structure = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return pj.combine(jax.tree.unflatten(structure, moved), frozen)


def adapted(method: str, **more: Any) -> Any:
    case = METHODS[method]
    options = {**case.needed, **case.tiny, "target_modules": ["up", "down"], **more}
    if method == "BOFT":
        options["boft_n_butterfly_factor"] = 1  # PEFT has no more on a CPU
    return shaken(pj.apply_adapter(tree(), getattr(pj, case.config)(**options)))


def torch_model(params: Any) -> Any:
    torch = pytest.importorskip("torch")
    layers = {name: torch.nn.Linear(*shape, bias=False) for name, shape in sorted(SIZES.items())}
    for name, layer in layers.items():
        layer.weight.data = torch.tensor(np.asarray(params[name]["kernel"]).T.copy())
    return torch.nn.ModuleDict(layers)


def products(tensors: Any) -> dict[str, np.ndarray]:
    modules = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    return {name: np.asarray(tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]) for name in modules}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONVERTED)
def test_every_method_is_converted_to_the_products_of_peft(method: str, tmp_path: Path) -> None:
    params = adapted(method)
    change = jax.tree.map(jnp.subtract, pj.merge(params), tree())
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(change)) > 1e-3
    made = nearest_lora(params, 8, "default")
    jax.tree.map(close, pj.merge(made.params), pj.merge(params))
    assert made.errors.keys() == SIZES.keys()
    assert max(made.errors.values()) < 1e-5

    peft = pytest.importorskip("peft")
    interop.save_adapter(params, tmp_path / "own")
    theirs = peft.PeftModel.from_pretrained(torch_model(tree()), tmp_path / "own")
    if not theirs.base_model.supports_lora_conversion():
        with pytest.raises(TypeError):
            peft.convert_to_lora(theirs, 4)
        return
    for rank in RANKS:
        want_config, want = peft.convert_to_lora(theirs, rank)
        config, got = pj.convert_to_lora(params, rank)
        got_products, want_products = products(got), products(want)
        assert got_products.keys() == want_products.keys()
        for name, product in got_products.items():
            assert got[f"{name}.lora_A.weight"].shape == want[f"{name}.lora_A.weight"].shape
            whole = np.asarray(change[name.removeprefix("base_model.model.")]["kernel"]).T
            values = [*np.linalg.svd(whole, compute_uv=False), 0]
            kept = got[f"{name}.lora_A.weight"].shape[0]
            if values[kept - 1] - values[kept] > 1e-3:  # else there are several nearest ones, as in C3A's pairs
                close(product, want_products[name])
            close(np.std(product - whole), np.std(want_products[name] - whole))
        for field in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
            assert getattr(config, field) == getattr(want_config, field)
        assert set(config.target_modules or ()) == set(want_config.target_modules)


def test_stacks_regexes_and_what_is_trained_whole(tmp_path: Path) -> None:
    """The LoRA's config names its ranks so that the file is read on the same base."""
    base = {"layers": {"up": {"kernel": jax.random.normal(jax.random.key(0), (3, 8, 12))}}, **tree()}
    layout = {r"layers\..*": pj.Layout((0,), (1,), (2,))}
    options = {"r": 2, "init_weights": False}
    for number, targets in enumerate((["up"], r"(layers\.[12]\.)?up")):
        config = pj.LoHaConfig(target_modules=targets, modules_to_save=["down"], **options)
        params = shaken(pj.apply_adapter(base, config, layout=layout))
        for rank in (4, 0.99):
            folder = tmp_path / f"{number}-{rank}"
            errors = pj.save_as_lora(folder, params, rank)
            again = pj.interop.load_adapter(base, folder, layout=layout)
            ranks = np.asarray(again["layers"]["up"]["kernel"].state["rank"])
            close(again["down"]["kernel"].params["modules_to_save"], params["down"]["kernel"].params["modules_to_save"])
            if rank == 4:
                jax.tree.map(close, pj.merge(again), pj.merge(params))
                assert ranks.tolist() == [4 * (number == 0), 4, 4]
            else:
                assert ranks[1:].min() >= 1
                assert 1e-3 < max(errors.values()) <= 0.01**0.5
            assert errors == pj.lora_conversion_errors(params, rank)


def test_peft_reads_what_it_would_not_convert(tmp_path: Path) -> None:
    params = adapted("OFT")
    pj.save_as_lora(tmp_path, params, 8)
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(torch_model(tree()), tmp_path).merge_and_unload()
    for name in SIZES:
        close(getattr(theirs, name).weight.detach().numpy().T, pj.merge(params)[name]["kernel"])


REFUSALS = {
    "a whole number below 1": ({"r": 2}, 0, ValueError, "A LoRA has a rank of at least 1, got 0"),
    "a threshold above 1": ({"r": 2}, 1.5, ValueError, "A rank that is a float is a threshold in (0, 1], got 1.5"),
    "a rank above the matrix's": ({"r": 2}, 9, ValueError, "rank=9 is above 8, the largest of 'up' of shape"),
    "biases": ({"r": 2, "bias": "all"}, 2, ValueError, "trains biases ('all'), which a plain LoRA does not hold"),
    "a start at the base": (
        {"r": 2, "init_lora_weights": "pissa"},
        2,
        ValueError,
        "Save it with path_initial_model_for_weight_conversion",
    ),
}


@pytest.mark.parametrize("row", REFUSALS)
def test_what_is_no_lora_is_refused(row: str) -> None:
    options, rank, kind, message = REFUSALS[row]
    params = pj.apply_lora(tree(), pj.LoraConfig(target_modules=["up"], **options))
    with pytest.raises(kind, match=re.escape(message)):
        pj.convert_to_lora(params, rank)


def test_an_adapter_of_biases_is_no_lora() -> None:
    params = {"up": {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)}}
    for config in (pj.IA3Config(target_modules=["up"], feedforward_modules=[]), pj.BeftConfig(target_modules=["up"])):
        with pytest.raises(TypeError, match="changes 'up.bias', a bias or a vector, which the LoRA of a matrix"):
            pj.convert_to_lora(pj.apply_adapter(params, config), 2)

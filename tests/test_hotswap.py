"""Swapped adapters run in the program that was compiled for the old one; intruders are PEFT's."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close

import peft_jax as pj
from peft_jax import interop

SIZES = {"up": (8, 12), "down": (12, 8)}
X = jax.random.normal(jax.random.key(9), (3, 8))
ROWS: dict[str, dict[str, Any]] = {
    "another scale": {"r": 4, "lora_alpha": 5},
    "a smaller rank": {"r": 2, "lora_alpha": 3},
    "a higher rank": {"r": 6, "lora_alpha": 7},
    "fewer modules": {"r": 3, "lora_alpha": 3, "target_modules": ["down"]},
    "rslora": {"r": 4, "use_rslora": True, "rank_pattern": {"up": 5}, "alpha_pattern": {"down": 9}},
}
IN_PEFT = ROWS.keys() - {"rslora"}  # which it refuses


def tree() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 2)
    return {name: {"kernel": jax.random.normal(key, SIZES[name])} for key, name in zip(keys, SIZES, strict=True)}


def adapted(seed: int, method: Any = pj.LoraConfig, **options: Any) -> Any:
    config = method(**{"target_modules": ["up", "down"], "init_lora_weights": False, **options})
    return pj.apply_adapter(tree(), config, key=jax.random.key(seed))


def forward(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def torch_model() -> Any:
    torch = pytest.importorskip("torch")
    layers = {name: torch.nn.Linear(*shape, bias=False) for name, shape in SIZES.items()}
    for name, layer in layers.items():
        layer.weight.data = torch.tensor(np.asarray(tree()[name]["kernel"]).T.copy())
    return torch.nn.ModuleDict(layers)


@pytest.fixture(scope="module")
def swapping(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """The folder of the first adapter, the model with room for rank 6, and a compiled function that has run on it."""
    folder = tmp_path_factory.mktemp("first")
    interop.save_adapter(adapted(1, r=4), folder)
    model = interop.load_adapter(tree(), folder)
    roomy = pj.prepare_model_for_compiled_hotswap(model, target_rank=6)
    run = jax.jit(pj.adapt(forward))
    close(run(roomy, X), pj.adapt(forward)(model, X))
    return folder, roomy, run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS)
def test_a_swapped_adapter_is_the_loaded_one_without_compiling(row: str, swapping: Any, tmp_path: Path) -> None:
    first, model, run = swapping
    interop.save_adapter(adapted(2, **ROWS[row]), tmp_path / "new")
    new = pj.hotswap_adapter(model, tmp_path / "new", "default")
    compiled = run._cache_size()
    got = run(new, X)
    assert run._cache_size() == compiled == 1
    want = forward(pj.merge(interop.load_adapter(tree(), tmp_path / "new")), X)
    close(got, want)
    assert np.abs(np.asarray(got - run(model, X))).max() > 0.1
    interop.save_adapter(new, tmp_path / "saved")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()
    if row not in IN_PEFT:
        return
    peft = pytest.importorskip("peft")
    from peft.utils.hotswap import hotswap_adapter

    theirs = peft.PeftModel.from_pretrained(torch_model(), first)
    hotswap_adapter(theirs, str(tmp_path / "new"), "default")
    theirs = theirs.merge_and_unload()
    for name in SIZES:
        close(pj.merge(new)[name]["kernel"], getattr(theirs, name).weight.detach().numpy().T)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a rank above the room": ({"r": 7}, "of shape .*7.*, and there is room for .*6.*prepare_model_for_compiled"),
    "DoRA": ({"r": 2, "use_dora": True}, "the new one .*'lora_magnitude_vector'.*, which is another program"),
    "a start at the base": ({"r": 2, "init_lora_weights": "pissa"}, "changes the base itself .*'pissa'"),
    "modules trained whole": ({"r": 2, "target_modules": ["up"], "modules_to_save": ["down"]}, "which is another prog"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_does_not_fit_is_refused(row: str, swapping: Any, tmp_path: Path) -> None:
    options, message = REFUSED[row]
    interop.save_adapter(adapted(2, **options), tmp_path)
    with pytest.raises(ValueError, match=message):
        pj.hotswap_adapter(swapping[1], tmp_path, "default")


def test_more_modules_other_methods_and_no_room(swapping: Any, tmp_path: Path) -> None:
    interop.save_adapter(adapted(1, r=4), tmp_path / "both")
    with pytest.raises(ValueError, match="The new adapter is on .*down.kernel.*, where 'default' is not"):
        pj.hotswap_adapter(adapted(1, r=4, target_modules=["up"]), tmp_path / "both", "default")
    interop.save_adapter(pj.apply_adapter(tree(), pj.HRAConfig(r=2, target_modules=["up"])), tmp_path / "other")
    with pytest.raises(ValueError, match="differ in {'peft_type': \\('LORA', 'HRA'\\)"):
        pj.hotswap_adapter(swapping[1], tmp_path / "other", "default")
    with pytest.raises(ValueError, match="No adapter is named 'b'. Found: \\['default'\\]"):
        pj.hotswap_adapter(swapping[1], tmp_path / "both", "b")
    with pytest.raises(ValueError, match="target_rank=5 is below 6, the rank of adapter 'default' at '"):
        pj.prepare_model_for_compiled_hotswap(swapping[1], target_rank=5)
    with pytest.raises(ValueError, match="The model has no LoRA. Load the first adapter before"):
        pj.prepare_model_for_compiled_hotswap(tree(), target_rank=5)


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "threshold_epsilon": 0.7, "mitigation_lambda": 0.2}], ids=str)
def test_intruders_are_those_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(1, r=3, lora_alpha=20, rank_pattern={"up": 2})
    lines: list[str] = []
    new = pj.reduce_intruder_dimension(model, logging_sink=lines.append, **options)
    assert pj.active_adapters(new) == ["intruder_reduced"]
    jax.tree.map(close, pj.merge(pj.set_adapter(new, "default")), pj.merge(model))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), pj.merge(new), pj.merge(model))
    assert max(jax.tree.leaves(moved)) > 0.1

    peft = pytest.importorskip("peft")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    interop.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_model(), tmp_path)
    printed: list[str] = []
    reduce_intruder_dimension(theirs, logging_sink=printed.append, **options)
    assert sorted(lines) == sorted(line.removeprefix("base_model.model.") for line in printed)
    theirs = theirs.merge_and_unload()
    for name in SIZES:
        close(pj.merge(new)[name]["kernel"], getattr(theirs, name).weight.detach().numpy().T)


def test_intruders_of_an_embedding_and_what_has_none() -> None:
    base = {"embed": {"embedding": jax.random.normal(jax.random.key(0), (10, 6))}}
    config = pj.LoraConfig(r=2, lora_alpha=9, init_lora_weights=False, target_modules=["embed"])
    params = pj.apply_lora(base, config)
    new = pj.reduce_intruder_dimension(params, mitigation_lambda=1, logging_sink=None)
    jax.tree.map(close, pj.merge(new), pj.merge(params))  # all of the intruders is left
    with pytest.raises(ValueError, match="Adapter name 'default' is taken"):
        pj.reduce_intruder_dimension(params, new_adapter_name="default")
    with pytest.raises(ValueError, match="'default' has use_dora, and is no product of two factors alone"):
        pj.reduce_intruder_dimension(adapted(1, r=2, use_dora=True))
    with pytest.raises(ValueError, match="is for a LORA named 'default'. Found: {}"):
        pj.reduce_intruder_dimension(base)

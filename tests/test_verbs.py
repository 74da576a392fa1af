"""PEFT's verbs on a handle: what they give and report is what PEFT's give."""

import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES, METHODS, filled
from conformance import close

import peft_jax as pj

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's
IDS = np.array([[5, 17, 2, 23, 9], [8, 8, 3, 21, 1]])
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.5,
}
MODULES = ARCHITECTURES["llama"].modules


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


def torch_model(base: Path, configs: dict[str, Any]) -> Any:
    """PEFT's model with adapters of random numbers."""
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    for name, config in configs.items():
        if isinstance(model, peft.PeftModel):
            model.add_adapter(name, config)
        else:
            model = peft.get_peft_model(model, config, adapter_name=name)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if any(f".{name}." in f"{path}." for name in configs):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def loaded(base: Path, theirs: Any, folder: Path) -> Any:
    """Our model with the adapters that PEFT saved, the first of them active."""
    theirs.save_pretrained(folder)
    model: Any = pj.AutoModelForCausalLM.from_pretrained(base)
    for name in theirs.peft_config:
        place = folder if name == "default" else folder / name
        if isinstance(model, pj.PeftModel):
            model = model.load_adapter(place, name, is_trainable=True)
        else:
            model = pj.PeftModel.from_pretrained(model, place, adapter_name=name, is_trainable=True)
    return model


def logits(model: Any) -> np.ndarray:
    if isinstance(model, pj.models.CausalLM):
        return np.asarray(model(IDS).logits)
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def uncounted(theirs: Any) -> int:
    """Elements that PEFT counts and that are no parameters here: the number of ranks of each of AdaLoRA's layers."""
    return sum(name.endswith(".ranknum.default") for name, _ in theirs.named_parameters())


def same_status(ours: Any, theirs: Any, *, switched_off: bool = False) -> None:
    """All fields of both kinds of status; a module's type is compared where PEFT's is that of its rule."""
    left_out = {"module_type"} | ({"active_adapters"} if switched_off else set())
    found = {status.name: vars(status) for status in ours.get_layer_status()}
    every = theirs.get_layer_status()
    expected = {status.name: vars(status) for status in every if status.available_adapters}  # PEFT keeps empty ones
    assert found.keys() == expected.keys()
    for name, fields in expected.items():
        for field in fields.keys() - left_out:
            assert found[name][field] == fields[field], (name, field)
    got, wanted = vars(ours.get_model_status()), vars(theirs.get_model_status())
    wanted["total_params"] -= uncounted(theirs)
    wanted["num_adapter_layers"] = len(expected)
    assert got.keys() == wanted.keys()
    for field in wanted.keys() - left_out:
        assert got[field] == wanted[field], field


@pytest.mark.parametrize("method", METHODS)
def test_status_counts_and_names_are_pefts(method: str, base: Path, tmp_path: Path) -> None:
    row = METHODS[method]
    options = filled({**row.needed, **row.common, **next(iter(row.llama.values()))}, MODULES)
    theirs = torch_model(base, {"default": getattr(peft, row.config)(**options)})
    ours = loaded(base, theirs, tmp_path)
    same_status(ours, theirs)
    trained_here, all_here = ours.get_nb_trainable_parameters()
    assert (trained_here, all_here + uncounted(theirs)) == theirs.get_nb_trainable_parameters()
    wanted = theirs.state_dict()
    state = ours.state_dict()
    for key, tensor in state.items():
        np.testing.assert_allclose(tensor, wanted[key].numpy(), atol=1e-6, err_msg=key)

    def own(name: str) -> str:
        """A parameter's name in PEFT's file: PyTorch's iterator calls one that layers share after one of the layers."""
        for count in (2, 3):  # the parameter and the adapter, and a number behind them if there are several
            of_model = "base_model." + ".".join(name.split(".")[-count:])
            if of_model in wanted:
                return of_model
        return name

    trained = {own(name) for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert {name for name, _ in ours.named_parameters(requires_grad=True)} == trained
    assert {own(name) for name, _ in theirs.named_parameters() if ".ranknum" not in name} <= state.keys()


TWO = {
    "default": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 5},
    "b": {"r": 3, "target_modules": ["q_proj", "up_proj", "embed_tokens"], "use_dora": True},
}


@pytest.fixture
def two(base: Path, tmp_path: Path) -> tuple[Any, Any]:
    theirs = torch_model(base, {name: peft.LoraConfig(**options) for name, options in TWO.items()})
    return theirs, loaded(base, theirs, tmp_path)


def test_a_second_adapter_is_not_active_until_it_is_chosen(two: tuple[Any, Any]) -> None:
    theirs, ours = two
    assert ours.active_adapters == theirs.active_adapters == ["default"] and ours.active_adapter == "default"
    same_status(ours, theirs)
    close(logits(ours), logits(theirs))
    theirs.set_adapter("b")
    chosen = ours.set_adapter("b")
    same_status(chosen, theirs)
    close(logits(chosen), logits(theirs))
    assert ours.active_adapters == ["default"]  # the old handle is what it was
    for names in (["default", "b"], ["b", "default"]):
        theirs.base_model.set_adapter(names)
        both = ours.set_adapter(names)
        assert both.active_adapters == names
        same_status(both, theirs)
        close(logits(both), logits(theirs))


def test_names_of_the_parameters_of_two_adapters(two: tuple[Any, Any]) -> None:
    theirs, ours = two
    state, wanted = ours.state_dict(), theirs.state_dict()
    assert state.keys() == wanted.keys()
    for key, tensor in state.items():
        np.testing.assert_allclose(tensor, wanted[key].numpy(), atol=1e-6, err_msg=key)
    counts = {name: array.shape for name, array in ours.named_parameters(requires_grad=True)}
    assert counts == {name: tuple(p.shape) for name, p in theirs.named_parameters() if p.requires_grad}


def test_switched_off_in_a_with_statement(two: tuple[Any, Any], base: Path) -> None:
    theirs, ours = two
    with theirs.disable_adapter(), ours.disable_adapter() as plain:
        same_status(plain, theirs, switched_off=True)
        close(logits(plain), logits(theirs))
        assert plain.active_adapters == []
    close(logits(ours), logits(theirs))


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_result_that_nobody_takes_is_warned_of(two: tuple[Any, Any]) -> None:
    _, ours = two
    config = pj.LoraConfig(target_modules=["q_proj"])

    def without_as() -> None:
        with ours.disable_adapter():
            ours(IDS)

    statements: dict[str, Any] = {
        "set_adapter": lambda: exec("ours.set_adapter('b')", {"ours": ours}),
        "disable_adapter": lambda: exec("ours.disable_adapter()", {"ours": ours}),
        "disable_adapter()": without_as,
        "delete_adapter": lambda: exec("ours.delete_adapter('b')", {"ours": ours}),
        "add_adapter": lambda: exec("ours.add_adapter('c', config)", {"ours": ours, "config": config}),
        "set_requires_grad": lambda: exec("ours.set_requires_grad('b')", {"ours": ours}),
        "merge_and_unload": lambda: exec("ours.merge_and_unload()", {"ours": ours}),
        "unload": lambda: exec("ours.unload()", {"ours": ours}),
        "resize_token_embeddings": lambda: exec("ours.unload().resize_token_embeddings(8)", {"ours": ours}),
        "train": lambda: exec("ours.train(key)", {"ours": ours, "key": jax.random.key(0)}),
    }
    for verb, statement in statements.items():
        with pytest.warns(
            UserWarning, match=rf"^model\.{verb.removesuffix('()')}\(.* gives a new model and changes none"
        ):
            statement()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = ours.set_adapter("b")
        with ours.disable_adapter() as plain:
            assert plain is not taken
        assert ours.set_adapter("b").active_adapters == ["b"]


def test_adapters_are_added_and_deleted(two: tuple[Any, Any]) -> None:
    theirs, ours = two
    theirs.delete_adapter("default")
    with pytest.warns(UserWarning, match="'default' was active and is deleted. Active is 'b' now"):
        left = ours.delete_adapter("default")
    close(logits(left), logits(theirs))
    theirs.set_adapter("b")  # PEFT leaves the layers of the deleted adapter alone with none
    same_status(left, theirs)
    theirs.add_adapter("c", peft.LoraConfig(r=4, target_modules=["k_proj"]))
    theirs.set_adapter("b")  # of which PEFT has frozen what "c" is not on
    more = left.add_adapter("c", pj.LoraConfig(r=4, target_modules=["k_proj"]))
    same_status(more, theirs)
    theirs.add_weighted_adapter(["c"], [0.5], "d")
    theirs.set_adapter("b")
    mixed = more.add_weighted_adapter(["c"], [0.5], "d")
    same_status(mixed, theirs)
    with pytest.raises(ValueError, match="takes a name and a config, got LoraConfig"):
        more.add_adapter(pj.LoraConfig(), "c")
    with pytest.raises(ValueError, match="No adapter is named 'x'"):
        more.set_adapter(["c", "x"])
    with pytest.raises(ValueError, match="each once: got \\['c', 'c'\\]"):
        more.set_adapter(["c", "c"])
    with pytest.raises(ValueError, match="Active are \\['b', 'c'\\], of"):
        _ = more.set_adapter(["b", "c"]).active_adapter


def test_trained_or_frozen(two: tuple[Any, Any]) -> None:
    theirs, ours = two
    for change in (
        lambda model: model.set_requires_grad("default", False),
        lambda model: model.set_adapter("b", inference_mode=True),
        lambda model: model.set_adapter("b", inference_mode=False),
    ):
        ours = change(ours)
        change(theirs)
        same_status(ours, theirs)
        assert len(jax.tree.leaves(pj.partition(ours)[0])) == 0 or ours.get_nb_trainable_parameters()[0] > 0


def test_dropout_is_on_for_a_key_and_off_again(base: Path) -> None:
    model = pj.AutoModelForCausalLM.from_pretrained(base)
    config = pj.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = pj.get_peft_model(model, config)
    training = model.train(jax.random.key(3))
    assert float(jnp.max(jnp.abs(training(IDS).logits - model(IDS).logits))) > 1e-3
    np.testing.assert_array_equal(training(IDS).logits, pj.with_dropout(model, jax.random.key(3))(IDS).logits)
    np.testing.assert_array_equal(training.eval()(IDS).logits, model.eval()(IDS).logits)
    assert jax.tree.structure(training.eval()) == jax.tree.structure(model)
    for wrong in ((), (True,)):
        with pytest.raises(ValueError, match="model.train\\(key\\)"):
            model.train(*wrong)


def test_status_of_what_has_no_adapter_on_layers(base: Path) -> None:
    model = pj.AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="its adapters: none"):
        pj.get_layer_status(model)
    prompted = pj.get_peft_model(model, pj.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="'default'.*prompts are on no layer"):
        prompted.get_model_status()


def test_a_model_prints_no_weights(base: Path) -> None:
    model = pj.get_peft_model(
        pj.AutoModelForCausalLM.from_pretrained(base), pj.LoraConfig(target_modules=["q_proj"]), "mine"
    )
    count = f"{model.num_parameters():,} parameters"
    expected = f"<PeftModelForCausalLM '{base}'; LlamaForCausalLM; {count}; adapter 'mine': LORA, not active>"
    assert repr(model.disable_adapter()) == expected and repr(model) == expected.replace(", not active", "")


def test_each_row_has_its_adapter_by_pefts_spelling(two: tuple[Any, Any]) -> None:
    theirs, ours = two
    rows = ["b", "__base__"]
    assert set(theirs.peft_config) == set(ours.peft_config)
    single = {name: ours.set_adapter("b") if name == "b" else ours.disable_adapter() for name in rows}
    expected = np.stack([logits(single[name])[row] for row, name in enumerate(rows)])
    close(np.asarray(ours(IDS, adapter_names=rows).logits), expected)
    tokens = ours.generate(IDS, adapter_names=rows, max_new_tokens=4)
    for row, name in enumerate(rows):
        alone = single[name].generate(IDS[row : row + 1], max_new_tokens=4)
        np.testing.assert_array_equal(tokens[row, : alone.shape[1]], alone[0])
    with pytest.raises(ValueError, match="No adapters are named \\['x'\\]"):
        ours(IDS, adapter_names=["x", "b"])

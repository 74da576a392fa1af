"""Adapters between PyTorch PEFT and us: the same logits, files and tokens in both directions."""

import dataclasses
import resource
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARCHITECTURES, METHODS, llama_adapters
from conformance import close, only_task, same_files, tolerance
from peft_jax.interop import formats
from peft_jax.interop.extras import tied_copies
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IDS = np.array([[5, 17, 2, 40, 9, 61, 33], [8, 8, 50, 3, 21, 77, 1]])
SIZES = {**ARCHITECTURES["llama"].sizes, "max_position_embeddings": 128, "eos_token_id": None}
ROWS = llama_adapters()
SUFFIXES = {"weight", "bias", "base_layer.bias", formats.TOKEN_SUFFIX} | {
    row.suffix for tables in formats.ROWS.values() for table in tables.values() for row in table
}
SUFFIXES |= {row.role for name in formats.COPIED_IN_LAYERS for row in formats.SHARED[name]}
SUFFIXES |= {f"adamss_{matrix}.{number}" for matrix in "AB" for number in range(4)}  # of the clusters
IN_THE_BASE = ("pissa", "olora")  # starts that take a part out of the base
FAMILIES = ["llama", "qwen2"]  # untied with biases everywhere; tied with biases on q, k and v
# The methods whose rows meet ties and biases on both; the others see nothing of either family's own.
VARIANTS = ("KaSA", "BD-LoRA", "VeLoRA", "MonteCLoRA")  # of LoRA, to which ties and biases are as to LoRA
ON_BOTH = [row for method in METHODS.values() if method.meets_ties for row in method.llama if row not in VARIANTS]
PAIRS = [
    (family, row)
    for family in FAMILIES
    for row in ROWS
    if family == "llama" or row in ON_BOTH
    # PEFT's forward fails where both are tied, and where there are more layers than Qwen2's config has kinds of.
    if (family, row) not in [("qwen2", "trainable tokens of both"), ("qwen2", "layer_replication")]
]
rows_of_families = pytest.mark.parametrize(("family", "row"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
# What is written on ties is compared byte by byte with PEFT's files already, so that PEFT reads it in slow tests alone.
rows_to_read = pytest.mark.parametrize(
    ("family", "row"),
    [pytest.param(*pair, id="-".join(pair), marks=[pytest.mark.slow] * (pair[0] == "qwen2")) for pair in PAIRS],
)
families = pytest.mark.parametrize("family", FAMILIES)
pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights and saved embeddings


@pytest.fixture(autouse=True)
def no_cuda_extension(monkeypatch):
    """BOFT in PEFT would try to compile one for every layer."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folders = {}
    for name, model, config in [
        ("llama", LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
        ("qwen2", Qwen2ForCausalLM, Qwen2Config(**SIZES, tie_word_embeddings=True)),
    ]:
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp(name)
        model = model(config)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias") or "norm" in path:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folders[name])
    return folders


def described(family, row):
    return ROWS[row].config, family, row


def torch_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def config_of(library, row):
    """The config of a row, as PEFT's class or ours."""
    return ROWS[row].make(library, task_type="CAUSAL_LM")


def torch_adapter(folder, row, save_to):
    """A PEFT model with random weights in every trained tensor, saved."""
    torch.manual_seed(2)
    config = config_of(peft, row)
    model = peft.get_peft_model(torch_base(folder), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    if pattern := ROWS[row].method.narrows and config.rank_pattern:
        model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)
    model.save_pretrained(save_to)
    return model


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS), **only_task(model, len(IDS))).logits.numpy()


def load(folder):
    return pj.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


@rows_of_families
def test_pefts_adapter_gives_the_same_logits_file_and_merge(family, row, bases, tmp_path):
    theirs = torch_adapter(bases[family], row, tmp_path / "theirs")
    want = torch_logits(theirs)
    base = load(bases[family])
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    close(model(IDS).logits, want)
    assert np.abs(want - base(IDS).logits).max() > 100 * tolerance(want), "the adapter is dead"
    if (family, row) == ("qwen2", "lora_bias") or row == "aLoRA":  # o_proj has no bias to merge into; PEFT refuses too
        with pytest.raises(ValueError, match="has none to merge it into|adds to some tokens of a sequence only"):
            model.merge_and_unload()
    elif not ROWS[row].method.merges:
        with pytest.raises(ValueError, match="no one matrix"):
            model.merge_and_unload()
    else:
        close(model.merge_and_unload()(IDS).logits, want)
    changes_base = ROWS[row].options.get("init_lora_weights") in IN_THE_BASE or row in ("layer_replication", "KaSA")
    if not changes_base:
        close(model.unload()(IDS).logits, base(IDS).logits)
    # Ours saved again is PEFT's file in every key and byte.
    model.save_pretrained(tmp_path / "ours")
    file = same_files(tmp_path / "ours", tmp_path / "theirs")
    assert_no_module_is_dead(base, model.peft_config["default"], file, want)


def assert_no_module_is_dead(base, config, tensors, want, inputs={"input_ids": IDS}):  # noqa: B006
    """Zeroing the adapter of any one module moves the logits by 100 times the tolerance."""
    own = interop.get_peft_model_state_dict
    fresh = own(interop.set_peft_model_state_dict(base, config, tensors))
    start = own(pj.get_peft_model(base, dataclasses.replace(config, inference_mode=False)))
    fresh = {key: array for key, array in fresh.items() if key not in tied_copies(base, config, fresh)}
    modules = {
        module_of(key) for key in fresh if key.startswith(formats.PREFIX) and not key.endswith("base_layer.weight")
    }
    for module in modules:
        # A fresh adapter changes nothing, and a fresh copy of a bias or saved module is the base's.
        own = [key for key in fresh if key.startswith(module) and not key.endswith("base_layer.weight")]
        own = [key for key in own if key.removesuffix(".weight").rpartition(".")[2] not in config.carried]
        own_start = {key: start[key] for key in own}
        if {key.rpartition(".")[2] for key in own_start} <= set(getattr(config, "frozen", ())):
            own_start = {key: np.zeros_like(array) for key, array in own_start.items()}
        without = {**fresh, **own_start}
        changed = pj.PeftModel.of(interop.set_peft_model_state_dict(base, config, without))(**inputs).logits
        assert np.abs(changed - want).max() > 100 * tolerance(want), f"{module} is dead"


def module_of(key):
    return next(key.removesuffix(f".{end}") for end in sorted(SUFFIXES, key=len)[::-1] if key.endswith(f".{end}"))


@rows_to_read
def test_our_adapter_gives_the_same_logits_in_peft(family, row, bases, tmp_path):
    if ROWS[row].method.starts_in_peft:
        torch_adapter(bases[family], row, tmp_path / "start")
        model = pj.PeftModel.from_pretrained(load(bases[family]), tmp_path / "start", is_trainable=True)
    else:
        model = pj.get_peft_model(load(bases[family]), config_of(pj, row))
    trainable, frozen = pj.partition(model)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    model = clean(load(bases[family]), pj.combine(jax.tree.unflatten(treedef, leaves), frozen))
    model.save_pretrained(tmp_path)
    want = np.asarray(model(IDS).logits)
    theirs = peft.get_peft_model(torch_base(bases[family]), peft.PeftConfig.from_pretrained(tmp_path))
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(theirs, load_peft_weights(tmp_path))
    assert result.unexpected_keys == []
    saved = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert peft.get_peft_model_state_dict(theirs).keys() == saved, "a key is missing"
    close(torch_logits(theirs.eval()), want)
    assert np.abs(want - model.unload()(IDS).logits).max() > 100 * tolerance(want)
    loaded = peft.PeftModel.from_pretrained(torch_base(bases[family]), tmp_path)
    close(torch_logits(loaded.eval()), want)


def clean(base, model):
    """The model as its file says it: padding, which the perturbation touched too, is zero again."""
    config = model.peft_config["default"]
    tensors = interop.get_peft_model_state_dict(model)
    return pj.PeftModel.of(interop.set_peft_model_state_dict(base, config, tensors))


@families
def test_greedy_generation_gives_the_same_tokens(family, bases, tmp_path):
    theirs = torch_adapter(bases[family], "plain", tmp_path)
    ids = torch.tensor(IDS[:1])
    with torch.no_grad():
        want = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    base = load(bases[family])
    model = pj.PeftModel.from_pretrained(base, tmp_path)
    got = model.generate(IDS[:1], max_new_tokens=24)
    np.testing.assert_array_equal(got, want.numpy())
    new = np.asarray(got)[0, IDS.shape[1] :]
    assert len(set(new.tolist())) >= 10
    assert not np.array_equal(new, np.asarray(base.generate(IDS[:1], max_new_tokens=24))[0, IDS.shape[1] :])


def test_stored_element_types_come_back(bases, tmp_path):
    from safetensors.numpy import save_file

    torch_adapter(bases["llama"], "plain", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: array.astype(jnp.bfloat16) for key, array in load_file(file).items()}
    save_file(tensors, file)
    model = pj.PeftModel.from_pretrained(load(bases["llama"]), tmp_path)
    assert {
        leaf.dtype
        for leaf in jax.tree.leaves(
            pj.partition(pj.PeftModel.from_pretrained(load(bases["llama"]), tmp_path, is_trainable=True))[0]
        )
    } == {jnp.dtype("float32")}
    again = interop.get_peft_model_state_dict(model)
    assert {key: array.tobytes() for key, array in again.items()} == {
        key: array.tobytes() for key, array in tensors.items()
    }


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("row", "size"), [("rslora", 0.1), ("ADALORA", 0.3), ("BOFT by number", 0.1)])
def test_an_adapters_element_type_is_pefts_on_a_bfloat16_base(row, size, autocast, bases, tmp_path):
    from transformers import AutoModelForCausalLM

    config = config_of(peft, row)
    config.bias, config.modules_to_save = "none", None
    base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.bfloat16).eval()
    theirs = peft.get_peft_model(base, config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
        want = theirs(torch.tensor(IDS)).logits.float().numpy()
    theirs.save_pretrained(tmp_path)
    kinds = {key: tensor.dtype for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert set(map(str, kinds.values())) == {"float32" if autocast else "bfloat16"}
    base = pj.AutoModelForCausalLM.from_pretrained(bases["llama"], dtype="bfloat16")
    model = pj.PeftModel.from_pretrained(base, tmp_path, is_trainable=True, autocast_adapter_dtype=autocast)
    fresh = pj.get_peft_model(base, model.peft_config["default"], autocast_adapter_dtype=autocast)
    for ours in (model, fresh):
        assert {key: tensor.dtype for key, tensor in pj.get_peft_model_state_dict(ours).items()} == kinds
        assert {leaf.dtype for leaf in jax.tree.leaves(pj.partition(ours)[0])} == set(kinds.values())
    got, alone = (np.asarray(m(IDS).logits, np.float32) for m in (model, base))
    # Bfloat16 has 8 binary digits, and sums in another order lose some of them: a fraction of what the adapter does.
    assert np.linalg.norm(got - want) < 0.2 * np.linalg.norm(want - alone)
    assert np.linalg.norm(want - alone) > 0.1 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(next(iter(t))), "is missing"),
        (lambda t: t.update({"base_model.model.no.such.lora_A.weight": np.ones((4, 4), np.float32)}), "is left over"),
        (lambda t: t.update({key: np.ones((4, 9), np.float32) for key in list(t)[:1]}), r"has shape \(4, 9\), not"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_files_that_do_not_fit_are_listed_and_nothing_is_loaded(edit, message, bases, tmp_path):
    from safetensors.numpy import save_file

    torch_adapter(bases["llama"], "plain", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"does not fit this base: .*{message}.*Load it on the base"):
        pj.PeftModel.from_pretrained(load(bases["llama"]), tmp_path)


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("adapter", ["plain", "embedding"])
@families
def test_base_embeddings_are_saved_where_peft_saves_them(family, adapter, save, bases, tmp_path):
    theirs = torch_adapter(bases[family], adapter, tmp_path / "auto")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=save)
    base = load(bases[family])
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=save)
    ours, file, auto = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs", "auto"))
    assert ours.keys() == file.keys()
    assert (file.keys() == auto.keys()) == (save == (adapter == "embedding"))
    for key in file:
        assert ours[key].tobytes() == file[key].tobytes(), key
    close(model(IDS).logits, torch_logits(theirs))
    own = interop.get_peft_model_state_dict(pj.PeftModel.from_pretrained(base, tmp_path / "auto"))
    assert own.keys() == auto.keys()
    if save and adapter == "plain":
        with pytest.raises(ValueError, match="of shape .* differs from this base's of shape"):
            pj.PeftModel.from_pretrained(load(bases[{"llama": "qwen2", "qwen2": "llama"}[family]]), tmp_path / "theirs")


def test_an_adapter_for_another_base_is_refused(bases, tmp_path):
    torch_adapter(bases["qwen2"], "embedding", tmp_path)
    with pytest.raises(ValueError, match="base_layer.weight differs from this base's"):
        pj.PeftModel.from_pretrained(load(bases["llama"]), tmp_path)


def test_damaged_and_absent_files_are_errors(bases, tmp_path):
    base = load(bases["llama"])
    with pytest.raises(FileNotFoundError, match="No adapter_config.json"):
        pj.PeftModel.from_pretrained(base, tmp_path)
    torch_adapter(bases["llama"], "plain", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged or cut off"):
        pj.PeftModel.from_pretrained(base, tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="safe_serialization=True"):
        pj.PeftModel.from_pretrained(base, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        pj.PeftModel.from_pretrained(base, tmp_path)


def test_saving_leaves_nothing_half_written(bases, tmp_path):
    model = pj.get_peft_model(load(bases["llama"]), pj.LoraConfig(target_modules=["q_proj"]))

    model.save_pretrained(tmp_path / "whole")  # compiles what it needs while files may be of any size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        with pytest.raises(OSError, match="adapter_model.safetensors cannot be written: .*File too large"):
            model.save_pretrained(tmp_path / "half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "whole").iterdir()) and not list((tmp_path / "half").iterdir())
    warnings.resetwarnings()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices of 'embed' hits none of .*embed_tokens"),
        ({"trainable_token_indices": [1, 96]}, r"Tokens \[96\].*ids 0 to 95"),
        ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "and the module in modules_to_save"),
        ({"trainable_token_indices": [1], "target_modules": ["embed_tokens"]}, "and the module in target_modules too"),
        (
            {"trainable_token_indices": [1], "target_modules": ["lm_head"]},
            "are trained in 'lm_head' too, which is tied",
        ),
        (
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}, "ensure_weight_tying": True},
            "names other tokens of 'lm_head' than of 'model.embed_tokens'",
        ),
    ],
)
def test_tokens_that_cannot_be_trained_are_named(options, message, bases):
    with pytest.raises(ValueError, match=message):
        pj.get_peft_model(load(bases["qwen2"]), pj.LoraConfig(**{"target_modules": ["q_proj"], **options}))

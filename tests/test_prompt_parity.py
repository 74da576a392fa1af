"""Prompt methods between PyTorch PEFT and us: the same logits, losses, files, tokens and training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ARCHITECTURES, PROMPTS, llama_prompts
from conformance import close, same_files, tolerance
from safetensors.numpy import load_file

import peft_jax as pj
from peft_jax import interop
from peft_jax.core.adapted_tree import map_adapted
from peft_jax.prompts.base import PromptMethod
from peft_jax.prompts.cartridge import FROZEN
from peft_jax.train import make_training_step

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

IDS = np.array([[0, 0, 5, 17, 2, 40], [8, 8, 50, 3, 21, 77]])
LEFT = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # padding on the left, and on the right
RIGHT = LEFT[:, ::-1].copy()
SIZES = {**ARCHITECTURES["llama"].sizes, "bos_token_id": 0, "eos_token_id": None}
ROWS = llama_prompts()
PAIRS = [("llama", row) for row in ROWS]
PAIRS += [(family, row) for prompt in PROMPTS.values() for family, row in prompt.others.items()]
pairs = pytest.mark.parametrize(("family", "row"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    folders = {}
    for name, options in [  # untied with biases; with a sliding window; tied
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"tie_word_embeddings": True}),
    ]:
        torch.manual_seed(1)
        folders[name] = tmp_path_factory.mktemp(name)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES, **options))
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if path.endswith("bias") or "norm" in path:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folders[name])
    return folders


def torch_base(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load(folder):
    return pj.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def described(family, row):
    return ROWS[row].config, family, row


def config_of(library, row):
    """The config of a row, as PEFT's class or ours."""
    return ROWS[row].make(library, task_type="CAUSAL_LM")


def torch_prompt(folder, row):
    """A PEFT model with random weights in every trained tensor."""
    torch.manual_seed(2)
    model = peft.get_peft_model(torch_base(folder), config_of(peft, row)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tasks(row):
    has_tasks = row in [prompt.row for prompt in PROMPTS.values() if prompt.has_tasks]
    return {"task_ids": np.array([2, 0])} if has_tasks else {}


def torch_call(model, row, mask=None, labels=None):
    given = {"input_ids": IDS, "attention_mask": mask, "labels": labels, **tasks(row)}
    with torch.no_grad():
        return model(**{name: torch.tensor(array) for name, array in given.items() if array is not None})


def same_calls(ours, theirs, row):
    """Logits of all positions, virtual tokens' among them, with padding on either side, and the loss."""
    for mask in (LEFT, RIGHT):
        labels = np.where(mask, IDS, -100)
        want, got = torch_call(theirs, row, mask, labels), ours(IDS, mask, labels=labels, **tasks(row))
        close(got.logits, want.logits.numpy())
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)


@pairs
def test_pefts_prompt_gives_the_same_logits_losses_and_file(family, row, bases, tmp_path):
    theirs = torch_prompt(bases[family], row)
    theirs.save_pretrained(tmp_path / "theirs")
    base = load(bases[family])
    model = pj.PeftModel.from_pretrained(base, tmp_path / "theirs")
    close(model(IDS, **tasks(row)).logits, torch_call(theirs, row).logits.numpy())
    same_calls(model, theirs, row)
    same_calls(model, peft.PeftModel.from_pretrained(torch_base(bases[family]), tmp_path / "theirs").eval(), row)
    model.save_pretrained(tmp_path / "ours")
    ours, file = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == file
    ours, file = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == file.keys()
    for key in file:
        assert ours[key].dtype == file[key].dtype and ours[key].tobytes() == file[key].tobytes(), key
    assert_no_part_is_dead(base, model, file, row)


def assert_no_part_is_dead(base, model, tensors, row):
    """Zeroing any tensor, any virtual token, and any layer's keys or values moves the logits."""
    want = np.asarray(model(IDS, **tasks(row)).logits)[:, -IDS.shape[1] :]
    config = model.peft_config["default"]
    parts = [(key, np.s_[...]) for key in tensors]
    if "prompt_embeddings" in tensors:
        tokens, width = tensors["prompt_embeddings"].shape
        parts += [("prompt_embeddings", np.s_[token]) for token in range(tokens)]
        if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
            size = width // (2 * config.num_layers)
            parts += [("prompt_embeddings", np.s_[:, at : at + size]) for at in range(0, width, size)]
    unread = [config.tensor_key(role) for role in unread_roles(model)]
    for key, part in [one for one in parts if one[0] not in unread]:
        without = {name: array.copy() for name, array in tensors.items()}
        without[key][part] = 0
        changed = interop.set_peft_model_state_dict(base, config, without)(IDS, **tasks(row)).logits
        assert np.abs(changed[:, -IDS.shape[1] :] - want).max() > 100 * tolerance(want), f"{key} {part} is dead"


@pairs
def test_our_prompt_gives_the_same_logits_in_peft(family, row, bases, tmp_path):
    base = load(bases[family])
    model = perturbed(pj.get_peft_model(base, config_of(pj, row)))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(torch_base(bases[family]), tmp_path).eval()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    known = peft.get_peft_model_state_dict(theirs)
    assert {key: array.shape for key, array in saved.items()} == {key: tuple(t.shape) for key, t in known.items()}
    same_calls(model, theirs, row)
    want = np.asarray(model(IDS, **tasks(row)).logits)[:, -IDS.shape[1] :]
    assert np.abs(want - base(IDS).logits).max() > 100 * tolerance(want), "the prompt is dead"


def perturbed(model):
    trainable, frozen = pj.partition(model)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    leaves = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return pj.combine(jax.tree.unflatten(treedef, leaves), frozen)


GENERATED = [("llama", prompt.row) for prompt in PROMPTS.values() if prompt.generates]
GENERATED += [("mistral", "prefix"), ("qwen2", "p-tuning")]


@pytest.mark.parametrize(("family", "row"), GENERATED, ids=["-".join(pair) for pair in GENERATED])
def test_greedy_generation_gives_the_same_tokens(family, row, bases, tmp_path):
    theirs = torch_prompt(bases[family], row)
    theirs.save_pretrained(tmp_path)
    given = {"input_ids": IDS, "attention_mask": LEFT, **tasks(row)}
    given = {name: torch.tensor(array) for name, array in given.items()}
    want = theirs.generate(**given, max_new_tokens=16, do_sample=False, pad_token_id=0).numpy()
    base = load(bases[family])
    model = pj.PeftModel.from_pretrained(base, tmp_path)
    got = model.generate(IDS, LEFT, max_new_tokens=16, pad_token_id=0, **tasks(row))
    np.testing.assert_array_equal(got, want)
    new = np.asarray(got)[:, IDS.shape[1] :]
    assert len(set(new.flat)) >= 6
    assert (new != np.asarray(base.generate(IDS, LEFT, max_new_tokens=16, pad_token_id=0))[:, IDS.shape[1] :]).any()


def torch_arrays(model):
    """The trained arrays of a PEFT model under our roles."""
    named = {name.replace(".default", ""): value.detach().numpy() for name, value in model.named_parameters()}
    shadow = {name: value for name, value in named.items() if "shadow_" in name}
    if shadow:
        return {name.removeprefix("base_model.").removeprefix("model."): value for name, value in shadow.items()}
    inside = {name.removeprefix("prompt_encoder."): value for name, value in named.items() if "prompt_encoder" in name}
    if not inside:
        return adaption_arrays(named)
    arrays = {}
    for name, value in inside.items():
        parts = name.split(".")
        if parts[0] in ("prefix_task_cols", "prefix_task_rows"):
            arrays[name] = value
        elif parts[0] in ("trainable_embedding", "frozen_embedding"):
            arrays["prompt" if parts[0].startswith("trainable") else FROZEN] = value
        elif parts[0] in ("embedding", "delta_embedding"):
            arrays["prompt" if parts[0] == "embedding" else "delta"] = value
        elif parts[0] == "lstm_head":
            kind, which, layer, *reverse = parts[1].split("_")
            side = {"ih": "input", "hh": "hidden"}[which]
            direction = "backward" if reverse else "forward"
            arrays[f"lstm_{layer[1:]}_{direction}_{side}_{'bias' if kind == 'bias' else 'kernel'}"] = value.T
        else:
            block = {"mlp_head": "mlp", "transform": "transform"}[parts[0]]
            arrays[f"{block}_{int(parts[1]) // 2}_{'kernel' if parts[2] == 'weight' else 'bias'}"] = value.T
    return arrays


def adaption_arrays(named):
    prompts = np.zeros((SIZES["num_hidden_layers"], 4, SIZES["hidden_size"]), np.float32)
    gates = np.zeros((SIZES["num_hidden_layers"], 1), np.float32)
    for name, value in named.items():
        if "adaption_" in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            (prompts if name.endswith("prompt") else gates)[layer] = value if name.endswith("gate") else value[0]
    return {"adaption_prompt": prompts, "adaption_gate": gates}


def unread_roles(model):
    """The arrays of a prompt that are in its file and that nothing reads."""
    config = model.peft_config["default"]
    return config.frozen if config.peft_type == "SHADOW" else ()


def our_arrays(model):
    found = {}
    map_adapted(lambda _, leaf: found.update(leaf.params) if isinstance(leaf.method, PromptMethod) else None, model)
    return {role: np.asarray(array) for role, array in found.items()}


def with_arrays(model, arrays):
    """The model with other trained arrays in its prompt."""

    def change(_, leaf):
        own = leaf.params.keys() - {"modules_to_save"}
        assert own <= arrays.keys() and all(leaf.params[role].shape == arrays[role].shape for role in own)
        leaf.params.update({role: jnp.asarray(arrays[role]) for role in own})
        if FROZEN in leaf.state:
            leaf.state[FROZEN] = jnp.asarray(arrays[FROZEN])
        return leaf

    return map_adapted(change, jax.tree.map(lambda leaf: leaf, model))


TRAINED = [row for prompt in PROMPTS.values() for row in prompt.trained]
TYPES = {"input_type_mask": np.array([[1, 2, 4, 5, 8, 0], [2, 4, 4, 3, 4, 7]])}  # other outputs in each row


@pytest.mark.parametrize("row", [*TRAINED, "CPT of typed inputs"])
def test_training_is_pefts(row, bases):
    """20 steps of AdamW from the same arrays, on padded batches whose virtual tokens have no labels."""
    row, types = (row.removesuffix(" of typed inputs"), TYPES if row.endswith("inputs") else {})
    theirs = torch_prompt(bases["llama"], row)
    start = {role: array.copy() for role, array in torch_arrays(theirs).items()}
    model = with_arrays(pj.get_peft_model(load(bases["llama"]), config_of(pj, row)), start)
    labels = np.where(RIGHT, IDS, -100)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01)
    want = []
    for _ in range(20):
        given = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, **tasks(row), **types}
        loss = theirs.train()(**{name: torch.tensor(array) for name, array in given.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        want.append(float(loss))

    step = make_training_step(
        lambda model, ids, mask, **more: model(ids, attention_mask=mask, lazy_logits=True, **more).logits,
        tx := optax.adamw(1e-3, weight_decay=0.01),
    )
    trainable, frozen = pj.partition(model)
    state, got = tx.init(trainable), []
    batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels, **tasks(row), **types}
    untyped = model(IDS, RIGHT, labels=labels, **tasks(row)).loss
    assert (abs(want[0] - untyped) > 1e-2) == bool(types)
    for number in range(20):
        trainable, state, metrics = step(trainable, state, frozen, batch, jax.random.key(number))
        got.append(float(metrics.loss))
    np.testing.assert_allclose(got, want, rtol=0, atol=5e-5)
    ends, trained = torch_arrays(theirs), our_arrays(pj.combine(trainable, frozen))
    if FROZEN in start:
        np.testing.assert_array_equal(ends[FROZEN], start[FROZEN])
    for role, array in trained.items():
        # The gradient of a key's bias is nearly none, as the softmax cancels it: AdamW divides rounding by rounding.
        atol = 5e-4 if role.endswith("k_proj.bias") else 5e-5
        np.testing.assert_allclose(array, ends[role], rtol=0, atol=atol, err_msg=role)
        assert np.abs(array - start[role]).max() > 1e-2, f"{role} does not move"


def test_a_cartridge_of_a_text_is_the_models_own_cache(tmp_path):
    """It is PEFT's array, and what follows is computed as after the text itself; composed cartridges are PEFT's."""
    from transformers import AutoTokenizer

    from peft_jax.cli.demo_data import MODEL

    base, tokenizer, text = load(MODEL), AutoTokenizer.from_pretrained(MODEL), "List the parameters of the model"
    ids = tokenizer(text)["input_ids"]
    size, later = len(ids), np.array([[5, 17, 2]])
    options = {"num_virtual_tokens": size, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(torch_base(MODEL), peft.CartridgeConfig(**options))
    want = peft.initialize_kv_prefix_from_text(theirs, tokenizer, text=text).numpy()
    fresh = pj.get_peft_model(base, pj.CartridgeConfig(**options))
    model = pj.initialize_kv_prefix_from_text(fresh, tokenizer, text=text)
    close(pj.get_peft_model_state_dict(model)["prompt_embeddings"], want)
    close(model(later).logits, base(np.concatenate([[ids], later], axis=1)).logits[:, size:])
    assert np.abs(model(later).logits - fresh(later).logits).max() > 1e-2

    prefix = pj.get_peft_model(base, pj.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    prefix = pj.initialize_kv_prefix_from_text(prefix, tokenizer, text=text, max_length=5)
    close(our_arrays(prefix)["prompt"], want[:4])
    with pytest.raises(ValueError, match="is of 3 tokens, and num_virtual_tokens is 4"):
        pj.initialize_kv_prefix_from_text(prefix, tokenizer, text=text, max_length=3)
    lora = pj.get_peft_model(base, pj.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="'default' is LORA, and a cache is for CARTRIDGE and PREFIX_TUNING"):
        pj.initialize_kv_prefix_from_text(lora, tokenizer, text=text)

    model.save_pretrained(tmp_path / "one")
    fresh.save_pretrained(tmp_path / "other")
    parts = [tmp_path / "one", tmp_path / "other"]
    peft.compose_cartridge_adapters(parts, output_path=tmp_path / "theirs")
    pj.compose_cartridge_adapters(parts, output_path=tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    again = pj.PeftModel.from_pretrained(base, tmp_path / "ours")
    assert again.peft_config["default"].num_virtual_tokens == 2 * size
    assert np.abs(again(later).logits - model(later).logits).max() > 1e-3
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="holds LORA, and CARTRIDGE alone is composed"):
        pj.compose_cartridge_adapters([tmp_path / "one", tmp_path / "lora"], output_path=tmp_path / "none")


def test_text_and_source_tasks_start_as_in_peft(bases, tmp_path):
    from peft_jax.cli.demo_data import MODEL

    base, theirs = load(MODEL), torch_base(MODEL)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "List the parameters", "task_type": "CAUSAL_LM"}
    for tokens in (2, 40):  # cut off, and repeated
        options = {**text, "num_virtual_tokens": tokens, "tokenizer_name_or_path": str(MODEL)}
        want = peft.get_peft_model(torch_base(MODEL), peft.PromptTuningConfig(**options))
        got = pj.get_peft_model(base, pj.PromptTuningConfig(**options))
        np.testing.assert_array_equal(our_arrays(got)["prompt"], torch_arrays(want)["prompt"])
    torch_prompt(bases["llama"], "multitask").save_pretrained(tmp_path)
    base = load(bases["llama"])
    for init in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"):
        options = {
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": 3,
            "num_ranks": 2,
            "prompt_tuning_init": init,
            "prompt_tuning_init_task": 1,
            "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
        }
        theirs = peft.get_peft_model(torch_base(bases["llama"]), peft.MultitaskPromptTuningConfig(**options))
        want, got = torch_arrays(theirs), pj.get_peft_model(base, pj.MultitaskPromptTuningConfig(**options))
        for role, array in our_arrays(got).items():
            if role == "prompt" or init != "ONLY_SOURCE_SHARED":
                np.testing.assert_allclose(array, want[role], rtol=0, atol=1e-7)
            assert array.shape == want[role].shape


@pytest.mark.parametrize("row", ROWS)
def test_starts_and_counts_are_pefts(row, bases):
    """Shapes, means, deviations and ranges of fresh arrays, and the line of trainable parameters."""
    torch.manual_seed(0)
    theirs = peft.get_peft_model(torch_base(bases["llama"]), config_of(peft, row))
    model = pj.get_peft_model(load(bases["llama"]), config_of(pj, row))
    want = torch_arrays(theirs)
    for role, array in our_arrays(model).items():
        assert array.shape == want[role].shape
        if not want[role].any() or not array.any():
            assert not array.any() and not want[role].any(), role
        elif array.size > 30 and not (std := want[role].std()):
            np.testing.assert_array_equal(array, want[role], err_msg=role)
        elif array.size > 30:
            assert abs(array.mean() - want[role].mean()) < 6 * std / array.size**0.5, role
            assert 0.7 < array.std() / std < 1.4, role
            assert 0.5 < np.abs(array).max() / np.abs(want[role]).max() < 2, role
    trained, total = theirs.get_nb_trainable_parameters()
    unread = sum(want[role].size for role in unread_roles(model))  # which PEFT counts, and never moves
    trained, total = trained - unread, total - unread
    line = pj.summary(model).splitlines()[-1]
    assert line.startswith(f"trainable params: {trained:,d} || all params: ")
    # PEFT counts the frozen arrays of these again: the base's own embeddings, and keys and values.
    if row not in ("CPT", "cartridge"):
        assert f"|| all params: {total:,d} ||" in line

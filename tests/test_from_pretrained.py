"""Arguments of PEFT's and transformers' ``from_pretrained``, ``save_pretrained``, ``push_to_hub`` and ``generate``."""

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close
from safetensors.numpy import load_file, save_file

import peft_jax as pj
from peft_jax.models import LlamaConfig

IDS = np.array([[5, 7, 2, 3], [8, 8, 3, 1]])
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base() -> Any:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
    )
    return pj.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def adapted(base: Any) -> Any:
    config = pj.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    return pj.get_peft_model(base, config)


def logits(model: Any) -> np.ndarray:
    return np.asarray(model(IDS).logits)


def cached(folder: Path, repo: str, cache: Path, revision: str = "main", inside: str = "") -> None:
    """Put a folder into a cache of the hub, as a download does."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT / inside, dirs_exist_ok=True)


def test_an_adapter_comes_from_the_hubs_cache(
    base: Any, adapted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapted.save_pretrained(tmp_path / "adapter")
    cached(tmp_path / "adapter", "me/adapter", tmp_path / "cache")
    cached(tmp_path / "adapter", "me/many", tmp_path / "cache", "v2", "deep/one")
    found = {
        "me/adapter": {"token": False},
        "me/many": {"revision": "v2", "subfolder": "deep/one"},
        str(tmp_path / "cache/models--me--many/snapshots" / COMMIT): {"subfolder": "deep/one"},
    }
    for name, options in found.items():
        hub: Any = {"cache_dir": tmp_path / "cache", **options}
        close(logits(pj.PeftModel.from_pretrained(base, name, **hub)), logits(adapted))
        assert pj.PeftConfig.from_pretrained(name, **hub).r == 2
    more = adapted.load_adapter("me/adapter", "again", cache_dir=tmp_path / "cache")
    close(logits(more.set_adapter("again")), logits(adapted))
    for name, options, line in (
        ("me/none", {}, r"'me/none' is neither a folder nor can it be downloaded .*network"),
        ("me/adapter", {"revision": "v9"}, r"'me/adapter' at revision 'v9' is neither"),
        ("me/many", {"revision": "v2", "subfolder": "deep/two"}, r"No folder 'deep/two' in 'me/many'"),
        (str(tmp_path), {"subfolder": "../x"}, r"subfolder='../x' is not below"),
        (str(tmp_path / "none"), {}, r"No folder '.*none'. Name the folder of a saved adapter, or an id"),
    ):
        with pytest.raises(FileNotFoundError, match=line) as caught:
            pj.PeftModel.from_pretrained(base, name, **{"cache_dir": tmp_path / "cache", **options})
        assert "\n" not in str(caught.value)


def test_an_adapter_and_its_base_come_from_the_hub(base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base.save_pretrained(tmp_path / "base")
    config = pj.LoraConfig(
        target_modules=["q_proj"], init_lora_weights=False, base_model_name_or_path="me/base", revision="old"
    )
    model = pj.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    cached(tmp_path / "base", "me/base", tmp_path / "cache", "old")
    cached(tmp_path / "adapter", "me/adapter", tmp_path / "cache")
    both = pj.AutoPeftModelForCausalLM.from_pretrained("me/adapter", cache_dir=tmp_path / "cache")
    close(logits(both), logits(model))
    read = pj.AutoModelForCausalLM.from_pretrained("me/base", revision="old", cache_dir=tmp_path / "cache")
    close(logits(read), logits(base))


def test_keys_config_and_sizes_that_the_call_gives(base: Any, adapted: Any, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    mapping = {r"^old\.stack": "model.layers", "never": "x"}
    renamed = {key.replace("model.model.layers", "model.old.stack", 1): one for key, one in tensors.items()}
    save_file(renamed, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit this base"):
        pj.PeftModel.from_pretrained(base, tmp_path)
    close(logits(pj.PeftModel.from_pretrained(base, tmp_path, key_mapping=mapping)), logits(adapted))
    with pytest.raises(ValueError, match="gives two tensors the key"):
        pj.PeftModel.from_pretrained(base, tmp_path, key_mapping={".*": "one"})
    with pytest.raises(ValueError, match="a key of key_mapping='\\*x' is no regular expression"):
        pj.PeftModel.from_pretrained(base, tmp_path, key_mapping={"*x": "one"})
    save_file(tensors, tmp_path / WEIGHTS)
    config = pj.PeftConfig.from_pretrained(tmp_path)
    scaled = pj.PeftModel.from_pretrained(base, tmp_path, "default", False, config.replace(lora_alpha=80))
    close(logits(scaled), logits(pj.scale_adapter(adapted, 10)))
    wide = dict(tensors)
    wide["base_model.model.lm_head.weight"] = np.zeros((20, 8), np.float32)
    save_file(wide, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match=r"start afresh: base_model.model.lm_head.weight \(20, 8\), not \(16, 8\)"):
        fitted = pj.PeftModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    own = adapted.params["lm_head"]["kernel"]
    np.testing.assert_array_equal(fitted.params["lm_head"]["kernel"].dense(), own.base)
    for options, line in (
        ({"torch_device": "cuda:0"}, "torch_device='cuda:0' is not where the base is, which is on \\['cpu'\\]"),
        ({"ephemeral_gpu_offload": True}, "ephemeral_gpu_offload=True is not supported"),
    ):
        with pytest.raises(ValueError, match=line):
            pj.PeftModel.from_pretrained(base, tmp_path, **options)
    save_file(tensors, tmp_path / WEIGHTS)
    same = pj.PeftModel.from_pretrained(base, tmp_path, torch_device="cpu", low_cpu_mem_usage=True)
    close(logits(same), logits(adapted))


def test_some_adapters_are_saved_and_by_one_process(adapted: Any, tmp_path: Path) -> None:
    two = adapted.add_adapter("b", pj.LoraConfig(target_modules=["k_proj"]))
    two.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    two.save_pretrained(tmp_path, selected_adapters=["b"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b"]
    with pytest.raises(ValueError, match=r"selected_adapters names \['c'\].*Found: \['default', 'b'\]"):
        two.save_pretrained(tmp_path, selected_adapters=["c"])
    with pytest.raises(ValueError, match="asks for a pickle"):
        two.save_pretrained(tmp_path, safe_serialization=False)


def test_a_push_writes_adapter_and_card(adapted: Any, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: dict[str, Any] = {}

    class Commit:
        commit_url = "https://hub/commit"

    def upload(*, repo_id: str, folder_path: str, **options: Any) -> Commit:
        files = {str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()}
        pushed.update(repo=repo_id, files=files, card=(Path(folder_path) / "README.md").read_text(), **options)
        return Commit()

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repo_id, **options: pushed.update(made=options))
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    assert adapted.push_to_hub("me/new", private=True, token="t", commit_message="first") == "https://hub/commit"
    assert pushed["files"] == {"adapter_config.json", WEIGHTS, "README.md"}
    assert pushed["made"] == {"private": True, "token": "t", "exist_ok": True} and pushed["commit_message"] == "first"
    card = huggingface_hub.ModelCard(pushed["card"])
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "transformers"],
    }
    assert "- PEFT 0.21.2" in card.text
    base.push_to_hub("me/whole")
    assert {"config.json", "model.safetensors", "README.md"} <= pushed["files"]
    with pytest.raises(TypeError, match="push_to_hub has no argument organization"):
        base.push_to_hub("me/new", organization="x")


def test_without_a_network_a_push_says_so(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError("no route\nat all")

    monkeypatch.setattr(huggingface_hub, "create_repo", refused)
    with pytest.raises(FileNotFoundError, match="'me/new' cannot be written on the Hugging Face hub") as caught:
        adapted.push_to_hub("me/new")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "line"),
    [
        ({"device_map": "auto"}, ValueError, "device_map='auto' is not supported. Arrays are on JAX's default device"),
        ({"trust_remote_code": True}, ValueError, "No code from a checkpoint is run"),
        ({"max_memory": {0: 1}}, ValueError, "belongs to device_map"),
        ({"attn_implementation": "flash_attention_2"}, ValueError, "Attention is computed by XLA"),
        ({"use_auth_token": "t"}, ValueError, "Write token="),
        ({"use_safetensors": False}, ValueError, "pickles are not read"),
        ({"dtype": "float16", "torch_dtype": "float16"}, ValueError, "Write dtype= alone"),
        ({"load_in_2bit": True}, TypeError, "from_pretrained has no argument load_in_2bit"),
    ],
)
def test_what_transformers_has_and_we_have_not(
    options: dict[str, Any], error: type[Exception], line: str, base: Any, tmp_path: Path
) -> None:
    base.save_pretrained(tmp_path)
    with pytest.raises(error, match=line) as caught:
        pj.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_words_that_ask_for_what_is_done_anyhow(base: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base.save_pretrained(tmp_path)
    for dtype in ("bfloat16", torch.bfloat16, jnp.bfloat16):
        for name in ("dtype", "torch_dtype"):
            options: dict[str, Any] = {name: dtype}
            model = pj.AutoModelForCausalLM.from_pretrained(
                tmp_path, **options, low_cpu_mem_usage=True, device_map=None, attn_implementation="sdpa"
            )
            assert model.params["lm_head"]["kernel"].dtype == jnp.bfloat16
    assert pj.AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto").params["lm_head"]["kernel"].dtype == (
        jnp.float32
    )


def test_lists_of_a_tokenizer_are_batches(base: Any) -> None:
    ids = [5, 7, 2, 3]
    expected = base.generate(np.array([ids]), max_new_tokens=3)
    np.testing.assert_array_equal(base.generate(ids, max_new_tokens=3), expected)
    np.testing.assert_array_equal(base.generate([ids], [[1, 1, 1, 1]], max_new_tokens=3), expected)
    np.testing.assert_array_equal(base.generate(ids, [1, 1, 1, 1], max_new_tokens=3), expected)
    np.testing.assert_array_equal(base(ids, [1, 1, 1, 1]).logits, base(np.array([ids])).logits)
    assert np.isfinite(float(base(ids, labels=ids).loss))
    with pytest.raises(ValueError, match=r"input_ids is a list of texts of \[2, 3\] tokens.*Pad them"):
        base.generate([[1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match=r"input_ids got all of a tokenizer's outputs .*model\(\*\*inputs\)"):
        base.generate({"input_ids": [ids], "attention_mask": [[1, 1, 1, 1]]})


def test_a_refusal_of_generate_says_what_to_write(base: Any) -> None:
    for options, line in (
        ({"num_beams": 4}, "transformers' num_beams. .* num_beams=4: There is no beam search"),
        ({"max_length": 9}, "max_length=9: Write max_new_tokens="),
        ({"use_cache": False}, "use_cache=False: Leave it out"),
    ):
        with pytest.raises(TypeError, match=line):
            base.generate(IDS[:1], **options)

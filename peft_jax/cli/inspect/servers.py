"""Which programs take an adapter as it is, and why one does not.

Rules as read in the programs' own code: PEFT 0.21.2; vLLM's lora/peft_helper.py, lora/lora_model.py and config/lora.py;
TGI's adapters/lora.py and utils/adapter.py with the kernels' pad_rank. Where a server would load an adapter and compute
something else, the verdict is no.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from peft_jax.interop.describe import LORA_ENDS, AdapterFolder
from peft_jax.interop.formats import PEFT_VERSION, PREFIX, WEIGHTS_FILE
from peft_jax.methods.base import Method, PeftConfig
from peft_jax.methods.lora.initializers.table import TABLE

PEFT_TYPES = frozenset(
    "ADALORA ADAMSS ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 "
    "LILY LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING PSOFT "
    "PVERA P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT "
    "XLORA".split()
)
SAME_SIGNS = "on the weights it was trained on, in the same element type, where PyTorch's SVD has the same signs"
VLLM_RANKS, VLLM_DEFAULT = (8, 16, 32, 64, 128, 256, 320, 512), 16
VLLM_SKIPS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # it passes over these
TGI_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")

# Fields of LoraConfig that change no number once an adapter is trained, or that the verdicts look at one by one.
_HARMLESS = frozenset(
    "peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r target_modules "
    "exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora use_dora modules_to_save init_lora_weights "
    "layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_core loftq_config eva_config corda_config "
    "lora_ga_config qalora_group_size runtime_config ensure_weight_tying".split()
)


class Verdict(NamedTuple):
    """Whether a program takes an adapter; the note says how, or why not."""

    program: str
    takes: bool
    note: str


def verdicts(adapter: AdapterFolder) -> list[Verdict]:
    """The verdicts, in the order in which they are shown."""
    return [_peft_jax(adapter), _peft(adapter), _server("vLLM", adapter, _vllm), _server("TGI", adapter, _tgi)]


def _peft_jax(adapter: AdapterFolder) -> Verdict:
    is_beside = [(adapter.path / number / WEIGHTS_FILE).is_file() for number in adapter.lost]
    if is_beside and all(is_beside):
        return Verdict("peft_jax", True, f"with layers.{adapter.lost[0]} of the folder '{adapter.lost[0]}'")
    if problems := adapter.problems():
        return Verdict("peft_jax", False, problems[0])
    if adapter.tensors is None:
        return Verdict("peft_jax", False, "the tensors are in a pickled .bin file; save as safetensors")
    try:
        config = PeftConfig.from_dict(adapter.config)
        if isinstance(config, Method):
            config.of_file({key: tensor.shape for key, tensor in adapter.tensors.items()})
    except (ValueError, TypeError) as error:
        return Verdict("peft_jax", False, str(error))
    return Verdict("peft_jax", True, SAME_SIGNS if adapter.peft_type == "PSOFT" else "")


def _peft(adapter: AdapterFolder) -> Verdict:
    if adapter.peft_type not in PEFT_TYPES:
        return Verdict("PEFT", False, f"PEFT {PEFT_VERSION} knows no {adapter.peft_type}")
    if problems := adapter.problems():
        return Verdict("PEFT", False, problems[0])
    return Verdict("PEFT", True, "PeftModel.from_pretrained(base, folder)" + _peft_condition(adapter))


def _peft_condition(adapter: AdapterFolder) -> str:
    """Which PEFT reads an adapter; empty if every one does.

    BOFT has several butterfly factors where its CUDA extension can be compiled, and one elsewhere. PEFT makes the basis
    of a FROD anew, which is that of the file only where PEFT made the file, with the same base and the same LAPACK. So
    it makes the singular vectors of a PSOFT, whose signs may be others on other weights or by another library. QA-LoRA
    it has for GPTQ's layers.
    """
    if adapter.peft_type == "PSOFT":
        return f", {SAME_SIGNS}"
    if adapter.config.get("use_qalora"):
        return ", on GPTQ's layers alone: elsewhere PEFT ignores use_qalora, and makes an A of another shape"
    if adapter.peft_type == "FROD":
        return ", with the same numbers only where PEFT itself started the adapter, with the same build of LAPACK"
    if adapter.peft_type != "BOFT" or not adapter.tensors:
        return ""
    asked = adapter.config.get("boft_n_butterfly_factor", 1)
    made = {tensor.shape[0] for key, tensor in adapter.tensors.items() if key.endswith(".boft_R") and tensor.shape}
    if asked == 1 or not made:
        return ""
    if made == {1}:
        return f", without BOFT's CUDA extension alone: with it PEFT makes boft_n_butterfly_factor={asked} factors"
    return ", with BOFT's CUDA extension alone: without it PEFT makes one butterfly factor, and refuses this file"


def _server(name: str, adapter: AdapterFolder, more: Any) -> Verdict:
    reasons = list(_not_plain(adapter)) or list(more(adapter))
    if reasons:
        return Verdict(name, False, "; ".join(reasons))
    return Verdict(name, True, _vllm_flags(adapter) if name == "vLLM" else "LORA_ADAPTERS=name=folder")


def _not_plain(adapter: AdapterFolder) -> Iterator[str]:
    """Reasons why neither server takes the adapter."""
    config = adapter.config
    if adapter.peft_type != "LORA":
        yield f"it serves LoRA alone, not {adapter.peft_type}"
        return
    yield from adapter.problems()[:1]
    if config.get("use_dora"):
        yield "it cannot do DoRA"
    if config.get("modules_to_save"):
        yield f"it cannot do modules_to_save ({', '.join(config['modules_to_save'])})"
    if config.get("bias", "none") != "none":
        yield f"it cannot do trained biases (bias={config['bias']!r})"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and _changes_base(start.lower()):
        yield f"init_lora_weights={start!r} needs a changed base; save with path_initial_model_for_weight_conversion"
    for field, value in config.items():
        if field not in _HARMLESS and value not in (None, False, 0, "", [], {}):
            yield f"it does not read {field}"
    if adapter.ranks and {adapter.scaling(module) for module in adapter.ranks} != {_common_scaling(config)}:
        yield "it has one scale for all modules, and rank_pattern or alpha_pattern asks for several"


def _common_scaling(config: dict[str, Any]) -> float:
    """The scale that a server uses everywhere."""
    rank = config.get("r", 8)
    return float(config.get("lora_alpha", 8) / (rank**0.5 if config.get("use_rslora") else rank))


def _vllm(adapter: AdapterFolder) -> Iterator[str]:
    if _top_rank(adapter) > VLLM_RANKS[-1]:
        yield f"rank {_top_rank(adapter)} is above its largest --max-lora-rank, {VLLM_RANKS[-1]}"
    others = [key for key in adapter.tensors or {} if not key.endswith((*LORA_ENDS, *VLLM_SKIPS))]
    if others:
        yield f"it refuses a file with {others[0].removeprefix(PREFIX)}; save with save_embedding_layers=False"


def _vllm_flags(adapter: AdapterFolder) -> str:
    enough = next(limit for limit in VLLM_RANKS if limit >= _top_rank(adapter))
    flags = "--enable-lora" + (f" --max-lora-rank {enough}" if enough > VLLM_DEFAULT else "")
    heads = []
    for end in ("embed_tokens", "lm_head"):
        if any(module.endswith(end) for module in adapter.ranks):
            heads.append(end)
    return flags + (f"; {' and '.join(heads)} for some architectures only" if heads else "")


def _top_rank(adapter: AdapterFolder) -> int:
    """The largest rank that a server must allow; vLLM looks at the config's."""
    return max(adapter.config.get("r", 8), *adapter.ranks.values(), 0)


def _tgi(adapter: AdapterFolder) -> Iterator[str]:
    if adapter.tensors is None:
        yield "it reads safetensors alone"
        return
    ends = {module.rsplit(".", 1)[-1] for module in adapter.ranks}
    if other := sorted(ends - set(TGI_MODULES)):
        yield f"it leaves {', '.join(other)} out"
    if tables := [key for key in adapter.frozen if key.endswith((".embed_tokens.weight", ".lm_head.weight"))]:
        yield f"it leaves the table {tables[0].removeprefix(PREFIX)} out"
    if adapter.config.get("layers_to_transform") is not None:
        yield "it drops a target that not all layers have (layers_to_transform)"
    rank = adapter.config.get("r", 8)
    padded = 8 if rank <= 8 else -(-rank // 16) * 16
    if padded != rank and len(ends) > 1:
        yield f"it pads rank {rank} to {padded}, and scales all targets but the first by it"


def _changes_base(initializer: str) -> bool:
    """Whether an initializer takes a part out of the base's weights, which a server would have to do too."""
    return any(row.changes_base and row.is_meant_by(initializer) for row in TABLE)

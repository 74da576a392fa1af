"""Describe an adapter's folder from its JSON and the header of its tensors; its method need not be known."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from peft_jax.interop.files import CONFIG, read_config
from peft_jax.interop.formats import EMBEDDING_MODULES, KEYS, PREFIX, WEIGHTS_FILE, is_fixed, tensor_key
from peft_jax.interop.patterns import modules_of
from safetensors import SafetensorError, safe_open

from peft_jax.core.field_kinds import is_kind
from peft_jax.core.selecting import without
from peft_jax.core.strict_json import shown
from peft_jax.core.targets import ALL_LINEAR, is_target, pattern_value
from peft_jax.methods import lily
from peft_jax.methods.base import CONFIG_FILE
from peft_jax.prompts.xlora import DEEPEST, numbers_of_layers

PICKLE_FILE = "adapter_model.bin"
PROMPT_KEY = "prompt_embeddings"
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")  # whose virtual tokens are those, not embeddings
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


class LoraEnd(NamedTuple):
    """Axes of one of LoRA's matrices: of the rank, the other one, and the axis of the base's weight that it meets."""

    rank_axis: int
    wide_axis: int
    base_axis: int


LORA_ENDS = {
    ".lora_A.weight": LoraEnd(0, 1, 1),
    ".lora_B.weight": LoraEnd(1, 0, 0),
    ".lora_embedding_A": LoraEnd(0, 1, 0),
    ".lora_embedding_B": LoraEnd(1, 0, 1),
}

# What PEFT writes of the base, or once more of what is trained whole. The base's biases are written where trained.
BASE_COPIES = re.compile(r"\.(base_layer|original_module)\.(.*\.)?weight$|\.modules_to_save\.")
RESHAPING = ("target_parameters", "use_qalora", "use_bdlora")  # fields that change their shapes
# What the fields that are read here have to be, whatever the method.
KINDS: dict[str, Any] = {
    "peft_type": str,
    "base_model_name_or_path": str,
    "task_type": str,
    "r": int,
    "lora_alpha": float,
    "target_modules": str | list[str],
    "exclude_modules": str | list[str],
    "modules_to_save": list[str],
    "layers_to_transform": int | list[int],
    "layers_pattern": str | list[str],
    "layer_replication": list[list[int]],
    "rank_pattern": dict[str, int | list[bool]],  # AdaLoRA's are lists
    "alpha_pattern": dict[str, float],
    "bias": str,
    "num_virtual_tokens": int,
    "num_transformer_submodules": int,
}


class TensorInfo(NamedTuple):
    """Element type (as safetensors spells it) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for length in self.shape:
            size *= length
        return size

    @property
    def nbytes(self) -> int:
        """Bytes in the file; types of less than a byte are packed."""
        return self.size * BITS.get(self.dtype, 8) // 8


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """An adapter as its files tell of it.

    Attributes:
        path: The folder.
        config: Contents of ``adapter_config.json``.
        tensors: Of ``adapter_model.safetensors``, by key; None where there is only a pickled file, which is not read.
    """

    path: pathlib.Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo] | None

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method."""
        return str(self.config["peft_type"])

    @functools.cached_property
    def lora_shapes(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shapes of LoRA's matrices by the end of their key, for each module that has any."""
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for key, tensor in (self.tensors or {}).items():
            for end in LORA_ENDS:
                if key.endswith(end) and len(tensor.shape) >= 2:
                    found.setdefault(key.removeprefix(PREFIX).removesuffix(end), {})[end] = tensor.shape
        return found

    @property
    def reshaped(self) -> bool:
        """Whether LoRA's matrices have other shapes than rank and features."""
        return any(map(self.config.get, RESHAPING))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module with a LoRA, from its matrices."""
        ranks = {}
        for module, shapes in self.lora_shapes.items():
            end, shape = next(iter(shapes.items()))
            ranks[module] = shape[LORA_ENDS[end].rank_axis]
        return ranks

    def scaling(self, module: str) -> float:
        """The scale of a module's LoRA: ``alpha / rank``, or by its square root where ``use_rslora`` is set."""
        alpha = pattern_value(self.config.get("alpha_pattern") or {}, module, self.config.get("lora_alpha", 8))
        rank = self.ranks[module]
        if rank == 0:  # of an empty matrix, which is one of the `problems`
            return 0.0
        return float(alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    @property
    def frozen(self) -> list[str]:
        """Keys of what was not trained: base weights beside an adapter on an embedding or a head, fixed matrices."""
        saved = tuple(self.config.get("modules_to_save") or ())
        found = []
        for key, tensor in (self.tensors or {}).items():
            module = key.removesuffix(".weight")
            is_whole = bool(saved) and module.endswith(saved)
            plain = key.endswith(".weight") and module.endswith(EMBEDDING_MODULES) and not is_whole
            copy = BASE_COPIES.search(key) is not None
            fixed = is_fixed(key) or tensor.dtype.startswith(("I", "U"))
            if plain or copy or fixed:
                found.append(key)
        return found

    @property
    def empty(self) -> list[str]:
        """Keys of tensors without elements, but for those of AdaLoRA, whose ranks may be 0."""
        found = []
        for key, tensor in (self.tensors or {}).items():
            may_be_empty = self.peft_type == "ADALORA" and len(tensor.shape) >= 2
            if tensor.size == 0 and not may_be_empty:
                found.append(key)
        return found

    @property
    def copies(self) -> set[str]:
        """Keys of LILY's factors that repeat those of another layer of a group: the file has them for each layer."""
        stride, targets = self.config.get("stride_A", 1), self.config.get("target_modules")
        if self.peft_type != "LILY" or not is_kind(stride, int) or stride < 1:
            return set()
        tensors, sizes = self.tensors or {}, {}
        for module in modules_of(self.peft_type, tensors):
            a, b = (tensors.get(f"{PREFIX}{module}.{role}.weight") for role in (lily.A, lily.B))
            if a is not None and b is not None:
                sizes[module] = (a.shape[-1], b.shape[-1])
        found = set()
        # The order of a file is not PyTorch's, but layers of a group have the same shapes, so that the number is right.
        for role, leaders in lily.leaders(sizes, targets if isinstance(targets, list) else (), stride).items():
            found |= {f"{PREFIX}{module}.{role}.weight" for module, leader in leaders.items() if module != leader}
        return found

    @property
    def trained(self) -> int:
        """Elements that were trained: all but those of `frozen`, and those of a group of layers once."""
        trained = without(self.tensors or {}, {*self.frozen, *self.copies})
        return sum(tensor.size for tensor in trained.values())

    @property
    def prompt(self) -> tuple[int, int] | None:
        """Rows and features of a prompt's virtual tokens; None of an adapter that has none."""
        tensor = (self.tensors or {}).get(PROMPT_KEY)
        return None if tensor is None or len(tensor.shape) != 2 else (tensor.shape[0], tensor.shape[1])

    @property
    def judged(self) -> str | None:
        """By what `misfits` can judge: names and shapes for LoRA, names where the method has keys in the layers.

        A prompt is judged by `prompt_misfits`.
        """
        if self.prompt is not None:
            return "the shape of its prompt"
        if self.tensors is None or not any(key.startswith(PREFIX) for key in self.tensors):
            return None
        return "names and shapes" if self.peft_type == "LORA" else "names"

    @property
    def unasked(self) -> list[str]:
        """Modules with tensors of the method that the config does not name, as far as it says without a base."""
        targets = self.config.get("target_modules")
        follows_base = targets is None or isinstance(targets, str) and targets.lower() == ALL_LINEAR
        has_copies = self.config.get("ensure_weight_tying") or self.peft_type == "TRAINABLE_TOKENS"  # of tied modules
        if follows_base or has_copies or self.config.get("target_parameters") or self.peft_type in KEYS:
            return []
        config = _target_fields(self.config)
        modules = modules_of(self.peft_type, self.tensors or {})
        return [module for module in modules if not is_target(config, module)]

    @property
    def lost(self) -> list[str]:
        """Numbers of the layers of an X-LoRA's classifier that are not in the file, as PEFT takes them for LoRAs'."""
        loras: Any = self.config.get("adapters")
        depth: Any = self.config.get("xlora_depth", 1)
        if self.peft_type != "XLORA" or not is_kind(loras, dict[str, str]) or not is_kind(depth, int):
            return []
        numbers = list(map(str, numbers_of_layers(min(depth, DEEPEST), self.config.get("xlora_dropout_p", 0.2))))
        keys = {number: tensor_key("XLORA", "", f"layers.{number}.weight") for number in numbers if number in loras}
        return [number for number, key in keys.items() if key not in (self.tensors or {})]

    def problems(self) -> list[str]:
        """Contradictions: other modules or ranks than the config's, a LoRA matrix without its partner."""
        if self.tensors is None:
            return []
        found = [] if self.tensors or self.lost else [f"{WEIGHTS_FILE} holds no tensors"]
        for number in self.lost:
            found.append(
                f"it lacks layers.{number} of the classifier, which PEFT takes for a tensor of LoRA '{number}'"
            )
        found += [f"{key} is empty" for key in self.empty]
        if self.prompt is not None and (tokens := self.config.get("num_virtual_tokens")):
            wanted = tokens * (self.config.get("num_transformer_submodules") or 1)
            if self.prompt[0] not in (tokens, wanted):
                found.append(f"{PROMPT_KEY} has {self.prompt[0]} rows, but {CONFIG_FILE} says {wanted}")
        found += [f"{module} has tensors, but {CONFIG_FILE} does not ask for it" for module in self.unasked]
        if self.peft_type != "LORA" or self.reshaped:
            return found
        for module, shapes in self.lora_shapes.items():
            wanted = pattern_value(self.config.get("rank_pattern") or {}, module, self.config.get("r", 8))
            ranks = {_rank(end, shape, wanted) for end, shape in shapes.items()}
            if len(shapes) != 2:
                found.append(f"{module} has {next(iter(shapes))[1:]} alone")
            elif ranks != {wanted}:
                told = " and ".join(map(str, sorted(ranks)))
                found.append(f"{module} has rank {told} in the file, but {CONFIG_FILE} says {wanted}")
        return found


def _rank(end: str, shape: tuple[int, ...], wanted: float) -> float:
    """The rank of a matrix; the wanted one where a convolution's groups may have a part of it each."""
    rank = shape[LORA_ENDS[end].rank_axis]
    is_part = end == ".lora_B.weight" and len(shape) > 2 and rank and wanted % rank == 0
    return wanted if is_part else rank


def read_adapter(directory: str | pathlib.Path) -> AdapterFolder:
    """Read what an adapter's folder says of itself.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is damaged.

    Example:
        >>> import tempfile, jax.numpy as jnp, peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 8))}}, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pj.interop.save_adapter(params, folder)
        ...     read_adapter(folder).ranks
        {'q': 2}
    """
    folder = pathlib.Path(directory)
    config = read_adapter_config(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return AdapterFolder(folder, config, read_header(folder / WEIGHTS_FILE))
    if (folder / PICKLE_FILE).is_file():
        return AdapterFolder(folder, config, None)
    raise FileNotFoundError(f"No {WEIGHTS_FILE} in '{folder}', only its {CONFIG_FILE}. Copy or save the adapter again.")


def read_adapter_config(directory: str | pathlib.Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` as it is, of whatever method.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not that of an adapter.
    """
    folder = pathlib.Path(directory)
    if not (folder / CONFIG_FILE).is_file():
        inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        if not folder.is_dir():
            raise FileNotFoundError(f"No folder '{folder}'. Give the folder of a saved adapter.")
        found = f", but below it in {', '.join(inside)}. Name one of these." if inside else None
        whole = f". It holds a whole model ({CONFIG}), not an adapter." if (folder / CONFIG).is_file() else None
        raise FileNotFoundError(
            f"No {CONFIG_FILE} in '{folder}'{found or whole or '. Give the folder of a saved adapter.'}"
        )
    config = read_config(folder, CONFIG_FILE)
    if config.get("peft_type") is None:
        raise ValueError(f"'{folder / CONFIG_FILE}' names no peft_type, so it is no adapter's. Save the adapter again.")
    kinds = {**KINDS, "rank_pattern": dict[str, int]} if config["peft_type"] == "LORA" else KINDS
    for field, kind in kinds.items():
        if config.get(field) is not None and not is_kind(config[field], kind):
            raise ValueError(f"'{folder / CONFIG_FILE}' has {field}={shown(config[field])}. Save the adapter again.")
    if config["peft_type"] == "LORA" and config.get("r") is not None and config["r"] < 1:
        raise ValueError(
            f"'{folder / CONFIG_FILE}' has r={config['r']}, and a rank is at least 1. Save the adapter again."
        )
    return {field: value for field, value in config.items() if value is not None or field not in ("r", "lora_alpha")}


def read_header(path: pathlib.Path) -> dict[str, TensorInfo]:
    """Element types and shapes of the tensors of a file, which are not read.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:  # checks the header against the file's length
            tensors = {}
            for key in file.keys():
                one = file.get_slice(key)
                tensors[key] = TensorInfo(one.get_dtype(), tuple(one.get_shape()))
            return tensors
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or cut off ({error}). Copy or save the adapter again.") from None


def misfits(adapter: AdapterFolder, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Why an adapter does not fit a base model, as far as names and shapes tell; empty if it fits.

    Args:
        adapter: The adapter.
        shapes: Shape of each tensor of the base, by its key in a Hugging Face checkpoint.
    """
    found = []
    for module, lora in adapter.lora_shapes.items():
        base = shapes.get(f"{module}.weight", ())
        if len(base) != 2:
            found.append(f"it has no matrix {module}")
            continue
        for end, shape in lora.items() if not adapter.reshaped else ():
            have, wanted = shape[LORA_ENDS[end].wide_axis], base[LORA_ENDS[end].base_axis]
            if have != wanted:
                found.append(f"{module}{end} is for {have} features, not {wanted}")
    for key, tensor in (adapter.tensors or {}).items():
        if not key.endswith(tuple(LORA_ENDS)):
            found += _whole_misfit(key.removeprefix(PREFIX).replace(".base_layer.", "."), tensor.shape, shapes)
    return list(dict.fromkeys(found)) + _missing(adapter, shapes)


def prompt_misfits(adapter: AdapterFolder, sizes: Mapping[str, Any]) -> list[str]:
    """Why a prompt does not fit a base model, as far as its shape tells.

    Args:
        adapter: The adapter; one that is no prompt has nothing to tell here.
        sizes: ``token_dim`` and ``num_layers`` of the base, as PEFT counts them for the method.
    """
    if adapter.prompt is None:
        return []
    width, features, layers = adapter.prompt[1], sizes["token_dim"], sizes["num_layers"]
    if adapter.peft_type not in KEYS_AND_VALUES:
        return [] if width == features else [f"its virtual tokens have {width} features, not {features}"]
    if width == 2 * layers * features:
        return []
    told = f"keys and values of {layers} layers with {features} features are {2 * layers * features} numbers a token"
    return [f"{told}, and it has {width}"]


def _whole_misfit(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """For a tensor that is not LoRA's: its shape if it has the name of one of the base's, else its layer's module."""
    if name in shapes:
        return [] if shape == shapes[name] else [f"{name} is {spell(shape)}, not {spell(shapes[name])}"]
    module = name.rsplit(".", 1)[0]
    if name.endswith((".weight", ".bias")) and f"{module}.weight" in shapes:
        return [f"it has no {name}"]
    owner = re.match(r"(.*\.layers\.\d+\.[a-z0-9_.]*?_proj)\.", name)
    return [f"it has no matrix {owner[1]}"] if owner and f"{owner[1]}.weight" not in shapes else []


def _missing(adapter: AdapterFolder, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Modules of the base that the config means and the file does not have."""
    if not adapter.ranks:
        return []
    config = _target_fields(adapter.config)
    missing = []
    for key, shape in shapes.items():
        module = key.removesuffix(".weight")
        if len(shape) == 2 and module not in adapter.ranks and is_target(config, module):
            missing.append(f"the adapter has nothing for {module}, which {CONFIG_FILE} means")
    return missing


def _target_fields(config: Mapping[str, Any]) -> Any:
    """The fields that `is_target` reads."""
    fields = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    return SimpleNamespace(**{name: config.get(name) for name in fields})


def spell(shape: tuple[int, ...]) -> str:
    """A shape in a line of text."""
    return " x ".join(map(str, shape)) or "a number"

"""PEFT's file format as tables: which of our arrays is which tensor, and how it lies in the file."""

from typing import NamedTuple

PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # the version whose format and defaults we follow
EMBEDDING_MODULES = ("embed_tokens", "lm_head")  # PEFT stores the base weight of these beside their adapter


class Row(NamedTuple):
    """One array of a method: ours, the tensor's name after the module path, and the sizes of our axes."""

    role: str
    suffix: str
    axes: tuple[str, ...]


# By method, and by whether the leaf is looked up. PEFT's matrices are (out, in): every row transposes.
ROWS: dict[str, dict[bool, tuple[Row, ...]]] = {
    "LORA": {
        False: (Row("lora_A", "lora_A.weight", ("in", "rank")), Row("lora_B", "lora_B.weight", ("rank", "out"))),
        True: (Row("lora_A", "lora_embedding_A", ("in", "rank")), Row("lora_B", "lora_embedding_B", ("rank", "out"))),
    },
}

# PyTorch's name of a leaf.
TORCH_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "weight": "weight", "bias": "bias"}

"""What the leaves of a Llama are: the tensors of a Hugging Face checkpoint, and matrices with stacked layers."""

import functools

from peft_jax.core.layout import Layout
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.formats import TORCH_NAMES
from peft_jax.models.llama import LlamaConfig, param_shapes

STACKED = {
    r"model\.layers\..*\.kernel": Layout(stack=(0,), inp=(1,), out=(2,), source="known to the model"),
    r"model\.layers\..*\.(bias|scale)": Layout(stack=(0,), inp=(), out=(1,), source="known to the model"),
}
IGNORED = (r".*\.rotary_emb\.inv_freq",)  # in old checkpoints; computed from the config instead


@functools.lru_cache(maxsize=64)
def rows(config: LlamaConfig) -> tuple[Row, ...]:
    """One row for each leaf of ``init_params(config, ...)``.

    Example:
        >>> config = LlamaConfig(num_hidden_layers=2)
        >>> next(row.keys[1] for row in rows(config) if row.path == "model.layers.self_attn.q_proj.kernel")
        'model.layers.1.self_attn.q_proj.weight'
    """
    return tuple(_row(path, shape) for path, shape in param_shapes(config).items())


def _row(path: str, shape: tuple[int, ...]) -> Row:
    module, name = path.rsplit(".", 1)
    key = f"{module.replace('model.layers.', 'model.layers.{}.')}.{TORCH_NAMES[name]}"
    return Row(path, shape, key, transposed=name == "kernel")

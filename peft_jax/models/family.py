"""What the handles, checkpoints and commands need to know of an architecture: one record each."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from peft_jax.core.layout import Layout
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.formats import TORCH_NAMES
from peft_jax.models.config import CAUSAL_LM, FEATURE_EXTRACTION, MASKED_LM, SEQ_2_SEQ_LM, ModelConfig

LANGUAGE_MODELS = (CAUSAL_LM, SEQ_2_SEQ_LM, MASKED_LM)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """An architecture and its kin, by functions of a config of theirs.

    Attributes:
        config: The class of the configs, which names the model types and tasks.
        init_params: ``init_params(config, key, dtype)``, a nested dict of arrays by Hugging Face module names.
        param_shapes: ``param_shapes(config)``, shapes by dotted path.
        apply: ``apply(config, params, input_ids, *, inputs_embeds, attention_mask, ..., output_hidden_states, remat)``,
            a `peft_jax.models.outputs.ModelOutput`.
        layouts: Axes of the stacked leaves, by regex over whole leaf paths, with and without the backbone in front.
            Each matches a leaf of every config. Int8 loading rounds those of them that are matrices.
        backbone: The module that holds all but the head, transformers' ``base_model_prefix``. A bare model's names
            lack it.
        embedding: Path of the token embedding below the backbone.
        heads: The module beside the backbone that gives the output, by task; none for a bare model.
        extras: Further modules that a checkpoint of another task may lack, as `heads` (a pooler, say).
        stored_in_out: Regex of the kernels that PyTorch stores as ``(in, out)``: transformers' Conv1D.
        ignored: Regexes of tensors in checkpoints that no model has use for.
        own_rows: ``own_rows(config)`` where `rows_by_layout` does not tell where the leaves lie in a checkpoint.
        init_cache: ``init_cache(config, batch, max_len, dtype)``, for models that generate.
    """

    config: type[ModelConfig]
    init_params: Callable[..., dict[str, Any]]
    param_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    apply: Callable[..., Any]
    layouts: Mapping[str, Layout]
    backbone: str
    embedding: str
    heads: Mapping[str, str]
    extras: tuple[str, ...] = ()
    stored_in_out: str = ""
    ignored: tuple[str, ...] = ()
    own_rows: Callable[[Any], tuple[Row, ...]] | None = None
    init_cache: Callable[..., Any] | None = None

    def rows(self, config: ModelConfig) -> tuple[Row, ...]:
        """One row for each leaf of ``init_params(config, ...)``."""
        return self.own_rows(config) if self.own_rows is not None else rows_by_layout(self, config)

    def embedding_module(self, config: ModelConfig) -> str:
        """Path of the token embedding."""
        return self.embedding if config.task_type == FEATURE_EXTRACTION else f"{self.backbone}.{self.embedding}"

    def embedding_table(self, config: ModelConfig, params: Any) -> Any:
        """The token embedding, ``(vocabulary, hidden)``."""
        path = [*self.embedding_module(config).split("."), "embedding"]
        return functools.reduce(lambda node, name: node[name], path, params)

    def output_module(self, config: ModelConfig) -> str | None:
        """Path of the module that gives the output; None for a bare model."""
        return self.heads.get(config.task_type)

    def tied_modules(self, config: ModelConfig) -> tuple[str, ...]:
        """Embedding and output head, where they share a leaf."""
        head = self.output_module(config)
        tied = config.tie_word_embeddings and config.task_type in LANGUAGE_MODELS and head is not None
        return (self.embedding_module(config), str(head)) if tied else ()

    def layout(self, path: str) -> Layout | None:
        """Axes of a stacked leaf; None for another."""
        return next((layout for pattern, layout in self.layouts.items() if re.fullmatch(pattern, path)), None)


@functools.lru_cache(maxsize=64)
def rows_by_layout(family: Family, config: ModelConfig) -> tuple[Row, ...]:
    """Rows of leaves whose paths are the keys: stacked leaves by their layouts, kernels as the transpose.

    Example:
        >>> from peft_jax.models.families import LLAMA
        >>> from peft_jax.models.llama import LlamaConfig
        >>> rows = rows_by_layout(LLAMA, LlamaConfig(num_hidden_layers=2))
        >>> next(row.keys[1] for row in rows if row.path == "model.layers.self_attn.q_proj.kernel")
        'model.layers.1.self_attn.q_proj.weight'
    """
    rows = []
    for path, shape in family.param_shapes(config).items():
        *modules, name = path.split(".")
        layout = family.layout(path)
        if layout is not None and layout.stack:
            modules.insert(modules.index(layout.index_after[0]) + 1, "{}")
        transposed = name == "kernel" and not re.fullmatch(family.stored_in_out, path)
        rows.append(Row(path, shape, ".".join([*modules, TORCH_NAMES[name]]), transposed))
    return tuple(rows)


def stacked_layouts(after: str) -> dict[str, Layout]:
    """Layouts of kernels, biases and scales in layers stacked in front, whose index follows the name ``after``."""
    return {
        rf"(.*\.)?{after}\..*\.kernel": _known(Layout(stack=(0,), inp=(1,), out=(2,), index_after=(after,))),
        rf"(.*\.)?{after}\..*\.(bias|scale)": _known(Layout(stack=(0,), inp=(), out=(1,), index_after=(after,))),
    }


def _known(layout: Layout) -> Layout:
    return dataclasses.replace(layout, source="known to the model")

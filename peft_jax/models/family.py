"""The record of an architecture: the facts of it that handles, checkpoints, meshes and commands need."""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from peft_jax.core.ids import rows_at
from peft_jax.core.layout import Layout
from peft_jax.core.paths import TORCH_NAMES, dotted
from peft_jax.core.pytree import PyTree
from peft_jax.core.repeated import Repeated
from peft_jax.core.weight import is_weight
from peft_jax.interop.checkpoint import Row
from peft_jax.interop.files import LazyArray
from peft_jax.models.config import CAUSAL_LM, FEATURE_EXTRACTION, MASKED_LM, SEQ_2_SEQ_LM, ModelConfig
from peft_jax.models.gguf_architecture import GGUFArchitecture
from peft_jax.models.modules import functional
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layers import scaled
from peft_jax.prompts.base import without_prompts

KNOWN = "known to the model"
LANGUAGE_MODELS = (CAUSAL_LM, SEQ_2_SEQ_LM, MASKED_LM)

OTHERWISE = "OTHERWISE"  # the key of PEFT's defaults for methods that have no entry of their own

Tensors = Mapping[str, LazyArray]
Fields = Mapping[str, Any]


def targets(*names: str, **more: Any) -> Fields:
    """Defaults of a method's config that adapts modules of these names.

    Example:
        >>> targets("wo", feedforward_modules=("wo",))
        {'target_modules': ('wo',), 'feedforward_modules': ('wo',)}
    """
    return {"target_modules": names, **more}


class Sharding(NamedTuple):
    """The modules whose weights a mesh splits, each a regex of the end of their paths.

    Attributes:
        columns: Those whose outputs are split among devices that compute one product together.
        rows: Those whose inputs are, as they are the outputs of such modules.
        tables: Embeddings, which are split by rows.
        experts: The tensors of fused experts, which have no module of their own; empty without experts.
    """

    columns: str
    rows: str
    tables: str
    experts: str = ""


class EncoderDecoder(NamedTuple):
    """The parts of an encoder-decoder's forward pass, as generation needs them.

    ``encode(config, params, inputs)`` has ``.last_hidden_state``; ``init_cache(config, params, encoded, max_len, *,
    attention_mask, cross_prefix)`` holds keys and values of the encoder's output; ``decode(config, params, inputs)``
    has ``.logits`` and ``.cache``, where ids and mask among the inputs are the decoder's.
    """

    encode: Callable[..., Any]
    init_cache: Callable[..., Any]
    decode: Callable[..., Any]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Family:
    """An architecture and its kin: facts, and functions of a config of theirs.

    Attributes:
        config: The class of the configs, which names the model types and tasks.
        module: The class of the Flax module, as `peft_jax.models.modules.functional` has it; attributes have Hugging
            Face module names.
        layouts: Axes of the stacked leaves, by regex over whole leaf paths, with and without the backbone in front;
            where layers have several shapes, `ModelConfig.stacks` says which of them each stack has.
            Quantized loading rounds those of them that are matrices. Other leaves follow Flax's conventions.
        backbone: The module that holds all but the head, transformers' ``base_model_prefix``. A bare model's names
            lack it. Empty if a model with a head has no such module either.
        embedding: Path of the token embedding below the backbone.
        heads: Path of the module beside the backbone that gives the output, by task; none for a bare model.
        peft_defaults: Fields that PEFT fills in where a config does not say where to adapt, by model type and method
            (PEFT 0.21.2); `OTHERWISE` is for the methods that are not named. Without fields a method has no default.
        sharding: How a mesh splits the weights.
        adaption_carrier: The matrix of an attention module whose leaf carries adaption prompts; empty if PEFT has none
            for these models.
        class_layers: By task, the layer of a head of several whose outputs are the classes.
        extras: Regexes of further leaves that only some tasks have, as a pooler's: a checkpoint of another task may
            lack them, as it lacks the head, and then they start at random.
        ignored: Regexes of tensors in checkpoints that no model has use for.
        surplus: Regexes of tensors that some checkpoints have beside those of all leaves.
        renamed: What the keys of old checkpoints end in, and what they end in since.
        moved: What the keys of other layouts start with, and what they start with here; an adapter's keys too.
        written: What keys start with, and what they start with in the checkpoint that is written, where transformers
            writes another layout than its modules have.
        single_experts: Where checkpoints hold experts one by one: by the end of a fused tensor's key the ends of the
            keys of its parts, with ``{}`` for the number of an expert.
        converted: The model types of which PEFT converts LoRA on single experts to LoRA on fused ones.
        beside: By model type, the one of the same text model whose modules have other names, as a multimodal model
            has it inside; an adapter's keys may be those of either.
        own_rows: ``own_rows(family, config)`` where `rows_by_layout` alone does not tell where the leaves lie in a
            checkpoint.
        float32: Regex of the leaves that stay float32 in a checkpoint read as float16, which they would overflow.
        always_float32: The same in a checkpoint read as bfloat16 too.
        replicable: Tasks of the models whose layers PEFT replicates.
        init_cache: ``init_cache(config, batch, max_len, dtype)``, for decoders that generate.
        encoder_decoder: What encoder-decoders have in its place.
        gguf: How GGUF files spell its model types, by their ``general.architecture``; empty if there are no such files.
    """

    config: type[ModelConfig]
    module: Any
    layouts: Mapping[str, Layout]
    backbone: str
    embedding: str
    heads: Mapping[str, str]
    peft_defaults: Mapping[str, Mapping[str, Fields]]
    sharding: Sharding
    adaption_carrier: str = ""
    class_layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extras: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    written: Mapping[str, str] = dataclasses.field(default_factory=dict)
    single_experts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    converted: Collection[str] = ()
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own_rows: Callable[[Any, Any], tuple[Row, ...]] | None = None
    float32: str = ""
    always_float32: str = ""
    replicable: Collection[str] = ()
    init_cache: Callable[..., Any] | None = None
    encoder_decoder: EncoderDecoder | None = None
    gguf: Mapping[str, GGUFArchitecture] = dataclasses.field(default_factory=dict)

    def init_params(self, config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
        """Random parameters: a nested dict of arrays by Hugging Face module names."""
        return functional.init_params(self.module, config, key, dtype)

    def param_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter by its dotted path; no parameters are made."""
        return functional.param_shapes(self.module, config)

    def declared_modules(self, config: ModelConfig) -> tuple[str, ...]:
        """Paths of the modules without numbers of layers, of which those of one parent are as PyTorch declares them."""
        return functional.declared_modules(self.module, config)

    def apply(self, config: ModelConfig, params: Mapping[str, Any], inputs: ForwardInputs) -> Any:
        """Run the model as a pure function of its parameters; the config is static under `jax.jit`.

        Returns:
            What the module returns: a `peft_jax.models.modules.outputs.ModelOutput`, or an encoder-decoder's output.

        Raises:
            ValueError: The leaves of params are not those of config, or an input is unknown or of a wrong shape.

        Example:
            >>> from peft_jax.models.registry import LLAMA
            >>> from peft_jax.models.llama.config import LlamaConfig
            >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            ...                      num_attention_heads=2)
            >>> params = LLAMA.init_params(config, jax.random.key(0))
            >>> LLAMA.apply(config, params, ForwardInputs(input_ids=jnp.array([[1, 2, 3]]))).logits.shape
            (1, 3, 16)
        """
        return functional.apply(self.module, config, params, inputs)

    def rows(self, config: ModelConfig) -> tuple[Row, ...]:
        """One row for each leaf of ``init_params(config, ...)``."""
        return (self.own_rows or rows_by_layout)(self, config)

    def written_rows(self, config: ModelConfig) -> tuple[Row, ...]:
        """The rows of a checkpoint that is written."""
        rows = self.rows(config)
        for start, new in self.written.items():
            rows = tuple(row._replace(key=_restarted(row.key, start, new)) for row in rows)
        return rows

    def embedding_module(self, config: ModelConfig) -> str:
        """Path of the token embedding."""
        is_bare = config.task_type == FEATURE_EXTRACTION or not self.backbone
        return self.embedding if is_bare else f"{self.backbone_of(config)}.{self.embedding}"

    def backbone_of(self, config: ModelConfig) -> str:
        """The module that holds all but the head in the model of the config's task."""
        return config.own_backbone or self.backbone

    def embedding_table(self, config: ModelConfig, params: PyTree) -> Any:
        """The token embedding, ``(vocabulary, hidden)``."""
        return leaf_at(params, f"{self.embedding_module(config)}.embedding")

    def embed(self, config: ModelConfig, params: PyTree, ids: jax.Array) -> jax.Array:
        """Embeddings (batch, length, hidden) of ids (batch, length)."""
        rows = rows_at(self.embedding_table(config, params), ids, config.untrained_row)
        return scaled(rows, config.embedding_scale)

    def output_module(self, config: ModelConfig) -> str | None:
        """Path of the module that gives the output; None for a bare model."""
        return self.heads.get(config.task_type)

    def class_layer(self, config: ModelConfig) -> str:
        """Path of the layer that gives a classifier's outputs: its head, or the last layer of it."""
        return self.class_layers.get(config.task_type, self.heads[config.task_type])

    def head_weight(self, config: ModelConfig, params: PyTree) -> tuple[Any, bool]:
        """The weight of a language model's output head, and whether it is the embedding."""
        if tied := bool(self.tied_modules(config)):
            return self.embedding_table(config, params), tied
        return leaf_at(params, f"{self.output_module(config)}.kernel"), tied

    def head_bias(self, config: ModelConfig, params: PyTree) -> Any:
        """The bias of a language model's output head; None if it has none."""
        if self.tied_modules(config):
            return None
        return leaf_at(params, str(self.output_module(config))).get("bias")

    def tied_modules(self, config: ModelConfig) -> tuple[str, ...]:
        """Embedding and output head, where they share a leaf."""
        head = self.output_module(config)
        tied = config.tie_word_embeddings and config.task_type in LANGUAGE_MODELS and head is not None
        return (self.embedding_module(config), str(head)) if tied else ()

    def untied(self, config: ModelConfig, params: PyTree) -> tuple[ModelConfig, Any]:
        """Config and parameters with a leaf of its own for each of the `tied_modules`."""
        if not (tied := self.tied_modules(config)):
            return config, params
        kernel = jnp.transpose(dense_table(self.embedding_table(config, params)))
        config = dataclasses.replace(config, tie_word_embeddings=False)
        return config, with_leaf(params, f"{tied[-1]}.kernel", kernel)

    def with_layers(self, config: ModelConfig, order: Sequence[int]) -> ModelConfig:
        """The config of the model whose layers are those of ``order``.

        Raises:
            ValueError: if there is no such layer, or PEFT replicates none of such a model.
        """
        if config.task_type not in self.replicable or config.own_backbone is not None:
            raise ValueError(f"PEFT has no layer_replication for models like this {config.architecture}. Leave it out.")
        if max(order) >= config.num_hidden_layers:
            raise ValueError(
                f"layer_replication names layer {max(order)}, and the model has layers 0 to "
                f"{config.num_hidden_layers - 1}. The end of a range is not in it."
            )
        return config.with_layers(order)

    def replicated(self, config: ModelConfig, params: PyTree, order: Sequence[int]) -> tuple[ModelConfig, Any]:
        """Config and parameters of the same model, whose layers share the weights that there are.

        Raises:
            ValueError: as `with_layers`.
        """

        def repeat(key_path: Any, leaf: Any) -> Any:
            layout = self.layout(config, dotted(key_path))
            return leaf if layout is None or not layout.stack else Repeated.of(leaf, order, layout)

        return self.with_layers(config, order), jax.tree_util.tree_map_with_path(repeat, params, is_leaf=is_weight)

    def settled(self, config: ModelConfig, tensors: Tensors) -> tuple[ModelConfig, Tensors]:
        """Do as transformers 5 does where the config ties the head, and the checkpoint has one nevertheless."""
        embedding, head = (f"{name}.weight" for name in self.tied_modules(config) or ("", ""))
        if head not in tensors:
            return config, tensors
        if embedding in tensors and not np.array_equal(tensors[embedding], tensors[head]):
            return dataclasses.replace(config, tie_word_embeddings=False), tensors
        rest = {key: tensor for key, tensor in tensors.items() if key != head}
        return config, {embedding: tensors[head], **rest}

    def layouts_of(self, config: ModelConfig) -> Mapping[str, Layout]:
        """The layouts that a leaf of this config has, by regex over whole paths."""
        paths = self.param_shapes(config)
        if config.stacks:
            layouts = {re.escape(path): self.layout(config, path) for path in paths}
            return {path: layout for path, layout in layouts.items() if layout is not None}
        used = {pattern for path in paths if (pattern := self._pattern(path)) is not None}
        return {pattern: layout for pattern, layout in self.layouts.items() if pattern in used}

    def layout(self, config: ModelConfig, path: str) -> Layout | None:
        """Axes of a leaf; None for one that follows the conventions."""
        pattern = self._pattern(path)
        if pattern is None:
            return None
        layout = self.layouts[pattern]
        if not config.stacks or not layout.stack:
            return layout
        modules = path.split(".")
        name = modules[modules.index(str(layout.index_after[0])) + 1]
        numbers = tuple(number for number, stack in enumerate(config.stacks) if stack == name)
        return dataclasses.replace(layout, numbers=numbers, stack_name=name)

    def _pattern(self, path: str) -> str | None:
        return next((pattern for pattern in self.layouts if re.fullmatch(pattern, path)), None)


@functools.lru_cache(maxsize=64)
def rows_by_layout(family: Family, config: ModelConfig) -> tuple[Row, ...]:
    """Rows of leaves whose paths are the keys: stacked leaves by their layouts, kernels as the transpose.

    Example:
        >>> from peft_jax.models.registry import LLAMA
        >>> from peft_jax.models.llama.config import LlamaConfig
        >>> rows = rows_by_layout(LLAMA, LlamaConfig(num_hidden_layers=2))
        >>> next(row.keys[1] for row in rows if row.path == "model.layers.self_attn.q_proj.kernel")
        'model.layers.1.self_attn.q_proj.weight'
    """
    rows = []
    for path, shape in family.param_shapes(config).items():
        *modules, name = path.split(".")
        layout = family.layout(config, path)
        numbers: tuple[int, ...] = ()
        if layout is not None and layout.stack:
            numbers = layout.numbers
            if layout.stack_name:
                modules.remove(layout.stack_name)
            modules.insert(modules.index(str(layout.index_after[0])) + 1, "{}")
        is_matrix = name == "kernel" or (layout is not None and bool(layout.unnamed and layout.inp))
        transposed = is_matrix and not (layout is not None and layout.stored_in_out)
        key = ".".join([*modules, TORCH_NAMES.get(name, name)])
        rows.append(Row(path, shape, key, transposed, numbers, _parts(family, key)))
    return tuple(rows)


def _parts(family: Family, key: str) -> tuple[str, ...]:
    """The keys of a tensor's parts, as templates like its own key; none where checkpoints hold it as it is."""
    for end, names in family.single_experts.items():
        if key.endswith(f".{end}"):
            return tuple(key.removesuffix(end) + name for name in names)
    return ()


def stacked_layouts(after: str, *, stored_in_out: bool = False) -> dict[str, Layout]:
    """Layouts of kernels, biases and scales in layers stacked in front.

    Args:
        after: The name in their paths that a layer's index follows.
        stored_in_out: Whether PyTorch stores the kernels as ``(in, out)``, as transformers' Conv1D.
    """
    layout = Layout(stack=(0,), inp=(1,), out=(2,), index_after=(after,), source=KNOWN)
    return {
        rf"(.*\.)?{after}\..*\.kernel": dataclasses.replace(layout, stored_in_out=stored_in_out),
        rf"(.*\.)?{after}\..*\.(bias|scale)": dataclasses.replace(layout, inp=(), out=(1,)),
        r".*\.kernel": Layout(stored_in_out=False, source=KNOWN),
    }


def _restarted(key: str, start: str, new: str) -> str:
    return new + key.removeprefix(start) if key.startswith(start) else key


def dense_table(table: Any) -> jax.Array:
    """An embedding as an array, with its adapters folded in but for prompts, which change no weight."""
    table = without_prompts(table)
    dense: jax.Array = table.dense() if is_weight(table) else table
    return dense


def leaf_at(tree: PyTree, path: str) -> Any:
    """The entry at a dotted path of a nested dict."""
    return functools.reduce(lambda node, name: node[name], path.split("."), tree)


def with_leaf(tree: Mapping[str, Any], path: str, leaf: Any) -> dict[str, Any]:
    """A nested dict with one more leaf, at a dotted path.

    Example:
        >>> with_leaf({"a": {"b": 1}}, "a.c", 2)
        {'a': {'b': 1, 'c': 2}}
    """
    name, _, rest = path.partition(".")
    return {**tree, name: with_leaf(tree.get(name, {}), rest, leaf) if rest else leaf}

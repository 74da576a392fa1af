"""Model handles: a checkpoint's parameters and architecture as one immutable pytree that can be called."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp

from peft_jax.adapt import adapt
from peft_jax.adapters.per_row import with_adapter_rows
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.discarded import warn_if_discarded
from peft_jax.core.ids import is_outside
from peft_jax.core.layout import Layout
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import not_none
from peft_jax.core.serialized_nodes import register_node
from peft_jax.core.weight import is_weight
from peft_jax.interop.describe import read_header
from peft_jax.interop.formats import WEIGHTS_FILE
from peft_jax.methods.base import by_name
from peft_jax.models.adapter_names import config_for, params_for
from peft_jax.models.config import MASKED_LM, ModelConfig
from peft_jax.models.defaults import method_defaults, prompt_sizes, router_sizes
from peft_jax.models.family import Family
from peft_jax.models.handles.inspection import Inspection
from peft_jax.models.handles.list_inputs import as_batch
from peft_jax.models.handles.prompted import apply_prompted
from peft_jax.models.handles.two_passes import in_two_passes
from peft_jax.models.hub_upload import PushOptions, model_card, push
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.lazy_logits import LazyLogits
from peft_jax.models.modules.logits_form import PLAIN, LogitsForm
from peft_jax.models.modules.outputs import ModelOutput
from peft_jax.models.registry import family_of
from peft_jax.models.resize import resized, tokens_of_adapter
from peft_jax.models.shadow_backbone import apply_beside, mirrored
from peft_jax.models.weights_io import save_model
from peft_jax.prompts.base import Prompt, take_prompt, virtual_slots, without_prompts
from peft_jax.prompts.learning import PromptLearning
from peft_jax.prompts.shadow import ShadowConfig, auxiliary_weight
from peft_jax.prompts.xlora import XLoraConfig, scales_weight

BASE = 0x62617365  # what a step's key is folded with for the base's dropout, so that adapters keep their masks: "base"

# For the dataclasses of handles: parameters are the leaves, all else is static.
register_handle = partial(
    register_node, data_fields=("params", "dropout_key"), meta_fields=("config", "source", "remat")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Where a model came from. All sources are equal, so that they stay out of the tree's structure.

    Attributes:
        name_or_path: Folder or hub id.
        generation_config: Contents of its generation_config.json.
        id2label: Names of a classifier's labels, where it has any.
        fresh: Paths of the leaves that the checkpoint lacks, and that were initialized at random.
        gguf_file: The GGUF file of the folder that it was read from, if it was.
    """

    name_or_path: str | None = None
    generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    id2label: Mapping[int, str] = dataclasses.field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    gguf_file: str | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    def __hash__(self) -> int:
        return hash(Source)


@dataclasses.dataclass(frozen=True, repr=False)
class ModelHandle(Inspection):
    """Base class of the handles of all tasks; a subclass adds the call, with its labels and outputs.

    Attributes:
        params: Nested dict of arrays and weights, by Hugging Face module names; layers are stacked.
        config: The architecture.
        source: Where the model came from.
        remat: Whether backward recomputes each layer instead of keeping its activations.
        dropout_key: The random key of the base's own dropout in a loss that is trained; None, as outside of
            `peft_jax.with_dropout`, for none.
    """

    task: ClassVar[str]  # the task type of the configs that a subclass is for

    params: PyTree
    config: ModelConfig
    source: Source = Source()
    remat: bool = False
    dropout_key: jax.Array | None = None

    def run(
        self,
        input_ids: Any,
        output_hidden_states: bool,
        head: bool = True,
        task_ids: jax.Array | None = None,
        adapter_names: Sequence[str] | None = None,
        output_router_logits: bool = False,
        **arrays: Any,
    ) -> ModelOutput:
        """Run the architecture, compiled once per shape; the other arrays are those of `ForwardInputs`.

        With ``adapter_names`` each row has its own adapter, as in `peft_jax.with_adapter_rows`.

        Without the head, an option of language models, the output's logits are `LazyLogits`, unless an X-LoRA scales
        LoRAs of the head.
        """
        if adapter_names is not None:
            by_row = self.replace(with_adapter_rows(self.params, adapter_names, task_ids))
            return by_row.run(input_ids, output_hidden_states, head, None, None, output_router_logits, **arrays)
        ids = None if input_ids is None else token_ids(input_ids, self.config.vocab_size)
        arrays = {name: as_batch(array, name) for name, array in arrays.items()}
        for name, rows in (("position_ids", self._position_rows()), ("token_type_ids", self.config.type_rows)):
            array = arrays.get(name)
            if array is None or rows is None:
                continue
            if bounds := is_outside(array, rows):
                raise ValueError(
                    f"{name} are from {bounds[0]} to {bounds[1]}, but this model has 0 to {rows - 1}. Give these alone."
                )
        given: dict[str, Any] = jax.tree.map(jnp.asarray, not_none(arrays))
        inputs = ForwardInputs(
            input_ids=ids,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            head=head,
            remat=self.remat,
            dropout_key=self.dropout_key,
            **given,
        )
        if not head and scales_weight(self.params, self.family.head_weight(self.config, self.params)[0]):
            head = True  # the scales of its tokens are those of this call
            inputs = dataclasses.replace(inputs, head=True)
        output: ModelOutput = _forward(self.config)(self.params, inputs, task_ids)
        if not head:
            output = output._replace(logits=self._lazy(output.last_hidden_state, self.config.logits_form))
        return output

    def _lazy(self, hidden: jax.Array, form: LogitsForm) -> LazyLogits:
        """The logits (batch, length, vocabulary) of what goes into the head of a language model."""
        params = without_prompts(self.params)
        weight, tied = self.family.head_weight(self.config, params)
        return LazyLogits(hidden, weight, tied, self.family.head_bias(self.config, params), form)

    def shadow_logits(self, output: ModelOutput) -> LazyLogits | None:
        """The logits of the small network of a SHADOW adapter, if its loss is added; without the form of the head's."""
        factor = auxiliary_weight(self.params)
        if output.shadow_state is None or not factor:
            return None
        return dataclasses.replace(self._lazy(output.shadow_state, PLAIN), factor=factor)

    def asks_routers(self, said: bool | None = None) -> bool:
        """Whether a call gives the routers' logits: as the call says, else as the config says, as in transformers."""
        routing = self.config.routing
        return routing is not None and routing.asked if said is None else said

    @property
    def has_router_loss(self) -> bool:
        """Whether routers whose logits a call gives have a loss too."""
        routing = self.config.routing
        return routing is not None and routing.has_loss

    def _position_rows(self) -> int | None:
        """The number of positions that ``position_ids`` may name, without a prefix's; None for any number."""
        rows = self.config.position_rows
        return None if rows is None else rows - virtual_slots(self.params)

    def save_pretrained(self, directory: str | os.PathLike[str], *, max_shard_size: int = 5 * 10**9) -> None:
        """Write the files that transformers reads: configs, and safetensors in the leaves' element types.

        Args:
            directory: Folder to write to; it is created if there is none.
            max_shard_size: Largest size of a weights file, in bytes.

        Raises:
            ValueError: if a leaf is quantized, adapted or a repeated layer.
        """
        weights = [leaf for leaf in jax.tree.leaves(self.params, is_leaf=is_weight) if is_weight(leaf)]
        if weights:
            raise ValueError(
                f"{len(weights)} leaves are quantized, adapted or repeated ({type(weights[0]).__name__}), which a "
                "Hugging Face checkpoint does not hold. Save pj.merge(model), or the adapter alone."
            )
        save_model(
            self.params,
            self.config,
            directory,
            generation_config=self.generation_config,
            id2label=self.source.id2label,
            max_shard_size=max_shard_size,
        )

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Write the model and a card, and upload them to a repository of the Hugging Face hub.

        Args:
            repo_id: The repository, which is made if need be.
            **options: As `peft_jax.models.hub_upload.PushOptions` says.

        Returns:
            The address of the commit.

        Raises:
            FileNotFoundError: if the hub cannot be reached, or refuses.
            ValueError: as `save_pretrained`.
        """
        if options.pop("selected_adapters", None) is not None:
            raise ValueError("selected_adapters= is for a model with adapters. Leave it out.")

        def write(folder: str) -> str:
            self.save_pretrained(folder)
            return model_card(self)

        return push(repo_id, write, options)

    @property
    def family(self) -> Family:
        """The architecture's functions and facts."""
        return family_of(self.config)

    @property
    def name_or_path(self) -> str | None:
        """Folder or hub id that the model was read from."""
        return self.source.name_or_path

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """Contents of the checkpoint's generation_config.json; empty if it has none."""
        return self.source.generation_config

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task; None for masked language modeling, for which PEFT has no name."""
        return None if self.config.task_type == MASKED_LM else self.config.task_type

    @property
    def output_module(self) -> str | None:
        """Path of the output head."""
        return self.family.output_module(self.config)

    @property
    def input_module(self) -> str:
        """Path of the input embedding."""
        return self.family.embedding_module(self.config)

    @property
    def adaption_carrier(self) -> str:
        """Name of the matrix of an attention module whose leaf carries adaption prompts; empty if there is none."""
        return self.family.adaption_carrier

    @property
    def single_experts(self) -> Mapping[str, tuple[str, ...]]:
        """As `Family.single_experts`; empty for a model type of which PEFT converts no adapters."""
        return self.family.single_experts if self.config.model_type in self.family.converted else {}

    def defaults(self, peft_type: str) -> Mapping[str, Any]:
        """PEFT's defaults for this model, by field of the method's config."""
        if issubclass(by_name(peft_type), PromptLearning):
            return prompt_sizes(peft_type, self.config)
        if issubclass(by_name(peft_type), ShadowConfig):
            return {"mirrored": partial(mirrored, self.family, self.config)}
        if issubclass(by_name(peft_type), XLoraConfig):
            return router_sizes(self.config)
        return method_defaults(peft_type, self.config.model_type)

    @property
    def tied_modules(self) -> tuple[str, ...]:
        """Paths of the embedding and the head if they share a leaf."""
        return self.family.tied_modules(self.config)

    def layouts(self) -> Mapping[str, Layout]:
        """Axes of the stacked leaves; the others follow Flax's conventions."""
        return self.family.layouts_of(self.config)

    def untied(self) -> Self:
        """The same model with a separate leaf for each of the `tied_modules`."""
        config, params = self.family.untied(self.config, self.params)
        return dataclasses.replace(self, config=config, params=params)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
        *,
        key: jax.Array | None = None,
    ) -> Self:
        """The same model with another number of tokens, in its embedding, its output head and its config.

        Old rows stay; where there are fewer tokens, the last ones go.

        Args:
            new_num_tokens: How many tokens, as ``len(tokenizer)``; None for as many as there are.
            pad_to_multiple_of: The number is rounded up to a multiple of this.
            mean_resizing: Whether new rows are about the mean of the old ones, or random as in a fresh model.
            key: Random key of new rows; None means ``jax.random.key(0)``.

        Raises:
            ValueError: if there would be no token, or the embedding or the head is adapted or quantized.

        Example:
            >>> from peft_jax.cli.demo_data import MODEL
            >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
            >>> model.resize_token_embeddings(2049, pad_to_multiple_of=8).config.vocab_size
            2056
        """
        tokens = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            tokens = -(-tokens // pad_to_multiple_of) * pad_to_multiple_of
        key = jax.random.key(0) if key is None else key
        config, params = resized(self.family, self.config, self.params, tokens, mean_resizing=mean_resizing, key=key)
        warn_if_discarded("model.resize_token_embeddings(...)")
        return dataclasses.replace(self, config=config, params=params)

    def resized_for(self, adapter: str | os.PathLike[str]) -> Self:
        """The same model with the tokens that an adapter's file or the tokenizer beside it has.

        The commands and `AutoPeftModel` do so before they load an adapter; without such a table or tokenizer it is
        the model as it is.

        Args:
            adapter: Folder of the adapter.
        """
        named = self.named_for(adapter)
        tokens = tokens_of_adapter(named, named.config, adapter)
        return named if tokens == self.config.vocab_size else named.resize_token_embeddings(tokens)

    def named_for(self, adapter: str | os.PathLike[str]) -> Self:
        """The same model under the module names that an adapter's keys have, if that is a text model's other name.

        Adapters of a multimodal model fit its text model so, and are written back under their keys. A model that has
        adapters keeps its names.

        Args:
            adapter: Folder of the adapter.
        """
        file = pathlib.Path(adapter) / WEIGHTS_FILE
        if not file.is_file() or adapters(self.params):
            return self
        config = config_for(self.config, read_header(file))
        if config is self.config:
            return self
        return dataclasses.replace(self, config=config, params=params_for(self.config, self.params, config))

    @property
    def moved_modules(self) -> Mapping[str, str]:
        """The starts of keys in old adapters, and the starts of today for them."""
        return self.family.moved

    @property
    def declared_modules(self) -> Sequence[str]:
        """Paths of the modules without numbers of layers, of which those of one parent are as PyTorch declares them."""
        return self.family.declared_modules(self.config)

    def replicated(self, order: Sequence[int]) -> Self:
        """The same model with the layers numbered by ``order``, with this one's weights."""
        config, params = self.family.replicated(self.config, self.params, order)
        return dataclasses.replace(self, config=config, params=params)

    def dropping(self, key: jax.Array) -> Self:
        """The same model, whose base drops by this key as it does in training; the model itself if it drops nothing.

        Example:
            >>> from peft_jax.models import GPT2Config
            >>> config = GPT2Config(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
            >>> model, ids = pj.AutoModelForCausalLM.from_config(config), jnp.array([[1, 2, 3]])
            >>> bool(jnp.allclose(model.dropping(jax.random.key(0))(ids).logits, model(ids).logits))
            False
        """
        if not any(self.config.rates):
            return self
        return dataclasses.replace(self, dropout_key=jax.random.fold_in(key, BASE))

    def replace(self, params: PyTree) -> Self:
        """The same model with other parameters."""
        return dataclasses.replace(self, params=params)


def token_ids(ids: Any, vocabulary: int, name: str = "input_ids") -> jax.Array:
    """Ids as an array, checked where they have values; under `jax.jit` one out of range gives an embedding of NaN.

    Raises:
        ValueError: if an id is not one of the vocabulary.
    """
    ids = as_batch(ids, name)
    if bounds := is_outside(ids, vocabulary):
        raise ValueError(
            f"{name} are from {bounds[0]} to {bounds[1]}, but the vocabulary has ids 0 to {vocabulary - 1}. "
            "Use the tokenizer of this model, and -100 in labels alone."
        )
    return jnp.asarray(ids)


@functools.lru_cache(maxsize=64)
def _forward(config: ModelConfig) -> Callable[..., Any]:
    """The compiled forward pass of an architecture, from parameters, inputs and each row's task."""
    family = family_of(config)

    @adapt
    def run(params: PyTree, prompt: Prompt, inputs: ForwardInputs) -> Any:
        apply = partial(apply_beside, family, config, params, prompt.shadow)
        embed = partial(family.embed, config, params)
        return apply_prompted(apply, embed, prompt, inputs, config.task_type)

    def forward(params: PyTree, inputs: ForwardInputs, task_ids: jax.Array | None) -> Any:
        rest, prompt = take_prompt(params, task_ids)
        if prompt.router is None:
            return run(rest, prompt, inputs)
        return in_two_passes(config, lambda tree, one: run(tree, Prompt(), one), rest, prompt.router, inputs)

    return jax.jit(forward)

"""The interface of a prompt method: arrays of its own, and what they give a model beside its inputs.

A prompt changes no weight. Its arrays are stored in the tree like those of an adapted leaf (on the input embedding, or
for adaption prompts on a matrix of the attention), so that partition, switching, saving and the rest work on them as on
any adapter; a model handle takes them out of the tree in its forward pass (`take_prompt`) and hands on what they give.
Config classes keep PEFT's class names, field names and defaults (PEFT 0.21.2).
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.task_ids import check_tasks, methods_with_tasks, with_task_ids
from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.articles import article
from peft_jax.core.handle import Handle
from peft_jax.core.ids import is_outside
from peft_jax.core.product import Product
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import MergeError, Weight
from peft_jax.methods.base import Arrays, Method

PROMPT = "prompt"  # the role of the virtual tokens' array
IGNORED_LABEL = -100


class Adaption(NamedTuple):
    """Prompts on the side of each layer's attention.

    prompts are (layers, length, hidden), gates (layers, 1), and on (layers,) marks the layers that have one.
    """

    prompts: jax.Array
    gates: jax.Array
    on: jax.Array


class ShadowSizes(NamedTuple):
    """The sizes of a shadow network, of which None are the model's.

    Attributes:
        layers: The number of its layers.
        hidden: Its hidden features.
        heads: Its heads of attention.
        inner: The width of its feed-forward network.
        shares: Whether it reads the model's embeddings of tokens, where its hidden features are as many.
    """

    layers: int = 1
    hidden: int | None = None
    heads: int | None = None
    inner: int | None = None
    shares: bool = True


@partial(jax.tree_util.register_dataclass, data_fields=("arrays", "dropout"), meta_fields=("sizes", "alpha"))
@dataclasses.dataclass(frozen=True)
class ShadowPart:
    """A shadow network, and what its state does to the layers.

    Attributes:
        arrays: Its arrays by PyTorch's names, as PyTorch has them.
        dropout: Rate and random key of the dropout in training; empty without.
        sizes: Its sizes.
        alpha: What the correction of a layer's input is multiplied by.
    """

    arrays: dict[str, jax.Array]
    dropout: dict[str, Any]
    sizes: ShadowSizes
    alpha: float


class Prompt(NamedTuple):
    """One of the things that a prompt gives a model.

    tokens are embeddings (1 or batch, n, hidden) that stand before the inputs', and decoder_tokens those before the
    inputs of the decoder, where a prompt has tokens for both. prefix is keys and values, each
    (layers, 1, n, kv_heads, head_dim), that every position of every layer sees before its own. shadow is a network
    beside the model. router is that of an X-LoRA (`peft_jax.prompts.xlora.Router`), which is no array, and stays out of
    compiled programs' arguments.
    """

    tokens: jax.Array | None = None
    prefix: tuple[jax.Array, jax.Array] | None = None
    adaption: Adaption | None = None
    decoder_tokens: jax.Array | None = None
    shadow: ShadowPart | None = None
    router: Any = None


class PromptMethod(Method):
    """A method that gives a model something beside its inputs; it goes on a model handle, not on a bare tree."""

    on_model: ClassVar[bool] = True

    @property
    def trains_from_file(self) -> bool:
        """Whether the file holds the trained arrays themselves, so that they can be trained on."""
        return True

    @abc.abstractmethod
    def places(self, modules: Sequence[str], handle: Handle) -> list[str]:
        """Which modules' matrices carry the arrays.

        Args:
            modules: Paths of all modules of the model that have a matrix.
            handle: The model.

        Raises:
            ValueError: if the model has none.
        """

    @abc.abstractmethod
    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """The prompt that the arrays give the model; ``task_ids`` (batch,) only where a method has tasks."""

    def init_prompt(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Trained and frozen arrays of a fresh prompt on ``base``, the input embedding."""
        return self.init(base.layout, base.shape, names, adapted, key)

    @property
    def virtual_tokens(self) -> int:
        """How many tokens stand before the inputs'."""
        return 0

    @property
    def slots(self) -> int:
        """How many slots of a cache it takes."""
        return self.virtual_tokens

    @property
    def tasks(self) -> int:
        """How many tasks it has, of which each row of a batch names one; 0 if it knows none."""
        return 0

    def labelled(self, labels: jax.Array, input_types: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Labels of virtual tokens and inputs for the loss: the former have none, unless a method says so.

        Args:
            labels: Those of the inputs ``(batch, length)``.
            input_types: The types of the inputs ``(batch, length)``, for a method that knows types.

        Returns:
            Labels ``(batch, n + length)``, and how much the loss of each counts; None for equal weights.

        Raises:
            ValueError: if types are given to a method that knows none.
        """
        if input_types is not None:
            raise ValueError(f"input_type_mask is for CPT, and the adapter is {self.peft_type}. Leave it out.")
        return jnp.pad(labels, ((0, 0), (self.virtual_tokens, 0)), constant_values=IGNORED_LABEL), None

    def merge(self, params: Arrays, state: Arrays, matrix: jax.Array) -> NoReturn:
        """Raise MergeError: a prompt is no change of a weight."""
        raise MergeError(
            f"{article(self.peft_type, first=True)} adapter has no merged form: it changes what a model is given, not "
            "its weights. Keep it as an adapter (pj.interop.save_adapter), or take it off: pj.unload, "
            "pj.disable_adapter."
        )

    def apply(self, params: Arrays, state: Arrays, base: Weight, x: jax.Array, product: Product) -> NoReturn:
        """Raise MergeError: only a model handle knows what to do with a prompt."""
        raise MergeError(
            f"{article(self.peft_type, first=True)} adapter takes effect in a model handle's call, not in its tree "
            "of weights. Call the model that pj.get_peft_model gives, or take the adapter off: "
            "pj.disable_adapter(params)."
        )


def take_prompt(params: PyTree, task_ids: jax.Array | None = None) -> tuple[Any, Prompt]:
    """A tree or model handle without its prompts, and what the active one gives.

    Other adapters that depend on the task of a row are handed it.

    Args:
        params: The tree.
        task_ids: The task of each row ``(batch,)``, for adapters that have tasks.

    Raises:
        ValueError: if several prompts are active, or tasks are given to one that has none.
    """
    active = active_prompts(params)
    rest = without_prompts(params)
    if len(active) > 1:
        names = [leaf.tag.name for leaf in active]
        raise ValueError(f"Prompts {names} are active, and a model takes one. Choose: pj.set_adapter(model, NAME).")
    if task_ids is not None:
        in_weights = bool(methods_with_tasks(rest))
        if not in_weights and not any(leaf.tag.config.tasks for leaf in active):
            raise ValueError(
                "task_ids are for MULTITASK_PROMPT_TUNING and POLY, and no such adapter is active. Leave them out."
            )
        rest = with_task_ids(rest, task_ids) if in_weights else rest
    if not active:
        return rest, Prompt()
    (leaf,) = active
    return rest, leaf.tag.config.give(leaf.params, leaf.state, task_ids)


def with_virtual_labels(
    params: PyTree, labels: jax.Array, input_type_mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """Labels ``(batch, n + length)`` with those of virtual tokens in front, and weights of the losses or None.

    Args:
        params: A tree or model handle, whose prompt may have virtual tokens.
        labels: ``(batch, length)``.
        input_type_mask: What each token of the inputs is ``(batch, length)``, for CPT; see `CPTConfig`.

    Raises:
        ValueError: if types are given where there is no CPT, or of another shape than labels.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, pj.PromptTuningConfig(num_virtual_tokens=2))
        >>> with_virtual_labels(model, jnp.array([[5, 6]]))[0].tolist()
        [[-100, -100, 5, 6]]
    """
    if input_type_mask is not None and input_type_mask.shape != labels.shape:
        raise ValueError(f"input_type_mask must be {labels.shape}, like labels, got {input_type_mask.shape}.")
    found = [leaf.tag.config for leaf in active_prompts(params) if leaf.tag.config.virtual_tokens]
    if not found and input_type_mask is not None:
        raise ValueError("input_type_mask is for CPT, and no such adapter is active. Leave it out.")
    return found[0].labelled(labels, input_type_mask) if found else (labels, None)


def task_array(params: PyTree, task_ids: Any) -> jax.Array | None:
    """Each row's task as an array, checked where it has values; under `jax.jit` one out of range gives NaN.

    Raises:
        ValueError: if there is no such task.
    """
    if task_ids is None:
        return None
    for leaf in active_prompts(params):
        tasks = leaf.tag.config.tasks
        if tasks and (found := is_outside(task_ids, tasks)):
            said = f"from {found[0]} to {found[1]}"
            raise ValueError(f"task_ids are {said}, but the prompt has the tasks 0 to {tasks - 1}. Name these.")
    check_tasks(params, task_ids)
    return jnp.asarray(task_ids)


def without_prompts(params: PyTree) -> Any:
    """A tree or model handle without its prompts."""
    return map_adapted(lambda _, leaf: leaf.base if isinstance(leaf.method, PromptMethod) else leaf, params)


def active_prompts(params: PyTree) -> list[Adapted]:
    """The leaves with the arrays of active prompts."""
    return [leaf for _, leaf in adapted_leaves(params) if leaf.active and isinstance(leaf.method, PromptMethod)]


def virtual_slots(params: PyTree) -> int:
    """How many slots of a cache the active prompt of a tree or model handle takes."""
    return sum(leaf.tag.config.slots for leaf in active_prompts(params))


def prompt_tasks(params: PyTree) -> int:
    """How many tasks the active adapters of a tree or model handle have, of which a row has to name one; 0 if none.

    A row need not name the only task of a POLY.
    """
    of_prompts = [leaf.tag.config.tasks for leaf in active_prompts(params)]
    of_weights = [method.tasks for method in methods_with_tasks(params)]
    return max([0, *of_prompts, *of_weights])

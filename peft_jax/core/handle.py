"""The interface of a model handle, for the packages below the models."""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax

from peft_jax.core.layout import Layout
from peft_jax.core.pytree import PyTree


class Handle(abc.ABC):
    """A model as a frozen dataclass and pytree: its parameters are its leaves, all else is static.

    Attributes:
        params: Tree of parameters; dotted paths of its leaves mirror the Hugging Face module names.
    """

    params: PyTree

    @property
    @abc.abstractmethod
    def name_or_path(self) -> str | None:
        """Folder or hub id that the model was read from."""

    @property
    @abc.abstractmethod
    def task_type(self) -> str | None:
        """PEFT's name for what the model does, e.g. ``"CAUSAL_LM"``; None if it has none."""

    @property
    @abc.abstractmethod
    def output_module(self) -> str | None:
        """Path of the output head, which ``all-linear`` leaves out."""

    @property
    @abc.abstractmethod
    def input_module(self) -> str:
        """Path of the input embedding."""

    @property
    @abc.abstractmethod
    def adaption_carrier(self) -> str:
        """Name of the matrix of an attention module whose leaf carries adaption prompts; empty if there is none."""

    @abc.abstractmethod
    def defaults(self, peft_type: str) -> Mapping[str, Any]:
        """PEFT's defaults for such a model, by field of the method's config."""

    @property
    def single_experts(self) -> Mapping[str, tuple[str, ...]]:
        """By the end of a fused parameter's name the ends of those of single experts, with ``{}`` for their number."""
        return {}

    @property
    @abc.abstractmethod
    def tied_modules(self) -> tuple[str, ...]:
        """Paths of modules that share one leaf; adapting one of them needs `untied` first."""

    @abc.abstractmethod
    def layouts(self) -> Mapping[str, Layout]:
        """Axes of the leaves, by regex over whole leaf paths."""

    @abc.abstractmethod
    def untied(self) -> Self:
        """The same model with a leaf of its own for each tied module."""

    @abc.abstractmethod
    def replicated(self, order: Sequence[int]) -> Self:
        """The same model whose layers are those of ``order``, with the weights that they had.

        Raises:
            ValueError: if it has no such layer, or PEFT replicates none of such a model.
        """

    def dropping(self, key: jax.Array) -> Self:
        """The same model, whose base drops by this key as it does in training; the model itself if it drops nothing."""
        return self

    @property
    def moved_modules(self) -> Mapping[str, str]:
        """The starts of keys in old adapters, and the starts of today for them."""
        return {}

    @property
    def declared_modules(self) -> Sequence[str]:
        """Paths of the modules without numbers of layers, of which those of one parent are as PyTorch declares them."""
        return ()

    @abc.abstractmethod
    def replace(self, params: PyTree) -> Self:
        """The same model with other parameters."""

"""PEFT's verbs on a model with adapters, each a method that returns a new handle and leaves the old one as it is."""

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from peft_jax.adapters.combine.weighted_lora import add_weighted_adapter
from peft_jax.adapters.per_row import with_adapter_rows
from peft_jax.adapters.task_ids import TaskIds
from peft_jax.core.adapted_tree import adapters
from peft_jax.core.discarded import warn_if_discarded
from peft_jax.core.merge import active_adapters, delete_adapter, disable_adapter, set_adapter, set_requires_grad
from peft_jax.core.partition import count_parameters
from peft_jax.core.summary import trainable_parameters
from peft_jax.methods.base import Method
from peft_jax.models.handles.adapter_status import (
    TunerLayerStatus,
    TunerModelStatus,
    get_layer_status,
    get_model_status,
)
from peft_jax.models.handles.base import ModelHandle


class AdapterVerbs(ModelHandle):
    """Base class of models with adapters: switches, adds, removes and describes them.

    A handle is immutable. ``model.set_adapter("b")`` as a statement changes nothing, and a warning says so; nor does
    ``with model.disable_adapter():``. Write ``with model.disable_adapter() as base:``, and call ``base``.
    """

    def __enter__(self) -> Self:
        """The handle itself, for ``with model.disable_adapter() as base:``."""
        warn_if_discarded("model.disable_adapter()")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo: the model that was switched is another handle."""

    @property
    def peft_config(self) -> dict[str, Method]:
        """The config of every adapter by its name."""
        return adapters(self.params)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they are applied."""
        return active_adapters(self.params)

    @property
    def active_adapter(self) -> str:
        """The name of the active adapter.

        Raises:
            ValueError: if none is active, or several are.
        """
        names = self.active_adapters
        if len(names) != 1:
            raise ValueError(f"Active are {names or 'no adapters'}, of {list(self.peft_config)}. Ask active_adapters.")
        return names[0]

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool | None = None) -> Self:
        """The model with one adapter active, or several, and the others not: `peft_jax.set_adapter`."""
        warn_if_discarded("model.set_adapter(...)")
        return self.replace(set_adapter(self.params, adapter_name, inference_mode=inference_mode))

    def disable_adapter(self) -> Self:
        """The model with no adapter active, for ``with model.disable_adapter() as base:`` or an assignment."""
        warn_if_discarded("model.disable_adapter()")
        return self.replace(disable_adapter(self.params))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> Self:
        """The model whose adapters of these names are trained while they are active, or are frozen."""
        warn_if_discarded("model.set_requires_grad(...)")
        return self.replace(set_requires_grad(self.params, adapter_names, requires_grad))

    def delete_adapter(self, adapter_name: str) -> Self:
        """The model without one adapter. If no other is active then, the first one is, as in PEFT, with a warning.

        Raises:
            ValueError: if there is no such adapter.
        """
        warn_if_discarded("model.delete_adapter(...)")
        was_active = self.active_adapters
        left = self.replace(delete_adapter(self.params, adapter_name))
        if was_active == [adapter_name] and left.peft_config:
            first = next(iter(left.peft_config))
            warnings.warn(
                f"Adapter '{adapter_name}' was active and is deleted. Active is '{first}' now, as in PEFT.",
                stacklevel=2,
            )
            left = left.replace(set_adapter(left.params, first))
        return left

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        **options: Any,
    ) -> Self:
        """The model with one adapter more, made of others, not active: `peft_jax.add_weighted_adapter`."""
        warn_if_discarded("model.add_weighted_adapter(...)")
        return add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, **options)

    def with_adapter_rows(self, adapter_names: Sequence[str], task_ids: TaskIds | None = None) -> Self:
        """The model that computes each row of a batch with its own adapter: `peft_jax.with_adapter_rows`."""
        warn_if_discarded("model.with_adapter_rows(...)")
        return with_adapter_rows(self, adapter_names, task_ids)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of trained and of all elements."""
        return count_parameters(self.params)

    def print_trainable_parameters(self) -> None:
        """Print PEFT's line of trainable and all parameters."""
        print(trainable_parameters(self.params))

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of every layer that has an adapter: `peft_jax.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of all adapters: `peft_jax.get_model_status`."""
        return get_model_status(self)

"""The interface of a method, one frozen dataclass of hyperparameters with ``init`` and ``merge``, and the registry.

Config classes keep PEFT's class names, field names and defaults (PEFT 0.21.2).
"""

import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.field_kinds import is_kind
from peft_jax.core.hub import ADAPTER_FILES, HubOptions, find_folder
from peft_jax.core.layout import Layout
from peft_jax.core.paths import keys_from_names
from peft_jax.core.product import Product
from peft_jax.core.short_errors import short_errors
from peft_jax.core.targets import by_end
from peft_jax.core.text_files import read_object
from peft_jax.core.weight import Weight
from peft_jax.methods.fields import check_fields, is_off
from peft_jax.methods.target_fields import AbsentFields

CONFIG_FILE = "adapter_config.json"
Arrays = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Fields that every PEFT config has; PEFT reads and writes them as ``adapter_config.json``.

    Attributes:
        learning_rate: The peak that suits the method with AdamW, which ``peft-jax finetune`` takes by default: that of
            the method's paper or of PEFT's examples, 3e-4 for changes of low rank.
        task_type: What the adapter is for, e.g. ``"CAUSAL_LM"``; None if unsaid.
        base_model_name_or_path: Folder or hub id of the base model.
        revision: Revision of the base model on the hub.
        inference_mode: True to attach the adapter frozen.
        auto_mapping: Names of a custom base class, as PEFT stores them.
        peft_version: Version that wrote the config; ours when written here.
    """

    peft_type: ClassVar[str]
    learning_rate: ClassVar[float] = 3e-4
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    def replace(self, **changes: Any) -> Self:
        """The config with other values of some fields."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``peft_type``, as PEFT writes them to ``adapter_config.json``."""
        return {
            "peft_type": self.peft_type,
            **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """A config from the contents of an ``adapter_config.json``; its ``peft_type`` chooses the class.

        Raises:
            ValueError: if ``peft_type`` is missing or unsupported, or a field is unknown.

        Example:
            >>> PeftConfig.from_dict({"peft_type": "LORA", "r": 4}).r
            4
        """
        with short_errors():
            return cls._from_dict(dict(fields))

    @classmethod
    def _from_dict(cls, given: dict[str, Any]) -> Self:
        peft_type = given.pop("peft_type", getattr(cls, "peft_type", None))
        if peft_type is None:
            raise ValueError(f"An adapter config needs 'peft_type', found only {sorted(given)}.")
        target = by_name(peft_type)
        if not issubclass(target, cls):
            raise ValueError(f"{cls.__name__} cannot read a config of peft_type '{peft_type}'. Use PeftConfig.")
        target.check_file(given)
        given = target.fields_of_file(given)
        known = {field.name: field.type for field in dataclasses.fields(target)}
        # Fields of other PEFT versions that are switched off say nothing; any other could change the numbers.
        unknown = {name: value for name, value in given.items() if name not in known and not is_off(value)}
        if unknown:
            raise ValueError(f"{target.__name__} does not know {unknown}. Remove these fields if they change nothing.")
        # Null, in the files of some older versions, means the default of a field that has no other use for it. PEFT
        # takes it for False, so that it is refused where the default is True.
        is_on = {field.name for field in dataclasses.fields(target) if field.default is True}
        has_value = {
            name: value is not None or is_kind(None, known.get(name)) or name in is_on for name, value in given.items()
        }
        return target(**{name: value for name, value in given.items() if name in known and has_value[name]})

    @classmethod
    def check_file(cls, fields: Mapping[str, Any]) -> None:
        """Raise ValueError if the adapter of a file with these fields means other numbers than ours."""

    @classmethod
    def fields_of_file(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a file that still count; override where it keeps others of what is finished."""
        return dict(fields)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **options: Unpack[HubOptions]) -> Self:
        """Read ``adapter_config.json`` from a folder, or from a repository of the Hugging Face hub.

        Args:
            directory: Folder, or id on the hub.
            **options: Where on the hub, as `peft_jax.core.hub.HubOptions` says.

        Raises:
            FileNotFoundError: if there is no such folder or id, or it holds no ``adapter_config.json``.
            ValueError: if it is not a JSON object, or as in `from_dict`.
        """
        path = find_folder(directory, ADAPTER_FILES, options) / CONFIG_FILE
        if not path.is_file():
            raise FileNotFoundError(f"No {CONFIG_FILE} in '{directory}'. Give the folder of a saved adapter.")
        rule = "Save the adapter again."
        return cls.from_dict(read_object(path, CONFIG_FILE, rule, f"'{path}'"))


class Method(AbsentFields, PeftConfig):
    """A method that changes weights: how its arrays are initialized, and what the adapted matrix is.

    Arrays are in two dictionaries, ``params`` (trained) and ``state`` (frozen), both with the stacked axes first.
    ``merge`` and ``apply`` see one layer, without stacked axes. A stack whose layers differ is padded; arrays of
    layers that are not adapted are zero. What only some methods do is in base classes of its own: `Ranked`,
    `StartsFromWeight`, `FrozenArrays`, `SharedArrays`, `TrainedSharedArrays`, `GroupedArrays`, `BiasRule`,
    `TrainingHooks`.

    Attributes:
        axes: Axes of a file's arrays after the stacked ones, by role; ``in`` and ``out`` are the matrix's.
        structural: The fields that change what is computed beyond what the arrays say; ``merge`` and ``apply`` read no
            others.
        side_path: Whether `apply` is cheaper than merging.
        first: Role of the trained ``(in, rank)`` that `apply` gives to ``product.down_by_role``.
        on_model: Whether the adapter goes on a model handle and changes no weight.
        on_input: Whether its default target is a model's input embedding.
        takes_conv1d: Whether PEFT has it for layers that PyTorch stores as (in, out).
        notes_storage: Whether PEFT sets ``fan_in_fan_out`` by what it finds, if there is the field.
        replaces: Whether it trains a copy of every leaf of a target, and has no arrays of its own.
        reads_base: Whether `merge` may look at the matrix without the adapters under this one.
        carried: Roles of trained arrays that leaves of an adapter share (`TrainedSharedArrays`, `GroupedArrays`).
        counts_modules: Whether its numbers depend on the order of the modules, as `SharedArrays.numbered` takes it.
        over_rows: Whether what it computes of a row depends on the other rows of a batch.
        mixes: Whether PEFT's PeftMixedModel has it active beside other such methods.
        is_whole: Whether the leaf is a trained copy in place of its base.
        packages: Packages beside JAX that its frozen arrays depend on. A run goes on with the versions it began with.
        bias_only: The value of ``bias`` for those of adapted modules, if not the method's name.
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    structural: ClassVar[tuple[str, ...]] = ()
    side_path: ClassVar[bool] = True
    first: ClassVar[str | None] = None
    on_model: ClassVar[bool] = False
    on_input: ClassVar[bool] = False
    takes_conv1d: ClassVar[bool] = True
    notes_storage: ClassVar[bool] = True
    replaces: ClassVar[bool] = False
    reads_base: ClassVar[bool] = False
    carried: ClassVar[Collection[str]] = ()
    counts_modules: ClassVar[bool] = False
    over_rows: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    is_whole: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()
    bias_only: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self, self.peft_type)

    def structure(self) -> tuple[Any, ...]:
        """A key that two configs share exactly if their adapters run in the same compiled program.

        Dropout counts in training only, so that adapters to serve can be swapped whatever theirs was.
        """
        rates = () if self.inference_mode else tuple(self.dropout_rates.values())
        return (type(self), rates, *(getattr(self, name) for name in self.structural))

    @property
    def label(self) -> str:
        """The method's name in tables."""
        return self.peft_type

    @property
    def dropout_rate(self) -> float:
        """Probability with which `peft_jax.with_dropout` zeroes an input of the adapter."""
        return 0.0

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """The probabilities of all that it drops, by name; ``"rate"`` is `dropout_rate`."""
        return {"rate": self.dropout_rate}

    @property
    def patterns(self) -> Mapping[str, str]:
        """Patterns of module paths in the config, which each name a target, and their expressions of whole paths."""
        return {pattern: by_end(pattern) for pattern in (*self.rank_pattern, *self.alpha_pattern)}

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """The config with a model's defaults in place of the fields that are None."""
        return self.replace(**{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays that a module's adapter trains, by role, without padding or stacked axes.

        Args:
            module: Its path.
            n_in: Rows of its matrix.
            n_out: Columns of its matrix.
            lookup: Whether it is an embedding.

        Raises:
            ValueError: if the module's sizes do not suit the config.
        """
        raise NotImplementedError

    def fits(self, module: str, layout: Layout) -> bool:
        """Whether ``all-linear`` can mean a matrix of such axes: one that it cannot is an error where it is named."""
        return True

    def leaf_shapes(self, module: str, layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`shapes` at a module whose leaf is of ``shape``; override where the matrix's sizes alone do not tell."""
        return self.shapes(module, *layout.sizes(shape), lookup=layout.lookup)

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """One of these arrays of one layer of a fresh adapter, float32."""
        raise NotImplementedError

    def init(
        self, layout: Layout, shape: tuple[int, ...], names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """Trained and frozen arrays for a leaf that stands for the layers ``names``, some of them ``adapted``."""
        layers = [dict[str, tuple[int, ...]]()] * names.size
        for at in np.flatnonzero(adapted):
            layers[at] = self.leaf_shapes(names.flat[at], layout, shape)
        params = {}
        for number, role in enumerate(self.axes):
            if not (shapes := [layer[role] for layer in layers if role in layer]):
                continue
            largest = tuple(np.max(shapes, axis=0).tolist())
            keys = jnp.reshape(keys_from_names(jax.random.fold_in(key, number), names), (-1,))
            arrays = [jnp.zeros(largest)] * len(layers)
            for i, layer in enumerate(layers):
                if role in layer:
                    drawn = self.initialize(role, layer[role], keys[i], lookup=layout.lookup)
                    arrays[i] = jnp.pad(drawn, [(0, n - m) for n, m in zip(largest, layer[role], strict=True)])
            params[role] = jnp.reshape(jnp.stack(arrays), (*names.shape, *largest))
        return params, self.state(names, adapted)

    def of_file(self, shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """The config of the adapter that a file holds, by the shapes of its tensors; it may say another than PEFT made.

        Raises:
            ValueError: if the file is of no adapter of this config.
        """
        return self

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """The frozen arrays of `init` alone, for an adapter that is read from a file."""
        return {"hit": jnp.asarray(adapted)}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """Number of trained elements of each stacked layer, padding not counted."""
        adapted = np.asarray(state["hit"])
        return adapted * sum(int(np.prod(array.shape[adapted.ndim :])) for array in params.values())

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """The adapted matrix, same shape and dtype as ``matrix``: ``(in, out)``, or ``(out,)`` for a vector."""
        raise NotImplementedError

    def stacks_on(self, inner: Any) -> bool:
        """Whether both can be active on one layer, as in PEFT: those of one method, and those of its mixed models.

        A weight that another adapter trained whole is a weight like any.
        """
        return type(self) is type(inner) or (self.mixes and inner.mixes) or inner.is_whole

    def has_array(self, role: str, *, biased: bool) -> bool:
        """Whether a module's adapter has an array of `shapes`, given whether the adapter changes a bias of it."""
        return True

    def for_bias(self, params: Arrays, state: Mapping[str, Any], base: Weight) -> dict[str, jax.Array]:
        """The arrays, stacked axes first, with which a layer's bias follows its matrix, of the weight ``base``."""
        return dict(params)

    def bias_roles(self, params: Arrays) -> set[str]:
        """Names of those of `for_bias`."""
        return set(params)

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The arrays as PEFT's file has them."""
        return params

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``product.full(x, merge(...))``; override where it is cheaper than merging."""
        return apply_merged(self, params, state, base, x, product)


M = TypeVar("M", bound=type[PeftConfig])
_METHODS: dict[str, type[PeftConfig]] = {}
_REGISTERING = ("peft_jax.methods", "peft_jax.prompts")  # packages whose import registers configs


def register(peft_type: str) -> Callable[[M], M]:
    """Enter a config class under PEFT's name for it, so that files and commands find it."""

    def enter(cls: M) -> M:
        cls.peft_type = peft_type
        cls.__hash__ = PeftConfig.__hash__  # type: ignore[method-assign]  # dataclass would hash dictionaries
        _METHODS[peft_type] = cls
        return cls

    return enter


def by_name(peft_type: str) -> type[PeftConfig]:
    """The config class that PEFT calls ``peft_type``.

    Raises:
        ValueError: if there is none.

    Example:
        >>> by_name("LORA").__name__
        'LoraConfig'
    """
    if peft_type not in names():
        raise ValueError(f"peft_type '{peft_type}' is not supported. Supported: {', '.join(names())}.")
    return _METHODS[peft_type]


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def names() -> list[str]:
    """PEFT's names of all supported methods, whether or not their modules have been imported yet."""
    for package in _REGISTERING:
        importlib.import_module(package)
    return sorted(_METHODS)

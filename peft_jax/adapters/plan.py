"""Plan an adapter: which leaves it changes, and in which roles. `peft_jax.adapters.build` then builds it."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from peft_jax.adapters.target_parameters import names_parameter
from peft_jax.core.declared_order import in_declared_order
from peft_jax.core.leaves import Leaf, is_float, is_matrix
from peft_jax.core.selecting import only
from peft_jax.core.targets import is_saved_module
from peft_jax.core.weight import as_weight
from peft_jax.methods.base import Method
from peft_jax.methods.grouped_arrays import GroupedArrays
from peft_jax.methods.packed_tensors import PackedTensors
from peft_jax.methods.roles import BIAS, REPLACED, SAVED, BiasRule, Follower, FollowingCopy, Role, Whole
from peft_jax.methods.shared_arrays import SharedArrays
from peft_jax.methods.starts_from_weight import Neighbours, StartsAmongWeights
from peft_jax.methods.trainable_tokens import Tokens


class Target(NamedTuple):
    """A leaf that an adapter changes.

    Attributes:
        position: Its position among the leaves of the tree.
        leaf: The leaf.
        adapted: Which of its stacked layers are changed, of its stacked shape.
        role: Its role; None for the matrix of a target module.
    """

    position: int
    leaf: Leaf
    adapted: np.ndarray
    role: Role | None


def plan(
    found: Sequence[Leaf],
    config: Method,
    modules: Collection[str],
    tokens: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> list[Target]:
    """The leaves that an adapter changes, and their roles in it.

    Args:
        found: All leaves of the tree.
        config: The adapter's config.
        modules: Names of the modules whose matrices get the method's arrays.
        tokens: Ids of trained tokens by module.

    Raises:
        ValueError: if one of them has ambiguous axes, or is to be changed in two ways; or two of them have one name in
            PEFT's files.
    """
    targets = []
    seen: dict[tuple[str, str], str] = {}
    for position, leaf in enumerate(found):
        role, adapted = _role_of(leaf, config, modules)
        ids = _tokens_of(leaf, tokens) if tokens else ()
        if ids and adapted.any():
            raise ValueError(
                f"Tokens of '{leaf.names.flat[0]}' are named in trainable_token_indices, and the module in "
                f"{'target_modules' if role is None else role.label} too. Name it in one of them."
            )
        if ids:
            role, adapted = Tokens(ids), _where(leaf, lambda name: name in tokens)
        if not adapted.any():
            continue
        layout = leaf.required_layout()
        if layout.unnamed and not names_parameter(config, leaf):
            raise ValueError(
                f"Leaf '{leaf.path}' of shape {leaf.value.shape} stacks experts without names of their own. Name "
                "it in target_parameters."
            )
        if layout.parameter and role is None and not names_parameter(config, leaf):
            raise ValueError(
                f"'{leaf.names.flat[0]}' is no linear layer, so that no file of PEFT's can hold an adapter of it as a "
                "module. Name its weight in target_parameters (LoRA), or leave it out of target_modules."
            )
        target = Target(position, leaf, adapted, role)
        _check_names(target, seen)
        targets.append(target)
    return targets


def _role_of(leaf: Leaf, config: Method, modules: Collection[str]) -> tuple[Role | None, np.ndarray]:
    """The role of a leaf, and in which of its stacked layers it has it; trained tokens are left out."""
    saved = np.zeros(leaf.names.shape, bool)
    if config.modules_to_save:
        saved = _where(leaf, lambda name: is_saved_module(config, name))
    if saved.any():
        both = sorted(set(leaf.modules) & set(modules) - set(leaf.names[saved]))
        if both:
            raise ValueError(
                f"Leaf '{leaf.path}' stacks layers of which {both[:3]} are targets and others are in "
                "modules_to_save, which one leaf cannot be. Save all of its layers, or none."
            )
        return Whole(SAVED), saved
    if config.replaces and is_float(leaf):
        return Whole(REPLACED), _where(leaf, lambda name: name in modules)
    if leaf.is_bias:
        follows = _where(leaf, lambda name: _follows(config, name, modules)).any()
        whole = FollowingCopy(BIAS) if follows else Whole(BIAS)
        role = Follower() if config.bias == "none" else whole
        return role, _where(leaf, lambda name: _changes_bias(config, name, modules))
    if config.bias == "all" and leaf.path.endswith("_bias"):
        raise ValueError(
            f"bias='all' means '{leaf.names.flat[0]}' too, which is not the bias of a linear layer and is not "
            "supported. Write bias='none', or train the biases of targets alone, as LoRA's 'lora_only'."
        )
    if is_matrix(leaf):
        return None, _where(leaf, lambda name: name in modules)
    return None, np.zeros(leaf.names.shape, bool)


def _where(leaf: Leaf, condition: Callable[[str], bool]) -> np.ndarray:
    """Which of a leaf's layers have names that meet a condition, of its stacked shape."""
    return np.vectorize(condition, otypes=[bool])(leaf.names)


def _tokens_of(leaf: Leaf, tokens: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Ids of the tokens that are trained in a leaf."""
    if is_matrix(leaf):
        for name in leaf.names.flat:
            if name in tokens:
                return tokens[name]
    return ()


def _check_names(target: Target, seen: dict[tuple[str, str], str]) -> None:
    """Note PEFT's names of a target, and raise ValueError if another leaf has one of them.

    A matrix has the name of its module, as PEFT adapts modules; a leaf that is trained whole has one of its own there.
    """
    leaf, has_name_of_module = target.leaf, target.role is None or isinstance(target.role, Tokens)
    own = "" if has_name_of_module else leaf.torch_name
    for name in leaf.names[target.adapted]:
        other = seen.setdefault((name, own), leaf.path)
        if other != leaf.path:
            raise ValueError(
                f"The leaves '{other}' and '{leaf.path}' are both '{name}{own and '.'}{own}' for PEFT, whose files "
                "have one tensor of that name. Rename one of them, or exclude its module."
            )


def _changes_bias(config: Method, module: str, modules: Collection[str]) -> bool:
    if config.bias != "none":
        return config.bias == "all" or module in modules or f"{module}.weight" in modules
    return _follows(config, module, modules)


def _follows(config: Method, module: str, modules: Collection[str]) -> bool:
    """Whether the adapter of a module's matrix changes its bias too."""
    return module in modules and isinstance(config, BiasRule) and config.changes_bias(module)


def matrices(targets: Iterable[Target]) -> list[Target]:
    """Those that are matrices of target modules."""
    return [target for target in targets if target.role is None]


def following_modules(targets: Iterable[Target]) -> set[str]:
    """Names of the modules whose bias changes with their matrix."""
    names: set[str] = set()
    for target in targets:
        if isinstance(target.role, Follower | FollowingCopy):
            names |= set(target.leaf.names[target.adapted])
    return names


def neighbours(targets: Collection[Target], sizes: Mapping[str, tuple[int, int]]) -> Callable[[Target], Neighbours]:
    """A function from a target to the weights that a method may look at beside the target's matrix.

    Args:
        targets: All leaves that an adapter changes.
        sizes: From `module_sizes`.
    """
    every_matrix = _LazyMatrices(targets, sizes)
    kept: dict[str, Any] = {}
    biases: dict[tuple[str, ...], Target] = {}
    for target in targets:
        if isinstance(target.role, Follower | FollowingCopy):
            biases[tuple(target.leaf.modules)] = target

    def of(target: Target) -> Neighbours:
        bias = biases.get(tuple(target.leaf.modules))
        return Neighbours(None if bias is None else _without_adapters(bias), every_matrix, sizes, kept)

    return of


class _LazyMatrices(Mapping[str, jax.Array]):
    """The matrices of all target modules by name, made when they are asked for; those of the last leaf are kept."""

    def __init__(self, targets: Collection[Target], names: Iterable[str]) -> None:
        self.names = list(names)
        self.last: tuple[int, jax.Array] | None = None
        self.places: dict[str, tuple[Target, tuple[int, ...]]] = {}
        for target in matrices(targets):
            for index in np.ndindex(target.leaf.names.shape):
                if target.adapted[index]:
                    self.places[str(target.leaf.names[index])] = target, index

    def __getitem__(self, name: str) -> jax.Array:
        target, index = self.places[name]
        if self.last is not None and self.last[0] == target.position:
            return self.last[1][index]
        whole = _without_adapters(target)
        # An array of a traced program must not outlive the program.
        self.last = None if isinstance(whole, jax.core.Tracer) else (target.position, whole)
        return whole[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _without_adapters(target: Target) -> jax.Array:
    """The weight of a target, stacked axes first."""
    layout = target.leaf.required_layout()
    return layout.matrix(as_weight(target.leaf.value, layout).unadapted.dense())


def module_sizes(config: Method, targets: Iterable[Target], declared: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """``(in, out)`` of the matrices of target modules by name, in the order in which PyTorch declares the modules.

    It is empty for a method whose arrays of a module depend on no other module.

    Args:
        config: The adapter's config.
        targets: All leaves that an adapter changes.
        declared: As in `in_declared_order`.
    """
    sizes: dict[str, tuple[int, int]] = {}
    if not isinstance(config, SharedArrays | GroupedArrays | PackedTensors | StartsAmongWeights):
        return sizes
    for target in matrices(targets):
        own = target.leaf.layout.sizes(target.leaf.value.shape)
        sizes |= dict.fromkeys(map(str, target.leaf.names[target.adapted]), own)
    return only(sizes, in_declared_order(sizes, declared))


def may_be_target(config: Method, leaf: Leaf) -> bool:
    """Whether a leaf's module may be a target: for most methods, if the leaf is a matrix."""
    return is_float(leaf) if config.replaces else is_matrix(leaf)

"""Which leaves an adapter changes, and in which role."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from peft_jax.adapters.target_parameters import is_parameter
from peft_jax.core.leaves import Leaf, is_float, is_matrix
from peft_jax.core.targets import is_saved_module
from peft_jax.methods.base import Method
from peft_jax.methods.whole import REPLACED

TOKENS = "trainable_token_indices"
FOLLOWS = "bias of its layer"  # the role of a bias that the adapter of its layer's matrix changes too


class Choice(NamedTuple):
    """A leaf that an adapter changes: its position, which stacked layers, and its role if it is no target's matrix.

    ``tokens`` are ids of tokens that are trained in it, if that is its role.
    """

    position: int
    leaf: Leaf
    hit: np.ndarray
    role: str | None
    tokens: tuple[int, ...] = ()


def choose(
    found: Sequence[Leaf], config: Method, targets: set[str], tokens: Mapping[str, tuple[int, ...]]
) -> Iterator[Choice]:
    """The leaves that an adapter changes.

    Args:
        found: All leaves.
        config: What to change.
        targets: Names of the modules that get a low-rank or other update.
        tokens: Ids of trained tokens by module.

    Raises:
        ValueError: if one of them has ambiguous axes, or is to be changed in two ways; or two of them have one name in
            PEFT's files.
    """
    seen: dict[tuple[str, str], str] = {}
    for position, leaf in enumerate(found):
        role = None
        hit = np.vectorize(lambda name: is_saved_module(config, name), otypes=[bool])(leaf.names)
        if hit.any():
            role = "modules_to_save"
            if both := sorted({str(name) for name in leaf.names.flat} & targets - set(leaf.names[hit].flat)):
                raise ValueError(
                    f"Leaf '{leaf.path}' stacks layers of which {both[:3]} are targets and others are in "
                    "modules_to_save, which one leaf cannot be. Save all of its layers, or none."
                )
        elif config.replaces and is_float(leaf):
            role = REPLACED
            hit = np.vectorize(lambda name: name in targets, otypes=[bool])(leaf.names)
        elif leaf.is_bias:
            role = "bias" if config.bias != "none" else FOLLOWS
            hit = np.vectorize(lambda name: _changes_bias(config, name, targets), otypes=[bool])(leaf.names)
        elif is_matrix(leaf):
            hit = np.vectorize(lambda name: name in targets, otypes=[bool])(leaf.names)
        own = next((tokens[name] for name in leaf.names.flat if name in tokens), ()) if is_matrix(leaf) else ()
        if own and hit.any():
            raise ValueError(
                f"Tokens of '{leaf.names.flat[0]}' are named in trainable_token_indices, and the module in "
                f"{role or 'target_modules'} too. Name it in one of them."
            )
        if own:
            role, hit = TOKENS, np.vectorize(lambda name: name in tokens, otypes=[bool])(leaf.names)
        if hit.any():
            layout = leaf.required_layout()
            if layout.unnamed and not is_parameter(config, str(leaf.names.flat[0])):
                raise ValueError(
                    f"Leaf '{leaf.path}' of shape {leaf.value.shape} stacks experts without names of their own. Name "
                    "it in target_parameters."
                )
            _check_names(leaf, hit, role, seen)
            yield Choice(position, leaf, hit, role, own)


def _check_names(leaf: Leaf, hit: np.ndarray, role: str | None, seen: dict[tuple[str, str], str]) -> None:
    """Note PEFT's names of a chosen leaf, and raise ValueError if another leaf has one of them.

    A matrix has the name of its module, as PEFT adapts modules; a leaf that is trained whole has one of its own there.
    """
    own = "" if role in (None, TOKENS) else leaf.torch_name
    for name in {str(name) for name in leaf.names[hit]}:
        other = seen.setdefault((name, own), leaf.path)
        if other != leaf.path:
            raise ValueError(
                f"The leaves '{other}' and '{leaf.path}' are both '{name}{own and '.'}{own}' for PEFT, whose files "
                "have one tensor of that name. Rename one of them, or exclude its module."
            )


def _changes_bias(config: Method, module: str, targets: set[str]) -> bool:
    if config.bias != "none":
        return config.bias == "all" or module in targets or f"{module}.weight" in targets
    return module in targets and config.changes_bias(module)


def modules_with_followers(choices: Sequence[Choice]) -> set[str]:
    """Names of the modules whose bias changes with their matrix."""
    return {str(name) for _, leaf, hit, role, _ in choices if role == FOLLOWS for name in leaf.names[hit]}


def matrix_sizes(choices: Sequence[Choice]) -> list[tuple[int, int]]:
    """``(in, out)`` of the targets' matrices."""
    return [leaf.layout.sizes(leaf.value.shape) for _, leaf, _, role, _ in choices if role is None]


def may_be_target(config: Method, leaf: Leaf) -> bool:
    """Whether a leaf's module may be a target: for most methods, if the leaf is a matrix."""
    return is_float(leaf) if config.replaces else is_matrix(leaf)

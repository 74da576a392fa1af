"""Flax modules as pure functions of a configuration and a tree of parameters.

A module is made by ``module(config, rngs=, dtype=)`` and called with `ForwardInputs`, of which ``module.takes`` names
those that it knows. ``module.backbone`` is the attribute that holds all of it but the head. A bare model
(``FEATURE_EXTRACTION``) has the parameters of its backbone alone, whose names then lack that part.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from peft_jax.core.pytree import PyTree
from peft_jax.models.config import FEATURE_EXTRACTION, ModelConfig
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.layer_scan import Stacks

Module = Callable[..., nnx.Module]


def init_params(module: Any, config: ModelConfig, key: jax.Array, dtype: DTypeLike = jnp.float32) -> dict[str, Any]:
    """Make random parameters: a nested dict of arrays by the names of the module's attributes.

    Kernels are ``(in, out)``, embeddings ``(vocabulary, hidden)``; those of stacked layers have an axis in front.
    """
    return _tree(module(config, rngs=nnx.Rngs(key), dtype=dtype), config)


def _tree(made: Any, config: ModelConfig) -> dict[str, Any]:
    """The parameters of a module."""
    tree: dict[str, Any] = nnx.to_pure_dict(nnx.state(made))
    return tree[made.backbone] if config.task_type == FEATURE_EXTRACTION else tree


@functools.lru_cache(maxsize=64)
def param_shapes(module: Any, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Map each parameter's dotted path to its shape, without making the parameters."""
    return {path: leaf.shape for path, leaf in _leaves(_tree(_outline(module, config), config))}


def _in_declared_order(part: nnx.Module, names: Sequence[str]) -> list[str]:
    """Names of attributes, of which those in the class's ``declared`` are put in its order, at the places they have."""
    declared = getattr(part, "declared", ())
    in_order = iter([name for name in declared if name in names])
    return [next(in_order) if name in declared else name for name in names]


@functools.lru_cache(maxsize=64)
def declared_modules(module: Any, config: ModelConfig) -> tuple[str, ...]:
    """Paths of the modules in a module, without numbers of layers: those of one parent are as PyTorch declares them.

    That is the order in which attributes are set, but for the names in a class's ``declared``, which are in theirs.
    """
    parts_of: dict[str, list[str]] = {}

    def walk(part: nnx.Module, path: str) -> None:
        own = parts_of.setdefault(path, [])
        parts = {name: inner for name, inner in vars(part).items() if isinstance(inner, nnx.Module | nnx.Dict)}
        place = len(own)
        for name in reversed(_in_declared_order(part, list(parts))):
            if isinstance(part, Stacks) or name.isdecimal():
                walk(parts[name], path)
                continue
            inner = f"{path}.{name}".removeprefix(".")
            if inner not in own:
                own.insert(place, inner)
            place = own.index(inner)
            walk(parts[name], inner)

    def made() -> Any:
        whole = module(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        walk(whole, "")
        return nnx.state(whole)

    jax.eval_shape(made)
    found = itertools.chain.from_iterable(parts_of.values())
    if config.task_type != FEATURE_EXTRACTION:
        return tuple(found)
    backbone = f"{module.backbone}."
    return tuple(path.removeprefix(backbone) for path in found if path.startswith(backbone))


def apply(module: Any, config: ModelConfig, params: Mapping[str, Any], inputs: ForwardInputs) -> Any:
    """Call the module with these parameters.

    Raises:
        ValueError: if they are not those of the config, or the module does not take what is given; also what it raises.
    """
    inputs.check(module.takes, config.architecture)
    return bind(module, config, params)(inputs)


def bind(module: Any, config: ModelConfig, params: Mapping[str, Any]) -> Any:
    """The module with these parameters.

    Raises:
        ValueError: if they are not those of the config.
    """
    _check(module, config, params)
    tree = {module.backbone: params} if config.task_type == FEATURE_EXTRACTION else params
    return nnx.merge(nnx.graphdef(_outline(module, config)), tree)


@functools.lru_cache(maxsize=64)
def _outline(module: Any, config: ModelConfig) -> nnx.Module:
    """The module with shapes in place of arrays; to trace its making takes longer than to read a small checkpoint."""
    made: nnx.Module = nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), dtype=jnp.float32))
    return made


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _check(module: Any, config: ModelConfig, params: PyTree) -> None:
    want, have = param_shapes(module, config), {path: jnp.shape(leaf) for path, leaf in _leaves(params)}
    if have != want:
        missing, surplus = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
        wrong = [f"{p} is {have[p]}, not {want[p]}" for p in want if p in have and have[p] != want[p]]
        raise ValueError(
            f"params do not fit the config: missing {missing}, surplus {surplus}, wrong shapes {wrong}. "
            "They should be like init_params(config, key); adapted or quantized leaves need peft_jax.adapt(apply)."
        )

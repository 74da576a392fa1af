"""An adapted model as a Flax NNX module whose trained arrays are ``nnx.LoRAParam``, as trainers of NNX select them."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from peft_jax.adapt import adapt
from peft_jax.core.partition import partition
from peft_jax.core.paths import dotted
from peft_jax.core.pytree import PyTree
from peft_jax.core.static_leaf import made_leaves, made_static


class Frozen(nnx.Variable[Any]):
    """An array that is not trained: no ``nnx.Param``."""


class AdaptedModule(nnx.Module):
    """Runs ``adapt(fn)(params, *inputs)``; made by `nnx_module`.

    Attributes:
        trained: The arrays of `peft_jax.partition`'s first result, by dotted path.
        frozen: All others.
    """

    def __init__(self, fn: Callable[..., Any], params: PyTree) -> None:
        trainable = jax.tree_util.tree_leaves_with_path(partition(params)[0])
        self.fn = nnx.static(adapt(fn))
        trained_paths = {key_path for key_path, _ in trainable}
        trained: dict[str, nnx.Variable[Any]] = {}
        frozen: dict[str, nnx.Variable[Any]] = {}
        found, structure = jax.tree_util.tree_flatten_with_path(made_static(params))
        places: list[tuple[bool, str]] = []
        for key_path, leaf in found:
            is_trained, name = key_path in trained_paths, dotted(key_path)
            places.append((is_trained, name))
            if is_trained:
                trained[name] = nnx.LoRAParam(leaf)
            else:
                frozen[name] = Frozen(leaf)
        self.trained, self.frozen = nnx.data(trained), nnx.data(frozen)
        self.places = nnx.static(tuple(places))
        self.structure: Any = nnx.static(structure)

    @property
    def params(self) -> PyTree:
        """The adapted tree, with the arrays as they are now: for `peft_jax.merge`, for saving."""
        return made_leaves(jax.tree.unflatten(self.structure, [variable.get_value() for variable in self._variables()]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function of the adapted tree and these inputs."""
        params = self.params
        out = self.fn(params, *args, **kwargs)
        after = jax.tree.leaves(made_static(params))
        if jax.tree.structure(made_static(params)) != self.structure:
            raise ValueError(
                "The function gave a module among the parameters other attributes, which a module of nnx_module does "
                "not keep. Write them before nnx_module, or train with pj.partition."
            )
        for variable, leaf in zip(self._variables(), after, strict=True):
            if leaf is not variable.get_value():  # state that the function changed, as batch statistics
                variable.set_value(leaf)
        return out

    def _variables(self) -> list[nnx.Variable[Any]]:
        """The variable of each leaf, in the order of the tree."""
        return [self.trained[name] if is_trained else self.frozen[name] for is_trained, name in self.places]


def nnx_module(fn: Callable[..., Any], params: PyTree) -> AdaptedModule:
    """An adapted model as an NNX module, for trainers that train what is an ``nnx.LoRAParam``, such as Tunix's.

    ``nnx.Optimizer(module, tx, wrt=nnx.LoRAParam)`` and ``nnx.DiffState(0, nnx.LoRAParam)`` train the arrays of
    `peft_jax.partition`'s first result and nothing else: all other arrays are variables that are no ``nnx.Param``.

    Args:
        fn: The function that runs the model, ``fn(params, *inputs)``; for an NNX module ``lambda m, *x: m(*x)``.
        params: The adapted tree, or an adapted NNX module.

    Returns:
        A module that is called with the inputs; ``module.params`` is the adapted tree again.

    Example:
        >>> import jax.numpy as jnp, optax, peft_jax as pj
        >>> from flax import nnx
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> run = lambda model, x: model(x)
        >>> x = jnp.ones((3, 4))
        >>> adapted = pj.apply_lora(model, pj.LoraConfig(r=2, target_modules="all-linear"), fn=run, args=(x,))
        >>> module = pj.nnx_module(run, adapted)
        >>> optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.LoRAParam)
        >>> @nnx.jit
        ... def step(module, optimizer, x):
        ...     loss = lambda module: jnp.mean((module(x) - 1) ** 2)
        ...     value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(module)
        ...     optimizer.update(module, grads)
        ...     return value
        >>> first, second = step(module, optimizer, x), step(module, optimizer, x)
        >>> bool(second < first)
        True
        >>> trained = module.params  # for pj.merge(trained), or to save
    """
    return AdaptedModule(fn, params)

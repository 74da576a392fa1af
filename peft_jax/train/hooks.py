"""The training hooks of a run: projections, penalties and schedules of its adapters, called by the training step."""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from peft_jax.core.adapted import Adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.dropout import with_dropout
from peft_jax.core.partition import combine, partition
from peft_jax.core.pytree import PyTree
from peft_jax.methods.base import Method
from peft_jax.methods.training_hooks import Leaves, TrainingHooks

M = TypeVar("M", bound=Method)
T = TypeVar("T")


class ScheduledState(NamedTuple):
    """The optimizer's state, and beside it what the method's schedule remembers."""

    optimizer: Any
    schedule: Any


class Hooked(NamedTuple):
    """The method of an adapter that is trained with a penalty or by a schedule.

    Attributes:
        adapter: The adapter's name.
        method: Its config.
        leaves: Its leaves by path.
    """

    adapter: str
    method: TrainingHooks
    leaves: dict[str, Adapted]


@dataclasses.dataclass(frozen=True)
class RunHooks:
    """The hooks of all adapters that are trained, as a training step calls them.

    Attributes:
        frozen: The frozen partition.
        key: The step's key, of dropout and of the noise that a penalty may look at.
    """

    frozen: PyTree
    key: jax.Array | None = None

    def project(self, trainable: PyTree) -> Any:
        """The trainable partition with arrays put back to where they may be, as PEFT does in every forward pass."""
        return partition(projected(combine(trainable, self.frozen)))[0]

    def penalize(self, loss: jax.Array, gradients: Any, trainable: PyTree) -> tuple[jax.Array, Any]:
        """Loss and gradients with those of the methods' penalties added, if any has one."""

        def penalty(trainable: PyTree) -> jax.Array:
            params = combine(trainable, self.frozen)
            if self.key is not None:
                params = with_dropout(params, self.key, base=False)
            total = jnp.zeros(())
            for found in _with_hook(params, "penalizes"):
                total += found.method.penalty(found.leaves)
            return total

        if not _with_hook(trainable, "penalizes"):
            return loss, gradients
        more, slope = jax.value_and_grad(penalty)(trainable)
        return loss + more, jax.tree.map(jnp.add, gradients, slope)

    def split(self, trainable: PyTree, opt_state: PyTree) -> tuple[Any, Any]:
        """The optimizer's state and the schedule's, which is None for a method without one.

        Raises:
            ValueError: if there is none for a method that needs it.
        """
        return _split(scheduled(trainable), opt_state)

    def advance(self, trainable: PyTree, gradients: Any, opt_state: PyTree, schedule: Any) -> tuple[Any, Any]:
        """The trainable partition after the schedule's part of a step, and the state to go on with."""
        if schedule is None:
            return trainable, opt_state
        found, slopes = scheduled(trainable), scheduled(gradients)
        assert found is not None and slopes is not None
        arrays = {path: leaf.params for path, leaf in found.leaves.items()}
        gradients_of_arrays = {path: leaf.params for path, leaf in slopes.leaves.items()}
        arrays, schedule = found.method.advance(arrays, gradients_of_arrays, schedule)
        leaves = {path: dataclasses.replace(found.leaves[path], params=own) for path, own in arrays.items()}
        return _with_leaves(trainable, found.adapter, leaves), ScheduledState(opt_state, schedule)


def for_run(config: M, max_steps: int) -> M:
    """The config with what a run's length says, for a method with a schedule.

    Example:
        >>> import peft_jax as pj
        >>> for_run(pj.AdaLoraConfig(), 100).total_step
        100
    """
    return config.for_run(max_steps) if isinstance(config, TrainingHooks) else config


def init_optimizer(optimizer: optax.GradientTransformation, params: PyTree) -> Any:
    """The state that a training step needs beside the trainable partition: the optimizer's, and that of a schedule.

    Args:
        optimizer: The optimizer.
        params: The whole tree or model handle, not a partition of it.

    Returns:
        ``optimizer.init(trainable)``; for a method with a schedule a `ScheduledState`.

    Raises:
        ValueError: if the method's config does not say how to train.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["q"])
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.ones((4, 4))}}, config)
        >>> init_optimizer(optax.sgd(0.1), params).schedule.budgets.tolist()  # two ranks at first, one in the end
        [-1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    state = optimizer.init(partition(params)[0])
    found = scheduled(params)
    return state if found is None else ScheduledState(state, found.method.begin(found.leaves))


def finished(trainable: PyTree, frozen: PyTree, opt_state: PyTree) -> Any:
    """The tree or handle to save: `peft_jax.combine`, without the ranks that a schedule removed.

    Example:
        >>> import peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(target_modules=["q"]))
        >>> trainable, frozen = pj.partition(params)
        >>> finished(trainable, frozen, optax.sgd(0.1).init(trainable))["q"]["kernel"].shape
        (4, 4)
    """
    params = combine(trainable, frozen)
    found = scheduled(params)
    if found is None:
        return params
    _, schedule = _split(found, opt_state)
    config, leaves = found.method.finish(found.leaves, schedule)
    return params if config is found.method else _with_leaves(params, found.adapter, leaves, config)


def projected(params: PyTree) -> Any:
    """The tree with the trained arrays of active adapters put back to where they may be, as a step of training begins.

    It matters for CPT, and for OFT with ``coft``.

    Example:
        >>> import peft_jax as pj
        >>> config = pj.OFTConfig(oft_block_size=2, coft=True, eps=0.1, target_modules=["q"], init_weights=False)
        >>> params = pj.apply_adapter({"q": {"kernel": jnp.eye(2)}}, config)
        >>> float(jnp.abs(projected(params)["q"]["kernel"].params["oft_R"]).max()) <= 0.1
        True
    """

    def put_back(_: str, leaf: Adapted) -> Adapted:
        method = leaf.method
        if not (leaf.active and isinstance(method, TrainingHooks)):
            return leaf
        return dataclasses.replace(leaf, params=dict(method.project(leaf.params, leaf.state)))

    return map_adapted(put_back, params)


def scheduled(params: PyTree) -> Hooked | None:
    """The method with a schedule that a tree, a model handle or one of their partitions trains; None without.

    Raises:
        ValueError: if there are two, which would not know of each other.
    """
    found = _with_hook(params, "scheduled")
    if len(found) > 1:
        raise ValueError(
            f"Adapters {sorted(one.adapter for one in found)} are trained by a schedule each. Train one at a time: "
            "pj.set_adapter(params, NAME)."
        )
    return found[0] if found else None


def _with_hook(params: PyTree, hook: str) -> list[Hooked]:
    """The adapters that are trained whose method has a hook, ``"penalizes"`` or ``"scheduled"``."""
    found: dict[str, Hooked] = {}
    for path, leaf in adapted_leaves(params):
        method = leaf.method
        if isinstance(method, TrainingHooks) and getattr(method, hook) and leaf.active and leaf.trainable:
            found.setdefault(leaf.tag.name, Hooked(leaf.tag.name, method, {})).leaves[path] = leaf
    return list(found.values())


def _split(found: Hooked | None, opt_state: PyTree) -> tuple[Any, Any]:
    if found is None:
        return opt_state, None
    if not isinstance(opt_state, ScheduledState):
        label = next(iter(found.leaves.values())).method.label
        raise ValueError(
            f"{label} is trained by a schedule, whose state is missing. "
            "Make the optimizer's state by peft_jax.train.init_optimizer(optimizer, params), or peft_jax.train.start."
        )
    return opt_state


def _with_leaves(params: PyTree, adapter: str, leaves: Leaves, config: Any = None) -> Any:
    """The tree with other arrays in the leaves of an adapter, and another config in all of its tags if one is given."""

    def put(path: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name != adapter:
            return leaf
        new = leaves.get(path, leaf)
        tag = leaf.tag if config is None else dataclasses.replace(leaf.tag, config=config)
        return dataclasses.replace(leaf, params=new.params, state=new.state, tag=tag)

    return map_adapted(put, params)

"""Optimizers made for LoRA's two factors, PEFT's ``peft.optimizers``, over the trainable partition."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from peft_jax.core.adapted import Adapted, is_adapted
from peft_jax.core.adapted_tree import adapted_leaves, map_adapted
from peft_jax.core.pytree import PyTree
from peft_jax.methods.lora.variants import variant_of

FACTORS = ("lora_A", "lora_B")
DELTA = 1e-8  # PEFT's damping in LoRA-FA


class Moments(NamedTuple):
    """State of LoRA-FA's Adam: steps, and moving averages of the gradients and of their squares."""

    steps: jax.Array
    mean: Any
    square: Any


def lora_plus(
    optimizer: Callable[[Any], optax.GradientTransformation],
    learning_rate: float,
    loraplus_lr_ratio: float,
    *,
    loraplus_lr_embedding: float = 1e-6,
) -> optax.GradientTransformation:
    """LoRA+ (Hayou et al., 2024, https://arxiv.org/abs/2402.12354): factors B and vectors learn faster than the rest.

    Args:
        optimizer: Makes an optimizer from a learning rate, such as ``optax.adamw``.
        learning_rate: The rate of A, and of what is trained whole.
        loraplus_lr_ratio: How many times larger the rate of B, biases and magnitudes is.
        loraplus_lr_embedding: The rate of the factors of embeddings.

    Example:
        >>> optimizer = lora_plus(optax.adamw, 1e-4, loraplus_lr_ratio=16)
    """
    rates = {"A": learning_rate, "B": learning_rate * loraplus_lr_ratio, "embedding": loraplus_lr_embedding}
    return optax.partition({label: optimizer(rate) for label, rate in rates.items()}, _plus_labels)


def riemannian(optimizer: optax.GradientTransformation, *, reg: float = 1e-2) -> optax.GradientTransformation:
    """An optimizer on gradients that each factor's Gram matrix scales (Zhang and Pilanci, 2024).

    The gradient of A is multiplied by ``(B^T B + reg)^-1``, that of B by ``(A A^T + reg)^-1``, with PyTorch's names of
    the axes (https://arxiv.org/abs/2402.02347). Adapters on embeddings, and all other arrays, are left as they are.

    Args:
        optimizer: What follows, such as ``optax.adamw(1e-4)``.
        reg: Damping of both inverses.

    Example:
        >>> optimizer = riemannian(optax.sgd(1e-2))
    """

    def update(updates: Any, state: Any, params: PyTree = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("riemannian() scales gradients by the factors. Give update(grads, state, trainable).")
        factors = _factors(params)

        def scaled(path: str, leaf: Adapted) -> Adapted:
            if (path, leaf.tag.name) not in factors:
                return leaf
            a, b = factors[path, leaf.tag.name]
            own = dict(leaf.params)
            own["lora_A"] = own["lora_A"] @ _damped_inverse(b @ jnp.swapaxes(b, -1, -2), reg, own["lora_A"].dtype)
            own["lora_B"] = _damped_inverse(jnp.swapaxes(a, -1, -2) @ a, reg, own["lora_B"].dtype) @ own["lora_B"]
            return dataclasses.replace(leaf, params=own)

        return map_adapted(scaled, updates), state

    return optax.chain(optax.GradientTransformation(lambda params: optax.EmptyState(), update), optimizer)


def lora_fa(
    params: PyTree,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """LoRA-FA (Zhang et al., 2023, https://arxiv.org/abs/2308.03303): A stays, and B's gradient makes up for it.

    The gradient of B is ``(A A^T)^-1`` times itself, over the square of the scale, and Adam follows. Adam adds eps to
    the average that is not corrected yet, as PEFT's, and is float32 throughout; PEFT scales the gradient in bfloat16
    where the machine has that. Arrays of other roles have Adam alone.

    Args:
        params: The whole tree or model handle, for the scales of its LoRAs.
        learning_rate: The learning rate.
        weight_decay: Decoupled, times the learning rate, of the arrays after the step.
        b1: Decay of the average of gradients.
        b2: Decay of the average of their squares.
        eps: Added to the root of the latter.

    Raises:
        ValueError: if the tree has no LoRA.

    Example:
        >>> import peft_jax as pj
        >>> params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(r=2, target_modules=["q"]))
        >>> optimizer = lora_fa(params, 1e-3)
        >>> state = optimizer.init(pj.partition(params)[0])
    """
    scales = {
        (path, leaf.tag.name): leaf.state["scaling"]
        for path, leaf in adapted_leaves(params)
        if FACTORS[0] in leaf.params and "scaling" in leaf.state
    }
    if not scales:
        raise ValueError("lora_fa() is for LoRA, and this tree has none. Attach one with pj.apply_lora first.")

    def init(trainable: PyTree) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, trainable)
        return Moments(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.zeros_like, trainable))

    def update(updates: Any, state: Moments, trainable: PyTree = None) -> tuple[Any, Moments]:
        if trainable is None:
            raise ValueError("lora_fa() scales gradients by A. Give update(grads, state, trainable).")
        factors = _factors(trainable)

        def projected(path: str, leaf: Adapted) -> Adapted:
            key = path, leaf.tag.name
            if key not in factors:
                return leaf
            a, b = factors[key][0], leaf.params["lora_B"]
            gram = jnp.swapaxes(a, -1, -2) @ a
            gram = gram + _identity(gram, DELTA)
            inverse = jnp.linalg.pinv(gram, rtol=a.shape[-1] * float(jnp.finfo(a.dtype).eps))
            scale = jnp.asarray(scales[key], a.dtype)[..., None, None]
            safe = jnp.where(scale == 0, 1, scale)  # of layers without an adapter, whose gradients are 0
            return dataclasses.replace(leaf, params={**leaf.params, "lora_B": inverse @ b / safe**2})

        grads = map_adapted(projected, updates)
        count = state.steps + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, grads)
        steps_done = count.astype(jnp.float32)
        rate = learning_rate * jnp.sqrt(1 - b2**steps_done) / (1 - b1**steps_done)

        def step(m: jax.Array, v: jax.Array, array: jax.Array) -> jax.Array:
            moved = -rate.astype(m.dtype) * m / (jnp.sqrt(v) + eps)
            return moved - learning_rate * weight_decay * (array + moved)

        steps = jax.tree.map(step, mean, square, trainable)

        def frozen(_: str, leaf: Adapted) -> Adapted:
            if FACTORS[0] not in leaf.params or leaf.params[FACTORS[0]] is None:
                return leaf
            return dataclasses.replace(leaf, params={**leaf.params, "lora_A": jnp.zeros_like(leaf.params["lora_A"])})

        return map_adapted(frozen, steps), Moments(count, mean, square)

    return optax.GradientTransformation(init, update)


def _factors(trainable: PyTree) -> dict[tuple[str, str], tuple[jax.Array, jax.Array]]:
    """The factors A ``(..., in, r)`` and B ``(..., r, out)`` of trained LoRAs on matrices, by path and adapter."""
    found = {}
    for path, leaf in adapted_leaves(trainable):
        a, b = leaf.params.get("lora_A"), leaf.params.get("lora_B")
        is_lora = leaf.tag.role is None and leaf.tag.config.peft_type == "LORA" and not leaf.layout.lookup
        if is_lora and (variant := variant_of(leaf.tag.config)):
            raise ValueError(f"This optimizer is for plain factors, and adapter '{leaf.tag.name}' has {variant}.")
        if is_lora and a is not None and b is not None:
            found[path, leaf.tag.name] = (a, b)
    return found


def _damped_inverse(gram: jax.Array, reg: float, dtype: DTypeLike) -> jax.Array:
    """The inverse of ``gram + reg``, computed in float32 at least."""
    wide = jnp.promote_types(gram.dtype, jnp.float32)
    damped = gram.astype(wide) + _identity(gram, reg).astype(wide)
    return jnp.linalg.inv(damped).astype(dtype)


def _identity(gram: jax.Array, scale: float) -> jax.Array:
    """The identity, as often as there are matrices, times a number."""
    return jnp.broadcast_to(scale * jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)


def _plus_labels(trainable: PyTree) -> Any:
    """The group of each trained array in LoRA+: ``A``, ``B`` or ``embedding``."""

    def visit(node: Any) -> Any:
        if not is_adapted(node):
            return jax.tree.map(lambda _: "A", node)
        labels = {}
        for role, array in node.params.items():
            label = "A"
            if array is not None and (role == "lora_B" or array.ndim - len(node.layout.stack) == 1):
                label = "B"
            if node.layout.lookup and role in FACTORS:
                label = "embedding"
            labels[role] = None if array is None else label
        return dataclasses.replace(node, base=visit(node.base), params=labels)

    return jax.tree.map(visit, trainable, is_leaf=is_adapted)

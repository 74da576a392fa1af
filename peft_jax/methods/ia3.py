"""(IA)³: a layer's outputs times a vector, y = l (x W + b), or in feed-forward modules its inputs, y = (l x) W + b.

Liu et al., 2022, https://arxiv.org/abs/2205.05638, section 3.3. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from peft_jax.core.adapted import apply_merged
from peft_jax.core.bounded_regex import compiled, matches
from peft_jax.core.layout import Layout
from peft_jax.core.product import Product
from peft_jax.core.selecting import picked
from peft_jax.core.targets import names_module
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, Method, register
from peft_jax.methods.roles import BiasRule
from peft_jax.methods.target_fields import ExcludeFields, TargetFields


@register("IA3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3Config(TargetFields, ExcludeFields, BiasRule, Method):
    """Multiplies the inputs or outputs of a frozen layer by a trained vector; fields and defaults are PEFT's.

    The outputs include the layer's bias (`peft_jax.apply_adapter` says which leaf it is).

    It goes on the modules that the fields of `TargetFields` and `ExcludeFields` say.

    Attributes:
        feedforward_modules: Which of the targets are scaled at their inputs: ends of paths, or one regex; ``[]`` for
            none. None takes a model's default, and is an error where there is none.
        fan_in_fan_out: Leaves named ``weight`` are ``(in, out)`` instead of PyTorch's ``(out, in)``.
        init_ia3_weights: True starts at ones; False at normal numbers.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> config = IA3Config(target_modules=["up", "down"], feedforward_modules=["down"])
        >>> params = {name: {"kernel": jnp.ones((2, 3))} for name in ("up", "down")}
        >>> params = pj.apply_adapter(params, config)
        >>> params["up"]["kernel"].params["ia3_out"].shape, params["down"]["kernel"].params["ia3_in"].shape
        ((3,), (2,))
    """

    learning_rate: ClassVar[float] = 3e-3
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"ia3_in": ("in",), "ia3_out": ("out",)}

    feedforward_modules: str | Sequence[str] | None = None
    fan_in_fan_out: bool = False
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, str):
            compiled(self.feedforward_modules, "feedforward_modules")
        lists = not isinstance(self.target_modules, str) and not isinstance(self.feedforward_modules, str)
        if not (lists and self.target_modules and self.feedforward_modules):
            return
        named, longer, extra = dict[str, None](), list[str](), list[str]()
        for name in self.feedforward_modules:
            # PEFT reads no name that target_modules lacks. The end of some targets is spelled out as these, and a name
            # of which a target is the end becomes one too, which hits nothing more.
            targets = [name] if name in self.target_modules else _named_by(self.target_modules, name)
            if not targets and names_module(self.target_modules, name):
                targets = [name]
                longer.append(name)
            named |= dict.fromkeys(targets)
            if not targets:
                extra.append(name)
        if extra:
            raise ValueError(
                f"feedforward_modules has {sorted(extra)}, not in target_modules. Name them in both or neither."
            )
        object.__setattr__(self, "feedforward_modules", tuple(named))
        object.__setattr__(self, "target_modules", (*self.target_modules, *longer))

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """With the model's defaults, of which given targets leave those feed-forward modules that they hit."""
        targets = self.target_modules
        feedforward = defaults.get("feedforward_modules")
        if feedforward is not None and targets is not None and not isinstance(targets, str):
            hit = [name for name in feedforward if _named_by(targets, name) or names_module(targets, name)]
            defaults = {**defaults, "feedforward_modules": hit}
        return super().completed(defaults)

    def is_feedforward(self, module: str) -> bool:
        """Whether a module is scaled at its inputs.

        Raises:
            ValueError: if the config does not say.
        """
        if self.feedforward_modules is None:
            raise ValueError(
                "IA3Config needs feedforward_modules: those targets whose inputs are scaled, not their outputs. "
                "Write feedforward_modules=[] if there are none."
            )
        if isinstance(self.feedforward_modules, str):
            return matches(self.feedforward_modules, module)
        return module.endswith(tuple(self.feedforward_modules))

    def changes_bias(self, module: str) -> bool:
        """Outputs include the bias."""
        return not self.is_feedforward(module)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """One vector."""
        return {"ia3_in": (n_in,)} if self.is_feedforward(module) else {"ia3_out": (n_out,)}

    def leaf_shapes(self, module: str, layout: Layout, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """One vector; at the inputs of a convolution a number for each channel, not for each position in the kernel."""
        shapes = super().leaf_shapes(module, layout, shape)
        if layout.taps and "ia3_in" in shapes:
            shapes["ia3_in"] = (shapes["ia3_in"][0] // math.prod(picked(shape, layout.taps)),)
        return shapes

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Ones, or normal numbers."""
        return jnp.ones(shape) if self.init_ia3_weights else jax.random.normal(key, shape)

    def state(self, names: np.ndarray, adapted: np.ndarray) -> dict[str, Any]:
        """Which stacked layers are scaled at their inputs, and which at their outputs."""
        at_inputs = np.vectorize(lambda name, on: on and self.is_feedforward(name), otypes=[bool])(names, adapted)
        which = {"hit": adapted, "ia3_in": adapted & at_inputs, "ia3_out": adapted & ~at_inputs}
        return {role: jnp.asarray(layers) for role, layers in which.items()}

    @staticmethod
    def sizes(params: Arrays, state: Mapping[str, Any]) -> np.ndarray:
        """The vector's length, of each stacked layer."""
        return sum((np.asarray(state[role]) * array.shape[-1] for role, array in params.items()), np.zeros((), int))

    def merge(self, params: Arrays, state: Arrays, matrix: Float[Array, "in out"]) -> Float[Array, "in out"]:
        """``diag(l) W`` or ``W diag(l)``, multiplied in the adapter's precision."""
        merged = matrix
        if "ia3_in" in params:
            factor = _factor("ia3_in", params, state)
            rows = jnp.repeat(factor, len(matrix) // len(factor))  # the channels of a kernel come before its positions
            merged = _times(merged, rows[:, None])
        if "ia3_out" in params:
            merged = _times(merged, _factor("ia3_out", params, state)[None, :])
        return merged

    def merge_bias(self, params: Arrays, state: Arrays, bias: Float[Array, " out"]) -> Float[Array, " out"]:
        """``l b``."""
        return _times(bias, _factor("ia3_out", params, state)) if "ia3_out" in params else bias

    def apply(
        self, params: Arrays, state: Arrays, base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``l (x W)`` or ``(l x) W``; inputs that are not the last axis of ``x`` need the merged matrix."""
        if "ia3_in" in params:
            if type(product) is not Product:
                return apply_merged(self, params, state, base, x, product)
            x = product.scale(x, _factor("ia3_in", params, state))
        y = base.apply(x, product)
        if "ia3_out" in params:
            factor = _factor("ia3_out", params, state)
            y = product.scale(y, factor)
        return y


def _named_by(targets: Sequence[str], name: str) -> list[str]:
    """The targets that a module's name, or the end of one, names."""
    return [target for target in targets if names_module([name], target)]


def _factor(role: str, params: Arrays, state: Arrays) -> Float[Array, "*groups features"]:
    """The vector, ones for layers that have none."""
    return jnp.where(state[role][..., None], params[role], 1)


def _times(array: Float[Array, "*axes"], factor: Float[Array, "..."]) -> Float[Array, "*axes"]:
    return (array.astype(factor.dtype) * factor).astype(array.dtype)

"""ShadowPEFT: a small network runs beside a decoder, and its state corrects the input of each layer.

ShadowPEFT, equations 1 to 9 (PEFT names the paper by its title and gives no address). Numbers follow PEFT 0.21.2. With
h the output of the layer before and s the state, which starts as what the small network gives,

    x = h + alpha Dropout(h - s) W_down W_up        the layer's input, equations 2 to 4
    s' = (1 - g) s + g T(y),  g = sigmoid(G(y))     the next state, of the layer's output y, equations 5 to 7

`peft_jax.models.modules.shadow_state` computes them. T and G are networks of two layers. The loss has that of the small
network by itself too, ``auxiliary_loss_weight`` times (equations 8 and 9).
"""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.handle import Handle
from peft_jax.core.pytree import PyTree
from peft_jax.core.targets import is_target
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, kaiming
from peft_jax.methods.frozen_arrays import FrozenArrays
from peft_jax.methods.own_tensors import OwnTensors
from peft_jax.methods.target_fields import ExcludeFields, LayerFields, TargetFields
from peft_jax.methods.task_type import TaskType
from peft_jax.prompts.base import Prompt, PromptMethod, ShadowPart, ShadowSizes, active_prompts

MIRROR = "mirror"
NAMED_DEFAULT = ".default."  # the name that a file has for any adapter, behind the name of each of its modules
BACKBONE, PROJECTION = "shadow_backbone.", "shadow_projection.weight"
DOWN, UP = "shadow_down.weight", "shadow_up.weight"
NETWORKS = ("shadow_update_transform", "shadow_update_gate")
NETWORK_ARRAYS = tuple(f"{name}.{layer}.{kind}" for name in NETWORKS for layer in (0, 2) for kind in ("weight", "bias"))
SIZES = (
    "shadow_num_hidden_layers",
    "shadow_hidden_size",
    "shadow_num_attention_heads",
    "shadow_intermediate_size",
    "update_hidden_size",
)


class Mirrored(NamedTuple):
    """The facts about a model that its shadow network is made of.

    Attributes:
        layers: Paths of the model's layers.
        hidden: Its features.
        shapes: The arrays of the small network and their shapes, by PyTorch's names.
        unused: Those that PEFT has in the file and that nothing reads: the table of tokens, where it is shared.
        width: The features that the small network gives.
        initialize: Gives random arrays of a key.
    """

    layers: tuple[str, ...]
    hidden: int
    shapes: Mapping[str, tuple[int, ...]]
    unused: tuple[str, ...]
    width: int
    initialize: Callable[[jax.Array], Mapping[str, jax.Array]]


@register("SHADOW")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ShadowConfig(TargetFields, ExcludeFields, LayerFields, FrozenArrays, OwnTensors, PromptMethod):
    """Corrects the layers' inputs by the state of a small network of the same kind; fields and defaults are PEFT's.

    It goes on the layers, not on matrices in them, that the fields of `TargetFields`, `ExcludeFields` and `LayerFields`
    say: without ``target_modules`` on all, or on those that ``layers_to_transform`` numbers. They follow one another.
    PEFT leaves ``layers_to_transform`` out of account; a file of ours names its layers one by one, which PEFT reads.

    Attributes:
        r: Rank of the correction.
        shadow_alpha: What the correction is multiplied by.
        shadow_dropout: Probability of zeroing a difference of input and state in training, in [0, 1).
        init_weights: True starts without a correction; False with a random one.
        shadow_num_hidden_layers: Layers of the small network; None for one.
        shadow_hidden_size: Its features; None for the model's.
        shadow_num_attention_heads: Its heads; None for as many as the model has.
        shadow_intermediate_size: The width of its feed-forward network; None for the model's.
        share_embeddings: Whether it reads the model's embeddings of tokens, where its features are as many; if not, it
            has a table of its own.
        update_hidden_size: The inner width of T and G; None for ``r``.
        auxiliary_loss_weight: How much of the small network's own loss is added in training; 0 for none.

    ``shadow_model`` other than ``"mirror"``, a checkpoint as the small network, is refused.

    Raises:
        ValueError: if a field has a value that is wrong or not supported; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, ShadowConfig(r=4))
        >>> model(jnp.array([[1, 2, 3]])).logits.shape[:2]
        (1, 3)
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    structural: ClassVar[tuple[str, ...]] = ("sizes_of_shadow", "shadow_alpha")
    facts: ClassVar[Mirrored | None] = None  # an instance's own, once it is on a model

    r: int = 8
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    init_weights: bool = True
    shadow_model: str = MIRROR
    shadow_num_hidden_layers: int | None = None
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    update_hidden_size: int | None = None
    auxiliary_loss_weight: float = 0.05
    mirrored: dataclasses.InitVar[Mirrored | None] = None  # the facts; no field of the file

    def __post_init__(self, mirrored: Mirrored | None = None) -> None:
        object.__setattr__(self, "facts", mirrored)
        super().__post_init__()
        check_probability(self, "shadow_dropout")
        if self.shadow_model != MIRROR:
            raise ValueError(
                f"ShadowConfig(shadow_model={self.shadow_model!r}) is not supported: a small network is made of the "
                f"model itself. Write shadow_model={MIRROR!r}, or leave it out."
            )
        for name in ("r", *SIZES):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"ShadowConfig needs {name} of at least 1, got {value}.")
        if self.auxiliary_loss_weight < 0:
            raise ValueError(f"auxiliary_loss_weight is at least 0, got {self.auxiliary_loss_weight}.")

    @property
    def dropout_rate(self) -> float:
        """``shadow_dropout``."""
        return self.shadow_dropout

    @property
    def sizes_of_shadow(self) -> ShadowSizes:
        """The sizes of the small network."""
        return ShadowSizes(
            self.shadow_num_hidden_layers or 1,
            self.shadow_hidden_size,
            self.shadow_num_attention_heads,
            self.shadow_intermediate_size,
            self.share_embeddings,
        )

    def replace(self, **changes: Any) -> Self:
        """The config with other values of some fields, on the model that it was on."""
        return super().replace(**{"mirrored": self.facts, **changes})

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """The config on a model, with all layers as targets if it names none.

        Args:
            defaults: ``mirrored``, a function that gives the facts about the model for `ShadowSizes`.

        Raises:
            ValueError: if such a network cannot be beside the model, or the targets are not layers in a row.
        """
        config = self.replace(mirrored=defaults["mirrored"](self.sizes_of_shadow))
        if config.target_modules is None:
            numbers = config.layers_to_transform
            chosen = None if numbers is None else np.atleast_1d(numbers).tolist()
            layers = config.on_model_facts.layers
            named = [name for number, name in enumerate(layers) if chosen is None or number in chosen]
            config = config.replace(target_modules=tuple(named))
        config.check_layers()
        return config

    def check_layers(self) -> None:
        """Raise ValueError unless the targets are some of the model's layers, one after the other."""
        layers = self.on_model_facts.layers
        chosen = [number for number, name in enumerate(layers) if is_target(self, name)]
        if not chosen:
            raise ValueError(
                f"target_modules={self.target_modules!r} names none of the layers, {layers[0]} to {layers[-1]}. Leave "
                "it out for all of them."
            )
        if chosen != list(range(chosen[0], chosen[-1] + 1)):
            raise ValueError(
                f"SHADOW is on layers that follow one another, and target_modules names {chosen}. Name those between "
                "too."
            )

    @property
    def on_model_facts(self) -> Mirrored:
        """The facts about the model that it is on."""
        if self.facts is None:
            raise ValueError("A SHADOW adapter goes on a model handle. Give the handle, not its tree.")
        return self.facts

    def places(self, modules: Sequence[str], handle: Handle) -> list[str]:
        """The input embedding."""
        return [handle.input_module]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The arrays that nothing reads: a table in the file that is not shared, and T and G of the last layer."""
        last = self.wrapped_layers[-1]
        networks = [f"{last}.{name}" for name in NETWORK_ARRAYS]
        return (*(BACKBONE + name for name in self.on_model_facts.unused), *networks)

    @property
    def wrapped_layers(self) -> list[str]:
        """Paths of the layers that it is on."""
        return [layer for layer in self.on_model_facts.layers if is_target(self, layer)]

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Those of the correction and the two networks of each layer, of the small network and its projection."""
        facts, shapes = self.on_model_facts, dict[str, tuple[int, ...]]()
        hidden, inner = facts.hidden, self.update_hidden_size or self.r
        for layer in self.wrapped_layers:
            shapes[f"{layer}.{DOWN}"] = (self.r, hidden)
            shapes[f"{layer}.{UP}"] = (hidden, self.r)
            for name in NETWORK_ARRAYS:
                shapes[f"{layer}.{name}"] = network_shape(name, hidden, inner)
        for name, shape in facts.shapes.items():
            shapes[BACKBONE + name] = shape
        if facts.width != hidden:
            shapes[PROJECTION] = (hidden, facts.width)
        return shapes

    def init_prompt(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As PyTorch starts Linear, and the small network as its architecture starts."""
        facts, shapes = self.on_model_facts, self.shapes("", *base.layout.sizes(base.shape), lookup=True)
        arrays = {}
        for role, shape in shapes.items():
            if role.startswith(BACKBONE):
                continue
            own = jax.random.fold_in(key, zlib.crc32(role.encode()))
            matrix = shapes[role.removesuffix("bias") + "weight"] if role.endswith("bias") else shape
            is_closed = self.init_weights and role.endswith(UP)
            arrays[role] = jnp.zeros(shape) if is_closed else kaiming(own, shape, matrix[-1])
        for name, array in facts.initialize(jax.random.fold_in(key, zlib.crc32(BACKBONE.encode()))).items():
            arrays[BACKBONE + name] = array
        params, frozen = self.apart(arrays)
        return params, self.state(names, adapted) | frozen

    def tensor_key(self, role: str) -> str:
        """The key of an array in PEFT's file, where the name of the adapter is ``default``.

        Example:
            >>> ShadowConfig().tensor_key("model.layers.0.shadow_update_gate.0.bias")
            'base_model.model.model.layers.0.shadow_update_gate.default.0.bias'
            >>> ShadowConfig().tensor_key("shadow_backbone.norm.weight")
            'base_model.shadow_backbone.default.norm.weight'
        """
        named = re.sub(r"(^|\.)(shadow_[a-z_]+)\.", rf"\1\2{NAMED_DEFAULT}", role, count=1)
        return f"base_model.{named}" if named.startswith("shadow_") else f"base_model.model.{named}"

    def own_name(self, key: str, adapter_name: str) -> str | None:
        """The name in PEFT's model of an array's tensor; None for one of a module that is trained whole.

        Example:
            >>> ShadowConfig().own_name("base_model.shadow_backbone.default.norm.weight", "mine")
            'base_model.shadow_backbone.mine.norm.weight'
            >>> ShadowConfig().own_name("base_model.model.lm_head.weight", "mine")
        """
        if re.search(rf"\.shadow_[a-z_]+{re.escape(NAMED_DEFAULT)}", key) is None:
            return None
        return key.replace(NAMED_DEFAULT, f".{adapter_name}.", 1)

    @property
    def unread_keys(self) -> set[str]:
        """The keys of the arrays that nothing reads."""
        return {self.tensor_key(role) for role in self.frozen}

    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """The small network, and what its state does to the layers."""
        dropout = {name: jnp.reshape(array, -1)[0] for name, array in state.get("dropout", {}).items()}
        return Prompt(shadow=ShadowPart(dict(params), dropout, self.sizes_of_shadow, self.shadow_alpha))


def network_shape(name: str, hidden: int, inner: int) -> tuple[int, ...]:
    """The shape of one of `NETWORK_ARRAYS`, of networks with ``inner`` features between the model's ``hidden``.

    Example:
        >>> network_shape("shadow_update_gate.0.weight", hidden=8, inner=2)
        (2, 8)
    """
    features = (inner, hidden) if ".0." in name else (hidden, inner)
    return features if name.endswith("weight") else features[:1]


def auxiliary_weight(params: PyTree) -> float:
    """How much of the loss of its small network the active SHADOW adapter of a tree adds in training; 0 for none."""
    for leaf in active_prompts(params):
        if isinstance(leaf.tag.config, ShadowConfig) and leaf.tag.config.task_type == TaskType.CAUSAL_LM:
            return float(leaf.tag.config.auxiliary_loss_weight)
    return 0.0

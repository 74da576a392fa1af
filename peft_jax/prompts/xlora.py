"""X-LoRA: a classifier reads a first pass through the model, and mixes LoRAs token by token for a second one.

Buehler and Buehler, 2024, https://arxiv.org/abs/2402.07148, section 2: of the last hidden states h of the first pass a
network gives S = softmax(net(h) / temperature), a number for each token, module and LoRA; in the second pass a module
computes x W + w sum_e S_e s_e (x A_e) B_e. Numbers follow PEFT 0.21.2, where the LoRAs count ``scaling_pass_value``
times in the first pass.

The classifier is no prompt, but a model has it in the same way: its arrays are on the input embedding, and a model
handle takes them out of the tree in its forward pass. The LoRAs are adapters of the model, named "0", "1" and so on.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from peft_jax.core.adapted import Adapted, changed_layers, nested_adapters
from peft_jax.core.adapted_tree import map_adapted
from peft_jax.core.declared_order import in_declared_order
from peft_jax.core.dropout import dropout
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import find_leaves
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import MergeError
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_probability, kaiming
from peft_jax.methods.lora.token_scales import SCALES
from peft_jax.prompts.base import Prompt, PromptMethod, active_prompts

H = TypeVar("H", bound=Handle)
NUMBER = "module_number"  # in the state of a LoRA: which of the classifier's modules each stacked layer is
DEEPEST = 32  # layers of a classifier


def numbers_of_layers(depth: int, dropout: float) -> list[int]:
    """The numbers that PyTorch gives a classifier's layers: it counts the ReLU behind each, and dropout if any.

    Example:
        >>> numbers_of_layers(3, 0.0), numbers_of_layers(3, 0.2)
        ([0, 2, 4], [0, 3, 6])
    """
    step = 3 if dropout else 2
    return [step * number for number in range(depth)]


NUMBERS = sorted({*numbers_of_layers(DEEPEST, 0), *numbers_of_layers(DEEPEST, 0.5)})
WEIGHTS, BIASES = [f"layers.{number}.weight" for number in NUMBERS], [f"layers.{number}.bias" for number in NUMBERS]


@register("XLORA")
@dataclasses.dataclass(frozen=True, kw_only=True)
class XLoraConfig(PromptMethod):
    """Has a classifier scale several LoRAs for each token; fields and defaults are PEFT's.

    The LoRAs are loaded with it, as adapters named by their numbers. They are plain ones, of any ranks and targets.

    Attributes:
        hidden_size: Features of the model's last hidden state; None takes the model's.
        adapters: Folders or hub ids of the LoRAs, by their numbers ``"0"``, ``"1"`` and so on.
        enable_softmax: Whether the scales of a token are a softmax over the LoRAs.
        enable_softmax_topk: Whether those that are not zero are a softmax again, after ``top_k_lora``.
        layerwise_scalings: Whether each module has scales of its own.
        xlora_depth: Number of the classifier's layers, at most 32.
        xlora_size: Features between them.
        xlora_dropout_p: Probability of dropping one of these in training, in [0, 1).
        use_trainable_adapters: Whether the LoRAs are trained too. They are saved in folders beside the X-LoRA's file,
            and read from there; PEFT's lack layers, and are refused.
        softmax_temperature: Divisor of the classifier's outputs in the first softmax, above 0.
        top_k_lora: How many LoRAs a token takes, those of the largest scales; None for all.
        scaling_pass_value: The scale of all LoRAs in the first pass.
        global_scaling_weight: What all scales are multiplied by.
        modules: Number of modules with a LoRA, which the model sets and no file has.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> import tempfile
        >>> from peft_jax.cli.demo_data import MODEL
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> lora = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora.save_pretrained(folder)
        ...     model = pj.get_peft_model(base, XLoraConfig(adapters={"0": folder, "1": folder}))
        >>> model.active_adapters, sorted(model.peft_config)
        (['default'], ['0', '1', 'default'])
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        dict.fromkeys(WEIGHTS, ("given", "made")) | dict.fromkeys(BIASES, ("made",))
    )
    structural: ClassVar[tuple[str, ...]] = (
        "experts",
        "enable_softmax",
        "enable_softmax_topk",
        "layerwise_scalings",
        "softmax_temperature",
        "top_k_lora",
        "scaling_pass_value",
        "global_scaling_weight",
        "modules",
    )

    hidden_size: int | None = None
    adapters: dict[str, str] | None = None
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: int = 1
    xlora_size: int = 2048
    xlora_dropout_p: float = 0.2
    use_trainable_adapters: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    modules: int = dataclasses.field(default=0, metadata={"unused": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "xlora_dropout_p")
        if not self.adapters or list(self.adapters) != [str(number) for number in range(len(self.adapters))]:
            raise ValueError(
                f"adapters are folders of LoRAs by number, as {{'0': FOLDER, '1': FOLDER}}, got {self.adapters!r}."
            )
        if self.top_k_lora is not None and not 1 <= self.top_k_lora <= len(self.adapters):
            raise ValueError(f"top_k_lora is from 1 to the {len(self.adapters)} LoRAs, got {self.top_k_lora}.")
        if not 1 <= self.xlora_depth <= DEEPEST or self.xlora_size < 1:
            raise ValueError(
                f"xlora_depth is from 1 to {DEEPEST} and xlora_size at least 1, got {self.xlora_depth} and "
                f"{self.xlora_size}."
            )
        if self.softmax_temperature <= 0:
            raise ValueError(f"softmax_temperature is above 0, got {self.softmax_temperature}.")

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the LoRAs."""
        return tuple(self.adapters or ())

    @property
    def dropout_rate(self) -> float:
        """``xlora_dropout_p``, where there is a layer to drop from."""
        return self.xlora_dropout_p if self.xlora_depth > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As of every config, without ``modules``."""
        fields = super().to_dict()
        del fields["modules"]
        return fields

    def completed(self, defaults: Mapping[str, Any]) -> Self:
        """The config with the model's hidden size.

        Raises:
            ValueError: if it gives another one.
        """
        wanted = defaults["hidden_size"]
        if self.hidden_size not in (None, wanted):
            raise ValueError(
                f"XLoraConfig(hidden_size={self.hidden_size}) does not fit this model, whose hidden_size is {wanted}. "
                "Leave hidden_size out."
            )
        return self.replace(hidden_size=wanted)

    def places(self, modules: Sequence[str], handle: Handle) -> list[str]:
        """The input embedding."""
        return [handle.input_module]

    @property
    def layers(self) -> list[tuple[str, int, int]]:
        """PyTorch's name of each of the classifier's layers, its inputs and its outputs."""
        outputs = len(self.experts) * (self.modules if self.layerwise_scalings else 1)
        widths = [self.hidden_size or 0, *[self.xlora_size] * (self.xlora_depth - 1), outputs]
        found = []
        for place, number in enumerate(numbers_of_layers(self.xlora_depth, self.xlora_dropout_p)):
            found.append((f"layers.{number}", widths[place], widths[place + 1]))
        return found

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """A matrix and a bias of each layer."""
        shapes = dict[str, tuple[int, ...]]()
        for name, given, made in self.layers:
            shapes |= {f"{name}.weight": (given, made), f"{name}.bias": (made,)}
        return shapes

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """As PyTorch's Linear."""
        fan_in = {name: given for name, given, _ in self.layers}
        return kaiming(key, shape, fan_in[role.rpartition(".")[0]])

    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """The router."""
        return Prompt(router=Router(self, params, state))

    def scalings(
        self, params: Arrays, state: Mapping[str, Any], hidden: Float[Array, "batch length hidden"]
    ) -> Float[Array, "batch length modules experts"]:
        """The classifier's scales, of one module in place of all if they have the same ones."""
        layers = self.layers
        x = hidden.astype(params[f"{layers[0][0]}.weight"].dtype)
        for number, (name, _, _) in enumerate(layers):
            x = x @ params[f"{name}.weight"] + params[f"{name}.bias"][None, None]
            if number < len(layers) - 1:
                x = dropout(jax.nn.relu(x), _for_layer(state, number))
        logits = x.reshape(*hidden.shape[:2], -1, len(self.experts))
        return jax.nn.softmax(logits / self.softmax_temperature, axis=-1) if self.enable_softmax else logits

    def chosen(self, scalings: Float[Array, "... experts"]) -> Float[Array, "... experts"]:
        """The scales that count: ``top_k_lora`` of them, as a softmax again where that is asked for."""
        if self.top_k_lora is not None:
            _, places = jax.lax.top_k(scalings, self.top_k_lora)
            scalings = scalings * jnp.sum(jax.nn.one_hot(places, len(self.experts), dtype=scalings.dtype), axis=-2)
        if self.enable_softmax_topk:
            counts = scalings != 0
            lowest = jnp.finfo(scalings.dtype).min  # not minus infinity, of which alone a softmax is NaN
            scalings = jnp.where(counts, jax.nn.softmax(jnp.where(counts, scalings, lowest), axis=-1), 0)
        return scalings * self.global_scaling_weight

    def merge(self, params: Arrays, state: Arrays, matrix: jax.Array) -> NoReturn:
        """Raise MergeError: each token has another matrix."""
        raise MergeError(
            "An XLORA adapter scales LoRAs for each token, which no merged weight does. Keep it apart, or take it off: "
            "pj.unload, pj.disable_adapter; pj.set_adapter(model, '0') leaves one LoRA alone."
        )


def _for_layer(state: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The state with a key of dropout for one layer of the classifier."""
    if "dropout" not in state:
        return state
    key = jax.random.fold_in(state["dropout"]["key"], number)
    return {**state, "dropout": {**state["dropout"], "key": key}}


@dataclasses.dataclass(frozen=True)
class Router:
    """An X-LoRA's classifier in a forward pass, and the LoRAs that it scales.

    Attributes:
        config: The adapter's config.
        params: The classifier's arrays.
        state: Its state.
    """

    config: XLoraConfig
    params: Arrays
    state: Mapping[str, Any]

    def for_first_pass(self, tree: PyTree) -> PyTree:
        """The tree of the first pass, whose LoRAs have ``scaling_pass_value`` for all tokens."""
        value = self.config.scaling_pass_value
        if not value:  # they count nothing, whatever is chosen of them
            names = self.config.experts
            return map_adapted(
                lambda _, leaf: dataclasses.replace(leaf, active=leaf.active and leaf.tag.name not in names), tree
            )
        scales = self.config.chosen(jnp.full(len(self.config.experts), value, jnp.float32))
        return self._with_scales(tree, lambda expert, numbers: jnp.broadcast_to(scales[expert], numbers.shape))

    def scalings(self, hidden: Float[Array, "batch length hidden"]) -> Float[Array, "batch length modules experts"]:
        """As `XLoraConfig.scalings`, of the last hidden states of the first pass."""
        return self.config.scalings(self.params, self.state, hidden)

    def for_second_pass(self, tree: PyTree, scalings: Float[Array, "batch length modules experts"]) -> PyTree:
        """The tree of the second pass, whose LoRAs have the classifier's scales."""
        by_module = jnp.moveaxis(self.config.chosen(scalings), 2, 0)
        if self.config.layerwise_scalings:
            return self._with_scales(tree, lambda expert, numbers: by_module[..., expert][numbers])
        one = by_module[0]
        return self._with_scales(
            tree, lambda expert, numbers: jnp.broadcast_to(one[..., expert], (*numbers.shape, *one.shape[:2]))
        )

    def of_all_modules(
        self, scalings: Float[Array, "batch length modules experts"]
    ) -> Float[Array, "batch length modules experts"]:
        """The scales of each module, as PEFT has them too where all have the same ones."""
        batch, length, _, experts = scalings.shape
        return jnp.broadcast_to(scalings, (batch, length, self.config.modules, experts))

    def _with_scales(self, tree: PyTree, scales_of: Callable[[int, Int[Array, "*stack"]], jax.Array]) -> PyTree:
        """The tree whose LoRAs are active, with scales by their number and by the modules of their stacked layers."""
        places = {name: place for place, name in enumerate(self.config.experts)}
        missing = set(places)

        def scale(_: str, leaf: Adapted) -> Adapted:
            if leaf.tag.name not in places or NUMBER not in leaf.state:
                return leaf
            missing.discard(leaf.tag.name)
            scales = scales_of(places[leaf.tag.name], leaf.state[NUMBER])
            return dataclasses.replace(leaf, active=True, state={**leaf.state, SCALES: scales})

        scaled = map_adapted(scale, tree)
        if missing:
            raise ValueError(
                f"An X-LoRA of {len(places)} LoRAs misses {sorted(missing)}, which were taken off, or not loaded with "
                "it. Make the model anew: pj.get_peft_model, or pj.PeftModel.from_pretrained."
            )
        return scaled


def has_router(tree: PyTree) -> bool:
    """Whether an X-LoRA is active in a tree or model handle."""
    return any(isinstance(leaf.method, XLoraConfig) for leaf in active_prompts(tree))


def scales_weight(tree: PyTree, weight: Any) -> bool:
    """Whether an active X-LoRA scales LoRAs of a weight of a tree or model handle."""
    on_weight = nested_adapters(weight).keys()
    for leaf in active_prompts(tree):
        if isinstance(leaf.method, XLoraConfig) and not on_weight.isdisjoint(leaf.method.experts):
            return True
    return False


def with_numbers(handle: H, config: XLoraConfig) -> tuple[H, XLoraConfig]:
    """The model whose LoRAs know which of the classifier's modules they are on, and the config with their number.

    PEFT counts the modules that have one of the LoRAs, in the order in which PyTorch declares them.
    """
    names_by_path = dict[str, np.ndarray]()
    modules = set[str]()
    for leaf in find_leaves(handle.params, handle.layouts()):
        names_by_path[leaf.path] = leaf.names
        for name, node in nested_adapters(leaf.value).items():
            if name in config.experts:
                modules.update(map(str, leaf.names[changed_layers(node)]))
    numbers = {name: number for number, name in enumerate(in_declared_order(modules, handle.declared_modules))}

    def number(path: str, leaf: Adapted) -> Adapted:
        if leaf.tag.name not in config.experts:
            return leaf
        own = np.vectorize(lambda name: numbers.get(name, 0), otypes=[np.int32])(names_by_path[path])
        return dataclasses.replace(leaf, state={**leaf.state, NUMBER: jnp.asarray(own)})

    return map_adapted(number, handle), config.replace(modules=len(numbers))


def set_xlora_options(model: H, adapter_name: str = "default", **options: Any) -> H:
    """The model whose X-LoRA has other options, in its config and in the files that it is saved to.

    It is for what PEFT sets by ``set_topk_lora``, ``set_global_scaling_weight`` and ``set_scaling_pass_value``, and
    does not save.

    Args:
        model: A model with an X-LoRA.
        adapter_name: Its name.
        **options: ``top_k_lora``, ``global_scaling_weight``, ``scaling_pass_value`` (None for one over the number of
            LoRAs), ``softmax_temperature``, ``enable_softmax`` and ``enable_softmax_topk``.

    Raises:
        TypeError: if there is no such option.
        ValueError: if there is no such X-LoRA, or an option has a value that is wrong.

    Example:
        >>> import tempfile
        >>> from peft_jax.cli.demo_data import MODEL
        >>> base = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> lora = pj.get_peft_model(base, pj.LoraConfig(r=2, target_modules=["q_proj"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     lora.save_pretrained(folder)
        ...     model = pj.get_peft_model(base, XLoraConfig(adapters={"0": folder, "1": folder}))
        >>> set_xlora_options(model, top_k_lora=1).peft_config["default"].top_k_lora
        1
    """
    known = [name for name in XLoraConfig.structural if name not in ("experts", "layerwise_scalings", "modules")]
    if unknown := sorted(options.keys() - set(known)):
        raise TypeError(f"set_xlora_options has no option {unknown[0]}. It has {', '.join(known)}.")
    found = []

    def change(_: str, leaf: Adapted) -> Adapted:
        config = leaf.tag.config
        if leaf.tag.name != adapter_name or not isinstance(config, XLoraConfig):
            return leaf
        found.append(leaf)
        chosen = dict(options)
        if "scaling_pass_value" in chosen and chosen["scaling_pass_value"] is None:
            chosen["scaling_pass_value"] = 1 / len(config.experts)
        return dataclasses.replace(leaf, tag=dataclasses.replace(leaf.tag, config=config.replace(**chosen)))

    changed: H = map_adapted(change, model)
    if not found:
        raise ValueError(f"The model has no X-LoRA '{adapter_name}'. Name one, as in model.peft_config.")
    return changed

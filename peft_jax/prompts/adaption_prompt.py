"""LLaMA-Adapter: prompts that the attention of the top layers sees beside its own keys and values, through a gate.

Zhang et al., 2023, https://arxiv.org/abs/2303.16199, equations 4 to 7. Numbers follow PEFT 0.21.2: a layer's output
has ``gate * o_proj(softmax(q K(prompt)) V(prompt))`` added, with the layer's own projections, and a bias of ``o_proj``
once more.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from peft_jax.core.handle import Handle
from peft_jax.methods.base import Arrays, register
from peft_jax.prompts.base import Adaption, Prompt, PromptMethod


@register("ADAPTION_PROMPT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptionPromptConfig(PromptMethod):
    """Adds gated attention to trained prompts in the top layers; fields and defaults are PEFT's.

    Attributes:
        target_modules: Name of the attention modules; None takes the model's.
        adapter_len: How many prompt vectors a layer has.
        adapter_layers: How many layers have them, counted from the top.

    Raises:
        ValueError: if a field is missing or wrong; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, AdaptionPromptConfig(adapter_len=4, adapter_layers=2))
        >>> print(pj.summary(model).splitlines()[1].split()[0])
        model.layers.self_attn.k_proj.kernel
    """

    learning_rate: ClassVar[float] = 9e-3
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {"adaption_prompt": ("tokens", "in"), "adaption_gate": ("one",)}

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("adapter_len", "adapter_layers"):
            if not isinstance(value := getattr(self, field), int) or value < 1:
                raise ValueError(f"AdaptionPromptConfig needs {field} of at least 1, got {value!r}.")

    def places(self, modules: Sequence[str], handle: Handle) -> list[str]:
        """The matrices of the attention of the top layers."""
        end = f".{self.target_modules}.{handle.adaption_carrier}"
        found = [module for module in modules if module.endswith(end)]
        if len(found) < (self.adapter_layers or 0):
            raise ValueError(
                f"adapter_layers={self.adapter_layers}, but the model has {len(found)} modules "
                f"'{self.target_modules}' with keys. Ask for fewer layers, or leave target_modules out."
            )
        return found[-(self.adapter_layers or 0) :]

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """Prompt vectors and a gate."""
        return {"adaption_prompt": (self.adapter_len or 0, n_in), "adaption_gate": (1,)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """Normal prompts behind closed gates."""
        return jax.random.normal(key, shape) if role == "adaption_prompt" else jnp.zeros(shape)

    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """Prompts and gates of all layers; the gates of layers that have none stay closed."""
        gates = jnp.where(state["hit"][:, None], params["adaption_gate"], 0)
        return Prompt(adaption=Adaption(params["adaption_prompt"], gates, state["hit"]))

"""The axes and sharding of routers and fused experts, and their names in checkpoints that hold experts one by one.

transformers 5 fuses the experts of such checkpoints while it loads them, and splits them when it saves a model.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from peft_jax.core.layout import Layout
from peft_jax.models.family import KNOWN, Sharding

# By the end of a fused tensor's key the ends of the keys of its parts, with {} for the number of an expert.
Names = Mapping[str, tuple[str, ...]]

USUAL_NAMES: Names = MappingProxyType(
    {
        "mlp.experts.gate_up_proj": ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        "mlp.experts.down_proj": ("mlp.experts.{}.down_proj.weight",),
        "mlp.gate.weight": ("mlp.gate.weight",),
    }
)

SHARDING = Sharding(
    columns=r"(q|k|v|gate|up)_proj|lm_head",
    rows=r"(o|down)_proj",
    tables="embed_tokens",
    experts=r"experts\.(gate_up|down)_proj",
)


def expert_layouts(after: str, *, router: str = "gate", stored_in_out: bool = False) -> dict[str, Layout]:
    """Layouts of routers and fused experts in layers stacked in front.

    Args:
        after: The name in their paths that a layer's index follows.
        router: The name of the router.
        stored_in_out: Whether PyTorch stores the matrices of experts as ``(in, out)``.

    Example:
        >>> list(expert_layouts("layers").values())[0].unnamed
        (1,)
    """
    own: dict[str, Any] = {"source": KNOWN, "parameter": True}
    of_router = Layout(stack=(0,), inp=(1,), out=(2,), index_after=(after,), stored_in_out=False, **own)
    experts = Layout(stack=(0, 1), inp=(2,), out=(3,), index_after=(after, None), stored_in_out=stored_in_out, **own)
    biases = Layout(stack=(0, 1), inp=(), out=(2,), index_after=(after, None), **own)
    return {
        rf"(.*\.)?{after}\..*\.experts\.(gate_up|down)_proj": experts,
        rf"(.*\.)?{after}\..*\.experts\.(gate_up|down)_proj_bias": biases,
        rf"(.*\.)?{after}\.(.*\.)?mlp\.{router}\.kernel": of_router,
    }

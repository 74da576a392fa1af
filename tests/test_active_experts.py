"""The operations of a step of a mixture are those of the chosen experts, by a count over the program as JAX traces it.

The count stands in for a compiler's, and takes a grouped product at its rows: two operations for each row, input and
output, as `jax.lax.ragged_dot` computes it on TPU and GPU. The form that XLA gets on the CPU is not counted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import peft_jax as pj
from peft_jax.models.registry import read_architecture

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from lowering_checks import GROUPED, operations_of_product  # noqa: E402

SIZES = {
    **{"vocab_size": 32, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.1},
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
# What the config of each has beside, and how it calls the number of experts.
MIXTURES: dict[str, tuple[dict[str, Any], str]] = {
    "qwen3_moe": ({"moe_intermediate_size": 96, "head_dim": 32}, "num_experts"),
    "gpt_oss": ({"head_dim": 32}, "num_local_experts"),
    "deepseek_v3": (
        {**LATENT, "moe_intermediate_size": 96, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
        "n_routed_experts",
    ),
}
MATRICES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def operations(program: Any) -> tuple[int, int]:
    """Floating-point operations of the products in a jaxpr, and those of them that are in grouped products."""
    total = grouped = 0
    for equation in program.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name in ("dot_general", GROUPED):
            own = operations_of_product(equation)
            total, grouped = total + own, grouped + own * (name == GROUPED)
            continue
        parts = [operations(part) for part in programs_in(parameters)]
        if name == "cond":  # of the forms for several platforms that with grouped products
            parts = [max(parts, key=lambda part: (part[1] > 0, part[0]))]
        times = parameters["length"] if name == "scan" else 1
        total += times * sum(part[0] for part in parts)
        grouped += times * sum(part[1] for part in parts)
    return total, grouped


def programs_in(parameters: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else [value]:
            inner = getattr(one, "jaxpr", one)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def step_of(kind: str, experts: int, on_experts: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The operations of a forward pass, and of one with its backward pass, of a mixture with LoRA."""
    fields, count = MIXTURES[kind]
    config = read_architecture({"model_type": kind, **SIZES, **fields, count: experts})
    ids = jnp.ones((2, 32), jnp.int32)
    options: dict[str, Any] = {"target_parameters": MATRICES} if on_experts else {}
    lora = pj.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM", **options)
    handle = pj.get_peft_model(pj.AutoModelForCausalLM.from_config(config), lora)
    trainable, frozen = pj.partition(handle)

    def loss(own: Any) -> jax.Array:
        return pj.combine(own, frozen)(ids, labels=ids).loss

    programs = (jax.make_jaxpr(loss)(trainable), jax.make_jaxpr(jax.value_and_grad(loss))(trainable))
    forward, step = (operations(program.jaxpr) for program in programs)
    return forward, step


ALWAYS = ("deepseek_v3", True)  # the row that is not slow: its layers are of two shapes, and its experts adapted


def rows() -> list[Any]:
    """Each mixture, with LoRA on its attention alone and on its experts too."""
    found = []
    for kind in MIXTURES:
        for on_experts, name in ((False, "attention"), (True, "experts")):
            marks = () if (kind, on_experts) == ALWAYS else pytest.mark.slow
            found.append(pytest.param(kind, on_experts, marks=marks, id=f"{kind}-{name}"))
    return found


@pytest.mark.parametrize(("kind", "on_experts"), rows())
def test_a_step_costs_what_the_chosen_experts_cost(kind: str, on_experts: bool) -> None:
    """A mixture of 32 experts does within a tenth of the work of one that has the two chosen ones alone."""
    for many, few in zip(step_of(kind, 32, on_experts), step_of(kind, 2, on_experts), strict=True):
        (total, grouped), (least, alone) = many, few
        assert grouped == alone > total / 4, "what the experts of both do is not the same, or not counted"
        assert least < total < 1.1 * least, total / least

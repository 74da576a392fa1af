"""`compute_dtype`, the element type of an adapter's own products: in programs, by every way to ask for it, and refused.

What each method computes with it is a part of test_methods.py.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import peft_jax as pj
from peft_jax.cli.shared.adapter_base import load_model
from peft_jax.core.adapted_tree import adapted_leaves
from peft_jax.core.precision import with_compute_dtype
from peft_jax.models import LlamaConfig

HALF = jnp.dtype("bfloat16")
TINY = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
LORA = pj.LoraConfig(r=2, target_modules=["q", "k", "o"], init_lora_weights=False)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape).astype(HALF)


def attend(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Two products of one input, and one behind them."""
    return (x @ params["q"]["kernel"] + x @ params["k"]["kernel"]) @ params["o"]["kernel"]


def attending(config: pj.LoraConfig = LORA, **options: Any) -> Any:
    base = {name: {"kernel": normal(seed, 8, 8)} for seed, name in enumerate("qko")}
    return pj.apply_lora(base, config, **options)


def products(jaxpr: Any) -> Iterator[set[str]]:
    """The element types of the operands of each product in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield {var.aval.dtype.name for var in eqn.invars}
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("asked", [None, "bfloat16", "float32", jnp.bfloat16])
def test_the_products_of_a_program(asked: Any) -> None:
    adapted, x = attending(compute_dtype=asked), normal(5, 4, 3, 8)
    trainable, frozen = pj.partition(adapted)

    def loss(trainable: Any) -> jax.Array:
        return jnp.sum(pj.adapt(attend)(pj.combine(trainable, frozen), x).astype(jnp.float32))

    found = list(products(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr))
    in_float32 = asked in (None, "float32")
    assert len(found) > 9 and all(len(kinds) == 1 for kinds in found)
    assert ({"float32"} in found) == in_float32 and {"bfloat16"} in found
    kept = jax.tree.leaves(jax.eval_shape(lambda trainable: jax.vjp(loss, trainable)[1], trainable))
    copies = [leaf for leaf in kept if leaf.dtype == jnp.float32 and leaf.size == x.size]
    assert bool(copies) == in_float32  # of the inputs, for the backward pass
    assert {leaf.dtype.name for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(loss), trainable))} == {"float32"}


@pytest.mark.parametrize("init", [False, "mica"])
def test_results_and_gradients_are_close_to_those_in_float32(init: Any) -> None:
    config = LORA.replace(init_lora_weights=init, lora_alpha=8)
    x = normal(5, 4, 3, 8)
    plain, half = (attending(config, compute_dtype=dtype) for dtype in (None, "bfloat16"))
    wide = with_compute_dtype(plain, "float32")
    trainable, frozen = zip(*(pj.partition(tree) for tree in (plain, half, wide)), strict=True)

    def outcome(trainable: Any, frozen: Any) -> Any:
        def loss(trainable: Any) -> tuple[jax.Array, jax.Array]:
            y = pj.adapt(attend)(pj.combine(trainable, frozen), x)
            return jnp.sum(y.astype(jnp.float32) ** 2), y

        gradient, y = jax.grad(loss, has_aux=True)(trainable)
        return [leaf.astype(jnp.float32) for leaf in jax.tree.leaves((gradient, y))]

    want, got, same = (jax.jit(outcome)(*pair) for pair in zip(trainable, frozen, strict=True))
    for one, other, third in zip(*(map(np.asarray, leaves) for leaves in (want, got, same)), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=2**-4 * np.abs(one).max())  # bfloat16 has 8 digits
        np.testing.assert_array_equal(third, one)  # float32 is the default
    assert any(not np.array_equal(one, other) for one, other in zip(want, got, strict=True))


@pytest.mark.parametrize(("base", "asked"), [("float32", "bfloat16"), ("bfloat16", "float16")])
def test_a_fresh_adapter_changes_nothing_on_a_wider_base(base: str, asked: Any) -> None:
    """The base's product is neither rounded to the adapter's type nor beyond its range."""
    params = {"q": {"kernel": jnp.full((8, 4), 3e4, base)}}
    x = normal(5, 3, 8).astype(base) * 10
    adapted = pj.apply_lora(params, LORA.replace(target_modules=["q"], init_lora_weights=True), compute_dtype=asked)
    y = pj.adapt(lambda params, x: x @ params["q"]["kernel"])(adapted, x)
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.asarray(x @ params["q"]["kernel"], np.float32))
    assert np.isfinite(np.asarray(y, np.float32)).all()


def kinds(model: Any, name: str) -> set[Any]:
    """The types of the products of an adapter's matrices."""
    return {leaf.compute_dtype for _, leaf in adapted_leaves(model) if leaf.tag.name == name and leaf.tag.role is None}


def test_every_way_to_ask(tmp_path: Path) -> None:
    base = pj.AutoModelForCausalLM.from_config(LlamaConfig(**TINY), dtype="bfloat16")
    config = pj.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = pj.get_peft_model(base, config, compute_dtype="bfloat16")
    assert kinds(model, "default") == {HALF}
    assert {leaf.compute_dtype for _, leaf in adapted_leaves(model) if leaf.tag.role is not None} == {None}
    model.save_pretrained(tmp_path)
    assert "compute" not in (tmp_path / "adapter_config.json").read_text()
    plain = pj.get_peft_model(base, config)
    plain.save_pretrained(tmp_path / "plain")
    tensors = "adapter_model.safetensors"
    assert (tmp_path / tensors).read_bytes() == (tmp_path / "plain" / tensors).read_bytes()
    assert kinds(plain, "default") == {None}
    for read in (pj.PeftModel.from_pretrained, pj.interop.load_adapter):
        assert kinds(read(base, tmp_path, compute_dtype="bfloat16"), "default") == {HALF}
        assert kinds(read(base, tmp_path), "default") == {None}
    base.save_pretrained(tmp_path / "base")
    named = pj.get_peft_model(pj.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
    named.save_pretrained(tmp_path / "named")
    auto = pj.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "named", compute_dtype="bfloat16")
    assert kinds(auto, "default") == {HALF}
    more = plain.add_adapter("more", config.replace(modules_to_save=None), compute_dtype="float16")
    more = more.load_adapter(tmp_path, "read", compute_dtype="bfloat16")
    found = [kinds(more, name) for name in ("default", "more", "read")]
    assert found == [{None}, {jnp.dtype("float16")}, {HALF}]
    mixed = more.add_adapter("plain", config.replace(modules_to_save=None))
    mixed = mixed.add_weighted_adapter(["more", "plain"], [1.0, 1.0], "mixed", "cat")
    mixed = mixed.add_weighted_adapter(["more"], [0.5], "half")
    assert [kinds(mixed, name) for name in ("mixed", "half")] == [{None}, {jnp.dtype("float16")}]
    rows = pj.with_adapter_rows(attending(compute_dtype="bfloat16"), ["default"])
    assert {array.dtype for array in rows["q"]["kernel"].params[0].values()} == {HALF}
    started = pj.apply_lora_from_data(
        {"q": {"kernel": jnp.eye(8)}},
        LORA.replace(target_modules=["q"], init_lora_weights="corda"),
        [jnp.eye(8)],
        fn=lambda params, x: x @ params["q"]["kernel"],
        compute_dtype="bfloat16",
    )
    assert kinds(started, "default") == {HALF}


PROMPT = pj.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
OPTIONS = SimpleNamespace(adapter=None, compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda base: attending(compute_dtype="int8"), "compute_dtype='int8' is none of float32, bfloat16, float16. W"),
        (lambda base: attending(compute_dtype="bf16"), "compute_dtype='bf16' is none of"),
        (lambda base: attending(compute_dtype=3), "compute_dtype='3' is none of"),
        (lambda base: pj.get_peft_model(base, LORA, compute_dtype="float64"), "compute_dtype='float64' is none of"),
        (
            lambda base: pj.get_peft_model(base, PROMPT, compute_dtype="bfloat16"),
            "compute_dtype is for products of adapters with inputs. PromptTuningConfig has none. Leave it out.",
        ),
        (
            lambda base: pj.get_peft_model(base, pj.LNTuningConfig(), compute_dtype="bfloat16"),
            "compute_dtype is for products of adapters with inputs, and adapter 'default' trains whole arrays alone.",
        ),
        (
            lambda base: with_compute_dtype(attending(), "bfloat16", "other"),
            r"set for adapter 'other', which is not there. Found: \['default'\].",
        ),
        (lambda base: load_model(OPTIONS, None), "--compute-dtype bfloat16 is for an adapter's products. Give --adap"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(ask: Any, message: str) -> None:
    base = pj.AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    with pytest.raises(ValueError, match=message) as raised:
        ask(base)
    assert "\n" not in str(raised.value)

"""A model with an X-LoRA: a first pass for its classifier, and a second one with the LoRAs as that scales them.

Each pass keeps a cache of its own. PEFT keeps none, and runs both passes over all tokens for each new one. What they
compute of a token depends on those before it alone, so that the numbers are the same.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from peft_jax.core.pytree import PyTree
from peft_jax.models.config import ModelConfig
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import TwoCaches
from peft_jax.models.registry import family_of
from peft_jax.prompts.xlora import Router

FIRST_PASS = 0x70617373  # what a step's key is folded with for the base's dropout in the first pass: "pass"


def in_two_passes(
    config: ModelConfig,
    run: Callable[[PyTree, ForwardInputs], Any],
    tree: PyTree,
    router: Router,
    inputs: ForwardInputs,
) -> Any:
    """Run an architecture as X-LoRA does; nothing in the first pass has a gradient, as in PEFT.

    Args:
        config: The architecture's.
        run: It, of parameters and inputs.
        tree: Its parameters with the LoRAs.
        router: The classifier.
        inputs: The inputs of the call; a cache is one of `TwoCaches`.
    """
    first, second = inputs, inputs
    if inputs.cache is not None:
        first = dataclasses.replace(inputs, cache=inputs.cache.first)
        second = dataclasses.replace(inputs, cache=inputs.cache.second)
    if inputs.dropout_key is not None:
        first = dataclasses.replace(first, dropout_key=jax.random.fold_in(inputs.dropout_key, FIRST_PASS))
    before, hidden = _last_hidden_state(config, run, *jax.lax.stop_gradient((router.for_first_pass(tree), first)))
    scalings = router.scalings(hidden)
    output = run(router.for_second_pass(tree, scalings), second)
    if inputs.cache is not None:
        output = output._replace(cache=TwoCaches(before.cache, output.cache))
    return output._replace(scalings=router.of_all_modules(scalings))


def _last_hidden_state(
    config: ModelConfig, run: Callable[[PyTree, ForwardInputs], Any], tree: PyTree, inputs: ForwardInputs
) -> tuple[Any, jax.Array]:
    """The output of an architecture, and its last hidden state ``(batch, length, hidden)``."""
    inputs = dataclasses.replace(inputs, output_router_logits=False)
    if "head" in family_of(config).module.takes:
        output = run(tree, dataclasses.replace(inputs, head=False, output_hidden_states=False))
        return output, output.last_hidden_state
    output = run(tree, dataclasses.replace(inputs, output_hidden_states=True))
    return output, output.hidden_states[-1]

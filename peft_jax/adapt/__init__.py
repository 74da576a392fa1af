"""Run any JAX function over adapted and quantized leaves."""

from peft_jax.adapt.explain import explain as explain
from peft_jax.adapt.interpreter import adapt as adapt
from peft_jax.adapt.interpreter import evaluate as evaluate

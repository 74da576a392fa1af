"""LoRA on plain dictionaries and a plain function, which stays as it is."""

import jax
import jax.numpy as jnp
import optax
from characters import ENGLISH, PYTHON, SAMPLE, batches, cross_entropy, report

import peft_jax as pj


def model(params, tokens):  # (batch, 8) -> logits of the next character, (batch, 128)
    x = params["embedding"][tokens].reshape(len(tokens), -1) @ params["input"]
    x, _ = jax.lax.scan(lambda x, w: (x + jax.nn.gelu(x @ w["up"]) @ w["down"], None), x, params["layers"])
    return x @ params["output"]


def train(apply, trained, rest, text):  # apply(trained, rest, tokens) gives the logits; only `trained` moves
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trained, state, rest, tokens, wanted):
        loss, grads = jax.value_and_grad(lambda t: cross_entropy(apply(t, rest, tokens), wanted))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, losses = tx.init(trained), []
    for batch in batches(text):
        trained, state, loss = step(trained, state, rest, *batch)
        losses.append(loss)
    report(losses)
    return trained


shapes = {"embedding": (128, 16), "input": (128, 64), "output": (64, 128)}
shapes["layers"] = {"up": (3, 64, 128), "down": (3, 128, 64)}
keys = iter(jax.random.split(jax.random.key(0), 5))
params = jax.tree.map(lambda s: jax.random.normal(next(keys), s) * 0.1, shapes, is_leaf=lambda s: isinstance(s, tuple))
print("The base learns Python")
params = train(lambda params, _, tokens: model(params, tokens), params, None, PYTHON)

# fn= and args= have the axes read off the program: here, that the first one of "up" and "down" counts layers.
config = pj.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
params = pj.apply_lora(params, config, fn=model, args=(SAMPLE,))
print(pj.summary(params))

# Give jax.grad and optax the trainable partition alone. Over the whole tree jax.grad is an error, so that the base is
# not trained by mistake; optax.masked is no way out: it passes on the raw gradients of what it masks.
trainable, frozen = pj.partition(params)
adapted = pj.adapt(model)  # the same function, for adapted trees
print("The adapter learns English")
trainable = train(lambda t, frozen, tokens: adapted(pj.combine(t, frozen), tokens), trainable, frozen, ENGLISH)
params = pj.combine(trainable, frozen)
difference = jnp.abs(model(pj.merge(params), SAMPLE) - adapted(params, SAMPLE)).max()  # plain arrays, plain function
print(f"Merged: logits differ by at most {difference:.1g}")

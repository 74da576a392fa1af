"""LoRA on a Flax NNX module, through nnx.split and nnx.merge."""

import jax
import jax.numpy as jnp
import optax
from characters import ENGLISH, PYTHON, SAMPLE, batches, cross_entropy, report
from flax import nnx

import peft_jax as pj


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(128, 32, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 32, rngs=rngs, decode=False)
        self.up, self.down = nnx.Linear(32, 128, rngs=rngs), nnx.Linear(128, 32, rngs=rngs)
        self.norm, self.head = nnx.LayerNorm(32, rngs=rngs), nnx.Linear(8 * 32, 128, rngs=rngs)

    def __call__(self, tokens):  # (batch, 8) -> logits of the next character, (batch, 128)
        x = self.embed(tokens)
        x = x + self.attention(x)
        x = x + self.down(nnx.gelu(self.up(self.norm(x))))
        return self.head(x.reshape(len(x), -1))


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


graph, params = nnx.split(Model(nnx.Rngs(0)))  # from here on the model is a function of a tree of arrays
run = lambda params, tokens: nnx.merge(graph, params)(tokens)  # noqa: E731
print("The base learns Python")
params = train(lambda params, _, tokens: run(params, tokens), params, None, PYTHON)
config = pj.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "up", "down", "head"])
params = pj.apply_lora(params, config, fn=run, args=(SAMPLE,))  # fn=, args= have the axes read off the program
print(pj.summary(params))

# Plain optax over the trainable partition. nnx.Optimizer(model, tx, wrt=nnx.Param) works over the whole model, the base
# included, so nnx.grad is an error there.
trainable, frozen = pj.partition(params)
adapted = pj.adapt(run)  # the same function, for adapted trees
print("The adapter learns English")
trainable = train(lambda t, frozen, tokens: adapted(pj.combine(t, frozen), tokens), trainable, frozen, ENGLISH)
params = pj.combine(trainable, frozen)
difference = jnp.abs(run(pj.merge(params), SAMPLE) - adapted(params, SAMPLE)).max()
print(f"Merged: logits differ by at most {difference:.1g}")

"""LoRA on an Equinox module. Equinox is not a dependency of peft_jax: pip install equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from characters import ENGLISH, PYTHON, SAMPLE, batches, cross_entropy, report

import peft_jax as pj


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(128, 32, key=key)
        self.attention = eqx.nn.MultiheadAttention(4, 32, key=key)
        self.mlp = eqx.nn.MLP(8 * 32, 128, 128, 2, key=key)

    def __call__(self, tokens):  # (8,) -> logits of the next character, (128,)
        x = jax.vmap(self.embed)(tokens)
        return self.mlp((x + self.attention(x, x, x)).reshape(-1))


def train(apply, trained, rest, text):  # apply(trained, rest, tokens) gives the logits; only `trained` moves
    tx = optax.adam(1e-2)

    @eqx.filter_jit
    def step(trained, state, rest, tokens, wanted):
        loss, grads = eqx.filter_value_and_grad(lambda t: cross_entropy(apply(t, rest, tokens), wanted))(trained)
        updates, state = tx.update(grads, state, trained)
        return eqx.apply_updates(trained, updates), state, loss

    state, losses = tx.init(eqx.filter(trained, eqx.is_array)), []
    for batch in batches(text):
        trained, state, loss = step(trained, state, rest, *batch)
        losses.append(loss)
    report(losses)
    return trained


run = lambda model, tokens: jax.vmap(model)(tokens)  # noqa: E731  # (batch, 8) -> (batch, 128)
print("The base learns Python")
model = train(lambda model, _, tokens: run(model, tokens), Model(jax.random.key(0)), None, PYTHON)
config = pj.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
model = pj.apply_lora(model, config, fn=run, args=(SAMPLE,))  # fn=, args= have the axes read off the program
print(pj.summary(model))

# pj.partition, not eqx.partition: with that, eqx.filter_grad over the whole model would silently train the base too.
trainable, frozen = pj.partition(model)
adapted = pj.adapt(run)  # the same function, for adapted trees
print("The adapter learns English")
trainable = train(lambda t, frozen, tokens: adapted(pj.combine(t, frozen), tokens), trainable, frozen, ENGLISH)
model = pj.combine(trainable, frozen)
difference = jnp.abs(run(pj.merge(model), SAMPLE) - adapted(model, SAMPLE)).max()
print(f"Merged: logits differ by at most {difference:.1g}")

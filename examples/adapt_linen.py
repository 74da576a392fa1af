"""LoRA on a Flax linen module, trained with linen's TrainState."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from characters import ENGLISH, PYTHON, SAMPLE, batches, cross_entropy, report
from flax.training.train_state import TrainState

import peft_jax as pj


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):  # (batch, 8) -> logits of the next character, (batch, 128)
        x = nn.Embed(128, 32, name="embed")(tokens) + self.param("position", nn.initializers.normal(0.1), (8, 32))
        x = x + nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm()(x))
        x = x + nn.Dense(32, name="down")(nn.gelu(nn.Dense(128, name="up")(nn.LayerNorm()(x))))
        return nn.Dense(128, name="head")(x.reshape(len(x), -1))


@jax.jit
def step(state, frozen, tokens, wanted):
    loss_of = lambda trained: cross_entropy(state.apply_fn(trained, frozen, tokens), wanted)  # noqa: E731
    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(apply, trained, frozen, text):
    state = TrainState.create(apply_fn=apply, params=trained, tx=optax.adam(1e-2))
    losses = []
    for batch in batches(text):
        state, loss = step(state, frozen, *batch)
        losses.append(loss)
    report(losses)
    return state.params


model = Model()
print("The base learns Python")
variables = model.init(jax.random.key(0), SAMPLE)
variables = train(lambda variables, _, tokens: model.apply(variables, tokens), variables, None, PYTHON)

# fn= and args= have the axes read off the program: attention's kernels are (features, heads, head size).
config = pj.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "up", "down", "head"])
variables = pj.apply_lora(variables, config, fn=model.apply, args=(SAMPLE,))
print(pj.summary(variables))

# TrainState takes the trainable partition alone. Over the whole tree it would train the base, so there jax.grad is an
# error.
trainable, frozen = pj.partition(variables)
adapted = pj.adapt(model.apply)  # the same function, for adapted trees
print("The adapter learns English")
trainable = train(lambda t, frozen, tokens: adapted(pj.combine(t, frozen), tokens), trainable, frozen, ENGLISH)
variables = pj.combine(trainable, frozen)
difference = jnp.abs(model.apply(pj.merge(variables), SAMPLE) - adapted(variables, SAMPLE)).max()
print(f"Merged: logits differ by at most {difference:.1g}")

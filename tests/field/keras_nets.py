"""Nets of Keras on JAX: ``model.stateless_call`` takes lists of variables."""

import os

os.environ["KERAS_BACKEND"] = "jax"
import jax.numpy as jnp
import keras
from nets import Net, normal

X, IMAGE, IDS = normal(1, 2, 5, 8), normal(2, 2, 8, 8, 4), jnp.array([[3, 0, 7, 2], [1, 3, 2, 10]])


def of_keras(model, *inputs, **fields):
    """A model's trainable variables by their paths, and its stateless call."""
    model(*inputs)
    paths = [variable.path for variable in model.trainable_variables]
    rest = [variable.value for variable in model.non_trainable_variables]

    def fn(params, *inputs):
        return model.stateless_call([params[path] for path in paths], rest, *inputs)[0]

    return Net(fn, {variable.path: variable.value for variable in model.trainable_variables}, inputs, **fields)


def transformer():
    """A block after Keras' example of text classification."""
    ids = keras.Input((4,), dtype="int32")
    x = keras.layers.Embedding(11, 8)(ids)
    attended = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = keras.layers.LayerNormalization()(x + attended)
    hidden = keras.layers.Dense(8)(keras.layers.Dense(16, activation="relu")(x))
    x = keras.layers.LayerNormalization()(x + hidden)
    return keras.Model(ids, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling1D()(x)))


def grouped():
    x = keras.Input((5, 8))
    return keras.Model(x, keras.layers.GroupQueryAttention(4, 2, 1)(x, x))


def cnn():
    x = image = keras.Input((8, 8, 4))
    for width in (8, 16):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False)(x)
        x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
        x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.SeparableConv2D(8, 2)(x)
    return keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(x)))


def recurrent(layer):
    x = keras.Input((5, 8))
    return keras.Model(x, keras.layers.Dense(3)(layer(x)))


NETS = {
    "keras transformer": lambda: of_keras(transformer(), IDS),
    "keras grouped queries": lambda: of_keras(grouped(), X),
    "keras CNN": lambda: of_keras(cnn(), IMAGE, left_out=r"groups do not divide"),
    "keras LSTM": lambda: of_keras(recurrent(keras.layers.LSTM(6)), X),
    "keras bidirectional GRU": lambda: of_keras(recurrent(keras.layers.Bidirectional(keras.layers.GRU(6))), X),
    "keras Conv1DTranspose": lambda: of_keras(recurrent(keras.layers.Conv1DTranspose(6, 3)), X),
    "keras EinsumDense": lambda: of_keras(recurrent(keras.layers.EinsumDense("abc,cde->abde", (None, 2, 3))), X),
}

"""Leaves that the host reads: the same bits as on the device, in the memory that was filled."""

import jax.numpy as jnp
import numpy as np
import pytest
from peft_jax.interop.checkpoint import Row, load_params
from peft_jax.interop.host_read import Cast, aligned_empty, read_leaves

TYPES = ("float32", "bfloat16", "float16")
ROWS = [
    Row("layers.kernel", (2, 70, 150), "layers.{}.weight", True),
    Row("layers.scale", (2, 150), "layers.{}.scale", False),
    Row("experts.kernel", (2, 3, 4, 5), "experts.{}.weight", True),
    Row("head.kernel", (70, 150), "head.weight", True),
    Row("table.embedding", (150, 70), "table.weight", False),
    Row("gate", (2,), "gates.{}", False),
    Row("bias", (7,), "bias", False),
    Row("number", (), "number", False),
    Row("nothing", (0, 3), "nothing", True),
]


class Computed:
    """A tensor that is computed when it is read."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.nbytes = array, array.shape, array.dtype, array.nbytes

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        return self.array


def stored(dtype, kind=np.asarray):
    draw = np.random.default_rng(0)
    tensors = {}
    for row in ROWS:
        for key in row.keys:
            tensors[key] = kind(np.asarray(draw.normal(size=row.tensor_shape)).astype(jnp.dtype(dtype)))
    return tensors


def leaf_of(tree, row):
    for name in row.path.split("."):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("kind", [np.asarray, Computed])
@pytest.mark.parametrize("to", TYPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_leaves_are_the_tensors_cast_and_transposed(dtype, to, kind):
    tensors = stored(dtype, kind)
    found = load_params(tensors, ROWS, Cast(lambda path: to))
    for row in ROWS:
        arrays = [np.asarray(tensors[key]) for key in row.keys]
        turned = [np.swapaxes(array, -1, -2) if row.transposed else array for array in arrays]
        want = np.stack(turned) if row.stacked else turned[0]
        got = leaf_of(found, row)
        assert (got.dtype, got.shape) == (jnp.dtype(to), row.shape)
        np.testing.assert_array_equal(np.asarray(got), want.astype(jnp.dtype(to)))


@pytest.mark.parametrize("row", [ROWS[0], ROWS[1], ROWS[2], ROWS[4], ROWS[7]], ids=lambda row: row.path)
@pytest.mark.parametrize(("value", "to"), [(np.nan, "float32"), (np.inf, "bfloat16"), (-np.inf, "float16")])
def test_one_value_that_is_not_finite_is_found(row, value, to):
    tensors = stored("float32")
    key = row.keys[-1]
    tensors[key].reshape(-1)[-1] = value
    with pytest.raises(ValueError, match=f"tensor '{key}' holds NaN or infinity in 1 of {tensors[key].size} elements"):
        load_params(tensors, ROWS, Cast(lambda path: to))


@pytest.mark.parametrize("to", ["bfloat16", "float16"])
def test_a_value_beyond_the_leafs_type_is_an_error(to):
    tensors = {"bias": np.array([1, 3.4e38], np.float32)}
    with pytest.raises(ValueError, match=f"tensor 'bias' has values beyond {to}"):
        load_params(tensors, [Row("bias", (2,), "bias", False)], Cast(lambda path: to))


def test_a_leaf_is_the_memory_that_was_filled(monkeypatch):
    made = []

    def noted(shape, dtype):
        made.append(aligned_empty(shape, dtype))
        return made[-1]

    monkeypatch.setattr("peft_jax.interop.host_read.aligned_empty", noted)
    read = read_leaves(ROWS[:5], stored("float32"), Cast(lambda path: "bfloat16"))
    for array, leaf in zip(made, read.values(), strict=True):
        assert leaf.unsafe_buffer_pointer() == array.ctypes.data

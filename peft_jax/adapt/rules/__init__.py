"""The rules: how each primitive runs with a weight among its operands.

A rule takes ``(evaluate, eqn, values)`` and gives the equation's outputs, or None where the weight has to be merged.
"""

from peft_jax.adapt.custom_calls import CUSTOM_CALLS
from peft_jax.adapt.joined import joined_or_stacked
from peft_jax.adapt.rules.base import Rule
from peft_jax.adapt.rules.control_flow import checkpoint, cond, custom_call, jit, scan, shard_map, while_loop
from peft_jax.adapt.rules.elementwise import (
    convert_element_type,
    elementwise,
    negative,
    on_each_array,
    optimization_barrier,
    untrained_row,
)
from peft_jax.adapt.rules.lookups import dynamic_slice, gather
from peft_jax.adapt.rules.moves import (
    broadcast_in_dim,
    pad,
    reduce_sum,
    reshape,
    reverse,
    slice_,
    split,
    squeeze,
    transpose,
)
from peft_jax.adapt.rules.placement import all_gather, device_put, ppermute, pvary, reshard, sharding_constraint
from peft_jax.adapt.rules.products import convolution, dot_general, ragged_dot

# The weights go inside of these.
CALLS = ("jit", "pjit", "checkpoint", "remat", "remat2", *CUSTOM_CALLS, "scan", "while", "cond", "shard_map")

RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "gather": gather,
    "conv_general_dilated": convolution,
    **dict.fromkeys(("add", "sub", "mul", "div"), elementwise),
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "reduce_sum": reduce_sum,
    "broadcast_in_dim": broadcast_in_dim,
    "convert_element_type": convert_element_type,
    "neg": negative,
    "concatenate": joined_or_stacked,
    "stack": joined_or_stacked,
    "slice": slice_,
    "split": split,
    "rev": reverse,
    "pad": pad,
    "dynamic_slice": dynamic_slice,
    "copy": lambda evaluate, eqn, values: values,
    "name": lambda evaluate, eqn, values: values,  # jax.ad_checkpoint.checkpoint_name
    "stop_gradient": on_each_array,
    "untrained_row": untrained_row,
    "device_put": device_put,
    "reshard": reshard,
    "all_gather": all_gather,
    "all_gather_invariant": all_gather,
    "ppermute": ppermute,
    "pvary": pvary,
    "pcast": pvary,
    "optimization_barrier": optimization_barrier,
    "sharding_constraint": sharding_constraint,
    "jit": jit,
    "pjit": jit,
    "checkpoint": checkpoint,
    "remat": checkpoint,
    "remat2": checkpoint,
    **dict.fromkeys(CUSTOM_CALLS, custom_call),
    "scan": scan,
    "while": while_loop,
    "cond": cond,
    "shard_map": shard_map,
}

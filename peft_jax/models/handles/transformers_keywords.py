"""Arguments of transformers' ``from_pretrained``: what they mean here, or why there is no such thing."""

from collections.abc import Mapping
from typing import Any

import jax

from peft_jax.core.hub import HubOptions
from peft_jax.core.pytree import PyTree

# Values that ask for what is done here in any case.
ALREADY: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (True, False, None),  # tensors are read one at a time into their places
    "use_safetensors": (True, None),
    "trust_remote_code": (False, None),
    "device_map": (None,),
    "attn_implementation": ("eager", "sdpa", None),
    "output_attentions": (False, None),
    "force_download": (False, None),
    "ignore_mismatched_sizes": (False, None),
    "use_cache": (True, False, None),  # generate has its cache, and a call has none
}
# What to do instead of others.
INSTEAD = {
    "low_cpu_mem_usage": "Leave it out: tensors are read one at a time in any case.",
    "use_safetensors": "Save the checkpoint as safetensors: pickles are not read.",
    "trust_remote_code": "No code from a checkpoint is run. Leave it out.",
    "device_map": "Arrays are on JAX's default device: choose it with jax.default_device, or shard the model over a "
    "mesh with jax.device_put(model, shardings).",
    "max_memory": "It belongs to device_map. Shard the model over a mesh with jax.device_put(model, shardings).",
    "offload_folder": "There is no offloading. Shard the model over a mesh, or read it with load_in_8bit=True.",
    "attn_implementation": "Attention is computed by XLA. Leave it out.",
    "output_attentions": "Attention's weights are not returned.",
    "force_download": "Delete the copy in the hub's cache instead.",
    "ignore_mismatched_sizes": "Read the checkpoint with the config of its weights.",
    "use_cache": "Leave it out: generate has its cache.",
    "use_auth_token": "Write token=.",
    "config": "Read the checkpoint with its own config.json, or make a model with from_config(config).",
    "torchscript": "It is PyTorch's.",
}


def element_type(dtype: Any, torch_dtype: Any) -> Any:
    """The ``dtype=`` of a call, which transformers called ``torch_dtype``; PyTorch's types and names are read too.

    Args:
        dtype: A name, a type of NumPy or PyTorch, ``"auto"``, or None.
        torch_dtype: The same.

    Raises:
        ValueError: if both are given.

    Example:
        >>> element_type(None, "torch.bfloat16"), element_type("auto", None)
        ('bfloat16', None)
    """
    if dtype is not None and torch_dtype is not None:
        raise ValueError(f"Both dtype={dtype!r} and torch_dtype={torch_dtype!r} are given. Write dtype= alone.")
    given = torch_dtype if dtype is None else dtype
    if given is None or isinstance(given, str) and given == "auto":
        return None
    name = str(given)
    if name.startswith("torch."):
        return name.removeprefix("torch.")
    return given


def hub_options(keywords: Mapping[str, Any]) -> HubOptions:
    """The arguments that say where on the hub a checkpoint is, once all others are found to change nothing.

    Args:
        keywords: The arguments of a call that are not parameters of their own.

    Raises:
        TypeError: if there is no such argument.
        ValueError: if it asks for what is not done here.

    Example:
        >>> hub_options({"revision": "main", "low_cpu_mem_usage": True})
        {'revision': 'main'}
    """
    hub: HubOptions = {}
    for name, value in keywords.items():
        if name in HubOptions.__annotations__:
            hub[name] = value  # type: ignore[literal-required]
        elif name not in ALREADY and name not in INSTEAD:
            raise TypeError(
                f"from_pretrained has no argument {name}. Beside its parameters it takes "
                f"{', '.join(HubOptions.__annotations__)} and torch_dtype."
            )
        elif value not in ALREADY.get(name, ()):
            raise ValueError(f"{name}={value!r} is not supported. {INSTEAD[name]}")
    return hub


def check_device(torch_device: str | None, params: PyTree) -> None:
    """Raise ValueError if an adapter is meant for another kind of device than its base is on.

    Args:
        torch_device: PyTorch's name of a device, such as ``"cuda:0"``; None for the base's.
        params: The base's parameters.
    """
    if torch_device is None:
        return
    kind = str(torch_device).partition(":")[0]
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    platforms = {device.platform for device in arrays[0].devices()} if arrays else set()
    names = {"cuda": "gpu", "xpu": "gpu", "rocm": "gpu"}
    if names.get(kind, kind) not in platforms:
        raise ValueError(
            f"torch_device={torch_device!r} is not where the base is, which is on {sorted(platforms)}, and where its "
            "adapter goes. Leave it out, or move the model with jax.device_put."
        )

"""Keys of an adapter's file that are not as PEFT writes them: an adapter's name in them, or those of a wrapper."""

from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

from peft_jax.interop.formats import PREFIX

from peft_jax.core.bounded_regex import compiled

T = TypeVar("T")

# What trainers put into the names of modules, and what does it.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning",
    "module.": "DataParallel or DeepSpeed",
}
MAGNITUDE = ".lora_magnitude_vector"
SHOWN = 4  # how many problems an error lists


def renamed(tensors: Mapping[str, T], key_mapping: Mapping[str, str]) -> dict[str, T]:
    """The tensors of a file under other keys: PEFT's ``key_mapping``.

    Args:
        tensors: Tensors by key.
        key_mapping: Replacements by regex, for keys without PEFT's prefix; the first that matches a key is applied.

    Raises:
        ValueError: if an expression is none, or two tensors get one key.

    Example:
        >>> list(renamed({"base_model.model.old.q.lora_A.weight": 1}, {"^old": "model.layers.0"}))
        ['base_model.model.model.layers.0.q.lora_A.weight']
    """
    patterns = {compiled(pattern, "a key of key_mapping"): new for pattern, new in key_mapping.items()}
    found: dict[str, T] = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        prefix = key.removesuffix(plain)
        for pattern, new in patterns.items():
            changed, count = pattern.subn(new, plain)
            if count:
                plain = changed
                break
        if prefix + plain in found:
            raise ValueError(
                f"key_mapping gives two tensors the key '{prefix + plain}'. Make its expressions narrower."
            )
        found[prefix + plain] = tensor
    return found


def without_adapter_name(tensors: Mapping[str, T], adapter_name: str) -> dict[str, T]:
    """The tensors under the keys of a file, where they have those of PEFT's module, with the adapter's name.

    PEFT reads such keys where the name is that of the adapter that is loaded.

    Args:
        tensors: Tensors by key.
        adapter_name: That name.

    Example:
        >>> list(without_adapter_name({"base_model.model.q.lora_A.default.weight": 1}, "default"))
        ['base_model.model.q.lora_A.weight']
    """
    found = {}
    for key, tensor in tensors.items():
        parts = key.split(".")
        *_, name, last = ["", "", *parts]
        if adapter_name not in (name, last) or "modules_to_save" in parts:
            found[key] = tensor
            continue
        del parts[-1 if last == adapter_name else -2]
        plain = ".".join(parts)
        plain = plain.removesuffix(".weight") if plain.endswith(f"{MAGNITUDE}.weight") else plain
        found[key if plain in tensors else plain] = tensor
    return found


def wrapper_in(keys: Iterable[str], wanted: Collection[str]) -> str:
    """A line on keys that a wrapper has changed; empty if without its part they would be no better.

    Args:
        keys: The keys of a file.
        wanted: Those that it should have.

    Example:
        >>> wrapper_in(["base_model.model._orig_mod.q.lora_A.weight"], {"base_model.model.q.lora_A.weight"})[:70]
        "its keys look like 'base_model.model._orig_mod.q.lora_A.weight', into "
    """
    for key in keys:
        inside = [part for part in WRAPPERS if f".{part}" in f".{key}"]
        if not inside or key in wanted:
            continue
        plain = key
        for part in inside:
            plain = f".{plain}".replace(f".{part}", ".").removeprefix(".")
        if plain in wanted or f"base_model.model.{plain}" in wanted:
            names = " and ".join(f"'{part}'" for part in inside)
            makers = " and ".join(WRAPPERS[part] for part in inside)
            return (
                f"its keys look like '{key}', into which {makers} put {names}. Save the unwrapped model, or strip it "
                f"from the keys: {{key.replace({inside[0]!r}, ''): tensor for key, tensor in tensors.items()}}"
            )
    bare = next((key for key in keys if f"base_model.model.{key}" in wanted), "")
    return f"its keys look like '{bare}', without PEFT's prefix. Put 'base_model.model.' in front of each" * bool(bare)


def some_of_each(kinds: Iterable[Collection[str]]) -> str:
    """A few problems, of each kind some, and how many more there are.

    Example:
        >>> some_of_each([["a", "b", "c"], ["d", "e", "f"]])
        'a; b; d; e; and 2 more'
    """
    lists = list(map(list, kinds))
    total = sum(map(len, lists))
    shown = [0] * len(lists)
    while sum(shown) < min(SHOWN, total):
        left = [i for i, kind in enumerate(lists) if shown[i] < len(kind)]
        shown[min(left, key=lambda i: shown[i])] += 1
    chosen = []
    for kind, count in zip(lists, shown, strict=True):
        chosen += kind[:count]
    more = [f"and {total - SHOWN} more"] if total > SHOWN else []
    return "; ".join([*chosen, *more])

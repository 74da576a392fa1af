"""The order of ``rank_pattern`` and ``alpha_pattern`` in a file: the first pattern that names a module counts."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft_jax.interop.formats import PREFIX, ROWS

from peft_jax.core.bounded_regex import matches
from peft_jax.core.targets import pattern_value
from peft_jax.methods.base import Method


def modules_of(peft_type: str, keys: Iterable[str]) -> set[str]:
    """The modules that have a method's tensors, by the keys of a file.

    Example:
        >>> modules_of("LORA", ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"])
        {'q'}
    """
    ends = {f".{row.suffix}" for rows in ROWS.get(peft_type, {}).values() for row in rows}
    found = set()
    for key in keys:
        for end in ends:
            if key.endswith(end):
                found.add(key.removeprefix(PREFIX).removesuffix(end))
    return found


def in_file_order(fields: Mapping[str, Any], config: Method, keys: Iterable[str]) -> dict[str, Any]:
    """The fields of a config as JSON has them: sorted as PEFT sorts them, but for patterns whose order decides.

    Args:
        fields: The fields.
        config: The config.
        keys: Keys of its tensors.
    """
    modules = modules_of(config.peft_type, keys)
    ordered = {}
    for name in sorted(fields):
        value = fields[name]
        if isinstance(value, Mapping):
            ranked = dict(sorted(value.items()))
            decides = name in ("rank_pattern", "alpha_pattern") and bool(config.patterns)
            if not decides or all(pattern_value(ranked, one, 0) == pattern_value(value, one, 0) for one in modules):
                value = ranked
        ordered[name] = value
    return ordered


def warn_of_sorted_patterns(config: Method, keys: Iterable[str]) -> None:
    """Warn where the order in a file decides and may be PEFT's, which sorts patterns when it writes them.

    Ranks are what the tensors have, so that alphas alone can be another pattern's.
    """
    patterns = dict(config.alpha_pattern)
    if list(patterns) != sorted(patterns):
        return
    for module in sorted(modules_of(config.peft_type, keys)):
        named = [pattern for pattern in patterns if matches(rf"(.*\.)?({pattern})", module)]
        if len({patterns[pattern] for pattern in named}) > 1:
            warnings.warn(
                f"The patterns {named} of alpha_pattern all name '{module}', and the first counts. PEFT sorts them "
                "when it writes a file, so that the adapter may have been trained with another. If so, change their "
                "order in adapter_config.json.",
                stacklevel=4,
            )
            return

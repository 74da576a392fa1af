"""The order of ``rank_pattern`` and ``alpha_pattern`` in a file: the first pattern that names a module counts."""

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft_jax.interop.formats import PREFIX, ROWS

from peft_jax.core.bounded_regex import matches
from peft_jax.core.targets import pattern_value
from peft_jax.methods.base import Method


def modules_of(peft_type: str, keys: Iterable[str]) -> list[str]:
    """The modules that have a method's tensors, by the keys of a file, in their order.

    Example:
        >>> modules_of("LORA", ["base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"])
        ['q']
    """
    rows = itertools.chain(*ROWS.get(peft_type, {}).values())
    ends = {f".{row.suffix}" for row in rows}
    found: dict[str, None] = {}
    for key in keys:
        for end in ends:
            if key.endswith(end):
                found[key.removeprefix(PREFIX).removesuffix(end)] = None
    return list(found)


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
            if not decides or _mean_the_same(ranked, value, modules):
                value = ranked
        ordered[name] = value
    return ordered


def _mean_the_same(one: Mapping[str, float], other: Mapping[str, float], modules: Iterable[str]) -> bool:
    """Whether patterns in two orders have the same value for each of some modules."""
    for module in modules:
        if pattern_value(one, module, 0) != pattern_value(other, module, 0):
            return False
    return True


def warn_of_sorted_patterns(config: Method, keys: Iterable[str]) -> None:
    """Warn where the order in a file decides and may be PEFT's, which sorts patterns when it writes them.

    Ranks are what the tensors have, so that alphas alone can be another pattern's.
    """
    patterns = dict(config.alpha_pattern)
    if len(patterns) < 2 or list(patterns) != sorted(patterns):
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

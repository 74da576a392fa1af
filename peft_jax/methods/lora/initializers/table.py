"""The table of LoRA's initializers: one row for each value of ``init_lora_weights``.

To add one, write its function in a file of this package and its row here; what the row says is read everywhere else.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from peft_jax.methods.lora.initializers import from_weight
from peft_jax.methods.lora.initializers.base import Initialize
from peft_jax.methods.lora.nested_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig

Value = bool | str


@dataclasses.dataclass(frozen=True)
class Initializer:
    """One row of the table.

    Attributes:
        value: The value of ``init_lora_weights``, as error messages write it.
        needs: What it looks at: nothing, the weight itself, or data (`peft_jax.apply_lora_from_data`).
        make: From a config to the function of one layer, if it looks at the weight alone.
        pattern: Regex of other values that mean it too.
        changes_base: Whether it takes the adapter's first product out of the base. A file holds the adapter alone, so
            that it goes on the changed base.
        converts: Whether `peft_jax.interop.save_adapter` can make such an adapter one on the original base.
        bases: The bases that it takes: ``"float"``, ``"float or quantized"``, or ``"any"``, other adapters included.
        embeddings: On an embedding: as ``True`` does, as it does elsewhere, or refused.
        any_rank: Whether the rank may be larger than the number of the matrix's directions.
        frozen: Roles of the factors that are not trained.
        options_field: The config's field with its options, if it has any.
        options: Their class.
        options_default: Whether the options may be left out.
    """

    value: Value
    needs: Literal["nothing", "weight", "data"] = "nothing"
    make: Callable[[Any], Initialize] | None = None
    pattern: str | None = None
    changes_base: bool = False
    converts: bool = False
    bases: Literal["any", "float", "float or quantized"] = "any"
    embeddings: Literal["as True", "own", "refused"] = "as True"
    any_rank: bool = False
    frozen: tuple[str, ...] = ()
    options_field: str | None = None
    options: type | None = None
    options_default: bool = False

    def is_meant_by(self, value: Any) -> bool:
        """Whether a value of ``init_lora_weights`` means this row."""
        if value is None or isinstance(value, bool) or isinstance(self.value, bool):
            return (False if value is None else value) is self.value
        return value == self.value or (self.pattern is not None and re.fullmatch(self.pattern, str(value)) is not None)


TABLE = (
    Initializer(True),
    Initializer(False),
    Initializer("gaussian"),
    Initializer("orthogonal", "weight", lambda config: from_weight.orthogonal, any_rank=True),
    Initializer(
        "pissa",
        "weight",
        from_weight.pissa,
        pattern=r"pissa_niter_\d+",
        changes_base=True,
        converts=True,
        bases="float",
    ),
    Initializer(
        "olora",
        "weight",
        lambda config: from_weight.olora,
        changes_base=True,
        converts=True,
        bases="float or quantized",
    ),
    Initializer(
        "loftq",
        "weight",
        from_weight.loftq,
        changes_base=True,
        bases="float",
        embeddings="refused",
        options_field="loftq_config",
        options=LoftQConfig,
    ),
    Initializer("mica", "weight", lambda config: from_weight.mica, bases="float", embeddings="own", frozen=("lora_B",)),
    Initializer("eva", "data", options_field="eva_config", options=EvaConfig, options_default=True),
    Initializer(
        "corda",
        "data",
        changes_base=True,
        converts=True,
        bases="float",
        options_field="corda_config",
        options=CordaConfig,
        options_default=True,
    ),
    Initializer(
        "lora_ga",
        "data",
        changes_base=True,
        converts=True,
        bases="float",
        options_field="lora_ga_config",
        options=LoraGAConfig,
    ),
)


def find(value: Any) -> Initializer:
    """The row of a value of ``init_lora_weights``.

    Raises:
        ValueError: if there is none.

    Example:
        >>> find("pissa_niter_4").changes_base, find("eva").needs
        (True, 'data')
    """
    for row in TABLE:
        if row.is_meant_by(value):
            return row
    raise ValueError(
        f"init_lora_weights={value!r} is not supported. Write True, False or one of {', '.join(written_values())}."
    )


def written_values() -> Iterator[str]:
    """The values that are strings, as a user writes them."""
    for row in TABLE:
        if isinstance(row.value, str):
            yield row.value
            if row.pattern is not None:
                yield row.pattern.replace(r"\d+", "N")


def from_data() -> tuple[str, ...]:
    """The values of those that look at data."""
    return tuple(str(row.value) for row in TABLE if row.needs == "data")

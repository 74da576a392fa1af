"""Shared base class of LoHa and LoKr, from LyCORIS (https://arxiv.org/abs/2309.14859): scale and dropout."""

from collections.abc import Mapping
from typing import ClassVar

from peft_jax.core.targets import pattern_value
from peft_jax.methods.fields import check_probability
from peft_jax.methods.ranked import Ranked


class Lycoris(Ranked):
    """A method whose change counts ``alpha / r``, and is dropped in training by outputs (`drop_change`) or whole."""

    mixes: ClassVar[bool] = True

    alpha: float
    rank_dropout: float
    module_dropout: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability(self, "rank_dropout")
        check_probability(self, "module_dropout")

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """Of outputs of the change, and of all of it."""
        return {"outputs": self.rank_dropout, "module": self.module_dropout}

    def scaling(self, module: str) -> float:
        """Scale of the adapter of a module."""
        return pattern_value(self.alpha_pattern, module, self.alpha) / self.rank(module)

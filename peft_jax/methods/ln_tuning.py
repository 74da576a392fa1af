"""LayerNorm tuning: the normalizations of a model trained whole, and nothing else.

Zhao et al., 2023, https://arxiv.org/abs/2312.11420, section 3. Files follow PEFT 0.21.2.
"""

import dataclasses
from typing import ClassVar

from peft_jax.methods.base import Method, register
from peft_jax.methods.target_fields import ExcludeFields, TargetFields


@register("LN_TUNING")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuningConfig(TargetFields, ExcludeFields, Method):
    """Trains a copy of whole modules, mostly normalizations; fields and defaults are PEFT's.

    It goes on the modules that the fields of `TargetFields` and `ExcludeFields` say.

    Attributes:
        target_modules: Names (ends of module paths), or one regex for whole paths, of any modules with weights.
        modules_to_save: Modules trained whole too, under names of their own in the file.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
        >>> params = pj.apply_adapter(params, LNTuningConfig(target_modules=["norm"]))
        >>> sorted(pj.get_peft_model_state_dict(params))
        ['base_model.model.norm.ln_tuning_layers.bias', 'base_model.model.norm.ln_tuning_layers.weight']
    """

    learning_rate: ClassVar[float] = 1e-3
    replaces: ClassVar[bool] = True

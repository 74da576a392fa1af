"""Prompt tuning: trained embeddings that stand before those of the inputs.

Lester et al., 2021, https://arxiv.org/abs/2104.08691, section 2. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import enum
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.adapted import is_adapted
from peft_jax.core.weight import Weight, as_weight
from peft_jax.methods.base import register
from peft_jax.prompts.base import PROMPT
from peft_jax.prompts.learning import PromptLearning
from peft_jax.prompts.tokenizer import read_tokenizer


class PromptTuningInit(enum.StrEnum):
    """How the virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@register("PROMPT_TUNING")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(PromptLearning):
    """Puts trained embeddings before those of the inputs; fields and defaults are PEFT's.

    Attributes:
        prompt_tuning_init: ``"RANDOM"`` (normal numbers), ``"TEXT"`` (embeddings of a text's tokens, repeated or cut
            off to fit) or ``"SAMPLE_VOCAB"`` (embeddings of random tokens).
        prompt_tuning_init_text: The text.
        tokenizer_name_or_path: Whose tokens the text is made of.
        tokenizer_kwargs: Arguments of the tokenizer's ``from_pretrained``; ``trust_remote_code`` is False in any case.

    The other fields are those of `PromptLearning`.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> config = PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="TEXT",
        ...                             prompt_tuning_init_text="List the parameters.",
        ...                             tokenizer_name_or_path=str(MODEL))
        >>> model = pj.get_peft_model(model, config)
        >>> model(jnp.array([[1, 2, 3]])).logits.shape[:2]  # of the virtual tokens too
        (1, 7)
    """

    learning_rate: ClassVar[float] = 3e-2
    prompt_tuning_init: str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_init(PromptTuningInit)
        is_text = self.prompt_tuning_init == PromptTuningInit.TEXT
        for field in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if is_text and not getattr(self, field):
                raise ValueError(f"prompt_tuning_init='TEXT' needs {field}, which is not given.")
        if self.tokenizer_kwargs and not is_text:
            raise ValueError("tokenizer_kwargs go with prompt_tuning_init='TEXT'. Leave them out.")

    def _check_init(self, known: type[enum.StrEnum]) -> None:
        if self.prompt_tuning_init not in [str(name) for name in known]:
            names = ", ".join(map(str, known))
            raise ValueError(f"prompt_tuning_init={self.prompt_tuning_init!r} is unknown. Write one of {names}.")

    def init_prompt(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As said by ``prompt_tuning_init``."""
        params, state = super().init_prompt(base, names, adapted, key)
        vocabulary = base.layout.sizes(base.shape)[0]
        if self.inference_mode:
            return params, state
        if self.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            params[PROMPT] = rows_of(base, jax.random.randint(key, (self.total_tokens,), 0, vocabulary))
        elif self.prompt_tuning_init == PromptTuningInit.TEXT:
            params[PROMPT] = rows_of(base, jnp.asarray(self._text_ids(vocabulary)))
        return params, state

    def _text_ids(self, vocabulary: int) -> np.ndarray:
        """The text's tokens, repeated or cut off."""
        assert self.tokenizer_name_or_path is not None and self.prompt_tuning_init_text is not None  # checked before
        tokenizer = read_tokenizer(self.tokenizer_name_or_path, **(self.tokenizer_kwargs or {}))
        ids = np.asarray(tokenizer(self.prompt_tuning_init_text)["input_ids"], np.int32)
        if not ids.size or ids.max() >= vocabulary:
            raise ValueError(
                f"prompt_tuning_init_text gives the ids {ids.tolist()}, and the model has {vocabulary}. "
                "Give a text, and the tokenizer of this model."
            )
        return np.resize(ids, self.total_tokens)


def rows_of(base: Weight, ids: jax.Array) -> jax.Array:
    """Rows of an embedding without its adapters, float32."""
    table: Any = base
    while is_adapted(table):
        table = as_weight(table.base, table.layout)
    return jnp.take(table.layout.matrix(table.dense()), ids, axis=0).astype(jnp.float32)

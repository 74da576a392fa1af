"""Context-aware prompt tuning: the embeddings of a context, each moved within a small ball.

Blau et al., 2024, https://arxiv.org/abs/2410.17222, sections 4.2 to 4.4. Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.training_hooks import TrainingHooks
from peft_jax.prompts.base import IGNORED_LABEL, PROMPT
from peft_jax.prompts.learning import PromptLearning
from peft_jax.prompts.prompt_tuning import rows_of

DELTA, TABLE = "delta", "table"
SMALLEST = 1e-10  # the radius of a token that is not to move


@register("CPT")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CPTConfig(TrainingHooks, PromptLearning):
    """Puts a context before the inputs and trains where its embeddings move; fields and defaults are PEFT's.

    The file holds the moved embeddings, so an adapter cannot be trained on once it is saved.

    Attributes:
        cpt_token_ids: The context; None is ``[0]``.
        cpt_mask: PEFT stores it and reads it nowhere; None is all ones.
        cpt_tokens_type_mask: What each token is, by its remainder of 4: 1 a template of an input, 2 an input, 3 a
            template of an output, 0 an output (``4 * n`` that of example ``n``), which does not move and has a loss;
            None is all ones. In training the largest is a multiple of 4.
        opt_weighted_loss_type: ``"none"``, or ``"decay"`` to weigh earlier examples less.
        opt_loss_decay_factor: By how much.
        opt_projection_epsilon: How far an input moves, times ``sqrt(token_dim / 2048)``.
        opt_projection_format_epsilon: How far a template does.
        tokenizer_name_or_path: For the record.

    Calls with labels, and batches of training, take ``input_type_mask``: what each token of the inputs is, counted
    anew from 1 as in the context; only outputs have a loss. Without it all inputs are one output, so that the labels
    alone say what has a loss.

    ``num_virtual_tokens`` is the context's length. The other fields are those of `PromptLearning`.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> config = CPTConfig(cpt_token_ids=[5, 6, 7], cpt_tokens_type_mask=[1, 2, 4])
        >>> pj.get_peft_model(model, config)(jnp.array([[1, 2, 3]])).logits.shape[:2]  # of the context too
        (1, 6)
    """

    learning_rate: ClassVar[float] = 1e-2
    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {PROMPT: ("tokens", "features"), DELTA: ("tokens", "features")}
    structural: ClassVar[tuple[str, ...]] = (
        *PromptLearning.structural,
        "cpt_token_ids",
        "cpt_tokens_type_mask",
        "opt_weighted_loss_type",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
    )

    cpt_token_ids: Sequence[int] | None = None
    cpt_mask: Sequence[int] | None = None
    cpt_tokens_type_mask: Sequence[int] | None = None
    opt_weighted_loss_type: str = "none"
    opt_loss_decay_factor: float = 1.0
    opt_projection_epsilon: float = 0.1
    opt_projection_format_epsilon: float = 0.1
    tokenizer_name_or_path: str | None = None

    def __post_init__(self) -> None:
        ids = [0] if self.cpt_token_ids is None else list(self.cpt_token_ids)
        ones = {field: getattr(self, field) or [1] * len(ids) for field in ("cpt_mask", "cpt_tokens_type_mask")}
        lengths = {"cpt_token_ids": len(ids), **{field: len(mask) for field, mask in ones.items()}}
        if self.num_virtual_tokens is not None:
            lengths["num_virtual_tokens"] = self.num_virtual_tokens
        if len(set(lengths.values())) > 1:
            raise ValueError(f"A CPT context has one length, got {lengths}. Make them the same.")
        filled = {"cpt_token_ids": ids, **ones, "num_virtual_tokens": len(ids), "num_transformer_submodules": 1}
        for field, value in filled.items():
            object.__setattr__(self, field, value)
        super().__post_init__()
        if self.task_type not in (None, "CAUSAL_LM"):
            raise ValueError(f"CPT is for causal language models, got task_type='{self.task_type}'.")
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ValueError(f"opt_weighted_loss_type={self.opt_weighted_loss_type!r} is unknown. Write none or decay.")

    @property
    def trains_from_file(self) -> bool:
        """Never: what has moved and where from is not in it."""
        return False

    @property
    def _types(self) -> np.ndarray:
        return np.asarray(self.cpt_tokens_type_mask)

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """How far each embedding has moved; the moved ones, of an adapter that is not trained."""
        return {PROMPT if self.inference_mode else DELTA: (self.total_tokens, n_out)}

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """Zeros: nothing has moved."""
        return jnp.zeros(shape) if role == DELTA else super().initialize(role, shape, key, lookup=lookup)

    def init_prompt(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """With the context's embeddings."""
        vocabulary = base.layout.sizes(base.shape)[0]
        ids = np.asarray(self.cpt_token_ids, np.int32)
        if not (ids.min() >= 0 and ids.max() < vocabulary):
            raise ValueError(
                f"cpt_token_ids are from {ids.min()} to {ids.max()}, but the vocabulary has ids 0 to {vocabulary - 1}."
            )
        params, state = super().init_prompt(base, names, adapted, key)
        return params, state if self.inference_mode else {**state, TABLE: rows_of(base, jnp.asarray(ids))}

    def project(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """Moves within each token's ball; PEFT replaces its weights by them in every forward pass."""
        return {DELTA: self._projected(params[DELTA])} if DELTA in params else params

    def _projected(self, delta: jax.Array) -> jax.Array:
        types = np.where(self._types > 0, self._types % 4, 0)
        radii = np.select(
            [types % 2 == 1, types == 2], [self.opt_projection_format_epsilon, self.opt_projection_epsilon]
        ) * np.sqrt(delta.shape[-1] / 2048)
        radius = jnp.asarray(np.where(types > 0, radii, SMALLEST), delta.dtype)
        norm = jnp.linalg.norm(delta, axis=-1)
        scale = jnp.where(norm > 0, radius / jnp.maximum(norm, radius), 1)
        return delta * scale[:, None]

    def saved(self, params: Arrays, state: Mapping[str, Any]) -> Arrays:
        """The moved embeddings; the gradient of a move passes its ball, and is zero for an output."""
        if DELTA not in params:
            return params
        delta = params[DELTA]
        moves = jnp.where(jnp.asarray(self._types % 4 > 0)[:, None], delta, 0)
        still = jax.lax.stop_gradient(self._projected(delta)) - jax.lax.stop_gradient(moves)
        return {PROMPT: state[TABLE] + (moves + still)}

    def labelled(self, labels: jax.Array, input_types: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Those of outputs, of the context's and of the inputs'; with ``"decay"`` earlier examples weigh less."""
        last = int(self._types.max())
        if input_types is None and last % 4:
            raise ValueError(
                f"The largest of cpt_tokens_type_mask is {last}, so that no token of the inputs has a loss. "
                "Make it a multiple of 4: the number of the last example's output."
            )
        own = jnp.full(labels.shape, 4) if input_types is None else jnp.asarray(input_types)
        ids, types = (jnp.asarray(array, jnp.int32) for array in (self.cpt_token_ids, self._types))
        types = _before(types, jnp.where(own > 0, own + last, own).astype(jnp.int32))
        asked = (types > 0) & (types % 4 == 0)
        labels = jnp.where(asked, _before(ids.astype(labels.dtype), labels), IGNORED_LABEL)
        if self.opt_weighted_loss_type == "none":
            return labels, None
        return labels, self.opt_loss_decay_factor ** jax.vmap(_later)(jnp.where(asked, types, 0))


def _before(own: jax.Array, rows: jax.Array) -> jax.Array:
    """``own`` (n,) in front of each of the rows (batch, length)."""
    return jnp.concatenate([jnp.broadcast_to(own, (len(rows), len(own))), rows], axis=1)


def _later(types: jax.Array) -> jax.Array:
    """How many larger types there are for each of a row's, float32; the row's first has no loss and counts as none."""
    known = jnp.sort(types.at[0].set(0))
    distinct = jnp.cumsum(jnp.diff(known, prepend=0) > 0)
    return (distinct[-1] - distinct[jnp.searchsorted(known, types)]).astype(jnp.float32)

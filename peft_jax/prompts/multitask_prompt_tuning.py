"""Multitask prompt tuning: one prompt for all tasks, times a low-rank matrix of each task's own.

Wang et al., 2023, https://arxiv.org/abs/2303.02861, equation 1. Numbers follow PEFT 0.21.2.
"""

import dataclasses
import enum
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from peft_jax.core.ids import rows_at
from peft_jax.core.weight import Weight
from peft_jax.methods.base import Arrays, register
from peft_jax.prompts.base import PROMPT, Prompt
from peft_jax.prompts.prompt_tuning import PromptTuningConfig

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskPromptTuningInit(enum.StrEnum):
    """How the prompt starts: like prompt tuning's, or from a file that was trained on source tasks."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@register("MULTITASK_PROMPT_TUNING")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Puts embeddings that are chosen by ``task_ids`` before those of the inputs; fields and defaults are PEFT's.

    Attributes:
        prompt_tuning_init: ``"RANDOM"`` or ``"TEXT"``, as in `PromptTuningConfig`; or from a file, with the average of
            its tasks (``"AVERAGE_SOURCE_TASKS"``), one of them (``"EXACT_SOURCE_TASK"``) or none of them
            (``"ONLY_SOURCE_SHARED"``).
        prompt_tuning_init_state_dict_path: That file, in safetensors' format.
        prompt_tuning_init_task: Which of its tasks.
        num_ranks: Rank of each task's matrix.
        num_tasks: How many tasks there are.

    Calls of the model take ``task_ids``, one a row. With ``num_transformer_submodules=2``, which PEFT chooses for an
    encoder-decoder, a call puts embeddings before those of the decoder's inputs too, which have logits then; generation
    leaves these out, as in PEFT, so that 1 trains what is generated with.

    The other fields are those of `PromptTuningConfig`.

    Raises:
        ValueError: if a field has a value that is wrong; the message names it.

    Example:
        >>> from peft_jax.cli.demo_data import MODEL
        >>> model = pj.AutoModelForCausalLM.from_pretrained(MODEL)
        >>> model = pj.get_peft_model(model, MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2))
        >>> model(jnp.array([[1, 2], [1, 2]]), task_ids=jnp.array([0, 1])).logits.shape[:2]
        (2, 6)
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        PROMPT: ("tokens", "features"),
        COLS: ("tasks", "tokens", "rank"),
        ROWS: ("tasks", "rank", "features"),
    }

    prompt_tuning_init: str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int = 0
    num_ranks: int = 1
    num_tasks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if wrong := [field for field in ("num_ranks", "num_tasks") if getattr(self, field) < 1]:
            raise ValueError(f"{wrong[0]} is at least 1, got {getattr(self, wrong[0])}.")
        if not self._from_file or self.inference_mode:
            return
        if not self.prompt_tuning_init_state_dict_path:
            raise ValueError(
                f"prompt_tuning_init='{self.prompt_tuning_init}' needs prompt_tuning_init_state_dict_path, "
                "which is not given."
            )
        if self._takes_task and self.num_tasks != 1:
            raise ValueError(
                f"prompt_tuning_init='{self.prompt_tuning_init}' starts one task, got num_tasks={self.num_tasks}. "
                "Write num_tasks=1, or prompt_tuning_init='ONLY_SOURCE_SHARED'."
            )

    @property
    def tasks(self) -> int:
        """``num_tasks``."""
        return self.num_tasks

    def _check_init(self, known: type[enum.StrEnum]) -> None:
        super()._check_init(MultitaskPromptTuningInit)

    @property
    def _takes_task(self) -> bool:
        return self.prompt_tuning_init in ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK")

    @property
    def _from_file(self) -> bool:
        return self._takes_task or self.prompt_tuning_init == "ONLY_SOURCE_SHARED"

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The shared prompt, and the columns and rows of each task."""
        return {
            **super().shapes(module, n_in, n_out, lookup=lookup),
            COLS: (self.num_tasks, self.total_tokens, self.num_ranks),
            ROWS: (self.num_tasks, self.num_ranks, n_out),
        }

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> jax.Array:
        """Normal numbers, those of tasks of deviation 0.02."""
        return super().initialize(role, shape, key, lookup=lookup) * (1.0 if role == PROMPT else 0.02)

    def init_prompt(
        self, base: Weight, names: np.ndarray, adapted: np.ndarray, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """As said by ``prompt_tuning_init``."""
        params, state = super().init_prompt(base, names, adapted, key)
        return (params | self._source(params) if self._from_file and not self.inference_mode else params), state

    def _source(self, fresh: Arrays) -> dict[str, jax.Array]:
        """Arrays of the file, in place of fresh ones."""
        path = pathlib.Path(self.prompt_tuning_init_state_dict_path or "")
        if path.suffix != ".safetensors" or not path.is_file():
            raise ValueError(
                f"prompt_tuning_init_state_dict_path='{path}' is no safetensors file. Give a saved adapter's."
            )
        try:
            file = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"'{path}' is damaged or cut off ({error}). Copy or save it again.") from None
        keys = {PROMPT: "prompt_embeddings", **({COLS: COLS, ROWS: ROWS} if self._takes_task else {})}
        if missing := [key for key in keys.values() if key not in file]:
            raise ValueError(f"'{path}' has no {missing}. Give the file of a MULTITASK_PROMPT_TUNING adapter.")
        found = {role: np.asarray(file[key], np.float32) for role, key in keys.items()}
        for role in (COLS, ROWS) if self._takes_task else ():
            found[role] = self._task_of(found[role], path)
        for role, array in found.items():
            if array.shape != fresh[role].shape:
                raise ValueError(
                    f"'{path}' has {keys[role]} for {array.shape}, and this adapter has {fresh[role].shape}. "
                    "Give it the file's num_virtual_tokens and num_ranks."
                )
        return {role: jnp.asarray(array) for role, array in found.items()}

    def _task_of(self, array: np.ndarray, path: pathlib.Path) -> np.ndarray:
        """The array (tasks, ...) of all source tasks as that of one task."""
        if self.prompt_tuning_init == "AVERAGE_SOURCE_TASKS":
            return array.mean(0, keepdims=True)
        if not 0 <= self.prompt_tuning_init_task < len(array):
            raise ValueError(
                f"prompt_tuning_init_task={self.prompt_tuning_init_task}, but '{path}' has the tasks 0 to "
                f"{len(array) - 1}. Name one of them."
            )
        return array[self.prompt_tuning_init_task][None]

    def give(self, params: Arrays, state: Mapping[str, Any], task_ids: jax.Array | None) -> Prompt:
        """Each row's virtual tokens, by its task."""
        if task_ids is None:
            raise ValueError("A MULTITASK_PROMPT_TUNING adapter needs to know each row's task. Give task_ids=.")
        if task_ids.ndim != 1 or not jnp.issubdtype(task_ids.dtype, jnp.integer):
            raise ValueError(f"task_ids are whole numbers (batch,), got {task_ids.dtype} of shape {task_ids.shape}.")
        cols, rows = (rows_at(params[role], task_ids) for role in (COLS, ROWS))
        tokens, count = params[PROMPT][None] * (cols @ rows), self.virtual_tokens
        if self.num_transformer_submodules != 2:
            return Prompt(tokens=tokens)
        return Prompt(tokens=tokens[:, :count], decoder_tokens=tokens[:, count:])

"""Polytropon (POLY): a table of skills, small LoRAs, of which each task mixes its own; with heads, MHR.

Ponti et al., 2022, https://arxiv.org/abs/2202.13914, equation 3: of the task t, A = sum_s w_ts A_s and B likewise, with
the weights w_t = sigmoid(z_t) / sum sigmoid(z_t), and h = W x + B A x / r. Caccia et al., 2022,
https://arxiv.org/abs/2211.03831, cut inputs and outputs into splits that mix by weights of their own. In training the
sigmoids are samples of a relaxed Bernoulli distribution, sigmoid(z_t + logistic noise). Numbers follow PEFT 0.21.2.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from peft_jax.core.ids import rows_at
from peft_jax.core.product import Product
from peft_jax.core.weight import MergeError, Weight
from peft_jax.methods.added_change import FactoredChange
from peft_jax.methods.base import Arrays, register
from peft_jax.methods.fields import check_rank, kaiming
from peft_jax.methods.target_fields import ExcludeFields, TargetFields
from peft_jax.methods.tasks import HasTasks, tasks_in

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_logits"
EPSILON = 1e-12  # PEFT's, beside the sum of the weights
LARGEST_LOGIT = 1e-3  # at initialization


@register("POLY")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolyConfig(TargetFields, ExcludeFields, HasTasks, FactoredChange):
    """Adds a mixture of LoRAs that the task of each row chooses; fields and defaults are PEFT's.

    Calls of a model take ``task_ids``, one a row; `peft_jax.with_task_ids` gives them to a tree. With one task, the
    default, nothing need be said. A matrix that all rows share, as of one task, can be merged, which PEFT has not. With
    `peft_jax.with_dropout`, as training has it, the weights of each row are drawn.

    It goes on the modules that the fields of `TargetFields` and `ExcludeFields` say.

    Attributes:
        r: Rank of a skill, and the divisor of the change, at least 1.
        init_weights: True starts at no change; False at a random one.
        poly_type: ``"poly"``, the one router that there is.
        n_tasks: Number of tasks.
        n_skills: Number of skills in each layer.
        n_splits: Parts of inputs and of outputs that mix by weights of their own, a divisor of both.

    Raises:
        ValueError: if a field has a value that is wrong, or does not suit a layer's size; the message names it.

    Example:
        >>> params = {"q": {"kernel": jnp.ones((8, 6))}}
        >>> params = pj.apply_adapter(params, PolyConfig(r=2, n_tasks=3, target_modules=["q"]))
        >>> {role: array.shape for role, array in params["q"]["kernel"].params.items()}
        {'poly_lora_A': (1, 4, 8, 2), 'poly_lora_B': (1, 4, 2, 6), 'poly_logits': (3, 4)}
    """

    axes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        A: ("splits", "skills", "part", "rank"),
        B: ("splits", "skills", "rank", "part"),
        LOGITS: ("tasks", "choices"),
    }
    takes_conv1d: ClassVar[bool] = False

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank(self)
        if self.poly_type != "poly":
            raise ValueError(f"poly_type is 'poly', got {self.poly_type!r}.")
        for field in ("n_tasks", "n_skills", "n_splits"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field} is at least 1, got {value}.")

    @property
    def dropout_rates(self) -> Mapping[str, float]:
        """That there is noise."""
        return {"noise": 1.0}

    def shapes(self, module: str, n_in: int, n_out: int, *, lookup: bool) -> dict[str, tuple[int, ...]]:
        """The skills' factors by split, and the logits of each task."""
        splits, skills = self.n_splits, self.n_skills
        if lookup:
            raise ValueError(f"POLY is not for embeddings, as '{module}' is. Target other modules.")
        if n_in % splits or n_out % splits:
            raise ValueError(
                f"PolyConfig(n_splits={splits}) needs a divisor of the {n_in} inputs and {n_out} outputs of '{module}'."
            )
        return {
            A: (splits, skills, n_in // splits, self.r),
            B: (splits, skills, self.r, n_out // splits),
            LOGITS: (self.n_tasks, splits * skills),
        }

    def initialize(self, role: str, shape: tuple[int, ...], key: jax.Array, *, lookup: bool) -> Float[Array, "..."]:
        """Random first factors; second ones of zeros, or random; logits near zero."""
        if role == LOGITS:
            return jax.random.uniform(key, shape, minval=-LARGEST_LOGIT, maxval=LARGEST_LOGIT)
        return jnp.zeros(shape) if role == B and self.init_weights else kaiming(key, shape, shape[-2])

    def factors(
        self, params: Arrays, state: Mapping[str, Any], n_in: int, n_out: int
    ) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
        """Those of the one task of all rows.

        Raises:
            MergeError: if rows have tasks of their own, or it is not known which.
        """
        tasks = tasks_in(state)
        if tasks is not None and tasks.ndim > state["hit"].ndim:
            raise MergeError(
                "A POLY adapter whose rows have tasks of their own is no one matrix. Choose a task: "
                "pj.with_task_ids(params, 0)."
            )
        logits = params[LOGITS]
        if tasks is None:
            self._check_only_task(logits)
            tasks = jnp.zeros(state["hit"].shape, jnp.int32)
        tasks = jnp.where(tasks < 0, logits.shape[-2], tasks)  # NaN, and not counted from the end
        chosen = jnp.take_along_axis(logits, tasks[..., None, None], axis=-2)[..., 0, :]
        return _mixed(params, state, jax.nn.sigmoid(chosen))

    def apply(
        self, params: Arrays, state: Mapping[str, Any], base: Weight, x: Shaped[Array, "..."], product: Product
    ) -> Float[Array, "... out"]:
        """``x W + (x A) B``, with the factors of each row's task; in training each row draws its own."""
        tasks = tasks_in(state)
        is_of_rows = tasks is not None and tasks.ndim > state["hit"].ndim
        if not is_of_rows and "dropout" not in state:
            return super().apply(params, state, base, x, product)
        if not product.is_plain:
            raise MergeError(
                "POLY mixes skills row by row in plain products alone, and a module here is used in another way. Leave "
                "it out of target_modules."
            )
        if x.ndim == 1:
            return self.apply(params, state, base, x[None], product)[0]
        logits = params[LOGITS]
        if tasks is None:
            self._check_only_task(logits)
            tasks = jnp.zeros((), jnp.int32)
        rows = tasks if is_of_rows else jnp.broadcast_to(tasks, x.shape[:1])
        if rows.shape != x.shape[:1]:
            raise ValueError(
                f"A product has inputs of shape {x.shape} where task_ids name the tasks of {len(rows)} rows. The first "
                "axis has to be the batch."
            )
        mixed = jax.vmap(lambda drawn: _mixed(params, state, drawn))
        a, b = mixed(_drawn(rows_at(logits, rows), state))
        update = jax.vmap(lambda x, a, b: product.up(product.down(x, a), b))(x, a, b)
        y = base.apply(x, product)
        return product.added(y, update)

    def _check_only_task(self, logits: Float[Array, "*groups tasks choices"]) -> None:
        """Raise MergeError if there are several tasks to choose from."""
        if (tasks := logits.shape[-2]) > 1:
            raise MergeError(
                f"A POLY adapter of {tasks} tasks needs to know each row's. Give task_ids= in the model's call, or "
                "write pj.with_task_ids(params, task_ids)."
            )


def _drawn(logits: Float[Array, "rows choices"], state: Mapping[str, Any]) -> Float[Array, "rows choices"]:
    """The sigmoids of each row's logits; in training samples of them."""
    if "dropout" not in state:
        return jax.nn.sigmoid(logits)
    key = jnp.reshape(state["dropout"]["key"], -1)[0]
    return jax.nn.sigmoid(logits + jax.random.logistic(key, logits.shape, logits.dtype))


def _mixed(
    params: Arrays, state: Mapping[str, Any], sigmoids: Float[Array, "*groups choices"]
) -> tuple[Float[Array, "*groups in rank"], Float[Array, "*groups rank out"]]:
    """``A`` and ``B / r`` as weights mix the skills, zero for layers that are not adapted."""
    a, b = params[A], params[B]
    *groups, splits, skills, part, rank = a.shape
    of_skills = sigmoids.reshape(*groups, splits, skills)
    weights = (of_skills / (jnp.sum(of_skills, axis=-1, keepdims=True) + EPSILON)).astype(a.dtype)
    first = jnp.einsum("...qs,...qsir->...qir", weights, a).reshape(*groups, splits * part, rank)
    second = jnp.einsum("...qs,...qsro->...rqo", weights, b).reshape(*groups, rank, splits * b.shape[-1])
    return first, jnp.where(state["hit"][..., None, None], second / rank, 0)

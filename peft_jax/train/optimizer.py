"""Optimizers and learning rate schedules by name, all of them optax's."""

from collections.abc import Callable

import optax

Schedule = Callable[[int], float]

SCHEDULES = ("linear", "cosine", "constant")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd")


def default_warmup(max_steps: int) -> int:
    """Return a twentieth of the steps, a hundred at most."""
    return min(100, max_steps // 20)


def make_schedule(learning_rate: float, max_steps: int, *, schedule: str = "linear", warmup_steps: int) -> Schedule:
    """Learning rate by step: linear warm-up to the peak, then ``linear`` or ``cosine`` to zero, or ``constant``.

    The rate of the first step is above zero, and that of the step after the last one is zero.

    Raises:
        ValueError: If the schedule is unknown or the warm-up longer than the run.

    Example:
        >>> rate = make_schedule(1.0, 12, warmup_steps=1)
        >>> [round(float(rate(step)), 3) for step in (0, 1, 12)]
        [0.5, 1.0, 0.0]
    """
    if not 0 <= warmup_steps <= max_steps:
        raise ValueError(f"a warm-up of {warmup_steps} steps does not fit into {max_steps}. Give 0 to {max_steps}.")
    rest = max(1, max_steps - warmup_steps)
    by_name = {
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
        "constant": optax.constant_schedule(learning_rate),
    }
    if schedule not in by_name:
        raise ValueError(f"no schedule is named '{schedule}'. Take one of {', '.join(SCHEDULES)}.")
    rising = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    return optax.join_schedules([rising, by_name[schedule]], [warmup_steps])


def make_optimizer(
    learning_rate: float | Schedule,
    max_steps: int | None = None,
    *,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Clip gradients to a norm and hand them to an optimizer of optax.

    Args:
        learning_rate: A schedule, or the peak of the linear one over ``max_steps`` with the default warm-up.
        max_steps: Only with a peak.
        optimizer: One of `OPTIMIZERS`. ``sgd`` has no momentum.
        weight_decay: Decoupled from the gradient (of ``sgd`` and ``adafactor`` too), times the learning rate.
        max_grad_norm: Global norm that gradients are scaled down to; 0 for no clipping.

    Raises:
        ValueError: If the optimizer is unknown.

    Example:
        >>> optimizer = make_optimizer(learning_rate=3e-4, max_steps=1000)
    """
    if not callable(learning_rate):
        if max_steps is None:
            raise ValueError("a learning rate that is a number needs max_steps. Give both, or a schedule.")
        learning_rate = make_schedule(learning_rate, max_steps, warmup_steps=default_warmup(max_steps))
    schedule = learning_rate
    decay = optax.add_decayed_weights(weight_decay)
    rate = optax.scale_by_learning_rate(schedule)
    by_name = {
        "adamw": lambda: optax.adamw(schedule, weight_decay=weight_decay),
        "lion": lambda: optax.lion(schedule, weight_decay=weight_decay),
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms(), decay, rate
        ),
        "sgd": lambda: optax.chain(decay, rate),
    }
    if optimizer not in by_name:
        raise ValueError(f"no optimizer is named '{optimizer}'. Take one of {', '.join(OPTIMIZERS)}.")
    clip = optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity()
    return optax.chain(clip, by_name[optimizer]())

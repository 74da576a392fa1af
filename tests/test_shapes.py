"""The axes in the signatures of the methods' mathematics (jaxtyping), checked by beartype over the table of methods.

They are checked where a module is imported under jaxtyping's hook, so this file runs itself in a process of its own.
"""

import contextlib
import os
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quick_compilation

CHECKED = ("peft_jax.methods", "peft_jax.core.product", "peft_jax.adapters.input_ids")


def has_axes(hint: Any) -> bool:
    """Whether an annotation is an array with axes, or holds one."""
    from jaxtyping import AbstractArray

    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(has_axes(part) for part in typing.get_args(hint))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function checked by beartype if its signature has axes, as the hook asks for it by name."""
    from beartype import BeartypeConf, beartype

    if not any(has_axes(hint) for hint in getattr(function, "__annotations__", {}).values()):
        return function
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)


def project(params: Any, x: Any) -> Any:
    """A product and a bias."""
    return x @ params["dense"]["kernel"] + params["dense"]["bias"]


def attend(params: Any, x: Any) -> Any:
    """A product, a bias, and the product with the transpose."""
    return project(params, x) @ params["dense"]["kernel"].T


NOT_LINEAR = ("LILY",)  # in what they are multiplied with: they have no transpose
NOT_LINEAR_IN_TRAINING = (*NOT_LINEAR, "PVERA")


def failures() -> list[str]:
    """The names of the methods some of whose axes are not what their signatures say, and of checks that are blind."""
    import jax
    import jax.numpy as jnp
    from cases import tiny_configs
    from jaxtyping import TypeCheckError

    import peft_jax as pj
    from peft_jax.core.weight import MergeError

    key, x, found = jax.random.key(0), jnp.ones((3, 2, 12)), []
    tree = {"dense": {"kernel": jax.random.normal(key, (12, 8)), "bias": jnp.ones(8)}}
    stacked = {"layers": {"dense": {"kernel": jax.random.normal(key, (2, 12, 8)), "bias": jnp.ones((2, 8))}}}
    layout = {".*kernel": pj.Layout((0,), (1,), (2,))}
    for name, config in tiny_configs().items():
        try:
            params = pj.apply_adapter(tree, config)
            used = project if name in NOT_LINEAR else attend
            jax.eval_shape(pj.adapt(used), params, x)
            trained = project if name in NOT_LINEAR_IN_TRAINING else attend
            jax.eval_shape(pj.adapt(trained), pj.with_dropout(params, key), x)
            with contextlib.suppress(MergeError):  # of those that have no merged form
                jax.eval_shape(pj.merge, pj.apply_adapter(stacked, config, layout=layout))
        except TypeCheckError as error:
            found.append(f"{name}: {error}")
    config = pj.LoraConfig(r=2, target_modules=["dense"])
    leaf = pj.apply_adapter(tree, config)["dense"]["kernel"]
    try:
        config.merge(leaf.params, leaf.state, jnp.ones((1, 12, 8)))
        found.append("a stack of matrices is no matrix, and nobody says so")
    except TypeCheckError:
        pass
    return found


def test_the_axes_are_as_the_signatures_say() -> None:
    settings = {**os.environ, **quick_compilation.environment()}
    command, folder = [sys.executable, __file__], Path(__file__).parent
    run = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


if __name__ == "__main__":
    from jaxtyping import install_import_hook

    with install_import_hook(CHECKED, "test_shapes.checked"):
        problems = failures()
    print("\n".join(problems))
    sys.exit(len(problems))

"""KappaTune: the modules whose matrices have the lowest condition numbers, as targets of an adapter.

https://arxiv.org/abs/2506.16289: where the largest and the smallest singular value of a matrix are near each other,
no direction is nearly lost, and a change costs least of what was learned.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.target_parameters import parameter_names
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Layouts, Leaf, find_leaves, is_matrix
from peft_jax.core.pytree import PyTree
from peft_jax.core.weight import as_weight

EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")  # PEFT's ends of the names of fused experts
SMALL = 1e-8  # what PEFT adds to the smallest singular value


def find_kappa_target_modules(
    model: PyTree,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    *,
    layout: Layouts | None = None,
) -> dict[str, list[str] | None]:
    """The modules, and the fused experts, with the lowest condition numbers, the lowest first.

    They are fields of a `LoraConfig`. PEFT leaves out layers that PyTorch stores as (in, out), as GPT-2's.

    Args:
        model: A tree or model handle.
        top_p: The fraction of the modules, and of the fused experts, that is chosen, above 0; at least one is.
        max_dim_size_to_analyze: Larger matrices are left out.
        moe_param_suffixes: Ends of the names of weights that are experts, fused; None for those of transformers. The
            condition number of such a weight is the mean over its experts.
        layout: As in `peft_jax.apply_adapter`, for a bare tree.

    Returns:
        ``target_modules``, and ``target_parameters``, which is None where there are no fused experts.

    Raises:
        ValueError: if ``top_p`` is no fraction.

    Example:
        >>> narrow = jnp.diag(jnp.array([9.0, 1.0]))
        >>> find_kappa_target_modules({"q": {"kernel": narrow}, "v": {"kernel": jnp.eye(2)}}, top_p=0.5)
        {'target_modules': ['v'], 'target_parameters': None}
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is a fraction above 0 and at most 1, got {top_p}.")
    handle = model if isinstance(model, Handle) else None
    tree = model if handle is None else handle.params
    layouts = layout if handle is None else {**handle.layouts(), **(layout or {})}
    of_modules: dict[str, list[float]] = {}
    of_experts: dict[str, list[float]] = {}
    for leaf in find_leaves(tree, layouts):
        if not _is_product(leaf) or max(leaf.layout.sizes(leaf.value.shape)) > max_dim_size_to_analyze:
            continue
        for parameter, module, kappa in _condition_numbers(leaf):
            if not leaf.layout.parameter:
                of_modules.setdefault(module, []).append(kappa)
            elif parameter.endswith(moe_param_suffixes or EXPERTS):
                of_experts.setdefault(parameter, []).append(kappa)
    return {
        "target_modules": _lowest(of_modules, top_p),
        "target_parameters": _lowest(of_experts, top_p) or None,
    }


def _is_product(leaf: Leaf) -> bool:
    """Whether a leaf is the matrix of products, as a Linear's or that of experts."""
    return is_matrix(leaf) and leaf.layout is not None and (leaf.layout.is_linear or leaf.layout.parameter)


def _condition_numbers(leaf: Leaf) -> Iterator[tuple[str, str, float]]:
    """Of each matrix that a leaf stands for its parameter's name, its module's, and its condition number."""
    weight = as_weight(leaf.value, leaf.layout)
    matrices = leaf.layout.matrix(weight.dense())
    *stack, n_in, n_out = matrices.shape
    values = np.asarray(jax.jit(_singular_values)(matrices.reshape(-1, n_in, n_out))).reshape(*stack, -1)
    kappas = values[..., 0] / (values[..., -1] + np.float32(SMALL))
    parameters = np.broadcast_to(parameter_names(leaf), kappas.shape)
    modules = np.broadcast_to(leaf.names, kappas.shape)
    for at in np.ndindex(kappas.shape):
        yield str(parameters[at]), str(modules[at]), float(kappas[at])


def _singular_values(matrices: jax.Array) -> jax.Array:
    """Those of each matrix of a stack, one after the other: compilers for chips take memory for all at once."""
    return jax.lax.map(lambda matrix: jnp.linalg.svd(matrix.astype(jnp.float32), compute_uv=False), matrices)


def _lowest(kappas: Mapping[str, list[float]], top_p: float) -> list[str]:
    """The names with the lowest mean numbers."""
    means: dict[str, Any] = {name: sum(numbers) / len(numbers) for name, numbers in kappas.items()}
    ordered = sorted(means, key=lambda name: means[name])
    return ordered[: max(1, int(len(ordered) * top_p))]

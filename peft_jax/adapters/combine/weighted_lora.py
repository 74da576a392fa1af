"""Make one adapter of several on the same base, as PEFT's ``add_weighted_adapter``, with the scales where PEFT errs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from peft_jax.adapters.build import Contents, build
from peft_jax.adapters.combine.task_vectors import PRUNED, combine
from peft_jax.adapters.combine.weighted_ia3 import weighted_ia3
from peft_jax.adapters.plan import Target
from peft_jax.core.adapted import Adapted, nested_adapters
from peft_jax.core.adapted_tree import adapters, check_adapter_name
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Leaf, find_leaves
from peft_jax.core.paths import keys_from_names
from peft_jax.core.precision import common_compute_dtype, with_compute_dtype
from peft_jax.core.pytree import PyTree
from peft_jax.core.selecting import fields_of, not_none, present
from peft_jax.core.weight import as_weight
from peft_jax.methods.ia3 import IA3Config
from peft_jax.methods.lora.config import BIAS, UNBIASED, LoraConfig
from peft_jax.methods.lora.grouped_conv import groups_of
from peft_jax.methods.lora.variants import variant_of
from peft_jax.methods.roles import Follower

T = TypeVar("T")
FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")  # each factor by itself
MATRICES = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")  # their products
WAYS = (*MATRICES, *FACTORS, "cat")
SELECTS = ("exclude_modules", "layers_to_transform", "layers_pattern")
ALGORITHMS = {None: "DEFAULT", "gesvd": "QR", "gesvdj": "JACOBI"}


class How(NamedTuple):
    """The way, and its options."""

    way: str
    density: float
    sign: str
    clamp: float | None
    full_matrices: bool
    driver: str | None


class Made(NamedTuple):
    """The new adapter of a leaf: its arrays, the names of its layers, and their ranks."""

    params: dict[str, jax.Array]
    state: dict[str, Any]
    names: np.ndarray
    ranks: np.ndarray


class Source(NamedTuple):
    """One adapter of one layer: A ``(in, rank)``, B ``(rank, out)``, its bias, its weight and its scale."""

    a: jax.Array
    b: jax.Array
    bias: jax.Array
    weight: float
    scale: float


def add_weighted_adapter(
    params: T,
    adapter_names: Sequence[str],
    weights: Sequence[float],
    new_name: str,
    combination_type: str | None = None,
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    key: jax.Array | None = None,
) -> T:
    """A new tree with one more LoRA, or IA3, made of others; `pj.set_adapter` switches to it.

    ``"cat"`` gives the weighted sum of the adapters exactly, with the sum of their ranks. ``"svd"`` gives the nearest
    to it of a smaller rank. ``"linear"`` adds the factors each by itself, which is near to it as far as they are
    alike. The others prune first: ``"magnitude_prune"`` the smallest elements, ``"dare_..."`` any, with the rest
    scaled up; ``"ties"`` and ``"dare_ties"`` then take the mean of what agrees in sign with the majority;
    ``"..._svd"`` does it with the products of the factors. IA3's vectors are added up (``"linear"``); as in PEFT an
    adapter that leaves a module out adds nothing there. The new adapter has scale 1, starts inactive, and has the
    ``compute_dtype`` of the others if that is the same for all.

    Args:
        params: A tree or model handle with the adapters.
        adapter_names: Which; of one alone the way is ``"linear"``, as in PEFT.
        weights: A factor for each, negative ones too.
        new_name: Name of the new adapter.
        combination_type: How; None is ``"svd"``, and ``"linear"`` for IA3.
        svd_rank: Rank of the new adapter for ``"..._svd"``; None for the largest of the others'.
        svd_clamp: Quantile of the elements of the new factors beyond which they are cut off.
        svd_full_matrices: Whether the decomposition is made in full; what counts of it is the same.
        svd_driver: None for the backend's own algorithm, ``"gesvd"`` or ``"gesvdj"``.
        density: Part of the elements that pruning keeps, in (0, 1].
        majority_sign_method: ``"total"``, the sign of the sum, or ``"frequency"``, that of most.
        key: A JAX random key for ``"dare_..."``; None means ``jax.random.key(0)``.

    Raises:
        ValueError: if a name or an option is wrong, or these adapters cannot be combined in this way.

    Example:
        >>> import peft_jax as pj
        >>> params = {"q": {"kernel": jnp.ones((4, 4))}}
        >>> for name in "ab":
        ...     config = pj.LoraConfig(r=2, target_modules=["q"], init_lora_weights=False)
        ...     params = pj.apply_lora(params, config, adapter_name=name)
        >>> params = pj.add_weighted_adapter(params, ["a", "b"], [0.7, -0.3], "mix", "cat")
        >>> pj.set_adapter(params, "mix")["q"]["kernel"].params["lora_A"].shape
        (4, 4)
    """
    tree = params.params if isinstance(params, Handle) else params
    known = adapters(tree)
    vectors = [config for name in adapter_names if isinstance(config := known.get(name), IA3Config)]
    if vectors and len(vectors) == len(adapter_names):
        _check_names(known, adapter_names, weights)
        check_adapter_name(new_name, tree)
        given = {"svd_rank": svd_rank, "svd_clamp": svd_clamp, "svd_driver": svd_driver, "density": density, "key": key}
        if combination_type not in (None, "linear") or not_none(given):
            raise ValueError("IA3's vectors are added up. Write combination_type='linear' or nothing, and no options.")
        weighted = dict(zip(adapter_names, weights, strict=True))
        new = weighted_ia3(tree, weighted, vectors, new_name)
        new = with_compute_dtype(new, common_compute_dtype(tree, adapter_names), new_name)
        return params.replace(new) if isinstance(params, Handle) else new
    way = "linear" if len(adapter_names) == 1 else combination_type or "svd"
    how = How(way, 1.0 if density is None else density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver)
    configs = _checked(tree, adapter_names, weights, new_name, how, density)
    ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
    rank = max(ranks)
    if way == "cat":
        rank = sum(ranks)
    elif way in MATRICES and svd_rank:
        rank = svd_rank
    weighted = dict(zip(adapter_names, weights, strict=True))
    key = jax.random.key(0) if key is None else key
    targets, made = [], {}
    for position, leaf in enumerate(find_leaves(tree, None)):
        there = nested_adapters(leaf.value)
        sources = list(present(there, weighted).values())
        if not sources:
            continue
        if leaf.layout.inp:
            made[position] = _made(leaf, sources, weighted, how, rank, key)
            targets.append(Target(position, leaf, made[position].ranks > 0, None))
        else:
            of_layers = [np.asarray(source.state["rank"]) for source in sources]
            targets.append(Target(position, leaf, np.any(of_layers, axis=0), Follower()))
    config = _new_config(configs, made.values(), rank)

    def contents_of(target: Target) -> Contents:
        base = as_weight(target.leaf.value, target.leaf.layout)
        if target.role is not None:
            return Contents(*target.role.init(config, base, target.leaf.names, target.adapted), base)
        return Contents(made[target.position].params, made[target.position].state, base)

    new = build(tree, new_name, config, targets, contents_of, active=False)
    new = with_compute_dtype(new, common_compute_dtype(tree, adapter_names), new_name)
    return params.replace(new) if isinstance(params, Handle) else new


def _made(
    leaf: Leaf, found: Sequence[Adapted], weighted: Mapping[str, float], how: How, rank: int, key: jax.Array
) -> Made:
    """The new adapter of a leaf, layer by layer."""
    names = leaf.names
    keys = jnp.reshape(keys_from_names(key, names), (-1,))
    n_in, n_out = found[0].layout.sizes(found[0].shape)
    has_bias, groups = False, 1
    for node in found:
        has_bias = has_bias or BIAS in node.params
        groups = max(groups, groups_of(node.params))
    if groups > 1 and how.way not in FACTORS:
        raise ValueError(
            f"combination_type='{how.way}' multiplies or joins factors, which those of '{leaf.path}', a convolution of "
            f"{groups} groups, are not for. Write one of {', '.join(FACTORS)}."
        )
    layers, ranks = [], np.zeros(names.shape, np.int32)
    for number, index in enumerate(np.ndindex(names.shape)):
        sources = [_source(node, index, weighted[node.tag.name]) for node in found if node.state["rank"][index] > 0]
        if not sources:
            layers.append((jnp.zeros((n_in * groups, 0)), jnp.zeros((0, n_out)), jnp.zeros(n_out)))
            continue
        ranks[index] = sources[0].a.shape[1] if how.way in FACTORS else rank
        layers.append(_layer(str(names[index]), sources, how, int(ranks[index]), keys[number]))
    width, inner = int(ranks.max()), int(ranks.max()) // groups
    padded_a, padded_b, biases = [], [], []
    for a, b, bias in layers:
        padded_a.append(jnp.pad(a, ((0, 0), (0, width - a.shape[1]))))
        padded_b.append(jnp.pad(b, ((0, inner - b.shape[0]), (0, 0))))
        biases.append(bias)
    params = {
        "lora_A": jnp.reshape(jnp.stack(padded_a), (*names.shape, n_in * groups, width)),
        "lora_B": jnp.reshape(jnp.stack(padded_b), (*names.shape, inner, n_out)),
    }
    if has_bias:
        params[BIAS] = jnp.reshape(jnp.stack(biases), (*names.shape, n_out))
    state: dict[str, Any] = {"scaling": jnp.asarray(ranks > 0, jnp.float32), "rank": jnp.asarray(ranks)}
    without_bias = [node.state[UNBIASED] for node in found if UNBIASED in node.state]
    if without_bias:
        state[UNBIASED] = without_bias[0]
    return Made(params, state, names, ranks)


def _source(node: Adapted, index: tuple[int, ...], weight: float) -> Source:
    rank = int(node.state["rank"][index])
    a, b = node.params["lora_A"][index][:, :rank], node.params["lora_B"][index][:rank]
    bias = node.params[BIAS][index] if BIAS in node.params else jnp.zeros(b.shape[1])
    return Source(a, b, bias, weight, float(node.state["scaling"][index]))


def _layer(
    name: str, sources: Sequence[Source], how: How, rank: int, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A, B and bias of the new adapter of one layer, whose scale is 1."""
    every_a, every_b, _, weights, _ = zip(*sources, strict=True)
    of_a, of_b, of_bias = jax.random.split(key, 3)
    one = how.way.removesuffix("_svd").replace("svd", "linear").replace("cat", "linear")
    scaled_biases = [source.scale * source.bias for source in sources]
    bias = combine(one, scaled_biases, weights, how.density, how.sign, of_bias)
    if how.way == "cat":
        weighted = [source.weight * source.scale * source.a for source in sources]
        a, b = jnp.concatenate(weighted, axis=1), jnp.concatenate(every_b, axis=0)
        more = rank - a.shape[1]
        return jnp.pad(a, ((0, 0), (0, more))), jnp.pad(b, ((0, more), (0, 0))), bias
    if how.way in MATRICES:
        changes = [source.scale * source.a @ source.b for source in sources]
        return *_cut_off(combine(one, changes, weights, how.density, how.sign, of_a), rank, how), bias
    ranks = [a.shape[1] for a in every_a]
    if len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type='{how.way}' adds factors of one rank, and those of '{name}' have "
            f"{ranks}. Write 'cat' or one of the '..._svd'."
        )
    roots, signed = [], []  # each factor has the root of the weight, and A its sign
    for source in sources:
        total = source.weight * source.scale
        roots.append(abs(total) ** 0.5)
        signed.append(np.copysign(roots[-1], total))
    a = combine(one, every_a, signed, how.density, how.sign, of_a)
    return a, combine(one, every_b, roots, how.density, how.sign, of_b), bias


def _cut_off(change: jax.Array, rank: int, how: How) -> tuple[jax.Array, jax.Array]:
    """The factors of rank at most ``rank`` whose product is nearest to a matrix, padded with zeros up to it."""
    algorithm = getattr(jax.lax.linalg.SvdAlgorithm, ALGORITHMS[how.driver])
    u, s, vt = jax.lax.linalg.svd(change, full_matrices=how.full_matrices, algorithm=algorithm)
    kept = min(rank, len(s))
    a, b = u[:, :kept], s[:kept, None] * vt[:kept]
    if how.clamp is not None:
        most = jnp.quantile(jnp.concatenate([a.reshape(-1), b.reshape(-1)]), how.clamp)
        a, b = jnp.clip(a, -most, most), jnp.clip(b, -most, most)
    return jnp.pad(a, ((0, 0), (0, rank - kept))), jnp.pad(b, ((0, rank - kept), (0, 0)))


def _new_config(configs: Sequence[LoraConfig], made: Iterable[Made], rank: int) -> LoraConfig:
    """The first adapter's config with what the new one has: its targets, its ranks, scale 1."""
    first = configs[0]
    ranks = dict[str, int]()
    for one in made:
        for index in np.ndindex(one.names.shape):
            if one.ranks[index]:
                ranks[str(one.names[index])] = int(one.ranks[index])
    selects, select_alike = fields_of(first, SELECTS), True
    regexes, names = list[str](), set[str]()
    for config in configs:
        select_alike = select_alike and fields_of(config, SELECTS) == selects
        if isinstance(config.target_modules, str):
            regexes.append(config.target_modules)
        else:
            names |= set(config.target_modules or ())
    targets: Any = sorted(ranks)
    if not select_alike:
        selects = dict.fromkeys(SELECTS)
    elif len(regexes) == len(configs):
        targets = "|".join(f"({regex})" for regex in regexes)
    elif not regexes:
        targets = sorted(names)
    smaller = {f"^{name}": found for name, found in ranks.items() if found != rank}
    return first.replace(
        r=rank,
        lora_alpha=rank,
        rank_pattern=smaller,
        alpha_pattern=smaller,
        use_rslora=False,
        lora_bias=any(config.lora_bias for config in configs),
        init_lora_weights=True,
        loftq_config={},
        target_modules=targets,
        **selects,
    )


def _checked(
    tree: PyTree, names: Sequence[str], weights: Sequence[float], new_name: str, how: How, density: float | None
) -> list[LoraConfig]:
    """The configs of the adapters, once it is certain that they can be combined."""
    known = adapters(tree)
    _check_names(known, names, weights)
    check_adapter_name(new_name, tree)
    if how.way not in WAYS:
        raise ValueError(f"combination_type='{how.way}' is not known. Write one of {', '.join(WAYS)}.")
    if how.way.removesuffix("_svd") in PRUNED and (density is None or not 0 < density <= 1):
        raise ValueError(f"combination_type='{how.way}' needs a density in (0, 1], got {density}.")
    if how.sign not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method is 'total' or 'frequency', got '{how.sign}'.")
    if how.driver not in ALGORITHMS:
        raise ValueError(f"svd_driver is None, 'gesvd' or 'gesvdj', got '{how.driver}'.")
    configs: list[LoraConfig] = []
    for name in names:
        config = known[name]
        if not isinstance(config, LoraConfig):
            raise ValueError(f"add_weighted_adapter is for LoRA, or IA3 alone, and '{name}' is {config.peft_type}.")
        changes_more = config.initializer.changes_base or config.initializer.frozen
        wrong = {
            "use_dora": config.use_dora,
            "alora_invocation_tokens": config.alora_invocation_tokens,
            "modules_to_save": config.modules_to_save,
            "trainable_token_indices": config.trainable_token_indices,
            "target_parameters": config.target_parameters,
            "bias": config.bias if config.bias != "none" else None,
            "init_lora_weights": config.init_lora_weights if changes_more else None,
            "variant": variant_of(config),
        }
        if set_fields := {field: value for field, value in wrong.items() if value}:
            raise ValueError(
                f"Adapter '{name}' is more than what is added to a weight ({set_fields}), and cannot be combined with "
                "others. Merge it into the base, or train it without."
            )
        configs.append(config)
    return configs


def _check_names(known: Mapping[str, Any], names: Sequence[str], weights: Sequence[float]) -> None:
    """Raise ValueError unless these adapters are there, and each has a weight."""
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"No adapters are named {missing}. Found: {sorted(known)}.")
    if not names or len(set(names)) != len(names) or len(weights) != len(names):
        raise ValueError(f"Give adapters, each once, and a weight for each, got {list(names)} and {list(weights)}.")

"""Which modules a config names: PEFT's rules (PEFT 0.21.2, ``check_target_module_exists``), errors included."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from peft_jax.core.bounded_regex import compiled, is_quick, matches

ALL_LINEAR = "all-linear"
EMBEDDING_LAYERS = ("embed_tokens", "lm_head")  # the names by which PEFT knows an embedding and its head

# Output heads that PEFT trains whole beside an adapter for a task; a model has one of them.
SAVED_HEADS: Mapping[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
PatternRule = Callable[[str], str]  # from a key of ``rank_pattern`` and the like to the expression of whole paths


class Targets(Protocol):
    """The fields of a config that choose modules."""

    @property
    def target_modules(self) -> str | Sequence[str] | None:
        """Names of modules, a regex, or ``"all-linear"``."""

    @property
    def exclude_modules(self) -> str | Sequence[str] | None:
        """Names of modules that are left out, or a regex."""

    @property
    def modules_to_save(self) -> Sequence[str] | None:
        """Names of modules that are trained whole."""

    @property
    def layers_to_transform(self) -> int | Sequence[int] | None:
        """Numbers of layers."""

    @property
    def layers_pattern(self) -> str | Sequence[str] | None:
        """Names before the numbers."""

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task that the adapter is for."""


def is_target(config: Targets, module: str) -> bool:
    """Whether PEFT would adapt a module of this dotted path (``all-linear`` has to be expanded before).

    Example:
        >>> import peft_jax as pj
        >>> is_target(pj.LoraConfig(target_modules=["q_proj"]), "model.layers.0.self_attn.q_proj")
        True
    """
    if config.exclude_modules and names_module(config.exclude_modules, module):
        return False
    for name in config.modules_to_save or ():
        if matches(rf"(^|.*\.){name}($|\..*)", module):
            return False
    targets = config.target_modules or ()
    if isinstance(targets, str) or module in targets or not names_module(targets, module):
        return bool(targets) and names_module(targets, module)
    return is_of_chosen_layer(config, module)


def is_of_chosen_layer(config: Targets, module: str) -> bool:
    """Whether ``layers_to_transform`` names the layer of a module, or is not given."""
    layers = _indices(config)
    return not layers or layer_index(config, module) in layers


def spelled_out_names(names: Sequence[str], modules: Sequence[str], own: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of targets, those that name no module but a leaf by its own path replaced by the names of its modules.

    Args:
        names: The names.
        modules: Paths of all modules.
        own: Names of modules by paths of leaves.

    Example:
        >>> spelled_out_names(["mlp", "head"], ["mlp.0", "mlp.1", "head"], {"mlp": ["mlp.0", "mlp.1"]})
        ['mlp.0', 'mlp.1', 'head']
    """
    spelled: list[str] = []
    for name in names:
        of_leaves = [] if names_some([name], modules) else _of_leaves(name, own)
        spelled += of_leaves or [name]
    return spelled


def shortened_names(names: Collection[str], modules: Iterable[str]) -> list[str]:
    """Names of targets, 20 or more of them replaced by the ends of paths that name no other module, if those are fewer.

    PEFT does this before it looks for targets, and LILY's layers share by the names that are left.

    Args:
        names: The names.
        modules: Paths of the modules that have weights.

    Example:
        >>> shortened_names([f"layers.{i}.up" for i in range(20)], [f"layers.{i}.down" for i in range(20)])
        ['up']
    """
    if len(names) < 20:
        return list(names)
    paths: set[str] = set()
    for module in modules:
        parts = module.split(".")
        paths.update(".".join(parts[:length]) for length in range(1, len(parts) + 1))
    others: set[str] = set()
    for path in paths:
        if not names_module(list(names), path):
            others.update(_ends_of(path))
    found: list[str] = []
    for name in sorted(set(names), key=_ends_of):
        if any(name == end or name.endswith(f".{end}") for end in found):
            continue
        found += [end for end in _ends_of(name) if end not in others][:1]
    return found if len(found) < len(set(names)) else list(names)


def _ends_of(path: str) -> list[str]:
    """The last part of a path, the last two, and so on."""
    parts = path.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]


def spelled_out_regex(regex: str, own: Mapping[str, Sequence[str]]) -> str:
    r"""A regex of targets that also matches the modules of a leaf whose own path it matches, if none of them already.

    Args:
        regex: The regex, matched against whole paths.
        own: Names of modules by paths of leaves.

    Example:
        >>> spelled_out_regex("(mlp|head)", {"mlp": ["mlp.0", "mlp.1"]})
        '(mlp|head)|mlp\\.0|mlp\\.1'
    """
    meant: list[str] = []
    for path, of_leaf in own.items():
        if matches(regex, path) and not names_some(regex, of_leaf):
            meant += of_leaf
    return "|".join([regex, *map(re.escape, dict.fromkeys(meant))])


def _of_leaves(name: str, own: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the modules of those leaves that a name is the end of."""
    found: list[str] = []
    for path, modules in own.items():
        if names_module([name], path):
            found += modules
    return found


def layer_index(config: Targets, module: str) -> int | None:
    """The index of the layer that a module belongs to: the first number after a list's name, or after a given one.

    Where PEFT's rule finds none it is the number after a list at the top, or of Flax's ``block_1``.
    """
    patterns = config.layers_pattern or ()
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    usual = [r".*?\.[^.]*\.(\d+)\.", r"[^.]+\.(\d+)(?:\.|$)", r"(?:.*?[./])?[A-Za-z_]+_(\d+)(?:[./]|$)"]
    named = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns]
    named += [rf"(?:^|.*?[./]){pattern}[._](\d+)(?:[./]|$)" for pattern in patterns]  # no list of PyTorch's
    rules = named or usual
    for rule in rules:
        if match := re.match(rule, module):
            return int(match[1])
    return None


def check_expressions(config: Targets, patterns: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise ValueError if a part of a config that PEFT takes for a regular expression is none, or takes forever.

    Args:
        config: The config.
        patterns: Keys of ``rank_pattern`` and the like, and the expression of whole paths that each stands for.
    """
    for field in ("target_modules", "exclude_modules"):
        if isinstance(expression := getattr(config, field), str):
            compiled(expression, field)
    for name in config.modules_to_save or ():
        compiled(name, "modules_to_save")
    for written, expression in patterns.items():
        compiled(written, f"a key of {_field_of(config, written)}")
        compiled(expression, f"a key of {_field_of(config, written)}")
    lists = config.layers_pattern or ()
    for pattern in [lists] if isinstance(lists, str) else lists:
        compiled(pattern, "layers_pattern")
        if not is_quick(pattern):
            raise ValueError(f"layers_pattern={pattern!r} may take forever. Write the name of the list of layers.")


def is_all_linear(config: Targets) -> bool:
    """Whether the targets of a config are all linear layers, which ``"all-linear"`` means."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def is_saved_module(config: Targets, module: str) -> bool:
    """Whether ``modules_to_save`` names the module or one that contains it (PEFT compares ends of strings)."""
    return saved_owner(config, module) is not None


def saved_owner(config: Targets, module: str) -> str | None:
    """The outermost module around this one, or itself, that ``modules_to_save`` names; None if there is none."""
    for owner in _owners(module):
        if owner.endswith(tuple(config.modules_to_save or ())):
            return owner
    return None


def by_end(pattern: str) -> str:
    """The expression of whole paths that a key of ``rank_pattern`` stands for: a path, or the end of one."""
    return rf"(.*\.)?({pattern})"


def below_others(pattern: str) -> str:
    """That of a key of FourierFT and C3A, whose rule in PEFT is an older one.

    There it is the end of a path with a module in front, so that it names neither whole paths nor modules at the top.

    Example:
        >>> rule = below_others
        >>> pattern_value({"q": 3}, "layers.0.q", 8, rule), pattern_value({"q": 3}, "q", 8, rule)
        (3, 8)
    """
    return rf"(?:.*\.{pattern}$).*"


def pattern_value(patterns: Mapping[str, float], module: str, default: float, rule: PatternRule = by_end) -> float:
    """The value of the first pattern that names the module, as ``rank_pattern`` and ``alpha_pattern`` are read.

    Args:
        patterns: Values by pattern.
        module: Path of the module.
        default: The value where no pattern names it.
        rule: From a pattern to the expression of the whole paths that it names.
    """
    for pattern, value in patterns.items():
        if matches(rule(pattern), module):
            return value
    return default


def _field_of(config: Targets, written: str) -> str:
    """The field with a pattern among its keys."""
    for name, value in vars(config).items():
        if name.endswith("_pattern") and isinstance(value, Mapping) and written in value:
            return name
    return "a pattern"


def check_targets(
    config: Targets,
    modules: Sequence[str],
    every: Sequence[str],
    patterns: Mapping[str, str] = MappingProxyType({}),
    parameters: Collection[str] = (),
    vectors: Sequence[str] = (),
) -> list[str]:
    """The modules that a config names, once it is certain that every part of it names at least one.

    Args:
        config: The config; ``all-linear`` has to be expanded before.
        modules: Paths of all modules with a matrix.
        every: Paths of all modules with any leaf, which ``modules_to_save`` may name.
        patterns: Keys of ``rank_pattern`` and the like, and the expression of whole paths that each stands for.
        parameters: Names of the weights that are targets by themselves.
        vectors: Paths of the modules with leaves that are no matrices, to say so if one is named.

    Raises:
        ValueError: if a target, excluded name, saved module, layer index or pattern matches nothing.
    """
    hits = [module for module in modules if is_target(config, module)]
    targets = config.target_modules
    if not targets and not parameters:
        alone = ""
        if config.modules_to_save:
            alone = f" As in PEFT, modules_to_save={list(config.modules_to_save)} is trained beside an adapter alone."
        ends = sorted(_ends(modules))
        raise ValueError(f"target_modules is not given. Name some of {ends}, or 'all-linear'.{alone}")
    if isinstance(targets, str):
        if not hits:
            what = f"target_modules regex '{targets}'"
            hint = no_matrix(targets, vectors) or "A regex is matched against whole paths."
            raise ValueError(nothing_hit(what, targets, modules, hint))
    else:
        for target in targets or ():
            if not names_some([target], modules):
                raise ValueError(
                    nothing_hit(f"Target module '{target}'", target, modules, no_matrix([target], vectors))
                )
        if targets and not hits and not parameters and not _indices(config):
            aside = "is excluded or in modules_to_save" if config.modules_to_save else "is excluded"
            raise ValueError(f"Every module that {list(targets)} names {aside}. Exclude less, or target more.")
    if config.exclude_modules:
        excluded = [config.exclude_modules] if isinstance(config.exclude_modules, str) else config.exclude_modules
        for name in excluded:
            one = name if isinstance(config.exclude_modules, str) else [name]
            if not names_some(one, modules):
                raise ValueError(nothing_hit(f"exclude_modules '{name}'", name, modules))
    check_saved(config, every)
    if indices := _indices(config):
        found = _layer_indices(config, hits)
        if missing := [index for index in indices if index not in found]:
            layers = sorted(_layer_indices(config, modules))
            found_none = f" layers_pattern {config.layers_pattern!r} names no list of layers." if not layers else ""
            hint = found_none if config.layers_pattern else ""
            raise ValueError(f"layers_to_transform {missing} hits no target. Layers found: {layers}.{hint}")
    for written, expression in patterns.items():
        if not any(matches(expression, name) for name in (*hits, *parameters)):
            what = f"Pattern '{written}' of {_field_of(config, written)}"
            raise ValueError(nothing_hit(what, written, [*hits, *parameters]))
    return hits


def _layer_indices(config: Targets, modules: Iterable[str]) -> set[int]:
    """The indices of the layers that some modules belong to."""
    found = set[int]()
    for module in modules:
        index = layer_index(config, module)
        if index is not None:
            found.add(index)
    return found


def check_saved(config: Targets, every: Sequence[str]) -> None:
    """Raise ValueError if a name in ``modules_to_save`` matches no module of all those with any leaf."""
    for name in config.modules_to_save or ():
        is_found = any(_saves([name], module) for module in every)
        if not is_found and name not in SAVED_HEADS.get(config.task_type, ()):
            raise ValueError(nothing_hit(f"modules_to_save '{name}'", name, every))


def _saves(names: Sequence[str], module: str) -> bool:
    """Whether the module, or one around it, ends with one of some names."""
    return any(owner.endswith(tuple(names)) for owner in _owners(module))


def _owners(module: str) -> list[str]:
    """The modules around a module, outermost first, and itself."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _ends(modules: Sequence[str]) -> set[str]:
    return {module.rsplit(".", 1)[-1] for module in modules}


def _indices(config: Targets) -> list[int]:
    layers = config.layers_to_transform
    if layers is None:
        return []
    return [layers] if isinstance(layers, int) else list(layers)


def names_module(targets: str | Sequence[str], module: str) -> bool:
    """Whether a regex matches the whole path of a module, or one of several names is its end."""
    if isinstance(targets, str):
        return matches(targets, module)
    for target in targets:
        if module == target or module.endswith(f".{target}"):
            return True
    return False


def names_some(targets: str | Sequence[str], modules: Iterable[str]) -> bool:
    """Whether `names_module` holds for at least one of some modules."""
    for module in modules:
        if names_module(targets, module):
            return True
    return False


def no_matrix(targets: str | Sequence[str], vectors: Sequence[str]) -> str:
    """A hint for targets that name a vector; empty if they name none."""
    for name in vectors:
        if names_module(targets, name):
            return (
                f"'{name}' is a vector, which is added or multiplied elementwise and is no matrix of a product. Train "
                "it whole: name it in modules_to_save, or in target_modules of LNTuningConfig."
            )
    return ""


def nothing_hit(what: str, name: str, modules: Sequence[str], hint: str = "") -> str:
    """The message for a name that matches none of the modules."""
    ends = _ends(modules) | set(modules)
    near = difflib.get_close_matches(name, sorted(ends), n=3, cutoff=0.3) or sorted(ends)[:3]
    return f"{what} hits none of {len(modules)} modules. Nearest: {near}. {hint}".strip()

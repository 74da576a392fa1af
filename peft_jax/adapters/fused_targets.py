"""LoRA on experts that are named one by one, as LoRA on the fused tensors that hold them.

transformers 5 fuses the experts of a mixture, and PEFT 0.21.2 (``convert_peft_config_for_transformers``) then means
``target_modules`` of single experts, and of routers, as ``target_parameters``: projections that are fused into one
tensor are all targets or none, and get one adapter whose rank is the sum of theirs.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from peft_jax.adapters.target_parameters import DECLARED
from peft_jax.core.handle import Handle
from peft_jax.core.leaves import Leaf, module_names
from peft_jax.core.targets import is_all_linear, is_target
from peft_jax.methods.base import Method
from peft_jax.methods.lora.config import LoraConfig

M = TypeVar("M", bound=Method)
Names = Mapping[str, tuple[str, ...]]


def with_fused_targets(config: M, asked: Method, handle: Handle, found: Sequence[Leaf]) -> M:
    """The config with fused parameters in place of target modules that are single experts or routers.

    Args:
        config: The config, ``all-linear`` spelled out.
        asked: The config before that.
        handle: The model.
        found: Its leaves.

    Raises:
        ValueError: Some of the projections that are fused into one tensor are targets and others are not.
    """
    if not handle.single_experts or not isinstance(config, LoraConfig):
        return config
    old = _old_names(handle.single_experts)
    single = dict[str, str]()
    for new, names in old.items():
        single |= dict.fromkeys(names, new)
    if is_all_linear(asked):
        targets = {*map(_last, config.target_modules or ()), *single}
    elif isinstance(config.target_modules, str):
        targets = _matched(config, single, handle.single_experts, found)
        if targets.isdisjoint(single):
            return config
    else:
        targets = set(config.target_modules or ())
    # The targets that are single experts or routers, by their last names, and the others.
    experts, left = set[str](), list[str]()
    for target in sorted(targets):
        if _last(target) in single:
            experts.add(_last(target))
        else:
            left.append(target)
    if not experts:
        return config
    hit = {single[name] for name in experts}
    ranks, alphas = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for new in sorted(hit):
        if missing := [name for name in old[new] if name not in experts]:
            present = sorted(experts & set(old[new]))
            raise ValueError(
                f"target_modules names '{present[0]}' without '{missing[0]}', which is fused with it into "
                f"'{new}'. Name both, or neither."
            )
        if len(old[new]) > 1:
            pattern = rf".*\.{re.escape(new)}"
            ranks[pattern] = config.r * len(old[new])
            alphas[pattern] = config.lora_alpha * len(old[new])
    parameters = sorted({*(config.target_parameters or ()), *hit})
    return config.replace(target_modules=left, target_parameters=parameters, rank_pattern=ranks, alpha_pattern=alphas)


def with_fused_adapters(tensors: Mapping[str, np.ndarray], handle: Handle, config: Method) -> Mapping[str, np.ndarray]:
    """The tensors of an adapter's file with fused ones in place of those of single experts.

    Of first factors ``(rank, in)`` the ranks follow one another, expert by expert; of second factors ``(out, rank)``
    those of projections that are fused are blocks of a diagonal.

    Args:
        tensors: Tensors under PEFT's keys.
        handle: The model.
        config: The adapter's config.

    Raises:
        ValueError: Some single experts are missing.
    """
    if not isinstance(config, LoraConfig):
        return tensors
    fused = dict(tensors)
    for new, names in handle.single_experts.items():
        first = re.escape(names[0].removesuffix(".weight")).replace(r"\{\}", "0")
        for key in tensors:
            match = re.fullmatch(rf"(?P<front>.*\.){first}\.(?P<role>lora_[AB])\.weight", key)
            if match is None:
                continue
            if "{}" in names[0]:
                _fuse(fused, match["front"], new, names, match["role"], handle.single_experts)
            else:
                fused[f"{match['front']}{new.removesuffix('weight')}{match['role']}.weight"] = fused.pop(key)
    return fused


def _fuse(tensors: dict[str, np.ndarray], front: str, new: str, names: Sequence[str], role: str, every: Names) -> None:
    """Put the tensors of one role of a layer's experts together, in place."""
    parts, experts = [], 0
    ends = [name.removesuffix("weight") + f"{role}.weight" for name in names]
    while front + ends[0].format(experts) in tensors:
        experts += 1
    for end in ends:
        keys = [front + end.format(expert) for expert in range(experts)]
        if missing := [key for key in keys if key not in tensors]:
            raise ValueError(f"The adapter's file has no '{missing[0]}', and the same of another expert. {WHOLE}")
        parts.append(np.stack([tensors.pop(key) for key in keys]))
    owner, _, last = new.rpartition(".")
    # Where both tensors of the experts are adapted, PEFT's wrapper of the one that is declared first is inside.
    is_inside = last != DECLARED[-1] and _adapts_down(tensors, front, every)
    key = f"{front}{owner}.{'base_layer.' if is_inside else ''}{role}.weight"
    if role == "lora_A":
        whole = np.concatenate(parts, axis=1)
        tensors[key] = whole.reshape(-1, whole.shape[-1])
        return
    rows = columns = 0
    for part in parts:
        rows, columns = rows + part.shape[1], columns + part.shape[2]
    whole = np.zeros((experts, rows, columns), parts[0].dtype)
    row = column = 0
    for part in parts:
        whole[:, row : row + part.shape[1], column : column + part.shape[2]] = part
        row, column = row + part.shape[1], column + part.shape[2]
    tensors[key] = np.ascontiguousarray(whole.transpose(1, 2, 0).reshape(rows, -1))


WHOLE = "Take an undamaged copy of the file."


def _adapts_down(tensors: Mapping[str, np.ndarray], front: str, every: Names) -> bool:
    """Whether the file has adapters of a layer's last projections, single ones or fused ones already."""
    for new, names in every.items():
        if new.rpartition(".")[2] == DECLARED[-1]:
            single = front + names[0].format(0).removesuffix("weight") + "lora_A.weight"
            return single in tensors or f"{front}{new.rpartition('.')[0]}.lora_A.weight" in tensors
    return False


def _old_names(single_experts: Names) -> dict[str, list[str]]:
    """By the name of a fused parameter those of the modules that it stands for."""
    found = {}
    for new, names in single_experts.items():
        module, _, last = new.rpartition(".")
        short = f"{module.rpartition('.')[2]}.weight" if last == "weight" else last
        found[short] = [_last(name.removesuffix(".weight")) for name in names]
    return found


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matched(config: Method, single: Mapping[str, str], every: Names, found: Sequence[Leaf]) -> set[str]:
    """The last names of modules that a pattern matches, those of single experts among them, as PEFT finds them."""
    matched = set[str]()
    for name in set(module_names(found)):
        if is_target(config, name):
            matched.add(_last(name))
        for old, new in single.items():
            if _last(name) == new and is_target(config, f"{name.rpartition('.')[0]}.{old}"):
                matched.add(old)
    return matched

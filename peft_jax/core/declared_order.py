"""The order in which PyTorch declares the modules of a model, by which some of PEFT's files count them."""

from collections.abc import Iterable, Sequence


def in_declared_order(names: Iterable[str], declared: Sequence[str] = ()) -> list[str]:
    """Paths of modules, sorted as PyTorch declares them.

    Args:
        names: The paths. Layers are sorted by their numbers.
        declared: Paths without numbers, in PyTorch's order. Modules that it lacks are behind their neighbours, by name.

    Example:
        >>> names = ["layers.10.v_proj", "layers.2.v_proj", "layers.2.q_proj"]
        >>> in_declared_order(names, ["layers", "layers.q_proj", "layers.v_proj"])
        ['layers.2.q_proj', 'layers.2.v_proj', 'layers.10.v_proj']
    """
    places = {path: place for place, path in enumerate(declared)}

    def rank(path: str) -> list[tuple[int, str]]:
        ranks, parent = [], ""
        for part in path.split("."):
            if part.isdecimal():
                ranks.append((int(part), ""))
                continue
            parent = f"{parent}.{part}" if parent else part
            ranks.append((places.get(parent, len(places)), part))
        return ranks

    return sorted(names, key=rank)

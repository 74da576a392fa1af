"""Options of a command in a YAML file: `--config` reads it, and a run writes its own."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from peft_jax.core.selecting import not_none
from peft_jax.core.text_files import read_text

RULE = "Give a file of options such as 'max_steps: 100', one a line, as a run writes in run.yaml."
HEAD = "# Options of a run: peft-jax finetune --config run.yaml --output another-folder makes it again.\n"


def read_options(file: Path) -> dict[str, Any]:
    r"""The entries of a YAML file of options, by name as they are written.

    Args:
        file: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or not a mapping, or has a name twice.

    Example:
        >>> _ = Path("run.yaml").write_text("max-steps: 3\ntarget_modules: [q_proj, v_proj]\n")
        >>> read_options(Path("run.yaml"))
        {'max-steps': 3, 'target_modules': ['q_proj', 'v_proj']}
    """
    import yaml  # takes long, and no other command needs it

    text = read_text(file, "file of options", RULE)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {' '.join(str(error).split())}. {RULE}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no options but {type(found).__name__}. {RULE}")
    names: set[Hashable] = set()
    for key, _ in node.value:
        if key.value in names:
            raise ValueError(f"{file} has {key.value} twice. Write it once.")
        names.add(key.value)
    return {str(name): value for name, value in found.items()}


def write_options(options: Mapping[str, Any], file: Path) -> None:
    """Write options for `read_options`; those that are None are left out.

    Args:
        options: Their values by name: texts, numbers, booleans, and lists of these.
        file: The file.

    Example:
        >>> write_options({"max_steps": 3, "epochs": None}, Path("run.yaml"))
        >>> Path("run.yaml").read_text().splitlines()[1:]
        ['max_steps: 3']
    """
    import yaml

    given = not_none(options)
    text = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=10**9)
    file.write_text(HEAD + text, encoding="utf-8")

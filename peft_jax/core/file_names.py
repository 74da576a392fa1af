"""Names that become a part of a path, from a file or a user: whether they stay in the folder they are joined to."""

import re
from pathlib import PureWindowsPath

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # the characters of Unicode's category Cc


def is_file_name(name: str) -> bool:
    r"""Whether a name is that of one file or folder, on every system.

    It is not empty, not ``.`` or ``..``, and has no separator, drive or control character. Links are followed, as the
    cache of the Hugging Face hub consists of them.

    Example:
        >>> is_file_name("model.safetensors"), is_file_name("../x"), is_file_name("a\\b"), is_file_name("C:x")
        (True, False, False, False)
    """
    if name in ("", ".", ".."):
        return False
    if CONTROL.search(name):
        return False
    return PureWindowsPath(name).name == name  # both slashes separate there, and a drive may stand in front


def is_path_below(path: str) -> bool:
    """Whether a relative path, with ``/`` between its parts, leads to something below the folder it is joined to.

    Example:
        >>> is_path_below("sub/model.safetensors"), is_path_below("sub/../../x"), is_path_below("/etc/passwd")
        (True, False, False)
    """
    return all(is_file_name(part) for part in path.split("/"))


def check_folder_name(name: str) -> None:
    """Raise ValueError unless an adapter can be saved into a folder of its name."""
    if not isinstance(name, str) or not is_file_name(name):
        raise ValueError(
            f"An adapter cannot be named {name!r}, as it is saved into a folder of its name. Take a name of "
            "letters, digits, '-' and '_'."
        )

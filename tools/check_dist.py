"""Check the files of a release: that the source distribution is the repository, and what is in the wheel.

    python tools/check_dist.py dist     # as `make dist` does, in a clone

Prints the sizes and the numbers of files. Ends with one line and exit status 1 where something is missing or too much.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE = re.compile(r"PKG-INFO|setup\.cfg|peft_jax\.egg-info/.*")  # setuptools adds them
RELATIVE = re.compile(r"\]\((?!https?://|mailto:)|(?:src|srcset|href)=\"(?!https?://|mailto:)")


def compare(archive: Path, found: Collection[str], wanted: Collection[str]) -> None:
    """Raise ValueError where the two differ."""
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing:
        raise ValueError(f"{archive.name} lacks {missing}. Name them in MANIFEST.in or in pyproject.toml.")
    if surplus:
        raise ValueError(f"{archive.name} holds {surplus}, which git does not track. Delete them, or commit them.")


def files_of_sdist(archive: Path) -> set[str]:
    """The paths of the files in a source distribution, without its folder and without what setuptools adds."""
    with tarfile.open(archive) as opened:
        names = [member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()]
    return {name for name in names if not MADE.fullmatch(name)}


def in_the_wheel(path: str) -> str | None:
    """The path in the wheel of a file of the repository; None if it is not in it."""
    if path.startswith("interop/"):
        path = f"peft_jax/{path}"
    return path if path.startswith("peft_jax/") else None


def check(folder: Path) -> None:
    """Check the one source distribution and the one wheel of a folder."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    tracked = [path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]

    in_sdist = files_of_sdist(sdist)
    compare(sdist, in_sdist, tracked)
    with zipfile.ZipFile(wheel) as opened:
        names = opened.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        description = opened.read(metadata).decode()
    modules = [name for name in names if ".dist-info/" not in name]
    compare(wheel, modules, [inside for path in tracked if (inside := in_the_wheel(path))])
    if relative := RELATIVE.search(description):
        line = description[: relative.start()].splitlines()[-1] + relative[0]
        raise ValueError(f"The index's page has a link that leads nowhere, in {line!r}. See index_page in setup.py.")
    for archive, count in ((sdist, len(in_sdist)), (wheel, len(modules))):
        print(f"{archive.name}: {archive.stat().st_size / 1e6:.2f} MB, {count} files")
    if "\nProject-URL: Repository," not in description:
        print("pyproject.toml has no Repository in [project.urls]: the page has no pictures and no links to files.")


if __name__ == "__main__":
    try:
        check(Path(sys.argv[1]))
    except ValueError as error:
        sys.exit(str(error))

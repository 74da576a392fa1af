"""The list of packages, found on disk; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

# The folder interop/ is imported as peft_jax.interop, so that no package called "interop" is installed.
inside = find_packages(include=["peft_jax", "peft_jax.*"])
interop = [f"peft_jax.{name}" for name in find_packages(include=["interop", "interop.*"])]
setup(packages=[*inside, *interop], package_dir={"peft_jax": "peft_jax", "peft_jax.interop": "interop"})

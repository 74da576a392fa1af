"""Windows of attention in GGUF files: which of the layers have one."""

from peft_jax.core.gguf_metadata import GGUFFile


def check_pattern(file: GGUFFile, every: int) -> None:
    """Check that one layer in ``every`` sees all and the others a window, where a file says it.

    Raises:
        ValueError: if other layers do.
    """
    name = file.architecture
    pattern = file.get(f"{name}.attention.sliding_window_pattern")
    usual = [number % every != 0 for number in range(1, file.get(f"{name}.block_count", 0) + 1)]
    if pattern not in (None, every, usual):
        raise ValueError(
            f"'{file.path}' has attention.sliding_window_pattern={pattern}, which is not supported, only {every}. "
            "Take another model."
        )

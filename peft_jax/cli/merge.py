"""`peft-jax merge`: fold an adapter into the float weights of its base and write a Hugging Face checkpoint."""

import shutil
from pathlib import Path

import jax

import peft_jax as pj
from peft_jax.cli.command_options import Merge
from peft_jax.cli.shared.adapter_base import Base, find_base
from peft_jax.cli.shared.end_token import with_end_token, with_generation_config
from peft_jax.cli.shared.output_folder import new_folder
from peft_jax.cli.shared.task import refuse_random, task_of_adapter
from peft_jax.models.weights_io import read_generation_config
from peft_jax.prompts.tokenizer import Tokenizer, read_tokenizer

# What belongs to a tokenizer, and goes along as it is.
TOKENIZER_FILES = (
    "tokenizer*",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)


def merge(options: Merge) -> None:
    """Run the command. The base is read in float, even if the adapter was trained on a quantized one, and rounded once.

    Raises:
        ValueError: If the adapter does not fit the base; nothing is left behind.
        OSError: If a file or folder is missing or cannot be written.
    """
    with new_folder(options.output) as folder:
        said = _merge(options, folder)
    print(*said, sep="\n")


def _merge(options: Merge, folder: Path) -> list[str]:
    """Write the checkpoint into a folder; return the lines to print about it."""
    base = find_base(options.model, options.adapter, options.gguf_file)
    # Merged in float32, then rounded, where another type than the base's is asked for; memory holds float32 then.
    task = task_of_adapter(str(base.folder), options.adapter, base.gguf_file)
    choices = {"dtype": options.dtype and "float32", "gguf_file": base.gguf_file}
    model = task.read_for(str(base.folder), options.adapter, **choices)
    model = pj.PeftModel.from_pretrained(model.resized_for(options.adapter), options.adapter)
    refuse_random(model)
    model = with_generation_config(model.merge_and_unload(), read_generation_config(options.adapter))
    if options.dtype is not None:
        model = model.replace(jax.tree.map(lambda leaf: leaf.astype(options.dtype), model.params))
    tokenizer, unread = _tokenizer(options.adapter, base)
    if tokenizer is not None:
        model = with_end_token(model, tokenizer)
    size, dtype = sum(leaf.nbytes for leaf in jax.tree.leaves(model)), jax.tree.leaves(model)[0].dtype
    model.save_pretrained(folder)
    said = [
        f"Merged {options.adapter} into {base.name}.",
        f"Wrote {options.output}: {model.num_parameters():,} weights in {dtype}, {size / 1e6:,.1f} MB",
    ]
    if not _add_tokenizer(options.adapter, base, folder):
        said.append("The base has no tokenizer files, so there are none in it.")
    return [*said, unread] if unread else said


def _tokenizer(adapter: Path, base: Base) -> tuple[Tokenizer | None, str]:
    """The tokenizer that the merged checkpoint gets, or None, and a line to print if it cannot be read."""
    own = _has_tokenizer(adapter)
    if not own and base.gguf_file is None and not _has_tokenizer(base.folder):
        return None, ""
    try:
        return read_tokenizer(adapter if own else base.folder, gguf_file=None if own else base.gguf_file), ""
    except ValueError as error:
        return None, f"The end token is the base's, as the tokenizer cannot be read: {error}"


def _add_tokenizer(adapter: Path, base: Base, folder: Path) -> bool:
    """Add the tokenizer in the adapter's folder if it has one, else the base's; return whether there was one."""
    if _has_tokenizer(adapter):
        return bool(_copy_tokenizer(adapter, folder))
    if base.gguf_file is None:
        return bool(_copy_tokenizer(base.folder, folder))
    read_tokenizer(base.folder, gguf_file=base.gguf_file).save_pretrained(folder)
    return True


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file()


def _copy_tokenizer(source: Path, target: Path) -> list[str]:
    files = {}
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                files[file.name] = file
    for name, file in files.items():
        shutil.copyfile(file, target / name)
    return sorted(files)

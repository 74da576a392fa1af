"""The files beside an adapter that make its folder complete: tokenizer, generation settings, layout."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from peft_jax.cli.shared.end_token import end_tokens
from peft_jax.cli.shared.output_folder import made_anew
from peft_jax.cli.shared.training_layout import TrainingLayout, layout_text
from peft_jax.interop.files import GENERATION_CONFIG
from peft_jax.models.config import CAUSAL_LM, SEQ_2_SEQ_LM
from peft_jax.models.handles.base import ModelHandle
from peft_jax.models.resize import LAYOUT_FILE
from peft_jax.prompts.tokenizer import Tokenizer

# Fields that transformers takes from a model's config where the checkpoint has no generation_config.json.
FROM_CONFIG = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
UNFINISHED = ".beside.part"


@dataclasses.dataclass(frozen=True)
class Beside:
    """The contents of an adapter's folder beside PEFT's files.

    Attributes:
        tokenizer: The tokenizer, chat template included.
        layout: How the training data were laid out.
    """

    tokenizer: Tokenizer
    layout: TrainingLayout

    def write(self, model: ModelHandle, folder: Path) -> None:
        """Write the files; each appears whole or not at all. What a killed run left unfinished is removed."""
        part = folder / UNFINISHED
        with made_anew(part):
            self._write_into(part, model)
            for file in sorted(part.rglob("*")):
                if file.is_file():
                    target = folder / file.relative_to(part)
                    target.parent.mkdir(exist_ok=True)
                    os.replace(file, target)

    def _write_into(self, part: Path, model: ModelHandle) -> None:
        self.tokenizer.save_pretrained(part)
        layout = dataclasses.replace(self.layout, tokens=model.config.vocab_size)
        (part / LAYOUT_FILE).write_text(layout_text(layout), encoding="utf-8")
        if model.task in (CAUSAL_LM, SEQ_2_SEQ_LM):
            settings = json.dumps(generation_settings(model), indent=2, sort_keys=True)
            (part / GENERATION_CONFIG).write_text(settings + "\n", encoding="utf-8")


def generation_settings(model: ModelHandle) -> dict[str, Any]:
    """Contents of generation_config.json: the base's, with the tokens that end an answer of the adapter."""
    settings: dict[str, Any] = {}
    for name in FROM_CONFIG:
        value = getattr(model.config, name, None)
        if value is not None:
            settings[name] = list(value) if isinstance(value, tuple) else value
    settings |= model.generation_config
    ends = end_tokens(model)
    if ends is not None:
        settings["eos_token_id"] = list(ends) if isinstance(ends, tuple) else ends
    return settings

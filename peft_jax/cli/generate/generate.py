"""`peft-jax generate`: continue prompts with a model, with or without an adapter."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.cli.command_options import Generate
from peft_jax.cli.generate.printer import Printer, text_of
from peft_jax.cli.generate.prompt_input import (
    Prompt,
    encode,
    pad,
    read_prompts,
    standard_input,
)
from peft_jax.cli.shared.adapter_base import (
    find_task,
    find_tokenizer,
    load_model,
)
from peft_jax.cli.shared.terminal import verbatim
from peft_jax.models.generation.generation_config import Generation, resolve
from peft_jax.models.generation.sampling import DRAWING
from peft_jax.prompts.base import prompt_tasks
from peft_jax.train.data.batches import rounded_up

NEW_TOKENS = 256  # where nobody says how many


def generate(options: Generate) -> None:
    """Run the command. One answer is printed as it comes, several when their batch is done.

    On a terminal their control characters are escaped; a pipe or a file gets the texts as they are.

    Raises:
        ValueError: If an option, a prompt or the checkpoint is unusable.
        OSError: If a file or folder is missing.
    """
    check(options)
    prompts = read_prompts(options.prompts, options.file, standard_input())
    task = find_task(options.model, options.adapter)
    if task.has_classes:
        raise ValueError(
            f"{options.adapter or options.model} tells classes of texts, and writes none. Give it to peft-jax eval, "
            "which tells how often it is right."
        )
    tokenizer = find_tokenizer(options.model, options.adapter)
    encoded = [encode(prompt, options.prompt_template, tokenizer, goes_on=task.next_token) for prompt in prompts]
    if not all(encoded):
        raise ValueError(
            f"prompt {encoded.index([]) + 1} has no tokens. Leave it out, or give --prompt-template short."
        )
    ends = [stop_token(text, tokenizer) for text in options.stop_token]
    model = load_model(options, task)
    tasks = task_ids(options.task_id, prompt_tasks(model), min(options.batch_size, len(prompts)))
    found = {} if options.ignore_generation_config else model.generation_config
    begun = max(map(len, encoded)) if task.next_token else 1  # an encoder-decoder's answer begins with a start token
    wanted = settle(options, found, model.config, begun, ends or None)
    asked = {
        **wanted.sampling._asdict(),
        "top_k": wanted.sampling.top_k or 0,
        "max_new_tokens": wanted.max_new_tokens,
        "eos_token_id": wanted.eos_token_ids,
        "generation_config": {},
        **tasks,
    }
    if not wanted.sampling.do_sample:
        asked |= dict.fromkeys(DRAWING)
    if len(prompts) == 1 and not options.json:
        ids, mask = pad(encoded, 1, rounded_up(len(encoded[0])))
        key = jax.random.fold_in(jax.random.key(options.seed), 0)
        model.generate(ids, mask, key=key, streamer=Printer(tokenizer, verbatim()), **asked)
        return
    said = answers(options, model, encoded, asked, goes_on=task.next_token)
    for number, (prompt, answer) in enumerate(zip(prompts, said, strict=True), 1):
        text = text_of(answer, tokenizer)
        if options.json:
            reason = "stop" if answer and answer[-1] in wanted.eos_token_ids else "length"
            print(
                json.dumps({"prompt": prompt, "text": text, "tokens": len(answer), "finish_reason": reason}), flush=True
            )
        else:
            print(f"{'' if number == 1 else chr(10)}[{number}] {title(prompt)}")
            print(text, flush=True, file=verbatim())


def check(options: Generate) -> None:
    """Raise ValueError for numbers that cannot work, and for words that contradict each other."""
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}. Give a number above 0.")
    if options.seed < 0:
        raise ValueError(f"--seed is {options.seed}. Give 0 or a number above.")
    drawing = [name for name in ("do_sample", *DRAWING) if getattr(options, name) not in (None, False)]
    if options.greedy and drawing:
        raise ValueError(f"--greedy and --{drawing[0].replace('_', '-')} contradict each other. Give one of them.")


def settle(
    options: Generate, found: Mapping[str, Any], config: Any, longest: int, ends: Sequence[int] | None
) -> Generation:
    """Decide how to generate: the command line first, then generation_config.json, then transformers' defaults.

    Raises:
        ValueError: If a value is out of range, or prompt and answer exceed the model's positions.
    """
    drawing = [name for name in DRAWING if getattr(options, name) is not None]
    if drawing and not options.do_sample and not found.get("do_sample"):
        raise ValueError(f"--{drawing[0].replace('_', '-')} is for drawing, but decoding is greedy. Add --do-sample.")
    room = config.max_position_embeddings - longest
    if room < 1:
        raise ValueError(
            f"a prompt has {longest} tokens, and the model {config.max_position_embeddings} positions. Shorten it."
        )
    asked: dict[str, Any] = {name: getattr(options, name) for name in (*DRAWING, "repetition_penalty")}
    asked["do_sample"] = True if options.do_sample else False if options.greedy else None
    asked["max_new_tokens"] = options.max_new_tokens
    if options.max_new_tokens is None and not {"max_new_tokens", "max_length"} & found.keys():
        asked["max_new_tokens"] = min(NEW_TOKENS, room)
    wanted = resolve(
        asked,
        found,
        length=longest,
        positions=config.max_position_embeddings,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    if options.max_new_tokens is None:
        wanted = wanted._replace(max_new_tokens=min(wanted.max_new_tokens, room))
    elif options.max_new_tokens > room:
        raise ValueError(
            f"--max-new-tokens is {options.max_new_tokens}, but behind {longest} tokens of prompt the model has {room} "
            f"positions left. Give --max-new-tokens {room} or less."
        )
    return wanted._replace(eos_token_ids=tuple(dict.fromkeys((*wanted.eos_token_ids, *(ends or ())))))


def answers(
    options: Generate, model: Any, encoded: Sequence[list[int]], asked: Mapping[str, Any], *, goes_on: bool
) -> Iterator[list[int]]:
    """The new tokens of each prompt, up to the one that ends it; all batches have one shape, hence one program.

    They stand behind the prompt where the model goes on with it, else behind a start token.
    """
    rows, length = min(options.batch_size, len(encoded)), rounded_up(max(map(len, encoded)))
    for number, start in enumerate(range(0, len(encoded), rows)):
        batch = encoded[start : start + rows]
        ids, mask = pad(batch, rows, length)
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        whole = np.asarray(model.generate(ids, mask, key=key, **asked))
        for row in whole[: len(batch), length if goes_on else 1 :].tolist():
            end = next((place for place, token in enumerate(row, 1) if token in asked["eos_token_id"]), len(row))
            yield row[:end]


def task_ids(asked: int | None, tasks: int, rows: int) -> dict[str, np.ndarray]:
    """The task of each row, for a prompt that has several; nothing for another adapter.

    Raises:
        ValueError: If the prompt's task is not named, or one is named that there is not.
    """
    if not tasks and asked is None:
        return {}
    if not tasks:
        raise ValueError(f"--task-id is {asked}, but no adapter has a prompt of several tasks. Leave it out.")
    if asked is None or not 0 <= asked < tasks:
        said = "not given" if asked is None else str(asked)
        raise ValueError(f"--task-id is {said}, and the prompt has {tasks} tasks. Give 0 to {tasks - 1}.")
    return {"task_ids": np.full(rows, asked, np.int32)}


def stop_token(text: str, tokenizer: Any) -> int:
    """The id of a token by its text.

    Raises:
        ValueError: If the text is not one token.
    """
    known = tokenizer.get_vocab()
    if text in known:
        return int(known[text])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"--stop-token {text!r} is not one token of this model but {len(ids)}. Give single tokens.")
    return int(ids[0])


def title(prompt: Prompt) -> str:
    """A prompt in one line of at most 72 characters."""
    if isinstance(prompt, dict):
        if "messages" in prompt:
            asked = [m for m in prompt["messages"] if m.get("role") == "user"] or prompt["messages"]
            prompt = str(asked[-1].get("content"))
        else:
            prompt = " ".join(prompt[name] for name in ("instruction", "input", "prompt") if name in prompt)
    line = " ".join(prompt.split())
    return line if len(line) <= 72 else line[:69] + "..."

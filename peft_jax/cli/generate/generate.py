"""`peft-jax generate`: continue prompts with a model, with or without an adapter."""

import dataclasses
import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from peft_jax.cli.command_options import Generate
from peft_jax.cli.generate.printer import Printer, text_of
from peft_jax.cli.generate.prompt_input import (
    Prompt,
    encode,
    layout_of,
    pad,
    read_prompts,
    standard_input,
)
from peft_jax.cli.shared.adapter_base import (
    find_task,
    find_tokenizer,
    load_model,
)
from peft_jax.cli.shared.command_line import flag
from peft_jax.cli.shared.end_token import with_end_token
from peft_jax.cli.shared.terminal import verbatim
from peft_jax.cli.shared.training_layout import choose_layout, clash, read_layout
from peft_jax.models.generation.filled_rows import can_fill, fill_rows, is_moved_by_padding
from peft_jax.models.generation.generate_options import SAMPLING_OPTIONS, GenerateOptions
from peft_jax.models.generation.generation_config import new_tokens, with_defaults
from peft_jax.models.handles.causal_lm import CausalLM
from peft_jax.models.handles.seq2seq_lm import Seq2SeqLM
from peft_jax.prompts.base import prompt_tasks, virtual_slots
from peft_jax.prompts.chat_template import end_of_turn
from peft_jax.prompts.tokenizer import Tokenizer
from peft_jax.train.data.batches import rounded_up

NEW_TOKENS = 256  # the default length of an answer


def generate(options: Generate) -> None:
    """Run the command. One answer is printed as it comes, several when they have ended.

    On a terminal their control characters are escaped; a pipe or a file gets the texts as they are.

    Raises:
        ValueError: If an option, a prompt or the checkpoint is unusable.
        OSError: If a file or folder is missing.
    """
    check(options)
    prompts = read_prompts(options.prompts, options.file, standard_input())
    task = find_task(options.model, options.adapter, options.gguf_file)
    if not task.writes:
        raise ValueError(
            f"{options.adapter or options.model} tells {task.tells}, and writes none. Give it to peft-jax eval, "
            "which reports its accuracy."
        )
    tokenizer = find_tokenizer(options.model, options.adapter, options.gguf_file)
    recorded = read_layout(options.adapter)
    chosen_layout = choose_layout(options.prompt_template, recorded, tokenizer, chats=task.next_token)
    used = list(dict.fromkeys(layout_of(prompt, chosen_layout) for prompt in prompts))
    if note := clash(recorded, used, tokenizer):
        print(note, file=sys.stderr)
    encoded = [encode(prompt, chosen_layout.layout, tokenizer, goes_on=task.next_token) for prompt in prompts]
    if not all(encoded):
        raise ValueError(
            f"prompt {encoded.index([]) + 1} has no tokens. Leave it out, or give --prompt-template short."
        )
    stop_tokens = [stop_token(text, tokenizer) for text in options.stop_token]
    turn = end_of_turn(tokenizer)
    if turn is not None and any(one.is_chat for one in used):
        stop_tokens.append(turn)
    model = load_model(options, task)
    if options.adapter is not None:
        model = with_end_token(model, tokenizer)
    rows = min(options.batch_size, len(prompts))
    keywords: dict[str, Any] = task_ids(options.task_id, prompt_tasks(model), rows)
    length = 1  # an encoder-decoder's answer follows a start token
    if task.next_token:
        length = max(len(ids) for ids in encoded)
    generation_config = {} if options.ignore_generation_config else model.generation_config
    virtual = virtual_slots(model) if task.next_token else 0
    chosen = generate_options(options, generation_config, model.config, length, stop_tokens, virtual=virtual)
    # The options are complete. {} keeps the model from applying its generation_config.json again.
    keywords |= {**dataclasses.asdict(chosen), "generation_config": {}}
    if len(prompts) == 1 and not options.json:
        [(_, length)] = row_batches(model, encoded, 1, chosen)
        ids, mask = pad(encoded, 1, length)
        key = jax.random.fold_in(jax.random.key(options.seed), 0)
        model.generate(ids, mask, key=key, streamer=Printer(tokenizer, verbatim()), **keywords)
        return
    all_answers = answers(options, model, encoded, chosen, keywords, goes_on=task.next_token)
    for number, (prompt, answer) in enumerate(zip(prompts, all_answers, strict=True), 1):
        text = text_of(answer, tokenizer)
        if options.json:
            is_stopped = bool(answer) and answer[-1] in chosen.eos_token_ids
            reason = "stop" if is_stopped else "length"
            fields = {"prompt": prompt, "text": text, "tokens": len(answer), "finish_reason": reason}
            print(json.dumps(fields), flush=True)
            continue
        if number > 1:
            print()
        print(f"[{number}] {title(prompt)}")
        print(text, flush=True, file=verbatim())


def check(options: Generate) -> None:
    """Raise ValueError for numbers that cannot work, and for options that contradict each other."""
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}. Give a number above 0.")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"--seed is {options.seed}. Give a number from 0 to {2**32 - 1}.")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{flag(name)} is {value}. Give a finite number.")
    sampling = given_sampling_options(options)
    if options.do_sample:
        sampling = ["do-sample", *sampling]
    if options.greedy and sampling:
        raise ValueError(f"--greedy and --{sampling[0]} contradict each other. Give one of them.")


def given_sampling_options(options: Generate) -> list[str]:
    """The names of the options on the command line that greedy decoding ignores."""
    return [name.replace("_", "-") for name in SAMPLING_OPTIONS if getattr(options, name) is not None]


def generate_options(
    options: Generate,
    generation_config: Mapping[str, Any],
    config: Any,
    length: int,
    stop_tokens: Sequence[int],
    *,
    virtual: int = 0,
) -> GenerateOptions:
    """The options of all answers: from the command line, else generation_config.json, else transformers' defaults.

    Args:
        options: The command line.
        generation_config: Contents of generation_config.json.
        config: The model's config.
        length: Tokens of the longest prompt that is continued.
        stop_tokens: Further tokens that end an answer.
        virtual: Positions of an adapter's virtual tokens, which stand before the prompt.

    Raises:
        ValueError: If a value is out of range, or prompt and answer exceed the model's positions.
    """
    sampling = given_sampling_options(options)
    if sampling and not options.do_sample and not generation_config.get("do_sample"):
        raise ValueError(f"--{sampling[0]} is for sampling, but decoding is greedy. Add --do-sample.")
    positions = config.max_position_embeddings - virtual
    free = positions - length
    if free < 1:
        beside = f" beside {virtual} virtual tokens" if virtual else ""
        raise ValueError(f"a prompt has {length} tokens, and the model {positions} positions{beside}. Shorten it.")
    do_sample = None  # the value in generation_config.json
    if options.do_sample or options.greedy:
        do_sample = options.do_sample
    given = GenerateOptions(
        max_new_tokens=options.max_new_tokens,
        do_sample=do_sample,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
    )
    chosen = with_defaults(given, generation_config, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    if options.max_new_tokens is not None and options.max_new_tokens > free:
        raise ValueError(
            f"--max-new-tokens is {options.max_new_tokens}, but after {length} tokens of prompt the model has {free} "
            f"positions left. Give --max-new-tokens {free} or less."
        )
    count = new_tokens(chosen, generation_config, length=length, positions=positions, default=NEW_TOKENS)
    ends = dict.fromkeys((*chosen.eos_token_ids, *stop_tokens))  # each once
    return dataclasses.replace(chosen, max_new_tokens=min(count, free), eos_token_id=tuple(ends))


def answers(
    options: Generate,
    model: CausalLM | Seq2SeqLM,
    encoded: Sequence[list[int]],
    chosen: GenerateOptions,
    keywords: Mapping[str, Any],
    *,
    goes_on: bool,
) -> Iterator[list[int]]:
    """The new tokens of each prompt, up to the one that ends it.

    Rows of a decoder take the next prompt as their answers end (`peft_jax.models.generation.filled_rows`). Where that
    cannot be, all batches have one shape, hence one program.

    Args:
        options: The command line.
        model: The model.
        encoded: Token ids of each prompt.
        chosen: All choices of the generation.
        keywords: Arguments of the model's ``generate``.
        goes_on: Whether answers follow the prompt in the tokens that are returned, or a start token.
    """
    is_alone = len(encoded) == 1  # drawn as where its tokens are printed as they come
    if goes_on and not is_alone and "task_ids" not in keywords and can_fill(model.config, model.params):
        yield from fill_rows(model, encoded, chosen, options.batch_size, jax.random.key(options.seed))
        return
    rows = min(options.batch_size, len(encoded))
    answered: dict[int, list[int]] = {}
    following = 0
    for number, (places, length) in enumerate(row_batches(model, encoded, rows, chosen)):
        batch = [encoded[place] for place in places]
        ids, mask = pad(batch, rows, length)
        key = jax.random.fold_in(jax.random.key(options.seed), number)
        tokens = np.asarray(model.generate(ids, mask, key=key, **keywords))
        new = tokens[: len(batch), length if goes_on else 1 :].tolist()
        answered |= zip(places, (up_to_end(row, keywords["eos_token_id"]) for row in new), strict=True)
        while following in answered:
            yield answered.pop(following)
            following += 1


def row_batches(
    model: CausalLM | Seq2SeqLM, encoded: Sequence[list[int]], rows: int, chosen: GenerateOptions
) -> list[tuple[Sequence[int], int]]:
    """The places of the prompts of each batch, and the length of its rows.

    All batches have one length, a multiple of 32, so that few programs are compiled; a table of positions keeps room
    for virtual tokens and the answer. Where padding would change the numbers of a row there is none: each batch has
    prompts of one length.

    Args:
        model: The model.
        encoded: Token ids of each prompt.
        rows: The most prompts of a batch.
        chosen: All choices of the generation.
    """
    if is_moved_by_padding(model.config, model.params):
        places_by_length: dict[int, list[int]] = {}
        for place, ids in enumerate(encoded):
            places_by_length.setdefault(len(ids), []).append(place)
    else:
        longest = max(len(ids) for ids in encoded)
        length = rounded_up(longest)
        if model.config.position_rows is not None:
            room = model.config.position_rows - virtual_slots(model) - (chosen.max_new_tokens or 0)
            length = max(longest, min(length, room))
        places_by_length = {length: list(range(len(encoded)))}
    found: list[tuple[Sequence[int], int]] = []
    for length, places in places_by_length.items():
        for start in range(0, len(places), rows):
            found.append((places[start : start + rows], length))
    return found


def up_to_end(tokens: list[int], ends: Collection[int]) -> list[int]:
    """The tokens up to the first that is an end, with it.

    Example:
        >>> up_to_end([5, 6, 2, 0], ends=(2, 3))
        [5, 6, 2]
    """
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def task_ids(task_id: int | None, tasks: int, rows: int) -> dict[str, Any]:
    """The argument ``task_ids`` for an adapter that has several tasks; nothing for another adapter.

    Args:
        task_id: The task that the command line names.
        tasks: The number of tasks; 0 for another adapter.
        rows: The number of rows.

    Raises:
        ValueError: If the prompt's task is not named, or one is named that there is not.
    """
    if not tasks and task_id is None:
        return {}
    if not tasks:
        raise ValueError(f"--task-id is {task_id}, but no adapter has several tasks. Leave it out.")
    if task_id is None:
        raise ValueError(f"--task-id is not given, and the adapter has {tasks} tasks. Give 0 to {tasks - 1}.")
    if not 0 <= task_id < tasks:
        raise ValueError(f"--task-id is {task_id}, and the adapter has {tasks} tasks. Give 0 to {tasks - 1}.")
    return {"task_ids": np.full(rows, task_id, np.int32)}


def stop_token(text: str, tokenizer: Tokenizer) -> int:
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
            messages = prompt["messages"]
            questions = [message for message in messages if message.get("role") == "user"]
            last = questions[-1] if questions else messages[-1]
            prompt = str(last.get("content"))
        else:
            texts = [prompt.get(name) for name in ("instruction", "input", "prompt")]
            prompt = " ".join(text for text in texts if isinstance(text, str))
    line = " ".join(prompt.split())
    if len(line) <= 72:
        return line
    return line[:69] + "..."

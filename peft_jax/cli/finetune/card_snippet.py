"""The part of a model card that says how to run the adapter in PyTorch."""

from pathlib import Path

from peft_jax.adapters.task_ids import methods_with_tasks
from peft_jax.cli.shared.task import Task
from peft_jax.cli.shared.training_layout import EVERYTHING, TrainingLayout
from peft_jax.models.config import QUESTION_ANS, TOKEN_CLS
from peft_jax.models.handles.label_losses import MULTI, REGRESSION
from peft_jax.models.handles.peft_model import PeftModel
from peft_jax.prompts.base import prompt_tasks
from peft_jax.train.data.records import Record
from peft_jax.train.data.template import PromptTemplate

SPAN = [
    'inputs = tokenizer("Who wrote it?", "Ada wrote it.", return_tensors="pt")',
    "with torch.no_grad():",
    "    output = model(**inputs)",
    "first, last = int(output.start_logits.argmax()), int(output.end_logits.argmax())",
    'print(tokenizer.decode(inputs["input_ids"][0, first : last + 1]))',
]
QUESTION = "Name three colours."
FOLDER = 'folder = "."  # this folder, if Python runs in it; or its path, or its id on the hub'


def snippet(model: PeftModel, task: Task, layout: TrainingLayout | None, options: str) -> list[str]:
    """The lines of a program that reads the adapter with PEFT and runs it on a prompt, laid out as in training.

    Args:
        model: The model.
        task: What it is for.
        layout: How the training data were laid out; None for classes of texts.
        options: Further arguments of ``from_pretrained``, each after a comma.
    """
    names = "AutoTokenizer" if layout is None else "AutoTokenizer, GenerationConfig"
    lines = ["import torch", f"from peft import {task.auto_peft}", f"from transformers import {names}", "", FOLDER]
    lines += [
        f"model = {task.auto_peft}.from_pretrained(folder{options}).eval()",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *_inputs(layout),
    ]
    if prompt_tasks(model) or methods_with_tasks(model):  # PEFT asks for the only task of a POLY too
        lines.append('inputs["task_ids"] = torch.tensor([0])')
    if layout is None:
        if model.task == QUESTION_ANS:
            return [*lines, *SPAN]
        with_grad = ["with torch.no_grad():", "    logits = model(**inputs).logits"]
        return [*lines, *with_grad, _answer(model)]
    lines.append("settings = GenerationConfig.from_pretrained(folder)")
    lines.append("tokens = model.generate(**inputs, generation_config=settings, max_new_tokens=256)")
    answer = 'tokens[0, inputs["input_ids"].shape[1] :]' if task.next_token else "tokens[0]"
    return [*lines, f"print(tokenizer.decode({answer}, skip_special_tokens=True))"]


def _answer(model: PeftModel) -> str:
    """The line that prints what the model says of a text."""
    if model.task == TOKEN_CLS:
        return "print([model.config.id2label[n] for n in logits[0].argmax(-1).tolist()])"
    if model.config.problem_type == REGRESSION:
        return "print(logits[0].tolist())"
    if model.config.problem_type == MULTI:
        return "print([model.config.id2label[n] for n, logit in enumerate(logits[0].tolist()) if logit > 0])"
    return "print(model.config.id2label[int(logits.argmax())])"


def _inputs(layout: TrainingLayout | None) -> list[str]:
    """The lines that make the inputs of the model."""
    if layout is None:
        return [f'inputs = tokenizer("{QUESTION}", return_tensors="pt")']
    if not isinstance(layout.used.layout, PromptTemplate):
        return [
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    prompt = layout.used.layout(Record(QUESTION, "", "")).prompt
    return [f"prompt = {prompt!r}", 'inputs = tokenizer(prompt, return_tensors="pt")']


def where_to_run(base: str) -> list[str]:
    """A sentence for a base that is named by a path from the folder that the command ran in, and an empty line."""
    if Path(base).is_absolute() or not Path(base).exists():
        return []
    sentence = f"The base `{base}` is a path from the folder that `peft-jax finetune` ran in: run this there."
    return [f"{sentence} `folder` is the path to this folder then.", ""]


def layout_in_words(layout: TrainingLayout) -> str:
    """Sentences on how the training data were laid out, and what of them was learned."""
    name = "the tokenizer's chat template" if layout.used.is_chat else f"the template `{layout.used.name}`"
    if layout.used.name == "raw":
        name = "nothing around the texts"
    learned = "Prompts and answers were learned" if layout.learned == EVERYTHING else "The answers were learned"
    sentences = [f"Prompts are laid out with {name}. {learned}."]
    if layout.answers_left_out:
        sentences.append(
            f"The chat template changes with what follows, so {layout.answers_left_out} earlier answers were not."
        )
    return " ".join(sentences)

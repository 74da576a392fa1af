"""The side of the benchmarks that is PyTorch, transformers and PEFT: what they build of it."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from measure import Contender, NotRun, timed
from shapes import left_padded, up_to_end

warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' and PEFT's, of each other
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(checkpoint: Path, **options: Any) -> Any:
    """The base model, in the checkpoint's dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype="auto", trust_remote_code=False, **options
    )
    return model if options.get("quantization_config") else model.to(DEVICE)


def load_in_8bit(checkpoint: Path) -> Any:
    """The base model on bitsandbytes' int8.

    Raises:
        NotRun: If there is no bitsandbytes that runs here.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotRun("bitsandbytes cannot be imported; pip install bitsandbytes")
    try:
        return load(checkpoint, quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True))
    except Exception as error:  # of many kinds: no kernel for this processor, no CUDA library
        raise NotRun(f"bitsandbytes fails here: {_reason(error)}") from error


def lora(rank: int, **options: Any) -> Any:
    """LoRA on all linear layers."""
    fixed = {"lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(r=rank, **fixed, **options)


def with_adapter(model: Any, folder: Path, *, merged: bool = False) -> Any:
    """The model with an adapter from a folder."""
    model = peft.PeftModel.from_pretrained(model, folder)
    return model.merge_and_unload() if merged else model


def with_adapters(model: Any, rank: int, count: int) -> Any:
    """The model with random adapters named ``a0``, ``a1`` and so on."""
    model = peft.get_peft_model(model, lora(rank, init_lora_weights=False), "a0")
    for number in range(1, count):
        model.add_adapter(f"a{number}", lora(rank, init_lora_weights=False))
    return model


def generator(model: Any, ids: np.ndarray, adapters: Sequence[str] | None = None) -> Callable[[int], Any]:
    """``(new tokens) -> ids``, greedy; each row with its adapter if they are named."""
    prompts = torch.tensor(ids, dtype=torch.long, device=DEVICE)
    given = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "do_sample": False, "pad_token_id": 0}
    rows = {} if adapters is None else {"adapter_names": list(adapters)}
    model.eval()

    @torch.no_grad()
    def run(count: int) -> np.ndarray:
        found: np.ndarray = model.generate(**given, **rows, max_new_tokens=count).cpu().numpy()
        return found

    return run


def answering(
    model: Any, prompts: Sequence[np.ndarray], rows: int, ends: Sequence[int], longest: int
) -> Callable[[], list[list[int]]]:
    """Answers many prompts in batches, greedily: with at most ``longest`` tokens, of which one of ``ends`` is last."""
    batches = []
    for start in range(0, len(prompts), rows):
        ids, mask = left_padded(prompts[start : start + rows])
        batches.append({"input_ids": torch.tensor(ids).to(DEVICE), "attention_mask": torch.tensor(mask).to(DEVICE)})
    given = {"do_sample": False, "pad_token_id": 0, "eos_token_id": list(ends), "max_new_tokens": longest}
    model.eval()

    @torch.no_grad()
    def run() -> list[list[int]]:
        found = []
        for batch in batches:
            tokens = model.generate(**batch, **given)[:, batch["input_ids"].shape[1] :]
            found += [up_to_end(row, ends) for row in tokens.tolist()]
        return found

    return run


def finish() -> None:
    """Wait until the device has nothing to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def random_model(shape: dict[str, Any], dtype: str) -> Any:
    """A base model of a shape with random weights, made on the device."""
    config = transformers.LlamaConfig(**shape)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def attach(model: Any, config: Any) -> Any:
    """The model with a fresh adapter."""
    return peft.get_peft_model(model, config)


def attach_and_detach(model: Any, config: Any) -> None:
    """Attach a fresh adapter; as PEFT changes the model in place, take it out again."""
    attach(model, config).unload()


def read_and_detach(model: Any, folder: Path) -> None:
    """Attach an adapter from its files, and take it out again."""
    peft.PeftModel.from_pretrained(model, folder).unload()


def first_step(model: Any, config: Any, ids: np.ndarray) -> dict[str, float]:
    """Attach an adapter and take a training step, eagerly; its parts are not timed."""
    model = attach(model, config)
    training_step("first step", model, ids)
    model.unload()
    return {}


def training_step(
    name: str, model: Any, ids: np.ndarray, *, compiled: bool = False, checkpointing: bool = False
) -> Contender:
    """A step of an adapted model as the Trainer takes it: loss, gradient, clipping and fused AdamW."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokens = torch.tensor(ids, dtype=torch.long, device=DEVICE)
    forward = torch.compile(model) if compiled else model
    losses: list[float] = []

    def run() -> None:
        loss = forward(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        finish()

    first = _first(run) if compiled else timed(run)[1]
    return Contender(name, run, {"first_step_seconds": first, "loss": losses[0]})


def training_on_texts(name: str, model: Any, batches: Sequence[Sequence[Sequence[np.ndarray]]]) -> Contender:
    """Steps on batches in micro batches of texts, each padded to its longest, with gradient accumulation."""
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    padded = [[_padded(texts) for texts in batch] for batch in batches]
    labels = [sum(len(text) - 1 for texts in batch for text in texts) for batch in batches]
    losses: list[float] = []

    def run() -> None:
        for batch, count in zip(padded, labels, strict=True):
            total = 0.0
            for micro_batch in batch:
                loss = model(**micro_batch, num_items_in_batch=count).loss
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
        finish()

    run()
    return Contender(name, run, {"loss": losses[0]})


def _padded(texts: Sequence[np.ndarray]) -> dict[str, Any]:
    width = max(map(len, texts))
    ids = torch.zeros((len(texts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.from_numpy(text.astype(np.int64))
        mask[row, : len(text)] = 1
    labels = torch.where(mask == 1, ids, -100)
    return {
        name: array.to(DEVICE) for name, array in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def weight_products(name: str, model: Any, tokens: int) -> Contender:
    """The products with frozen weights of a training step and nothing else: forward, and gradient of the inputs."""
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [module.weight.detach() for module in modules]
    inputs = {
        width: torch.randn(tokens, width, device=DEVICE, dtype=weights[0].dtype)
        for width in {weight.shape[1] for weight in weights}
    }

    @torch.no_grad()
    def run() -> None:
        for weight in weights:
            (inputs[weight.shape[1]] @ weight.T @ weight).max()
        finish()

    return Contender(name, run)


def wake() -> None:
    """Make the device ready, by a first operation."""
    torch.zeros(1, device=DEVICE).add(1)
    finish()


def memory_in_use() -> int:
    """Bytes of tensors on the accelerator; 0 for a CPU."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def forget_peak() -> None:
    """Let `device_peak` begin anew."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def device_peak() -> int | None:
    """The most bytes that were in use on the accelerator; None for a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def _first(run: Callable[[], None]) -> float:
    """Seconds of a first run, in which torch.compile compiles."""
    try:
        return timed(run)[1]
    except Exception as error:  # of many kinds: no compiler, an unsupported operation
        raise NotRun(f"torch.compile fails here: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error's first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"

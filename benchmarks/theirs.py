"""The side of the benchmarks that is PyTorch, transformers and PEFT: what they build of it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from measure import Contender, NotRun, timed

warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' and PEFT's, of each other
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(checkpoint: Path, **options: Any) -> Any:
    """The base model, in the checkpoint's dtype."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto", **options)
    return model if options.get("quantization_config") else model.to(DEVICE)


def lora(rank: int) -> Any:
    """LoRA on all linear layers."""
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def finish() -> None:
    """Wait until the device has nothing to do."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def training_step(
    name: str, model: Any, config: Any, ids: np.ndarray, *, compiled: bool = False, checkpointing: bool = False
) -> Contender:
    """A step as the Trainer takes it: loss, gradient, clipping and fused AdamW."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = peft.get_peft_model(model, config)
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


def device_peak() -> int | None:
    """The most bytes that were in use on the accelerator; None for a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


def _first(run: Callable[[], None]) -> float:
    """Seconds of a first run, in which torch.compile compiles."""
    try:
        return timed(run)[1]
    except Exception as error:  # of many kinds: no compiler, an unsupported operation
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise NotRun(f"torch.compile fails here: {type(error).__name__}: {reason[:200]}") from error

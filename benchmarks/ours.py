"""The side of the benchmarks that is JAX and peft_jax: what they build of it."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import Contender, timed
from shapes import SHAPES, Dtype, Size, checkpoint_folder, left_padded, up_to_end

import peft_jax as pj
from peft_jax.cli.shared.forward_pass import apply_lazily
from peft_jax.models import LlamaConfig
from peft_jax.models.generation.filled_rows import fill_rows
from peft_jax.models.generation.generate_options import GenerateOptions
from peft_jax.train import (
    Padded,
    make_accumulating_step,
    make_optimizer,
    make_training_step,
    micro_layout,
    start,
)
from peft_jax.train.data.batches import micro_batches
from peft_jax.train.data.encode import Example


def random_checkpoint(build: Path, size: Size, dtype: Dtype) -> Path:
    """Write a checkpoint of a shape with random weights, if it is not there yet; return its folder."""
    folder = checkpoint_folder(build, size, dtype)
    if not folder.exists():
        model = random_model(SHAPES[size], dtype)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            model.save_pretrained(Path(temporary) / "whole")
            (Path(temporary) / "whole").rename(folder)
    return folder


def load(checkpoint: Path, *, load_in_8bit: bool = False, remat: bool = False) -> Any:
    """The base model, in the checkpoint's dtype."""
    return pj.AutoModelForCausalLM.from_pretrained(checkpoint, load_in_8bit=load_in_8bit, remat=remat)


def batch_of(ids: np.ndarray) -> dict[str, jax.Array]:
    """A batch without padding, every token of which is learned."""
    return {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones_like(ids), "labels": jnp.asarray(ids)}


def random_model(shape: Mapping[str, Any], dtype: Dtype, *, remat: bool = False) -> Any:
    """A base model of a shape with random weights."""
    model = pj.AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype, remat=remat)
    return jax.block_until_ready(model)


def attach(model: Any, config: Any) -> Any:
    """The model with a fresh adapter."""
    return jax.block_until_ready(pj.get_peft_model(model, config))


def attach_and_detach(model: Any, config: Any) -> None:
    """Attach a fresh adapter; as the old model stays as it is, there is nothing to take out."""
    attach(model, config)


def read_and_detach(model: Any, folder: Path) -> None:
    """Attach an adapter from its files."""
    jax.block_until_ready(pj.PeftModel.from_pretrained(model, folder))


def training_step(name: str, model: Any, ids: np.ndarray) -> Contender:
    """The step of `peft-jax finetune` on an adapted model: loss, gradient, clipping and AdamW in one program."""
    optimizer = make_optimizer(1e-4, 1000)
    state, frozen = start(model, optimizer, seed=0)
    batch = batch_of(ids)
    step = make_training_step(apply_lazily, optimizer)
    lowered, trace = timed(lambda: step.lower(state.trainable, state.opt_state, frozen, batch, state.key))
    compiled, compilation = timed(lowered.compile)
    current = [state.trainable, state.opt_state]
    losses: list[float] = []

    def run() -> None:
        *current[:], metrics = compiled(*current, frozen, batch, state.key)
        losses.append(float(metrics.loss))

    _, first = timed(run)
    parts = {"trace_seconds": trace, "compile_seconds": compilation, "first_step_seconds": trace + compilation + first}
    return Contender(name, run, {**parts, "loss": losses[0], **_compiler_bytes(compiled.memory_analysis())})


def training_on_texts(
    name: str, model: Any, batches: Sequence[Sequence[np.ndarray]], micro: int, *, packed: bool
) -> Contender:
    """Steps of `peft-jax finetune` on batches of texts, all tokens of which are learned, in its micro batches."""
    lengths = [len(text) for batch in batches for text in batch]
    hidden_size = model.config.hidden_size
    layout = micro_layout(lengths, len(batches[0]), packed=packed, micro_batch_size=micro, hidden_size=hidden_size)
    dealt = [micro_batches(list(Padded([Example(text, text) for text in batch])), layout) for batch in batches]
    optimizer = make_optimizer(1e-4, 1000)
    state, frozen = start(model, optimizer, seed=0)
    step = make_accumulating_step(apply_lazily, optimizer)
    current = [state.trainable, state.opt_state]
    losses: list[float] = []

    def run() -> None:
        for batch in dealt:
            *current[:], metrics = step(*current, frozen, batch, state.key)
            losses.append(float(metrics.loss))

    run()
    return Contender(name, run, {"loss": losses[0]})


def computed_tokens(batches: Sequence[Sequence[int]], size: int, micro: int, *, packed: bool, hidden_size: int) -> int:
    """Tokens that the layout of `peft-jax finetune` computes for batches of texts of these lengths."""
    lengths = [length for batch in batches for length in batch]
    layout = micro_layout(lengths, size, packed=packed, micro_batch_size=micro, hidden_size=hidden_size)
    return layout.computed(batches)


def first_step(model: Any, config: Any, ids: np.ndarray) -> dict[str, float]:
    """Attach an adapter and take a training step, from nothing compiled; return the seconds of its parts."""
    jax.clear_caches()
    facts = training_step("first step", attach(model, config), ids).facts
    return {part: facts[f"{part}_seconds"] for part in ("trace", "compile")}


def random_adapter(checkpoint: Path, rank: int, folder: Path) -> None:
    """Write an adapter that changes the model, if it is not there yet."""
    if not folder.exists():
        pj.get_peft_model(load(checkpoint), lora(rank, init_lora_weights=False)).save_pretrained(folder)


def with_adapter(model: Any, folder: Path, *, merged: bool = False) -> Any:
    """The model with an adapter from a folder."""
    model = pj.PeftModel.from_pretrained(model, folder)
    return model.merge_and_unload() if merged else model


def with_adapters(model: Any, rank: int, count: int) -> Any:
    """The model with random adapters named ``a0``, ``a1`` and so on."""
    for number in range(count):
        config = lora(rank, init_lora_weights=False)
        model = pj.get_peft_model(model, config, f"a{number}", key=jax.random.key(number))
    return model


def generator(model: Any, ids: np.ndarray, adapters: Sequence[str] | None = None) -> Callable[[int], Any]:
    """``(new tokens) -> ids``, greedy; each row with its adapter if they are named."""
    model = model if adapters is None else pj.with_adapter_rows(model, adapters)
    prompts = jnp.asarray(ids)
    mask = jnp.ones_like(prompts)
    return lambda count: jax.block_until_ready(model.generate(prompts, mask, max_new_tokens=count, do_sample=False))


def answering(
    model: Any, prompts: Sequence[np.ndarray], rows: int, ends: Sequence[int], longest: int, *, filled: bool
) -> Callable[[], list[list[int]]]:
    """Answers many prompts, greedily: in rows that take the next prompt as answers end, or in batches.

    An answer has at most ``longest`` tokens, of which one of ``ends`` is the last.
    """
    options = GenerateOptions(max_new_tokens=longest, do_sample=False, eos_token_id=tuple(ends), pad_token_id=0)
    texts = [prompt.tolist() for prompt in prompts]
    batches = [left_padded(prompts[start : start + rows]) for start in range(0, len(prompts), rows)]

    def fill() -> list[list[int]]:
        return list(fill_rows(model, texts, options, rows, jax.random.key(0)))

    def in_batches() -> list[list[int]]:
        found = []
        for ids, mask in batches:
            tokens = np.asarray(model.generate(ids, mask, **options.given))[:, ids.shape[1] :]
            found += [up_to_end(row, ends) for row in tokens.tolist()]
        return found

    return fill if filled else in_batches


def lora(rank: int, **options: Any) -> Any:
    """LoRA on all linear layers."""
    return pj.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", **options)


def norms() -> Any:
    """Trains a norm of each layer: the gradient goes the way of an adapter's, and costs no product of its own."""
    return pj.LNTuningConfig(target_modules=["input_layernorm"])


def weight_products(name: str, model: Any, tokens: int) -> Contender:
    """The products with frozen weights of a training step and nothing else: forward, and gradient of the inputs."""
    params = model.params["model"]
    kernels = [leaf for leaf in jax.tree.leaves(params["layers"]) if leaf.ndim == 3]
    head = model.params["lm_head"]["kernel"] if "lm_head" in model.params else params["embed_tokens"]["embedding"].T
    widths = {kernel.shape[-2] for kernel in (*kernels, head)}
    inputs = {width: jax.random.normal(jax.random.key(0), (tokens, width), head.dtype) for width in widths}

    def both(kernel: jax.Array, inputs: Mapping[int, jax.Array]) -> jax.Array:
        y = jax.lax.optimization_barrier(inputs[kernel.shape[0]] @ kernel)
        return jnp.max(y @ kernel.T)

    @jax.jit
    def products(kernels: list[jax.Array], head: jax.Array, inputs: dict[int, jax.Array]) -> Any:
        layers = jax.lax.scan(lambda _, layer: (None, [both(kernel, inputs) for kernel in layer]), None, kernels)[1]
        return layers, both(head, inputs)

    return Contender(name, lambda: jax.block_until_ready(products(kernels, head, inputs)))


def wake() -> None:
    """Make the device ready, by a first program, and import what is imported where it is first used.

    With PyTorch installed, transformers imports it, and that weighs more than some models.
    """
    import transformers.models.llama.configuration_llama  # noqa: F401

    jax.block_until_ready(jnp.zeros(1) + 1)


def device_peak() -> int | None:
    """The most bytes that were in use on the accelerator; None for a CPU."""
    stats = jax.devices()[0].memory_stats() or {}
    found: int | None = stats.get("peak_bytes_in_use")
    return found


def _compiler_bytes(analysis: Any) -> dict[str, int]:
    fields = [field for field in ("argument", "output", "temp", "alias") if hasattr(analysis, f"{field}_size_in_bytes")]
    found = {field: getattr(analysis, f"{field}_size_in_bytes") for field in fields}
    total = found.get("argument", 0) + found.get("output", 0) + found.get("temp", 0) - found.get("alias", 0)
    return {"xla_bytes": total, "xla_temporary_bytes": found.get("temp", 0)}

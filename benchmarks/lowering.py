"""Train and decode steps compiled for accelerators that are not here: what the compiler says of memory and operations.

    make lowering                                        # all cases, into docs/lowering.json and docs/lowering.md
    python benchmarks/lowering.py --only 70b             # some of them; the records of the others stay

Needs Python 3.12 and ``pip install ".[tpu-compiler]"`` (for the H100 also what the Makefile installs), but no
accelerator and no weights: models are trees of shapes. LoRA has r=16 on all linear layers and on each expert of a
mixture, and each layer is recomputed in the backward pass. Each program is checked: no product has a frozen weight's
shape (its gradient would), and with an int8 base no buffer between fusions is a weight in float.
"""

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from lowering_checks import dequantized, frozen_gradients, multiplications
from lowering_table import FOREIGN_CASES, INT8, INT8_HEAD, NF4, NF4_HEAD, foreign_name, table

import peft_jax as pj
from peft_jax.cli.shared.forward_pass import apply_lazily
from peft_jax.core.partition import partition
from peft_jax.core.weight import is_weight
from peft_jax.models import LlamaConfig
from peft_jax.models.llama.family import LLAMA
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.models.modules.kv_cache import KVCache
from peft_jax.models.registry import read_architecture
from peft_jax.train import cross_entropy, init_optimizer, make_optimizer, make_training_step
from peft_jax.train.mesh import (
    batch_spec,
    in_use,
    layout,
    make_mesh,
    parse_mesh,
    shardings,
)

RECORDS = Path(__file__).parents[1] / "docs" / "lowering.json"
BY_HAND = RECORDS.with_name("lowering_by_hand.json")  # of lowering_by_hand.py
SIZES = {  # hidden, feed-forward, layers, heads, size of a head, tied embeddings: Llama 3.2 1B, 3.1 8B and 70B
    "1b": (2048, 8192, 16, 32, 64, True),
    "8b": (4096, 14336, 32, 32, 128, False),
    "70b": (8192, 28672, 80, 64, 128, False),
}
MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48},
        **{"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144},
        **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    },
    "gpt-oss-20b": {
        **{"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "num_hidden_layers": 24},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880},
        **{"num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128},
    },
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile.

    Attributes:
        size: Of the model.
        base: Element type of the frozen weights; that of the layers' alone where it is int8 or nf4, and with "+head" of
            the output head's too.
        work: "train" or "decode".
        chip: A topology as the compiler's package names it.
        mesh: How it is used.
        rows: Of a batch, or of a cache.
        length: Tokens of a row, or slots of the cache.
        micro: Rows that go through the model at once.
    """

    size: str
    base: str
    work: str
    chip: str
    mesh: str
    rows: int
    length: int
    micro: int = 0

    @property
    def name(self) -> str:
        """What the case is called in the records."""
        return f"{self.size} {self.base} {self.work} {self.chip} {self.mesh} {self.rows}x{self.length}/{self.micro}"


CASES = (
    Case("70b", "int8", "train", "v5e:4x4", "fsdp=4,tensor=4", 16, 1152, 4),
    Case("1b", "int8", "train", "v5e:1x1", "data=1", 2, 1152, 2),
    Case("1b", "bfloat16", "train", "v5e:1x1", "data=1", 2, 1152, 2),
    Case("8b", "int8", "decode", "v5e:1x1", "data=1", 4, 2304),
    Case("8b", "int8", "train", "v6e:1x1", "data=1", 1, 1152, 1),
    Case("8b", INT8_HEAD, "train", "v6e:1x1", "data=1", 1, 1152, 1),
    Case("8b", "bfloat16", "train", "v6e:1x1", "data=1", 1, 1152, 1),
    Case("1b", "int8", "decode", "v6e:1x1", "data=1", 8, 2304),
    Case("8b", "int8", "train", "v5e:2x2", "fsdp=4", 4, 1152, 4),
    Case("70b", "int8", "decode", "v5e:4x4", "tensor=16", 8, 2304),
    Case("8b", "int8", "train", "h100", "data=1", 2, 1152, 2),
    Case("8b", INT8_HEAD, "train", "h100", "data=1", 2, 1152, 2),
    Case("8b", "bfloat16", "train", "h100", "data=1", 2, 1152, 2),
    Case("8b", "int8", "decode", "h100", "data=1", 8, 2304),
    Case("8b", NF4_HEAD, "train", "v5e:1x1", "data=1", 1, 1152, 1),
    Case("8b", NF4_HEAD, "train", "v6e:1x1", "data=1", 1, 1152, 1),
    Case("8b", NF4_HEAD, "train", "h100", "data=1", 1, 1152, 1),
    Case("70b", NF4_HEAD, "train", "v5e:2x4", "fsdp=8", 8, 1152, 8),
    Case("Qwen3-30B-A3B", "int8", "train", "v5e:2x2", "expert=4", 4, 1152, 4),
    Case("Qwen3-30B-A3B", "int8", "train", "v5e:4x4", "fsdp=4,expert=4", 16, 1152, 16),
    Case("gpt-oss-20b", "int8", "train", "v5e:2x2", "expert=4", 4, 1152, 4),
    Case("gpt-oss-20b", "int8", "train", "v5e:4x4", "fsdp=4,expert=4", 16, 1152, 16),
)


def config_of(case: Case) -> Any:
    """The architecture."""
    if case.size in MIXTURES:
        return read_architecture(MIXTURES[case.size])
    hidden, wide, layers, heads, head, tied = SIZES[case.size]
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )


def model_of(case: Case, *, adapter: bool = True) -> Any:
    """The model as shapes."""
    config = config_of(case)

    def make() -> Any:
        model = pj.AutoModelForCausalLM.from_config(config, dtype="bfloat16", remat=True)
        kind, _, head = case.base.partition("+")
        if case.base in (*INT8, *NF4):
            model = pj.quantize(model, kind=kind)
        if head:
            model = pj.quantize(model, kind=kind, target_modules=["lm_head"])
        experts = list(EXPERTS) if case.size in MIXTURES else None
        lora = pj.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", target_parameters=experts)
        return pj.get_peft_model(model, lora) if adapter else model

    return jax.eval_shape(make)


def on(where: Any, tree: Any) -> Any:
    """Shapes with shardings: from a tree of shardings, or one sharding for all."""
    where = jax.tree.map(lambda _: where, tree) if isinstance(where, NamedSharding) else where
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where)


def training(case: Case, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    """The training step and the shapes of its arguments."""
    everywhere = NamedSharding(mesh, P())
    model = model_of(case)
    model = on(layout(model, mesh), model)
    trainable, frozen = partition(model)
    optimizer = make_optimizer(3e-4, 1000)
    state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, weight: on(weight.sharding, moment),
        jax.eval_shape(lambda model: init_optimizer(optimizer, model), model),
        trainable,
        transform_non_params=lambda array: on(everywhere, array),
    )
    ids = jax.ShapeDtypeStruct((case.rows, case.length), jnp.int32, sharding=NamedSharding(mesh, batch_spec(mesh)))
    batch = dict.fromkeys(("input_ids", "attention_mask", "labels"), ids)
    out = (*shardings((trainable, state)), everywhere)
    step = make_training_step(apply_lazily, optimizer, micro_batch_size=case.micro, out_shardings=out)
    return step, (trainable, state, frozen, batch, on(everywhere, jax.eval_shape(lambda: jax.random.key(0))))


def decoding(case: Case, mesh: Any) -> tuple[Any, tuple[Any, ...]]:
    """The step that reads a token of each row and finds the next, and the shapes of its arguments."""
    model = model_of(case)
    config = model.config
    shape = (config.num_hidden_layers, case.rows, case.length, config.num_key_value_heads, config.head_size)
    heads = "tensor" if config.num_key_value_heads % mesh.shape["tensor"] == 0 else None
    slots = None if heads else "tensor"
    there = NamedSharding(mesh, P(None, ("data", "fsdp"), slots, heads))
    buffer = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=there)
    index = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, P()))
    ids = jax.ShapeDtypeStruct((case.rows, 1), jnp.int32, sharding=NamedSharding(mesh, batch_spec(mesh)))

    def step(params: Any, cache: KVCache, ids: Any) -> Any:
        out = pj.adapt(partial(LLAMA.apply, config))(params, ForwardInputs(input_ids=ids, cache=cache))
        return jnp.argmax(out.logits[:, -1], axis=-1), out.cache

    params = on(layout(model, mesh), model).params
    return jax.jit(step, donate_argnums=1), (params, KVCache(buffer, buffer, index), ids)


def without_adapters(case: Case) -> Any:
    """The program of the same step with the adapters removed: the loss and its gradient down to the embeddings."""
    model = model_of(case, adapter=False)
    rows, hidden = case.micro, model.config.hidden_size
    ids = jax.ShapeDtypeStruct((rows, case.length), jnp.int32)

    def loss(embeds: Any, model: Any, ids: Any) -> Any:
        total, count = cross_entropy(model(inputs_embeds=embeds, attention_mask=ids).logits, ids)
        return total / jnp.maximum(count, 1)

    embeds = jax.ShapeDtypeStruct((rows, case.length, hidden), jnp.bfloat16)
    return jax.make_jaxpr(jax.value_and_grad(loss))(embeds, model, ids)


def described(chip: str) -> Any:
    """The devices of a machine that is not here."""
    from jax.experimental import topologies  # loads the compilers

    if chip != "h100":
        return topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
    import nvidia  # of nvidia-cuda-nvcc-cu12, whose assembler the compiler calls

    folders = [str(folder) for root in nvidia.__path__ for folder in Path(root).glob("*/bin")]
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *folders])
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # which would run kernels
    target = Path(__file__).with_name("h100.textproto").read_text()
    found = topologies.get_topology_desc(platform="cuda", topology_name="", topology="1x1x1", target_config=target)
    return found.devices


def lowered(case: Case) -> dict[str, Any]:
    """Compile a case, check it, and return what the compiler says.

    Raises:
        AssertionError: If a dequantized weight or a frozen weight's gradient is in the program.
    """
    mesh = make_mesh(parse_mesh(case.mesh), described(case.chip))
    step, args = (training if case.work == "train" else decoding)(case, mesh)
    program = jax.make_jaxpr(step)(*args)  # not on the mesh, where the program is that of one device in its parts
    weights = jax.tree.leaves(model_of(case, adapter=False).params["model"]["layers"], is_leaf=is_weight)
    matrices = {leaf.shape[1:] for leaf in weights if len(leaf.shape) in (3, 4)}  # experts have one more axis
    quantized = {leaf.shape[1:] for leaf in weights if is_weight(leaf)}
    assert not (found := frozen_gradients(program, matrices)), f"gradients of frozen weights: {found}"
    operations, removed = multiplications(program), None
    if case.work == "train":
        removed = multiplications(without_adapters(case)) * (case.rows // case.micro)
    begin = time.perf_counter()
    with in_use(mesh if case.size in MIXTURES else None):
        compiled = step.lower(*args).compile()
    seconds = time.perf_counter() - begin
    written: set[str] = set()
    if case.base in (*INT8, *NF4):
        own = given_in_float(model_of(case).params, mesh)
        written = dequantized(compiled.as_text(), quantized, mesh, own, in_blocks=case.base in NF4)
    # XLA does not fuse the scales of blocks into every product: the page says of each such program what it writes.
    if written and case.base in INT8:
        raise Dequantized(f"dequantized weights: {', '.join(sorted(written))}")
    memory = compiled.memory_analysis()
    parts = {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "temp", "output", "alias")}
    return {
        **dataclasses.asdict(case),
        **parts,
        "per_chip": parts["argument"] + parts["temp"] + parts["output"] - parts["alias"],
        "dequantized": sorted(written),
        "operations": operations,
        "operations_without_adapters": removed,
        "compiler_flops": (compiled.cost_analysis() or {}).get("flops"),  # of a described GPU there are none
        "compile_seconds": seconds,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def given_in_float(params: Any, mesh: Any) -> set[tuple[int, ...]]:
    """Shapes of a model's arrays of floats and of a layer of each, on a device of a mesh and gathered."""
    shapes = set()
    where = jax.tree.leaves(layout(params, mesh))
    for leaf, sharding in zip(jax.tree.leaves(params), where, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            part = sharding.shard_shape(leaf.shape)
            shapes |= {leaf.shape, leaf.shape[1:], part, part[1:]}
    return shapes


class Dequantized(Exception):
    """Buffers of a compiled program are weights in float."""


def refused(case: Case, error: Exception) -> dict[str, Any]:
    """The record of a case that the compiler or a check refuses, as some shapes of mixtures are so far."""
    said = str(error).splitlines()[0]
    return {**dataclasses.asdict(case), "refused": said, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}


def write_page() -> None:
    """Write docs/lowering.md from the records of this program and of `lowering_by_hand.py`."""
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    missing = [known.name for known in CASES if known.name not in records]
    beside = json.loads(BY_HAND.read_text()) if BY_HAND.exists() else {}
    beside_missing = [name for name in (foreign_name(*one) for one in FOREIGN_CASES) if name not in beside]
    page = table(list(records.values()), missing, list(beside.values()), beside_missing)
    RECORDS.with_suffix(".md").write_text(page)


def without_a_tpu() -> None:
    """Make settings by which the compilers run on a machine without their chips."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)  # products for one CPU have their rows in one axis, others have not
    # What libtpu asks for on a machine without a TPU.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which cases."""

    only: str = ""
    """A part of their names, such as 70b or decode; all by default."""


def main(options: Options) -> None:
    """Compile the cases, and write the records after each."""
    is_any = False
    for case in CASES:
        if options.only not in case.name:
            continue
        is_any = True
        try:
            record = lowered(case)
        except (Dequantized, jax.errors.JaxRuntimeError) as error:
            if case.size not in MIXTURES:
                raise
            record = refused(case, error)
        found = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
        found[case.name] = record
        records = {known.name: found[known.name] for known in CASES if known.name in found}
        RECORDS.write_text(json.dumps(records, indent=1) + "\n")
        write_page()
        said = record.get("refused") or f"{record['per_chip'] / 2**30:.2f} GiB a chip"
        print(f"{case.name}: {said}", flush=True)
        jax.clear_caches()
    if not is_any:
        print(f"no case has {options.only!r} in its name")


if __name__ == "__main__":
    without_a_tpu()
    main(tyro.cli(Options))

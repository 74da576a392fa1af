"""Random combinations of the fields of PEFT's configs, for each of its types.

The fields are those of PEFT's own dataclasses. What values a field has is derived from its annotation where that lists
them; otherwise COMMON says it, by the field's name, or the row of the type in TYPES. A new type of PEFT's needs a row
only for fields that no other type has; a field without values is an error that names it.
"""

from __future__ import annotations

import dataclasses
import enum
import random
import re
import typing
from collections.abc import Collection, Mapping
from typing import Any

from peft_jax.methods import base as methods

Values = tuple[Any, ...]

# How a combination can end.
EQUAL = "equal"
BOTH = "refused by both"
OURS = "refused here"
THEIRS = "refused by PEFT alone"
REREAD = "equal to what PEFT reads"
UNREADABLE = "PEFT cannot read its file"
DIFFERENT = "different"

DEFAULT_ONLY: Values = ()  # a field that is left at its default, for a reason that stands beside it
SHARE_OF_REFUSED = 0.1  # of the combinations; a field that is refused here hides what stands beside it
MOST_FIELDS = 6  # that one combination sets beside the fields that are always drawn
IGNORED_BY_PEFT = r"\(PEFT ignores \w+"  # in the words of a refusal of its file, which says so

TARGETS: Values = (
    ["q_proj", "v_proj"],
    ["q_proj", "v_proj", "down_proj"],
    ["k_proj", "o_proj"],
    ["up_proj", "gate_proj"],
    ["layers.1.self_attn.q_proj", "down_proj"],
    ["o_proj"],
    "all-linear",
    r".*layers\.[01]\.mlp\.(up|down)_proj",
    r".*\.self_attn\.(q|o)_proj",
    ["embed_tokens", "q_proj"],
    ["lm_head", "v_proj"],
)
FIRST, SECOND = r"layers\.0\..*", r"layers\.1\..*"  # patterns of modules that most targets have


def patterns(*values: float) -> Values:
    """Values of a field that says a number by patterns of modules; the last of them misses some targets."""
    one, other = values[0], values[-1]
    return {SECOND: one}, {r"^model\.layers\.0\..*_proj": one}, {FIRST: other, SECOND: one}, {"q_proj": other}


# By the name of a field, in whatever types it is.
COMMON: Mapping[str, Values] = {
    "task_type": ("CAUSAL_LM",),
    "fan_in_fan_out": DEFAULT_ONLY,  # of layers that Llama has not
    "target_modules": TARGETS,
    "exclude_modules": (["v_proj"], ["down_proj", "layers.0.self_attn.q_proj"], r".*layers\.1\..*", ["lm_head"]),
    "layers_to_transform": (0, 1, [0], [1], [0, 1]),
    "layers_pattern": ("layers", ["layers"]),
    "modules_to_save": (["lm_head"], ["model.norm"], ["layers.1.post_attention_layernorm", "embed_tokens"]),
    "rank_pattern": patterns(3, 6),
    "alpha_pattern": patterns(5, 11),
    "r": (1, 2, 3, 4, 6, 8),
    "alpha": (1, 4, 7, 16),
    "lora_alpha": (1, 4, 7, 16),
    "scaling": (0.5, 2.0, 10.0),
    "d_initial": (0.3, 1.0),
    "random_seed": (0, 5),
    "random_loc_seed": (5, 123),
    "projection_prng_key": (1, 7),
    "projection_seed": (1, 7),
    "proj_seed": (1, 7),
    "n_frequency": (20, 50, 60),
    "n_frequency_pattern": patterns(30, 25),
    "use_effective_conv2d": (True, False),
    # What prompts find out of the model: that it is so, and that it is not.
    "num_virtual_tokens": (1, 3, 5),
    "token_dim": (32,),
    "num_transformer_submodules": (1,),
    "num_attention_heads": (4, 2),
    "num_layers": (2,),
    "tokenizer_name_or_path": DEFAULT_ONLY,  # the rows of TYPES give it with the texts that it is for
    "tokenizer_kwargs": DEFAULT_ONLY,
    "encoder_hidden_size": (8, 12),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TypeRow:
    """What is a type's own.

    Attributes:
        needed: Fields that every combination has, beside ``target_modules``.
        most: Fields that a combination sets beside these at most.
        fields: Values of its fields.
    """

    needed: tuple[str, ...] = ()
    most: int = MOST_FIELDS
    fields: Mapping[str, Values] = dataclasses.field(default_factory=dict)


VIRTUAL = ("num_virtual_tokens",)
OF_KEYS_AND_VALUES: Mapping[str, Values] = {"token_dim": (16,), "num_attention_heads": (2, 4)}
OF_LORA: Mapping[str, Values] = {
    "init_lora_weights": (
        *(True, False, "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "mica"),
        *("loftq", "eva", "corda", "lora_ga", "nonsense"),
    ),
    "trainable_token_indices": ([5, 17], {"embed_tokens": [3]}, {"lm_head": [2, 9]}),
    "loftq_config": ({"loftq_bits": 4}, {"loftq_bits": 8, "loftq_iter": 2}),
    "eva_config": ({"rho": 1.0},),
    "corda_config": ({},),
    "lora_ga_config": ({},),
    "velora_config": ({"num_groups": 4, "init_type": "random"}, {"num_groups": 8}),
    "alora_invocation_tokens": ([5, 17], [8]),
    "qalora_group_size": (2, 8),
    "monteclora_config": ({"num_samples": 3}, {}),
    "layer_replication": ([[0, 2], [1, 2]], [[0, 1], [0, 2]]),
    "target_parameters": (["q_proj.weight"], ["layers.1.mlp.down_proj.weight"]),
    "use_bdlora": (
        {"target_modules_bd_a": ["down_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2},
        {"target_modules_bd_a": ["o_proj"], "nblocks": 2, "match_strict": False},
    ),
    "arrow_config": ({"top_k": 1},),
    "kasa_config": ({}, {"beta": 0.1}),
    "megatron_config": DEFAULT_ONLY,  # Megatron's own layers
    "megatron_core": DEFAULT_ONLY,
    "runtime_config": DEFAULT_ONLY,  # where arrays are kept, which no file says
}
TYPES: Mapping[str, TypeRow] = {
    "LORA": TypeRow(most=3, fields=OF_LORA),
    "ADALORA": TypeRow(
        needed=("total_step",),
        fields={
            **dict.fromkeys(OF_LORA, DEFAULT_ONLY),  # variants of LoRA, which AdaLoRA has not
            "init_r": (4, 6),
            "target_r": (2, 3),
            "tinit": (1, 3),
            "tfinal": (1, 2),
            "deltaT": (2,),
            "beta1": (0.5,),
            "beta2": (0.5,),
            "orth_reg_weight": (0.1,),
            "total_step": (10, 20),
            "init_lora_weights": (True, False),
            "rank_pattern": DEFAULT_ONLY,  # what training leaves there, which tests/test_peft_parity.py compares
        },
    ),
    "ADAMSS": TypeRow(
        needed=("r",),
        fields={
            "r": (4, 6, 9),
            "num_subspaces": (1, 3, 4),
            "subspace_rank": (1, 2, 3),
            "asa_target_subspaces": (2,),
            "init_warmup": (2,),
            "final_warmup": (9,),
            "mask_interval": (3,),
            "asa_importance_beta": (0.5,),
            "asa_uncertainty_beta": (0.5,),
            "asa_schedule_exponent": (2.0,),
            "svd_threshold": (0.3,),
        },
    ),
    "ADAPTION_PROMPT": TypeRow(
        needed=("adapter_len", "adapter_layers"),
        fields={"target_modules": ("self_attn", None), "adapter_len": (1, 3, 4), "adapter_layers": (1, 2, 3)},
    ),
    "BOFT": TypeRow(
        fields={
            "boft_block_size": (2, 4, 8),
            "boft_block_num": (0, 4, 8),
            "boft_n_butterfly_factor": DEFAULT_ONLY,
        }  # without its CUDA extension PEFT has one
    ),
    "C3A": TypeRow(
        needed=("block_size",),
        fields={
            "block_size": (2, 4, 8, 16),
            "block_size_pattern": patterns(4, 8),
        },
    ),
    "CARTRIDGE": TypeRow(needed=VIRTUAL, fields={**OF_KEYS_AND_VALUES, "num_frozen_tokens": (0, 1, 2)}),
    "CPT": TypeRow(
        needed=("cpt_token_ids",),
        fields={
            "num_virtual_tokens": DEFAULT_ONLY,  # the number of cpt_token_ids
            "cpt_token_ids": ([3, 14, 15], [9]),
            "cpt_mask": ([1, 1, 1], [1]),
            "cpt_tokens_type_mask": ([1, 2, 4], [4], [1, 2, 3]),
            "opt_loss_decay_factor": (0.7,),
            "opt_projection_epsilon": (2.0,),
            "opt_projection_format_epsilon": (3.0,),
        },
    ),
    "DEFT": TypeRow(fields={"init_scale": (0.5, 3.0)}),
    "DELORA": TypeRow(fields={"delora_lambda": (3, 8), "lambda_pattern": patterns(4, 2)}),
    "FROD": TypeRow(fields={"sparse_rate": (0.05, 0.2), "regularization_alpha": (0.1,)}),
    "GRALORA": TypeRow(
        needed=("r",),
        fields={"r": (2, 4, 8), "hybrid_r": (1, 2, 4), "gralora_k": (1, 2, 4), "layers_pattern": ("layers",)},
    ),
    "IA3": TypeRow(fields={"feedforward_modules": (["down_proj"], [], r".*\.down_proj", ["q_proj"])}),
    "LILY": TypeRow(fields={"stride_A": (1, 2), "num_B": (1, 2, 3)}),
    "LN_TUNING": TypeRow(
        fields={
            "target_modules": (None, ["norm"], ["input_layernorm"], ["norm", "q_proj"], r".*layers\.1\..*layernorm")
        }
    ),
    "LOKR": TypeRow(fields={"decompose_factor": (2, 4, 8)}),
    "MISS": TypeRow(needed=("r",), fields={"mini_r": (1, 2, 4), "r": (2, 4, 8), "layers_pattern": ("layers",)}),
    "OFT": TypeRow(
        needed=("oft_block_size",),
        fields={"r": (0, 2, 4), "oft_block_size": (0, 4, 8), "eps": (1.0, 3.0), "num_cayley_neumann_terms": (2, 4)},
    ),
    "PROMPT_TUNING": TypeRow(
        needed=VIRTUAL,
        fields={"prompt_tuning_init_text": ("Reverse the word.", "a"), "tokenizer_name_or_path": ("{base}",)},
    ),
    "MULTITASK_PROMPT_TUNING": TypeRow(
        needed=VIRTUAL,
        fields={
            "prompt_tuning_init_text": ("Reverse the word.",),
            "tokenizer_name_or_path": ("{base}",),
            "prompt_tuning_init_state_dict_path": DEFAULT_ONLY,  # a file of another run
            "prompt_tuning_init_task": (0, 1),
            "num_ranks": (1, 2, 3),
            "num_tasks": (2, 3),
        },
    ),
    "OSF": TypeRow(
        fields={
            "effective_rank": (4, 8, 0.5, 0.75),
            "rank_pattern": patterns(6, 0.9),
            "target_svd_config": DEFAULT_ONLY,  # PEFT writes it by itself
        }
    ),
    "P_TUNING": TypeRow(needed=VIRTUAL, fields={"encoder_num_layers": (1, 2, 3)}),
    "PEANUT": TypeRow(fields={"depth": (0, 1, 2, 3), "act_fn": ("relu", "silu", "gelu", "tanh", "nonsense")}),
    "POLY": TypeRow(fields={"n_tasks": (1, 3), "n_skills": (2, 3), "n_splits": (1, 2, 3)}),
    "PREFIX_TUNING": TypeRow(needed=VIRTUAL, fields=OF_KEYS_AND_VALUES),
    "PSOFT": TypeRow(
        needed=("r",),  # by its default of 32 there are more directions than these matrices have
        fields={
            "psoft_alpha": (1, 7, 16),
            "psoft_svd_lowrank_niter": (0, 2, 4),
            "num_cayley_neumann_terms": (1, 2, 3, 6),
            "cayley_neumann_eps": (0.5, 0.9),
        },
    ),
    "PVERA": TypeRow(fields={"generator_seed": (3,)}),
    "RANDLORA": TypeRow(
        needed=("randlora_alpha",),  # by its default attention is so sharp that float32 loses digits
        fields={"r": (3, 7, 9, 20), "randlora_alpha": (9, 30), "layers_pattern": ("layers",)},
    ),
    "ROAD": TypeRow(needed=("group_size",), fields={"group_size": (2, 4, 8, 16)}),
    "SHADOW": TypeRow(
        fields={
            "target_modules": (None, ["layers"], r".*layers\.1", ["layers.0", "layers.1"]),
            "shadow_alpha": (0.3, 1.0),
            "shadow_model": ("mirror",),
            "shadow_num_hidden_layers": (1, 2),
            "shadow_hidden_size": (16, 32),
            "shadow_num_attention_heads": (2, 4),
            "shadow_intermediate_size": (24,),
            "update_hidden_size": (6,),
            "auxiliary_loss_weight": (0.0, 0.5),
        }
    ),
    "SUPERTUNING": TypeRow(needed=("sparsity",), fields={"sparsity": (0.8, 0.9, 0.95), "lora_alpha": (4.0, 7.0)}),
    "TINYLORA": TypeRow(
        fields={
            "u": (3, 6, 13),
            "weight_tying": (0.5, 1.0),
            "init_v_bound": (0.5,),
            "init_weights": (True, False, "uniform"),
        }
    ),
    "TRAINABLE_TOKENS": TypeRow(
        needed=("token_indices",),
        fields={
            "target_modules": (None, ["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]),
            "token_indices": ([5], [17, 3, 40]),
        },
    ),
    "UNILORA": TypeRow(fields={"theta_d_length": (20, 50), "init_theta_d_bound": (0.5,)}),
    "VBLORA": TypeRow(
        needed=("vector_length", "num_vectors"),
        fields={
            "num_vectors": (6, 12),
            "vector_length": (2, 4, 8),
            "topk": (1, 2, 3),
            "init_vector_bank_bound": (0.5,),
            "init_logits_std": (0.3,),
        },
    ),
    "WAVEFT": TypeRow(needed=("n_frequency",), fields={"wavelet_family": ("db1", "db2", "db4", "sym2")}),
    "FOURIERFT": TypeRow(needed=("n_frequency",)),
    "XLORA": TypeRow(
        needed=("hidden_size", "adapters", "xlora_size"),  # by its default of 2048 random logits are hundreds apart
        fields={
            "hidden_size": (32,),
            "adapters": ({"0": "{lora0}", "1": "{lora1}"}, {"0": "{lora0}", "1": "{lora1}", "2": "{lora2}"}),
            "xlora_depth": (1, 2, 3),
            "xlora_size": (8,),
            "softmax_temperature": (0.5, 2.0),
            "top_k_lora": (1, 2),
            "scaling_pass_value": (0.5,),
            "global_scaling_weight": (1.5,),
        },
    ),
}
GOES_WITH = {"layers_pattern": "layers_to_transform"}  # a field that is an error alone
OF_EVERY_CONFIG = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "peft_type")


def listed(annotation: Any) -> list[Any]:
    """The values that an annotation lists: booleans, those of literals and of enumerations."""
    if annotation is bool:
        return [True, False]
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    return [value for part in typing.get_args(annotation) for value in listed(part)]


def values_of(peft_type: str, config: type) -> dict[str, Values]:
    """The values of each field of a config class of PEFT's that combinations set.

    Raises:
        LookupError: if a field has none, which then belong into the row of the type.
    """
    row = TYPES.get(peft_type, TypeRow())
    annotations = typing.get_type_hints(config)
    found: dict[str, Values] = {}
    for field in dataclasses.fields(config):
        name = field.name
        if name in OF_EVERY_CONFIG:
            continue
        if name in row.fields:
            found[name] = row.fields[name]
        elif annotations[name] is str and name == "bias":
            found[name] = ("none", "all", methods.by_name(peft_type).bias_only or f"{peft_type.lower()}_only")
        elif "dropout" in name and annotations[name] is float:
            found[name] = (0.1, 0.5)
        elif name in COMMON:
            found[name] = COMMON[name]
        else:
            found[name] = tuple(listed(annotations[name]))
            if not found[name]:
                raise LookupError(f"{peft_type}.{name} needs values in the row of {peft_type} in TYPES.")
    return found


def combination(peft_type: str, config: type, number: int) -> dict[str, Any]:
    """The fields of one combination; ``number`` is its seed."""
    values = values_of(peft_type, config)
    draws = random.Random(f"{peft_type} {number}")
    row = TYPES.get(peft_type, TypeRow())
    always = ["task_type", "target_modules", *row.needed]
    defaults = default_values(config)
    others = {}
    for name, choices in values.items():
        if name not in always and (changed := [value for value in choices if value != defaults[name]]):
            others[name] = changed
    refused = refused_here(peft_type)
    for name in sorted(refused & others.keys()):
        if draws.random() > SHARE_OF_REFUSED:
            del others[name]
    chosen = draws.sample(list(others), draws.randint(0, min(row.most, len(others))))
    chosen += [GOES_WITH[name] for name in chosen if GOES_WITH.get(name) in others]
    found = {}
    for name in values:
        if name in always and values[name]:
            found[name] = draws.choice(values[name])
        elif name in chosen:
            found[name] = draws.choice(others[name])
    return found


def refused_here(peft_type: str) -> set[str]:
    """The fields that our config class has at their default alone."""
    fields = dataclasses.fields(methods.by_name(peft_type))
    return {field.name for field in fields if "default" in field.metadata}


def default_values(config: type) -> dict[str, Any]:
    """The defaults of a config's fields; None where there is none."""
    found = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        found[field.name] = field.default_factory() if made else field.default
    return found


@dataclasses.dataclass(frozen=True)
class Explained:
    """Why combinations end otherwise than equal, or refused by both or by a clear error of ours.

    Attributes:
        kind: How they end.
        types: PEFT's types, or empty for all.
        words: A regex that is found in the words of the outcome.
        fields: Fields that the combination sets.
        reason: Why, in a sentence for the note.
    """

    kind: str
    types: tuple[str, ...]
    words: str
    reason: str
    fields: tuple[str, ...] = ()


EXPLAINED = (
    Explained(
        THEIRS,
        (),
        r"Embedding\(.*\) is not (supported|a plain)|does not support target modules of type .*Embedding"
        r"|type <class '.*Embedding'> not supported",
        "PEFT has the type for linear layers; here it is on embeddings too.",
    ),
    Explained(
        THEIRS,
        ("FROD",),
        "^KeyError: 'model_embed_tokens'",
        "PEFT has the type for linear layers; here it is on embeddings too.",
    ),
    Explained(
        UNREADABLE,
        ("IA3",),
        "should be a subset of `target_modules`",
        "PEFT writes the model's default `feedforward_modules` beside targets that lack them, and does not read that.",
    ),
    Explained(
        THEIRS,
        ("IA3",),
        "should be a subset of `target_modules`",
        "PEFT compares names as they are written; here `q_proj` is the target 'layers.1.self_attn.q_proj' too.",
    ),
    Explained(
        DIFFERENT,
        ("OSF",),
        "^other logits, by [12]e-05$",
        "Both decompose the weight in float32. PEFT adds its parts up, and we take the old part off the weight: the "
        "sums of parts lose these digits, in float64 too, as the decomposition stays in float32.",
    ),
    Explained(
        DIFFERENT,
        ("XLORA",),
        "is what PEFT saves of a LoRA beside an X-LoRA: it lacks the layers",
        "PEFT leaves layers out of the LoRAs that it trains and saves, so that we refuse the folder.",
        ("use_trainable_adapters",),
    ),
    Explained(
        THEIRS,
        ("SHADOW",),
        r"^NoMatchingPeftModuleError: .*layers_to_transform",
        "PEFT looks for the number of a layer inside a longer path, and its targets are the layers themselves.",
        ("layers_to_transform",),
    ),
    Explained(
        DIFFERENT,
        ("SHADOW",),
        "^a fresh adapter has other tensors",
        "Without targets PEFT names all layers by their paths, among which `layers_to_transform` does not choose.",
        ("layers_to_transform",),
    ),
)


def reason_of(peft_type: str, kind: str, words: str, fields: Collection[str]) -> str | None:
    """Why an outcome is as it should be, "" where that needs no words, and None where it is a defect."""
    if kind in (EQUAL, BOTH):
        return ""
    if kind == OURS and words.startswith("ValueError: ") and words.endswith("."):
        return ""
    for row in EXPLAINED:
        is_of_type = not row.types or peft_type in row.types
        is_about = set(row.fields) <= set(fields) and re.search(row.words, words)
        if row.kind == kind and is_of_type and is_about:
            return row.reason
    return None

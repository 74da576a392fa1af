"""PEFT's file format as tables: which of our arrays is which tensor, and how it lies in the file."""

from typing import NamedTuple

from peft_jax.prompts.xlora import XLoraConfig

PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_VERSION = "0.21.2"  # the version whose format and defaults we follow
EMBEDDING_MODULES = ("embed_tokens", "lm_head")  # PEFT stores the base weight of these beside their adapter


ONE, EXPERTS = "1", "experts"


class Row(NamedTuple):
    """One array of a method: ours, the tensor's name after the module path, and the tensor's axes.

    They are ours (``axes`` of the method's class) in the file's order; `ONE` is an axis of length 1 that we have not,
    and a tuple is several of ours in one.
    """

    role: str
    suffix: str
    axes: tuple[str | tuple[str, ...], ...]


# By method, and by whether the leaf is looked up. A module has those of the tensors whose arrays its adapter has.
ROWS: dict[str, dict[bool, tuple[Row, ...]]] = {
    "LORA": {
        False: (
            Row("lora_A", "lora_A.weight", ("rank", "in")),
            Row("lora_B", "lora_B.weight", ("out", "rank")),
            Row("lora_bias", "lora_B.bias", ("out",)),
            Row("lora_magnitude_vector", "lora_magnitude_vector", ("out",)),
            Row("lora_diag", "lora_diag", ("rank",)),
            Row("lora_velora_embed", "lora_velora_embed", ("part",)),
            *(
                Row(f"lora_monteclora_sampler.{name}", f"lora_monteclora_sampler.{name}", axes)
                for name, axes in (
                    ("std_prior", ("rank",)),
                    ("expert_weights_prior", ("samples",)),
                    ("expert_weights", ("samples",)),
                    ("gaussian_var_prior", ("rank", "column")),
                )
            ),
        ),
        True: (
            Row("lora_A", "lora_embedding_A", ("rank", "in")),
            Row("lora_B", "lora_embedding_B", ("out", "rank")),
            Row("lora_magnitude_vector", "lora_magnitude_vector", ("out",)),
        ),
    },
    "ADALORA": {
        False: (
            Row("lora_A", "lora_A", ("rank", "in")),
            Row("lora_E", "lora_E", ("rank", ONE)),
            Row("lora_B", "lora_B", ("out", "rank")),
        ),
    },
    "BOFT": {
        False: (
            Row("boft_R", "boft_R", ("factors", "blocks", "row", "column")),
            Row("boft_s", "boft_s", ("out", ONE)),
        ),
    },
    "VERA": {
        False: (
            Row("vera_lambda_d", "vera_lambda_d", ("rank",)),
            Row("vera_lambda_b", "vera_lambda_b", ("out",)),
        ),
    },
    "LN_TUNING": {
        False: (
            Row("ln_tuning_layers", "ln_tuning_layers.weight", ("out",)),
            Row("ln_tuning_layers", "ln_tuning_layers.bias", ("out",)),
        ),
    },
    "BEFT": {False: (Row("beft_bias", "beft_bias", (ONE, "out")),)},
    "OFT": {
        False: (Row("oft_R", "oft_R.weight", ("blocks", "pairs")),),
        True: (Row("oft_embedding_R", "oft_embedding_R.weight", ("blocks", "pairs")),),
    },
    "HRA": {False: (Row("hra_u", "hra_u", ("in", "rank")),)},
    "LOHA": {
        False: (
            Row("hada_w1_a", "hada_w1_a", ("out", "rank")),
            Row("hada_w1_b", "hada_w1_b", ("rank", "in")),
            Row("hada_w2_a", "hada_w2_a", ("out", "rank")),
            Row("hada_w2_b", "hada_w2_b", ("rank", "in")),
        ),
    },
    "LOKR": {
        False: (
            Row("lokr_w1", "lokr_w1", ("out_1", "in_1")),
            Row("lokr_w1_a", "lokr_w1_a", ("out_1", "rank")),
            Row("lokr_w1_b", "lokr_w1_b", ("rank", "in_1")),
            Row("lokr_w2", "lokr_w2", ("out_2", "in_2")),
            Row("lokr_w2_a", "lokr_w2_a", ("out_2", "rank")),
            Row("lokr_w2_b", "lokr_w2_b", ("rank", "in_2")),
        ),
    },
    "HIRA": {
        False: (Row("hira_A", "hira_A", ("rank", "in")), Row("hira_B", "hira_B", ("out", "rank"))),
        True: (Row("hira_A", "hira_embedding_A", ("rank", "in")), Row("hira_B", "hira_embedding_B", ("out", "rank"))),
    },
    "DELORA": {
        False: (
            Row("delora_A", "delora_A", ("rank", "in")),
            Row("delora_B", "delora_B", ("out", "rank")),
            Row("delora_lambda", "delora_lambda", ("one",)),
            Row("delora_w_norm", "delora_w_norm", ("in",)),
        ),
    },
    "SHIRA": {
        False: (
            Row("shira_weight", "shira_weight", ("places",)),
            Row("shira_indices", "shira_indices", ("out_in", "places")),
        ),
    },
    "FOURIERFT": {False: (Row("fourierft_spectrum", "fourierft_spectrum", ("frequencies",)),)},
    "C3A": {False: (Row("c3a_kernel", "c3a_kernel", ("out_blocks", "in_blocks", "offsets")),)},
    "ROAD": {False: (Row("road_theta", "road_theta", ("turns",)), Row("road_alpha", "road_alpha", ("turns",)))},
    "GRALORA": {
        False: (
            Row("gralora_A", "gralora_A", ("blocks", "part", "rank")),
            Row("gralora_B", "gralora_B", ("blocks", "rank", "part")),
            Row("gralora_A_general", "gralora_A_general.weight", ("rank", "in")),
            Row("gralora_B_general", "gralora_B_general.weight", ("out", "rank")),
        ),
    },
    "WAVEFT": {False: (Row("waveft_spectrum", "waveft_spectrum", ("frequencies",)),)},
    "RANDLORA": {
        False: (
            Row("randlora_lambda", "randlora_lambda", ("rank", "bases")),
            Row("randlora_gamma", "randlora_gamma", ("bases", "least")),
        ),
    },
    "DEFT": {
        False: (
            Row("deft_P", "deft_P", ("out", "rank")),
            Row("deft_R", "deft_R", ("rank", "in")),
        ),
    },
    "PEANUT": {
        False: (
            Row("peanut_A", "peanut_A.weight", ("rank", "out")),
            Row("peanut_B", "peanut_B.weight", ("out", "rank")),
            *(
                Row(f"peanut_{part}.{number}", f"peanut_{part}.{number}.weight", ("made", "given"))
                for part in ("encoders", "decoders")
                for number in range(8)
            ),
        ),
    },
    "ADAMSS": {  # as `PackedTensors` packs them
        False: (
            Row("adamss_A", "adamss_A", ("subspaces", "rank", "width")),
            Row("adamss_B", "adamss_B", ("rows", "rank")),
            Row("adamss_newB", "adamss_newB", ("width", "columns")),
            Row("adamss_ranks", "adamss_ranks", ("subspaces",)),
            Row("adamss_lengths", "adamss_lengths", ("subspaces",)),
        ),
    },
    "FROD": {  # as `PackedTensors` packs them
        False: (
            Row("frod_lambda_l", "frod_lambda_l", ("directions",)),
            Row("frod_lambda_s_values", "frod_lambda_s_values", ("places",)),
            Row("frod_V", "frod_V", ("in", "directions")),
            Row("frod_s_indices", "frod_s_indices", ("row_column", "places")),
            Row("frod_s_size", "frod_s_size", ("row_column",)),
        ),
    },
    "LILY": {
        False: (
            Row("lily_A", "lily_A.weight", ("rank", "in")),
            Row("lily_B", "lily_B.weight", (("choices", "rank"), "out")),
            Row("lily_router", "lily_router.weight", ("choices", "rank")),
        ),
    },
    "POLY": {
        False: (
            Row("poly_lora_A", "poly_lora_A", ("splits", "skills", "part", "rank")),
            Row("poly_lora_B", "poly_lora_B", ("splits", "skills", "rank", "part")),
            Row("poly_logits", "poly_router.module_logits", ("tasks", "choices")),
        ),
    },
    "PVERA": {
        False: (
            Row("pvera_lambda_d", "pvera_lambda_d", ("rank",)),
            Row("pvera_lambda_b", "pvera_lambda_b", ("out",)),
        ),
    },
    "VBLORA": {
        False: (
            Row("vblora_logits_A", "vblora_logits_A", ("rank", "parts", "vectors")),
            Row("vblora_logits_B", "vblora_logits_B", ("parts", "rank", "vectors")),
        ),
    },
    "GLORA": {
        False: (
            *(
                row
                for part in "AB"
                for row in (
                    Row(f"{part}.Xd", f"glora_{part}.Xd", ("out", "rank")),
                    Row(f"{part}.Xu", f"glora_{part}.Xu", ("rank", "in")),
                    Row(f"{part}.X", f"glora_{part}.X", ("out", ONE)),
                    Row(f"{part}.number", f"glora_{part}.X", ("one",)),
                    Row(f"{part}.zeros", f"glora_{part}.zeros", ("out", "in")),
                )
            ),
            Row("C.Xd", "glora_C.Xd", ("in", "rank")),
            Row("C.Xu", "glora_C.Xu", ("rank", ONE)),
            Row("C.X", "glora_C.X", ("in", ONE)),
            Row("C.zeros", "glora_C.zeros", ("in", ONE)),
            *(Row(f"{part}.X", f"glora_{part}.X", ("values",)) for part in "DE"),
            *(Row(f"{part}.zeros", f"glora_{part}.zeros", ("out",)) for part in "DE"),
        ),
    },
    "TINYLORA": {
        False: (
            Row("tinylora_A", "tinylora_A", ("rank", "in")),
            Row("tinylora_B", "tinylora_B", ("out", "rank")),
            Row("tinylora_P", "tinylora_P", ("elements", "column", "row")),
        ),
        True: (
            Row("tinylora_B", "tinylora_A", ("rank", "out")),
            Row("tinylora_A", "tinylora_B", ("in", "rank")),
            Row("tinylora_P", "tinylora_P", ("elements", "row", "column")),
        ),
    },
    "UNILORA": {
        False: (
            Row("unilora_indices_A", "unilora_indices_A", ("rank", "in")),
            Row("unilora_indices_B", "unilora_indices_B", ("out", "rank")),
            Row("unilora_scales_A", "unilora_scales_A", ("rank", "in")),
            Row("unilora_scales_B", "unilora_scales_B", ("out", "rank")),
        ),
    },
    "SUPERTUNING": {
        False: (
            Row("supertuning_values", "supertuning_values", ("places",)),
            Row("supertuning_indices", "supertuning_indices", ("places",)),
            Row("supertuning_lora_A", "supertuning_lora_A.weight", ("rank", "in")),
            Row("supertuning_lora_B", "supertuning_lora_B.weight", ("out", "rank")),
        ),
    },
    "OSF": {
        False: (
            Row("U_low", "osf_svd_params.U_low", ("out", "rank")),
            Row("S_low", "osf_svd_params.S_low", ("rank",)),
            Row("V_low", "osf_svd_params.V_low", ("rank", "in")),
        ),
    },
    "PSOFT": {
        False: (
            Row("psoft_R", "psoft_R.weight", ("pairs",)),
            Row("psoft_R_matrix", "psoft_R.weight", ("row", "column")),
            Row("psoft_vector_b", "psoft_R.vector_b", ("row",)),
            Row("psoft_vector_a", "psoft_R.vector_a", ("column",)),
        ),
    },
    "MISS": {
        False: (
            Row("miss_block", "miss_block", ("rank", "out")),
            Row("miss_mini", "miss_block", ("rank", "part")),
            Row("miss_bat", "miss_block", ("blocks", "row", "column")),
        ),
    },
    "TRAINABLE_TOKENS": {
        False: (Row("trainable_tokens_head", "trainable_tokens_delta", ("tokens", "in")),),
        True: (Row("trainable_tokens_delta", "trainable_tokens_delta", ("tokens", "out")),),
    },
    "IA3": {
        False: (Row("ia3_in", "ia3_l", (ONE, "in")), Row("ia3_out", "ia3_l", ("out", ONE))),
    },
}

# Of the experts of a parameter, which share their tensors.
FUSED: dict[str, tuple[Row, ...]] = {
    "LORA": (
        Row("lora_A", "lora_A.weight", ((EXPERTS, "rank"), "in")),
        Row("lora_B", "lora_B.weight", ("out", ("rank", EXPERTS))),
    ),
}
# Of kernels of convolutions, whose positions have axes of their own in the file, of length 1 where they do not count.
TAPS, ONES = "taps", "1..."
CONVOLUTIONS: dict[str, tuple[Row, ...]] = {
    "LORA": (
        Row("lora_A", "lora_A.weight", ("rank", "in", TAPS)),
        Row("lora_B", "lora_B.weight", ("out", "rank", ONES)),
        Row("lora_bias", "lora_B.bias", ("out",)),
        Row("lora_magnitude_vector", "lora_magnitude_vector", (ONE, "out", ONES)),
    ),
    "IA3": (Row("ia3_in", "ia3_l", (ONE, "in", ONES)), Row("ia3_out", "ia3_l", (ONE, "out", ONES))),
    "LOKR": tuple(
        row._replace(axes=("out_2", "in_2", TAPS)) if row.role == "lokr_w2" else row for row in ROWS["LOKR"][False]
    ),
    "BOFT": (Row("boft_R", "boft_R", ("factors", "blocks", "row", "column")), Row("boft_s", "boft_s", (ONE, "out"))),
    "HIRA": (
        Row("hira_A", "hira_A", ("rank", "in", TAPS)),
        Row("hira_B", "hira_B", ("out", "rank", ONES)),
    ),
}
INNER = ".base_layer"  # between a module and the adapter of a parameter of it, for each that lies around that

TOKEN_SUFFIX = "token_adapter.trainable_tokens_delta"  # of tokens that are trained beside another method

# The tensors of an adapted embedding under the name of the head that is tied to it, where they are turned.
TIED = {"lora_embedding_A": "lora_B.weight", "lora_embedding_B": "lora_A.weight"}
# Arrays that all layers share: our name of a layer's part, the whole tensor's key, and its axes as above. Some
# layer's part is the whole. A key with a place for a number is of as many tensors as our first axis has places.
SHARED: dict[str, tuple[Row, ...]] = {
    "VERA": (
        Row("vera_A", "base_model.vera_A", ("rank", "in")),
        Row("vera_B", "base_model.vera_B", ("out", "rank")),
    ),
    "PVERA": (
        Row("pvera_A", "base_model.pvera_A", ("rank", "in")),
        Row("pvera_B", "base_model.pvera_B", ("out", "rank")),
    ),
    "RANDLORA": (
        Row("randlora_A", "base_model.randlora_A", ("rank", ONE, "least")),
        Row("randlora_B", "base_model.randlora_B", ("most", "bases", "rank")),
    ),
    "TINYLORA": (Row("tinylora_v", "base_model.tinylora_v.{}", ("elements",)),),
    "UNILORA": (Row("unilora_theta_d", "base_model.unilora_theta_d", ("elements",)),),
    "VBLORA": (Row("vblora_vector_bank", "base_model.vblora_vector_bank", ("vectors", "length")),),
}
COPIED_IN_LAYERS = ("RANDLORA",)  # methods whose shared arrays a file has once more for each layer, whole

# Ends of the keys of tensors that are not trained.
FIXED = (
    *(f".{name}_{matrix}" for name in ("vera", "pvera", "randlora", "tinylora") for matrix in "AB"),
    *(f".unilora_{kind}_{matrix}" for kind in ("indices", "scales") for matrix in "AB"),
    *(".tinylora_P", ".delora_w_norm", ".adamss_newB"),
    *(f".glora_{part}.zeros" for part in "ABCDE"),
    ".lora_velora_embed",
    *(f".lora_monteclora_sampler.{name}" for name in ("expert_weights", "gaussian_var_prior")),
)

FIXED_OF_MODEL = ("base_model.frod_V.",)  # and beginnings of such keys


def is_fixed(key: str) -> bool:
    """Whether a tensor of a file is not trained, as its key says.

    Example:
        >>> is_fixed("base_model.vera_A"), is_fixed("base_model.model.q.lora_A.weight")
        (True, False)
    """
    return key.endswith(FIXED) or key.startswith(FIXED_OF_MODEL)


PROMPT_LEARNING = ("CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")
_PROMPT = Row("prompt", "prompt_embeddings", ("tokens", "features"))
ROWS |= {name: {True: (_PROMPT,)} for name in PROMPT_LEARNING}
ROWS |= {
    "SHADOW": {True: ()},  # its tensors are those of whole modules, whose names its config knows
    "MULTITASK_PROMPT_TUNING": {
        True: (
            _PROMPT,
            Row("prefix_task_cols", "prefix_task_cols", ("tasks", "tokens", "rank")),
            Row("prefix_task_rows", "prefix_task_rows", ("tasks", "rank", "features")),
        ),
    },
    "ADAPTION_PROMPT": {
        False: (
            Row("adaption_prompt", "adaption_prompt", (ONE, "tokens", "in")),
            Row("adaption_gate", "adaption_gate", ("one",)),
        ),
    },
}

ROWS |= {"XLORA": {True: tuple(Row(role, role, axes[::-1]) for role, axes in XLoraConfig.axes.items())}}

# How a key is made of the path of a module (or of its parent) and a row's suffix, where it is not `PREFIX` and both.
KEYS = {"ADAPTION_PROMPT": PREFIX + "{parent}.{suffix}", **dict.fromkeys(PROMPT_LEARNING, "{suffix}")}
KEYS["XLORA"] = "base_model.internal_xlora_classifier.{suffix}"
# What stands before the path of a module that is trained whole: PEFT wraps no model for the sake of a prompt.
PREFIXES = dict.fromkeys(PROMPT_LEARNING, "base_model.")


def tensor_key(peft_type: str, module: str, suffix: str) -> str:
    """The key of a method's tensor at a module.

    Example:
        >>> tensor_key("LORA", "layers.0.up", "lora_A.weight"), tensor_key("P_TUNING", "wte", "prompt_embeddings")
        ('base_model.model.layers.0.up.lora_A.weight', 'prompt_embeddings')
    """
    pattern = KEYS.get(peft_type, PREFIX + "{module}.{suffix}")
    return pattern.format(module=module, parent=module.rpartition(".")[0], suffix=suffix)


# What stands between the path of a module and PyTorch's name of a leaf that is trained whole, by its role.
INSIDE = {"bias": ".base_layer", "ln_tuning_layers": ".ln_tuning_layers", "modules_to_save": ""}

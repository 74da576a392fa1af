"""One row per method, per prompt and per architecture: the tests over all of them take their cases from here.

A new method adds a row to METHODS (or PROMPTS), a new architecture one to ARCHITECTURES; test_cases.py checks that
each is there. What a row need not say has a default. Neither torch nor peft is imported: a row names the classes that
both libraries have, and `made` makes a config of either.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import peft_jax as pj

Options = Mapping[str, Any]
Switches = tuple[str, Options]  # a model type, and what its config has beside the sizes of its row

# The names of an architecture's modules, which `filled` puts in; see `Modules`.
TARGETS = ["{first}", "{second}", "{last}"]


def nothing() -> Any:
    """The default of a field of options."""
    return dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodCase:
    """What the tests need to know of a method that changes weights.

    Attributes:
        config: Name of its config class, here and in PEFT.
        tiny: Options for trees of matrices of 8 and 12 features, without targets.
        variants: Other options for such trees that compute in another way, by their names in test ids.
        stacked: What is different from `tiny` in the scanned model of test_rows.py, its targets among it.
        needed: What a config cannot do without, though it is no error in PEFT.
        common: What all options of `llama` and `models` have.
        llama: Options that are compared with PEFT on Llama, by their names in test ids and docs/conformance.md.
        models: Options that are compared with PEFT on every other architecture, by name.
        starts: Options whose start is compared with PEFT's draws on a matrix of 512 x 256, by name; targets are added.
        trained: Options of 20 training steps that are compared with PEFT's on Llama, by name; targets are added.
        trained_elsewhere: Those names of `trained` that are compared on the other architectures too.
        finetune: Options of a few steps of ``peft-jax finetune``.
        name_is_enough: Whether that command needs no options for it; if not its name alone is an error.
        changes_matrix: Whether it changes a matrix; False if it trains biases alone.
        merges: Whether it has a merged matrix; if not merging is an error.
        rounds: Cases of `tiny` and `variants` in which a fresh adapter changes the last digit of a weight.
        starts_in_peft: Whether PEFT makes frozen arrays again when it reads a file, so that those have to be PEFT's.
        conv1d: Whether PEFT has it for layers that PyTorch stores as (in, out), as GPT-2's; if not it is an error.
        meets_ties: Whether Qwen2's ties and biases matter to it, so that `llama` is compared on Qwen2 too.
        narrows: Whether training changes its ranks by a schedule, which its file has as ``rank_pattern``.
        scales: Whether an adapter of it has a scale for `pj.scale_adapter`; if not that is an error.
        drops_inputs: Options with a dropout of the inputs of its change, if it has one.
        drops_outputs: Options with a rank of their own for its dropout of outputs, by name, if it has one.
    """

    config: str
    tiny: Options = nothing()
    variants: Mapping[str, Options] = nothing()
    stacked: Options = nothing()
    needed: Options = nothing()
    common: Options = nothing()
    llama: Mapping[str, Options]
    models: Mapping[str, Options]
    starts: Mapping[str, Options] = nothing()
    trained: Mapping[str, Options] = nothing()
    trained_elsewhere: tuple[str, ...] = ()
    finetune: Options = nothing()
    name_is_enough: bool = True
    changes_matrix: bool = True
    merges: bool = True
    rounds: tuple[str, ...] = ()
    starts_in_peft: bool = False
    conv1d: bool = True
    meets_ties: bool = False
    narrows: bool = False
    scales: bool = False
    drops_inputs: Options | None = None
    drops_outputs: Mapping[str, Options] = nothing()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptCase:
    """What the tests need to know of a prompt.

    Attributes:
        config: Name of its config class, here and in PEFT.
        row: Its name in test ids and docs/conformance.md.
        tiny: Options for the models of test_prompts.py.
        needed: What a config cannot do without, though it is no error in PEFT.
        llama: Options that are compared with PEFT on Llama, by name; `row` is one of the names.
        model: Options that are compared with PEFT on every other architecture.
        others: Which of `llama` are compared on other model types of Llama's family.
        generates: Whether its tokens are compared with PEFT's on Llama.
        trained: Which of `llama` are trained beside PEFT.
        trained_elsewhere: Options of the training steps on the other architectures, if there are any.
        finetune: Options of a few steps of ``peft-jax finetune``.
        name_is_enough: Whether that command needs no options for it; if not its name alone is an error.
        is_a_side: Whether it is the one whose kind of input to a model the slower tests take: keys and values, virtual
            tokens, or an addition to attention.
        has_tasks: Whether a call needs ``task_ids``.
        file_is_whole: Whether its file holds all that is trained; if not it is an error to train on from a file.
    """

    config: str
    row: str
    tiny: Options
    needed: Options = nothing()
    llama: Mapping[str, Options]
    model: Options
    others: Mapping[str, str] = nothing()
    generates: bool = False
    trained: tuple[str, ...] = ()
    trained_elsewhere: Options | None = None
    finetune: Options
    name_is_enough: bool = True
    is_a_side: bool = False
    has_tasks: bool = False
    file_is_whole: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modules:
    """Names of modules that options of methods have in braces.

    Attributes:
        first: A projection of attention.
        second: Another one.
        last: A matrix of the feed-forward network.
        layers: The list of layers.
        norm: A normalization.
        part: A module in each layer.
        embedding: The embedding of tokens.
    """

    first: str
    second: str
    last: str
    layers: str
    norm: str
    part: str
    embedding: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the tests need to know of an architecture.

    Attributes:
        sizes: Fields of a tiny config, in the words of transformers, for each of its model types.
        model_types: Its model types, the first being the one of the row, and what their configs have beside `sizes`.
        modules: The names of its modules.
        conv1d: Whether PyTorch stores its matrices as (in, out), which is not for every method.
        heads: Ends of the names of its classes ``AutoModelFor...``, without that of language models.
        adapters: By task, the rows of methods that are compared with PEFT for it; None for all that there are.
        left_out: Rows of LoRA that are not compared, as another architecture shows the same.
        more: Rows of LoRA that it has beside those of `MethodCase.models`, by name.
        instead: Options of some rows that are others here, by name.
        prompts: By task, the prompts that are compared with PEFT for it.
        generates: Prompts whose tokens are compared with PEFT's.
        training: The task that is trained beside PEFT, and what its config has instead of `sizes`, if there is one.
        not_trained: Methods and prompts that PEFT does not have for it.
        lively: By how much random weights of it are moved for prompts, so that its outputs differ.
        types: Whether it takes ``token_type_ids`` for classes of texts and of tokens.
        switches: Of a decoder, what is compared in test_decoders.py: model types, and what their configs have beside
            `sizes`, by name. The first of them is compared in everything, the others in numbers and tokens.
        noise: By how much its random weights are moved there; norms and caps of some models amplify roundoff.
        adapter_noise: By how much the arrays of its adapters are moved there, for the same reason.
        grid: Further ones, for ``make test-models`` alone.
        refused: Options that are refused, and what the error names.
        to_build: By model type, what transformers' default config lacks for transformers to make a model of it.
    """

    sizes: Options
    model_types: Mapping[str, Options]
    modules: Modules
    conv1d: bool = False
    heads: tuple[str, ...] = ()
    adapters: Mapping[str, Sequence[str] | None] = nothing()
    left_out: tuple[str, ...] = ()
    more: Mapping[str, Options] = nothing()
    instead: Mapping[str, Options] = nothing()
    prompts: Mapping[str, tuple[str, ...]] = nothing()
    generates: tuple[str, ...] = ()
    training: tuple[str, Options] | None = None
    not_trained: tuple[str, ...] = ()
    lively: float = 0.05
    types: bool = False
    switches: Mapping[str, Switches] = nothing()
    noise: float = 0.15
    adapter_noise: float = 0.2
    grid: Mapping[str, Switches] = nothing()
    refused: Mapping[str, Switches] = nothing()
    to_build: Mapping[str, Options] = nothing()


# Of each task of PEFT: the end of the names of classes, and of the names of models in test ids.
TASKS = {
    "CAUSAL_LM": ("CausalLM", ""),
    "SEQ_CLS": ("SequenceClassification", "-seq"),
    "TOKEN_CLS": ("TokenClassification", "-token"),
    "QUESTION_ANS": ("QuestionAnswering", "-spans"),
    "FEATURE_EXTRACTION": ("", "-features"),
    "SEQ_2_SEQ_LM": ("Seq2SeqLM", ""),
}

FULL = {"q_proj": 32, "v_proj": 16, "down_proj": 32}
SCHEDULE = {"init_r": 4, "target_r": 2, "lora_alpha": 16, "total_step": 18, "tinit": 3, "tfinal": 5, "deltaT": 2}

METHODS: dict[str, MethodCase] = {
    "ADALORA": MethodCase(
        config="AdaLoraConfig",
        tiny={"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 5},
        needed={"total_step": 10},
        llama={
            "ADALORA": {
                "init_r": 4,
                "target_r": 2,
                "total_step": 10,
                "lora_alpha": 7,
                "target_modules": TARGETS,
                "bias": "lora_only",
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
            "ADALORA narrowed": {
                "init_r": 4,
                "target_r": 3,
                "total_step": 10,
                "lora_alpha": 7,
                "init_lora_weights": False,
                "target_modules": r".*(v_proj|layers\.[12]\.mlp\.down_proj)",
                "rank_pattern": {
                    "model.layers.0.self_attn.v_proj.lora_E": [True, False, False, True],
                    "model.layers.1.self_attn.v_proj.lora_E": [True, True, True, True],
                    "model.layers.2.self_attn.v_proj.lora_E": [False, False, True, False],
                    "model.layers.1.mlp.down_proj.lora_E": [False, True, True, True],
                    "model.layers.2.mlp.down_proj.lora_E": [True, True, True, False],
                },
            },
        },
        models={"ADALORA": {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": TARGETS}},
        starts={
            "ADALORA": {"total_step": 9},
            "ADALORA random": {"total_step": 9, "init_r": 32, "init_lora_weights": False},
        },
        trained={"ADALORA": SCHEDULE},
        trained_elsewhere=("ADALORA",),
        finetune={"init_r": 4, "target_r": 2, "tfinal": 1, "lora_alpha": 32},
        narrows=True,
        scales=True,
    ),
    "BOFT": MethodCase(
        config="BOFTConfig",
        tiny={"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        llama={
            "BOFT": {"target_modules": TARGETS, "bias": "boft_only", "modules_to_save": ["norm"]},
            "BOFT by number": {
                "boft_block_size": 0,
                "boft_block_num": 8,
                "target_modules": ["k_proj", "down_proj"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"BOFT": {"target_modules": TARGETS, "bias": "boft_only"}},
        starts={"BOFT": {}, "BOFT random": {"boft_block_size": 0, "boft_block_num": 64, "init_weights": False}},
        conv1d=False,
    ),
    "VERA": MethodCase(
        config="VeraConfig",
        tiny={"r": 5},
        stacked={"d_initial": 1.0},
        llama={
            "VERA": {"r": 24, "target_modules": TARGETS, "bias": "vera_only"},
            "VERA of some layers": {
                "r": 16,
                "d_initial": 0.3,
                "projection_prng_key": 5,
                "save_projection": False,
                "target_modules": ["up_proj"],
                "layers_to_transform": [1, 2],
                "modules_to_save": ["norm"],
            },
        },
        models={"VERA": {"r": 24, "target_modules": TARGETS, "bias": "vera_only"}},
        starts={"VERA": {}, "VERA random": {"init_weights": False}},
        finetune={"r": 32, "d_initial": 1.0},
    ),
    "BEFT": MethodCase(
        config="BeftConfig",
        llama={"BEFT": {"target_modules": TARGETS, "modules_to_save": ["norm"]}},
        models={"BEFT": {"target_modules": TARGETS}},
        starts={"BEFT": {}, "BEFT random": {"init_weights": False}},
        changes_matrix=False,  # its bias has tests of its own
        conv1d=False,
    ),
    "LN_TUNING": MethodCase(
        config="LNTuningConfig",
        stacked={"target_modules": ["norm"]},
        llama={
            "LN_TUNING": {"exclude_modules": r".*layers\.1\.input_layernorm"},
            "LN_TUNING of other modules": {"target_modules": ["norm", "q_proj"], "modules_to_save": ["lm_head"]},
        },
        models={"LN_TUNING": {"target_modules": ["{norm}"]}},
    ),
    "IA3": MethodCase(
        config="IA3Config",
        tiny={"feedforward_modules": []},
        stacked={"feedforward_modules": ["down"]},
        llama={
            "IA3": {"modules_to_save": ["norm"]},
            "IA3 of one stack": {
                "target_modules": ["q_proj", "o_proj"],
                "feedforward_modules": r".*layers\.[12]\.self_attn\.q_proj",
            },
        },
        models={"IA3": {}},
        starts={
            "IA3": {"feedforward_modules": []},
            "IA3 random": {"feedforward_modules": ["dense"], "init_ia3_weights": False},
        },
        meets_ties=True,
    ),
    "OFT": MethodCase(
        config="OFTConfig",
        tiny={"oft_block_size": 4},
        llama={
            "OFT": {"target_modules": TARGETS, "bias": "oft_only", "modules_to_save": ["norm"]},
            "OFT constrained": {
                "oft_block_size": 8,
                "target_modules": ["embed_tokens", "k_proj"],
                "coft": True,
                "eps": 3.0,  # so that some of the blocks are out of their balls, and some in
            },
            "OFT by number": {
                "r": 4,
                "oft_block_size": 0,
                "target_modules": ["embed_tokens", "k_proj"],
                "block_share": True,
                "use_cayley_neumann": False,
                "layers_to_transform": [0, 2],
            },
        },
        models={"OFT": {"oft_block_size": 8, "target_modules": TARGETS}},
        starts={"OFT": {}, "OFT random": {"init_weights": False}},
        # Of the blocks of 8 angles some start out of their ball.
        trained={"COFT": {"oft_block_size": 8, "coft": True, "eps": 1.25}},
        conv1d=False,
    ),
    "HRA": MethodCase(
        config="HRAConfig",
        tiny={"r": 4},
        llama={
            "HRA": {"r": 4, "target_modules": TARGETS, "bias": "all"},
            "HRA orthogonal": {
                "r": 3,
                "apply_GS": True,
                "init_weights": False,
                "target_modules": ["up_proj"],
                "layers_to_transform": [1],
            },
        },
        models={"HRA": {"r": 4, "target_modules": TARGETS}},
        starts={"HRA": {"r": 32}, "HRA random": {"r": 31}},
        rounds=("HRA",),  # pairs of reflections, which cancel but for the last digit
        conv1d=False,
    ),
    "SHIRA": MethodCase(
        config="ShiraConfig",
        tiny={"r": 2},
        llama={
            "SHIRA": {"r": 4, "target_modules": TARGETS},
            "SHIRA of a seed": {
                "r": 2,
                "random_seed": 5,
                "init_weights": False,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
            },
        },
        models={"SHIRA": {"r": 4, "target_modules": TARGETS}},
        starts={"SHIRA": {}, "SHIRA random": {"random_seed": 3, "init_weights": False}},
        trained={"SHIRA": {"r": 4}},
        finetune={"r": 4},
        conv1d=False,
        scales=True,
    ),
    "FOURIERFT": MethodCase(
        config="FourierFTConfig",
        tiny={"n_frequency": 20, "init_weights": True},
        stacked={"n_frequency": 20, "n_frequency_pattern": {r"1\..*": 9}},
        llama={
            "FOURIERFT": {
                "n_frequency": 60,
                "target_modules": TARGETS,
                "n_frequency_pattern": {r"layers\.1\.self_attn\.q_proj": 90, "down_proj": 40},
                "bias": "fourierft_only",
            },
            "FOURIERFT of a seed": {
                "n_frequency": 50,
                "scaling": 40.0,
                "random_loc_seed": 5,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"FOURIERFT": {"n_frequency": 60, "scaling": 40.0, "target_modules": TARGETS}},
        starts={"FOURIERFT": {}, "FOURIERFT of zeros": {"init_weights": True}},
        trained={"FOURIERFT": {"n_frequency": 60}},
        finetune={"n_frequency": 50},
        scales=True,
    ),
    "C3A": MethodCase(
        config="C3AConfig",
        tiny={"block_size": 4, "init_weights": True},
        stacked={"block_size": 4, "block_size_pattern": {r"1\..*": 2}},
        llama={
            "C3A": {
                "block_size": 8,
                "target_modules": TARGETS,
                "block_size_pattern": {r"layers\.1\.self_attn\.q_proj": 4},
                "bias": "all",
            },
            "C3A of some layers": {
                "block_size": 4,
                "init_weights": "gaussian",
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"C3A": {"block_size": 8, "target_modules": TARGETS}},
        starts={
            "C3A": {},
            "C3A of zeros": {"init_weights": True},
            "C3A gaussian": {"init_weights": "gaussian"},
            "C3A kaiming": {"init_weights": "kaiming_uniform", "block_size": 128},
        },
        finetune={"block_size": 8},
        conv1d=False,
    ),
    "ROAD": MethodCase(
        config="RoadConfig",
        tiny={"group_size": 4},
        variants={
            "ROAD of outputs": {"group_size": 4, "variant": "road_2"},
            "ROAD of both": {"group_size": 4, "variant": "road_4"},
        },
        llama={
            "ROAD": {"group_size": 8, "target_modules": TARGETS},
            "ROAD of outputs": {
                "variant": "road_2",
                "group_size": 4,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
            },
            "ROAD of both": {"variant": "road_4", "group_size": 8, "target_modules": TARGETS},
        },
        models={"ROAD": {"group_size": 8, "target_modules": TARGETS}},
        starts={"ROAD": {}, "ROAD random": {"variant": "road_4", "init_weights": False}},
        trained={"ROAD": {"group_size": 8}},
        finetune={"group_size": 8},
        conv1d=False,
    ),
    "GRALORA": MethodCase(
        config="GraloraConfig",
        tiny={"r": 4, "alpha": 5},
        variants={"GRALORA hybrid": {"r": 4, "hybrid_r": 3, "gralora_k": 4, "alpha": 9}},
        llama={
            "GRALORA": {"r": 4, "alpha": 7, "target_modules": TARGETS, "bias": "gralora_only"},
            "GRALORA hybrid": {
                "r": 8,
                "hybrid_r": 3,
                "gralora_k": 4,
                "init_weights": False,
                "gralora_dropout": 0.1,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"GRALORA": {"r": 4, "alpha": 7, "target_modules": TARGETS}},
        starts={"GRALORA": {"hybrid_r": 8}, "GRALORA random": {"hybrid_r": 8, "init_weights": False}},
        trained={"GRALORA": {"r": 4, "alpha": 8, "hybrid_r": 2}},
        finetune={"r": 4},
        scales=True,
        drops_inputs={"r": 2, "gralora_dropout": 0.5},
    ),
    "WAVEFT": MethodCase(
        config="WaveFTConfig",
        tiny={"n_frequency": 20},
        variants={"WAVEFT of longer filters": {"n_frequency": 30, "wavelet_family": "db2"}},
        stacked={"n_frequency": 20, "n_frequency_pattern": {r"1\..*": 9}},
        llama={
            "WAVEFT": {
                "n_frequency": 60,
                "target_modules": TARGETS,
                "n_frequency_pattern": {r"layers\.1\.self_attn\.q_proj": 90, "down_proj": 40},
            },
            "WAVEFT of longer filters": {
                "n_frequency": 50,
                "scaling": 10.0,
                "wavelet_family": "db4",
                "random_loc_seed": 5,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
            "WAVEFT of places": {
                "n_frequency": 60,
                "use_idwt": False,
                "init_weights": False,
                "target_modules": TARGETS,
            },
        },
        models={"WAVEFT": {"n_frequency": 60, "target_modules": TARGETS}},
        starts={"WAVEFT": {}, "WAVEFT random": {"init_weights": False}},
        trained={"WAVEFT": {"n_frequency": 60}},
        finetune={"n_frequency": 50},
        scales=True,
    ),
    "RANDLORA": MethodCase(
        config="RandLoraConfig",
        tiny={"r": 3, "randlora_alpha": 30},
        llama={
            "RANDLORA": {"r": 20, "randlora_alpha": 9, "target_modules": TARGETS, "bias": "randlora_only"},
            "RANDLORA of a seed": {
                "r": 7,
                "randlora_alpha": 9,
                "projection_prng_key": 7,
                "save_projection": False,
                "randlora_dropout": 0.1,
                "init_weights": False,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
            "RANDLORA of sparse bases": {
                "r": 9,
                "randlora_alpha": 9,
                "sparse": True,
                "save_projection": False,
                "target_modules": TARGETS,
            },
            "RANDLORA of very sparse bases": {
                "r": 9,
                "randlora_alpha": 9,
                "very_sparse": True,
                "save_projection": False,
                "target_modules": ["down_proj"],
            },
        },
        models={"RANDLORA": {"r": 20, "randlora_alpha": 9, "target_modules": TARGETS}},
        starts={"RANDLORA": {}, "RANDLORA random": {"init_weights": False, "sparse": True}},
        trained={"RANDLORA": {"r": 20, "randlora_alpha": 20}},
        finetune={"r": 16},
        scales=True,
        drops_inputs={"r": 2, "randlora_dropout": 0.5},
    ),
    "DEFT": MethodCase(
        config="DeftConfig",
        tiny={"r": 3},
        variants={"DEFT of a basis": {"r": 3, "decomposition_method": "qr", "alpha": 6}},
        llama={
            "DEFT": {"r": 4, "alpha": 6, "target_modules": TARGETS, "bias": "deft_only"},
            "DEFT of a basis": {
                "r": 40,  # one of the modules has fewer outputs
                "decomposition_method": "qr",
                "init_weights": False,
                "init_scale": 3.0,
                "deft_dropout": 0.1,
                "target_modules": ["k_proj", "up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
            "DEFT that only takes away": {"r": 3, "para": True, "target_modules": TARGETS},
        },
        models={"DEFT": {"r": 4, "alpha": 6, "target_modules": TARGETS}},
        starts={"DEFT": {"r": 32}, "DEFT random": {"init_weights": False}, "DEFT that only takes away": {"para": True}},
        trained={"DEFT": {"r": 4}},
        finetune={"r": 4},
        rounds=("DEFT", "DEFT of a basis"),
        drops_inputs={"r": 2, "init_scale": 100.0, "deft_dropout": 0.5},
    ),
    "PEANUT": MethodCase(
        config="PeanutConfig",
        tiny={"r": 3},
        variants={"PEANUT of depth": {"r": 4, "depth": 2, "act_fn": "gelu"}},
        llama={
            "PEANUT": {"r": 6, "target_modules": TARGETS},
            "PEANUT of depth": {
                "r": 5,
                "depth": 2,
                "act_fn": "silu",
                "scaling": 2.0,
                "init_weights": False,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"PEANUT": {"r": 6, "depth": 1, "target_modules": TARGETS}},
        starts={"PEANUT": {"depth": 1}, "PEANUT random": {"init_weights": False}},
        trained={"PEANUT": {"r": 6}},
        finetune={"r": 8},
        conv1d=False,
        scales=True,
    ),
    "ADAMSS": MethodCase(
        config="AdamssConfig",
        tiny={"r": 4, "num_subspaces": 3, "subspace_rank": 2},
        llama={
            "ADAMSS": {"r": 9, "num_subspaces": 4, "subspace_rank": 2, "target_modules": TARGETS},
            "ADAMSS of ranks": {
                "r": 12,
                "num_subspaces": 3,
                "subspace_rank": 3,
                "init_weights": None,
                "use_dynamic_rank": True,
                "svd_threshold": 0.4,
                "random_seed": 3,
                "target_modules": ["up_proj", "o_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"ADAMSS": {"r": 5, "num_subspaces": 3, "subspace_rank": 2, "target_modules": TARGETS}},
        starts={"ADAMSS": {}, "ADAMSS random": {"init_weights": None, "subspace_rank": 4, "num_subspaces": 1}},
        trained={
            "ADAMSS": {"r": 6, "num_subspaces": 3, "subspace_rank": 2},
            "ADAMSS that freezes": {
                "r": 6,
                "num_subspaces": 3,
                "use_asa": True,
                "asa_target_subspaces": 6,
                "init_warmup": 2,
                "final_warmup": 16,
                "mask_interval": 3,
            },
        },
        finetune={"r": 6, "num_subspaces": 3},
        conv1d=False,
        meets_ties=True,
    ),
    "FROD": MethodCase(
        config="FrodConfig",
        tiny={"sparse_rate": 0.1},
        llama={
            "FROD": {"target_modules": TARGETS, "bias": "frod_only"},
            "FROD of many places": {
                "projection_prng_key": 5,
                "sparse_rate": 0.2,
                "regularization_alpha": 0.1,
                "frod_dropout": 0.1,
                "init_weights": False,
                "progressbar": False,
                "target_modules": ["up_proj", "o_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"FROD": {"sparse_rate": 0.05, "progressbar": False, "target_modules": TARGETS}},
        trained={"FROD": {"sparse_rate": 0.05, "progressbar": False}},
        finetune={"sparse_rate": 0.05},
        drops_inputs={"frod_dropout": 0.5, "sparse_rate": 0.5},
        rounds=("FROD",),
        starts_in_peft=True,
    ),
    "LILY": MethodCase(
        config="LilyConfig",
        tiny={"r": 3, "num_B": 3, "scaling": 2.0},
        llama={
            "LILY": {"r": 4, "stride_A": 2, "num_B": 3, "target_modules": TARGETS},
            "LILY of one size": {
                "r": 3,
                "scaling": 0.5,
                "init_weights": False,
                "target_modules": r".*\.(q_proj|o_proj|up_proj)",
                "exclude_modules": r".*layers\.1.*",
                "modules_to_save": ["norm"],
            },
        },
        models={"LILY": {"r": 4, "stride_A": 2, "num_B": 3, "target_modules": TARGETS}},
        starts={"LILY": {}, "LILY random": {"init_weights": False}},
        trained={"LILY": {"r": 4, "stride_A": 2, "num_B": 3}},
        finetune={"r": 8},
        merges=False,
        conv1d=False,
    ),
    "POLY": MethodCase(
        config="PolyConfig",
        tiny={"r": 2, "n_skills": 3},
        variants={"POLY of splits": {"r": 3, "n_skills": 2, "n_splits": 2}},
        llama={
            "POLY": {"r": 3, "target_modules": TARGETS},
            "POLY of splits": {
                "r": 2,
                "n_skills": 3,
                "n_splits": 2,
                "init_weights": False,
                "target_modules": ["up_proj"],
                "exclude_modules": r".*layers\.1.*",
                "modules_to_save": ["norm"],
            },
        },
        models={"POLY": {"r": 3, "n_skills": 2, "target_modules": TARGETS}},
        starts={"POLY": {"n_tasks": 64}, "POLY random": {"n_tasks": 64, "n_splits": 2, "init_weights": False}},
        trained={"POLY": {"r": 4, "n_tasks": 2, "n_skills": 3, "n_splits": 2}},
        finetune={"r": 4, "n_tasks": 2},
        conv1d=False,
    ),
    "PVERA": MethodCase(
        config="PveraConfig",
        tiny={"r": 3, "d_initial": 0.5},
        llama={
            "PVERA": {"r": 6, "d_initial": 0.5, "target_modules": TARGETS},
            "PVERA of a seed": {
                "r": 5,
                "projection_prng_key": 7,
                "save_projection": False,
                "pvera_dropout": 0.1,
                "init_weights": False,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"PVERA": {"r": 6, "d_initial": 0.5, "target_modules": TARGETS}},
        starts={"PVERA": {}, "PVERA random": {"init_weights": False}},
        finetune={"r": 16},
        drops_inputs={"r": 2, "pvera_dropout": 0.5},
    ),
    "VBLORA": MethodCase(
        config="VBLoRAConfig",
        tiny={"r": 3, "num_vectors": 6, "vector_length": 2, "init_vector_bank_bound": 0.0},
        llama={
            "VBLORA": {
                "num_vectors": 12,
                "vector_length": 4,
                "init_vector_bank_bound": 0.5,
                "target_modules": TARGETS,
                "bias": "vblora_only",
            },
            "VBLORA of three": {
                "r": 3,
                "num_vectors": 20,
                "vector_length": 8,
                "topk": 3,
                "init_vector_bank_bound": 0.5,
                "init_logits_std": 0.3,
                "vblora_dropout": 0.1,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={
            "VBLORA": {
                "num_vectors": 12,
                "vector_length": 4,
                "init_vector_bank_bound": 0.5,
                "target_modules": TARGETS,
            },
        },
        starts={"VBLORA": {"vector_length": 64}},
        trained={"VBLORA": {"num_vectors": 12, "vector_length": 4, "init_vector_bank_bound": 0.5}},
        finetune={"num_vectors": 12, "vector_length": 4, "init_vector_bank_bound": 0.5},
    ),
    "GLORA": MethodCase(
        config="GloraConfig",
        tiny={"r": 3},
        variants={
            "GLORA of vectors": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
            "GLORA of numbers": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
        },
        llama={
            "GLORA": {"r": 4, "target_modules": TARGETS, "bias": "glora_only"},
            "GLORA of vectors": {
                "r": 3,
                "config_A_B": "vector",
                "config_C": "vector",
                "config_D_E": "vector",
                "init_weights": False,
                "target_modules": ["up_proj", "q_proj"],
                "modules_to_save": ["norm"],
            },
            "GLORA of numbers": {
                "config_A_B": "constant",
                "config_C": "none",
                "config_D_E": "constant",
                "target_modules": TARGETS,
            },
        },
        models={"GLORA": {"r": 4, "target_modules": TARGETS}},
        starts={
            "GLORA": {"r": 256},
            "GLORA random": {"r": 256, "init_weights": False, "config_D_E": "vector"},
            "GLORA of random vectors": {
                "init_weights": False,
                "config_A_B": "vector",
                "config_C": "vector",
                "config_D_E": "vector",
            },
        },
        trained={"GLORA": {"r": 4}},
        trained_elsewhere=("GLORA",),
        finetune={"r": 4},
        conv1d=False,
        meets_ties=True,
    ),
    "TINYLORA": MethodCase(
        config="TinyLoraConfig",
        tiny={"u": 5},
        llama={
            "TINYLORA": {"u": 6, "target_modules": TARGETS, "bias": "tinylora_only"},
            "TINYLORA of ties": {
                "r": 3,
                "u": 7,
                "weight_tying": 0.6,
                "projection_seed": 5,
                "save_projection": False,
                "tinylora_dropout": 0.1,
                "init_weights": "uniform",
                "init_v_bound": 0.5,
                "target_modules": ["up_proj", "o_proj", "k_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
            "TINYLORA of an embedding": {"u": 6, "weight_tying": 1.0, "target_modules": ["embed_tokens", "q_proj"]},
        },
        models={"TINYLORA": {"u": 6, "target_modules": TARGETS}},
        starts={"TINYLORA": {}, "TINYLORA random": {"init_weights": "uniform"}},
        trained={"TINYLORA": {"u": 6, "weight_tying": 0.5}},
        finetune={"u": 13},
        drops_inputs={"u": 5, "tinylora_dropout": 0.5},
    ),
    "UNILORA": MethodCase(
        config="UniLoraConfig",
        tiny={"r": 2, "theta_d_length": 20, "init_theta_d_bound": 1e-20},
        llama={
            "UNILORA": {"theta_d_length": 50, "target_modules": TARGETS, "bias": "unilora_only"},
            "UNILORA of a seed": {
                "r": 3,
                "proj_seed": 7,
                "theta_d_length": 37,
                "unilora_dropout": 0.1,
                "init_weights": False,
                "save_indices": True,
                "target_modules": ["up_proj", "o_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"UNILORA": {"theta_d_length": 50, "target_modules": TARGETS}},
        starts={"UNILORA": {}, "UNILORA random": {"init_weights": False}},
        trained={"UNILORA": {"theta_d_length": 50, "init_theta_d_bound": 0.5}},
        finetune={"theta_d_length": 50},
        drops_inputs={"r": 2, "unilora_dropout": 0.5},
    ),
    "SUPERTUNING": MethodCase(
        config="SupertuningConfig",
        tiny={"sparsity": 0.8},
        variants={"SUPERTUNING with LoRA": {"sparsity": 0.9, "select_top": False, "r": 2}},
        llama={
            "SUPERTUNING": {"sparsity": 0.9, "target_modules": TARGETS},
            "SUPERTUNING with LoRA": {
                "sparsity": 0.95,
                "select_top": False,
                "r": 3,
                "lora_alpha": 5,
                "lora_dropout": 0.1,
                "init_weights": False,
                "save_precomputed_indices": False,
                "target_modules": ["up_proj"],
                "modules_to_save": ["norm"],
            },
        },
        models={"SUPERTUNING": {"sparsity": 0.9, "target_modules": TARGETS}},
        starts={"SUPERTUNING": {"r": 8}},
        trained={"SUPERTUNING": {"sparsity": 0.9, "r": 2}},
        finetune={"sparsity": 0.9},
        conv1d=False,
        drops_inputs={"sparsity": 0.9, "r": 2, "lora_dropout": 0.5},
    ),
    "OSF": MethodCase(
        config="OSFConfig",
        tiny={"effective_rank": 5},
        stacked={"rank_pattern": {r"layers\.1\.": 0.5}},
        llama={
            "OSF": {"target_modules": TARGETS},
            "OSF of ranks": {
                "effective_rank": 0.75,
                "rank_pattern": {r"layers\.1\.self_attn": 12, "down": 0.9},
                "target_modules": TARGETS,
                "modules_to_save": ["norm"],
            },
        },
        models={"OSF": {"effective_rank": 0.75, "target_modules": TARGETS}},
        starts={"OSF": {}, "OSF random": {"init_weights": False}},
        trained={"OSF": {"effective_rank": 0.5}},
        finetune={"effective_rank": 0.9},
        rounds=("OSF",),
        conv1d=False,
    ),
    "PSOFT": MethodCase(
        config="PsoftConfig",
        tiny={"r": 3, "psoft_alpha": 5},
        variants={
            "PSOFT of any matrix": {"r": 4, "psoft_orth": False, "psoft_mag_a": False, "ab_svd_init": "pissa_init"},
            "PSOFT by the series": {"r": 4, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
        },
        llama={
            "PSOFT": {"r": 6, "psoft_alpha": 9, "target_modules": TARGETS},
            "PSOFT of any matrix": {
                "r": 5,
                "ab_svd_init": "pissa_init",
                "psoft_svd": "lowrank",
                "psoft_svd_lowrank_niter": 3,
                "random_seed": 7,
                "psoft_orth": False,
                "psoft_mag_b": False,
                "psoft_dropout": 0.1,
                "init_weights": False,
                "target_modules": ["up_proj", "o_proj"],
                "modules_to_save": ["norm"],
                "layers_to_transform": [0, 2],
            },
            "PSOFT by the series": {
                "r": 8,
                "psoft_mag_a": False,
                "use_cayley_neumann": True,
                "num_cayley_neumann_terms": 6,
                "cayley_neumann_eps": 0.9,
                "init_weights": False,
                "target_modules": TARGETS,
                "exclude_modules": r".*layers\.1.*",
            },
        },
        models={"PSOFT": {"r": 6, "psoft_alpha": 9, "target_modules": TARGETS}},
        starts={
            "PSOFT": {"r": 64},
            "PSOFT random": {"r": 64, "init_weights": False},
            "PSOFT of a random matrix": {"r": 64, "init_weights": False, "psoft_orth": False},
        },
        trained={"PSOFT": {"r": 6, "psoft_alpha": 9}},
        finetune={"r": 8},
        conv1d=False,
        scales=True,
        drops_inputs={"r": 4, "psoft_dropout": 0.5, "init_weights": False},
    ),
    "LOHA": MethodCase(
        config="LoHaConfig",
        tiny={"r": 3, "alpha": 5},
        llama={
            "LOHA": {
                "r": 4,
                "alpha": 7,
                "target_modules": TARGETS,
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6},
                "alpha_pattern": {"v_proj": 3},
            },
        },
        models={"LOHA": {"r": 4, "alpha": 7, "target_modules": TARGETS}},
        starts={"LOHA": {"r": 16}, "LOHA random": {"r": 16, "init_weights": False}},
        finetune={"r": 4},
        conv1d=False,
        scales=True,
        drops_outputs={"LOHA": {"r": 3}},
    ),
    "HIRA": MethodCase(
        config="HiraConfig",
        tiny={"r": 3},
        llama={"HIRA": {"r": 4, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}},
        models={"HIRA": {"r": 4, "target_modules": ["{embedding}", *TARGETS]}},
        starts={"HIRA": {}, "HIRA gaussian": {"init_weights": "gaussian"}, "HIRA random": {"init_weights": False}},
        finetune={"r": 4},
        scales=True,
        drops_inputs={"r": 2, "hira_dropout": 0.5},
    ),
    "DELORA": MethodCase(
        config="DeloraConfig",
        tiny={"r": 3, "delora_lambda": 2},
        llama={
            "DELORA": {
                "r": 4,
                "delora_lambda": 3,
                "target_modules": TARGETS,
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6},
                "lambda_pattern": {"v_proj": 2.5},
                "bias": "delora_only",
                "modules_to_save": ["model.norm"],  # "norm" is the end of PEFT's own delora_w_norm, which it would copy
            },
            "DELORA of some layers": {
                "init_weights": False,
                "module_dropout": 0.1,
                "target_modules": ["up_proj"],
                "layers_to_transform": [0, 2],
            },
        },
        models={"DELORA": {"r": 4, "delora_lambda": 3, "target_modules": TARGETS}},
        starts={"DELORA": {"r": 32}, "DELORA random": {"r": 32, "init_weights": False}},
        finetune={"r": 4, "delora_lambda": 1},
        conv1d=False,
        scales=True,
        drops_inputs={"r": 2, "module_dropout": 0.5},
    ),
    "LOKR": MethodCase(
        config="LoKrConfig",
        tiny={"r": 1, "alpha": 2, "decompose_both": True},
        llama={
            "LOKR": {
                "r": 2,
                "alpha": 3,
                "decompose_both": True,
                "target_modules": TARGETS,
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 5, r"layers\.2\.mlp\.down_proj": 3},
            },
        },
        models={"LOKR": {"r": 2, "alpha": 3, "target_modules": TARGETS}},
        starts={
            "LOKR": {"r": 4, "decompose_both": True, "decompose_factor": 16},
            "LOKR lycoris": {"r": 64, "decompose_factor": 16, "init_weights": "lycoris"},
            "LOKR random": {"r": 4, "decompose_factor": 16, "init_weights": False},
        },
        finetune={"r": 4},
        conv1d=False,
        scales=True,
        drops_outputs={"LOKR": {"r": 2}, "LOKR rescaled": {"r": 2, "rank_dropout_scale": True}},
    ),
    "MISS": MethodCase(
        config="MissConfig",
        tiny={"r": 5},
        llama={
            "MISS": {"r": 6, "target_modules": TARGETS, "bias": "MiSS_only"},
            "MISS bat": {"r": 4, "init_weights": "bat", "target_modules": TARGETS},
            "MISS mini": {
                "r": 8,
                "mini_r": 4,
                "init_weights": "mini",
                "target_modules": TARGETS,
                "layers_to_transform": [1],
            },
        },
        models={"MISS": {"r": 6, "target_modules": TARGETS}},
        starts={
            "MISS": {},
            "MISS bat": {"init_weights": "bat"},
            "MISS mini": {"init_weights": "mini", "mini_r": 4},
            "MISS random": {"init_weights": False},
        },
        finetune={"r": 4},
        conv1d=False,
    ),
    "TRAINABLE_TOKENS": MethodCase(
        config="TrainableTokensConfig",
        tiny={"token_indices": [3, 5]},
        stacked={"token_indices": [3, 1], "target_modules": ["embed"]},
        needed={"token_indices": [1]},
        llama={
            "trainable tokens": {"token_indices": [5, 17, 3]},
            "trainable tokens of a head": {"token_indices": [2, 95], "target_modules": ["lm_head"]},
            "trainable tokens of both": {"token_indices": [8, 40], "target_modules": ["embed_tokens", "lm_head"]},
        },
        models={"TRAINABLE_TOKENS": {"token_indices": [5, 17], "target_modules": ["{embedding}"]}},
        finetune={"token_indices": list(range(2, 60))},
        name_is_enough=False,
        meets_ties=True,
    ),
    "LORA": MethodCase(
        config="LoraConfig",
        tiny={"r": 3, "lora_alpha": 5},
        variants={
            "LORA with DoRA": {"r": 3, "lora_alpha": 5, "use_dora": True},
            "BD-LoRA": {"r": 4, "use_bdlora": {"target_modules_bd_a": [""], "nblocks": 2}},
            "QA-LoRA": {"r": 3, "use_qalora": True, "qalora_group_size": 4},
        },
        common={"r": 4, "lora_alpha": 7},
        llama={
            "plain": {"target_modules": TARGETS},
            "rslora": {"target_modules": TARGETS, "use_rslora": True},
            "patterns": {
                "target_modules": TARGETS,
                "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 6},
                "alpha_pattern": {"layers.0.mlp.down_proj": 3, "q_proj": 11},
            },
            "layers_to_transform": {
                "target_modules": TARGETS,
                "layers_to_transform": [0, 2],
                "layers_pattern": "layers",
            },
            "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
            "a saved container": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "embed_tokens"]},
            "bias all": {"target_modules": ["q_proj", "o_proj"], "bias": "all"},
            "bias lora_only": {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only", "layers_to_transform": [1]},
            "embedding": {"target_modules": ["embed_tokens", "k_proj"]},
            "output head": {"target_modules": ["lm_head", "k_proj"]},
            "both embeddings": {"target_modules": ["lm_head", "embed_tokens"]},
            "all-linear": {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
            "regex": {"target_modules": r".*layers\.[02]\.mlp\.(up|gate)_proj"},
            "DoRA": {
                "target_modules": ["embed_tokens", "lm_head", *TARGETS],
                "use_dora": True,
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6},
            },
            # All singular values: where the r-th is near the next, what is left of the base depends on the last digits.
            "pissa": {
                "target_modules": ["embed_tokens", *TARGETS],
                "init_lora_weights": "pissa",
                "use_rslora": True,
                "rank_pattern": FULL,
            },
            "olora": {"target_modules": TARGETS, "init_lora_weights": "olora", "rank_pattern": {"v_proj": 2}},
            "pissa with DoRA": {
                "target_modules": TARGETS,
                "init_lora_weights": "pissa",
                "use_dora": True,
                "rank_pattern": FULL,
            },
            "mica": {
                "target_modules": ["embed_tokens", *TARGETS],
                "init_lora_weights": "mica",
                "rank_pattern": {"v_proj": 2},
            },
            "orthogonal": {"target_modules": TARGETS, "init_lora_weights": "orthogonal"},
            "LoRA and tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 17, 3]},
            "LoRA and tokens of two modules": {
                "target_modules": ["q_proj"],
                "trainable_token_indices": {"embed_tokens": [5, 17], "lm_head": [3, 40, 8]},
            },
            "LoRA and tokens of a head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [2]}},
            "kept ties": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
            "kept ties of saved modules": {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            "aLoRA": {"target_modules": ["q_proj", "o_proj", "lm_head"], "alora_invocation_tokens": [2, 40]},
            "target_parameters": {
                "target_modules": ["v_proj"],
                "target_parameters": ["q_proj.weight", "layers.1.mlp.down_proj.weight"],
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj\.weight": 6},
                "alpha_pattern": {"down_proj.weight": 3},
                "bias": "lora_only",
            },
            "layer_replication": {
                "layer_replication": [[0, 2], [1, 3]],
                "target_modules": ["embed_tokens", *TARGETS],
                "rank_pattern": {r"layers\.3\.self_attn\.q_proj": 6},
                "modules_to_save": ["layers.2.input_layernorm"],
            },
            "lora_bias": {"target_modules": ["q_proj", "o_proj", "up_proj"], "lora_bias": True},
            "KaSA": {"target_modules": TARGETS, "kasa_config": {}, "rank_pattern": {"v_proj": 2}},
            "BD-LoRA": {
                "target_modules": ["o_proj", *TARGETS],
                "use_bdlora": {
                    "target_modules_bd_a": ["down_proj"],
                    "target_modules_bd_b": ["q_proj", "v_proj"],
                    "nblocks": 2,
                    "match_strict": False,
                },
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6, r"layers\.1\.mlp\.down_proj": 2},
            },
            "VeLoRA": {"target_modules": TARGETS, "velora_config": {"num_groups": 5, "init_type": "random"}},
            "MonteCLoRA": {
                "target_modules": TARGETS,
                "monteclora_config": {"num_samples": 3},
                "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 6},
            },
        },
        models={
            "default": {},
            "plain": {"target_modules": TARGETS},
            "rslora": {"target_modules": TARGETS, "use_rslora": True},
            "patterns": {
                "target_modules": TARGETS,
                "rank_pattern": {"{second}": 2, r"{layers}\.1\..*{first}": 6},
                "alpha_pattern": {r"{layers}\.0\..*{first}": 3, "{last}": 11},
            },
            "layers_to_transform": {
                "target_modules": TARGETS,
                "layers_to_transform": [0, 2],
                "layers_pattern": "{layers}",
            },
            "modules_to_save": {"target_modules": ["{first}"], "modules_to_save": ["{norm}"]},
            "a saved container": {
                "target_modules": ["{first}"],
                "modules_to_save": ["{layers}.1.{part}", "{embedding}"],
            },
            "bias all": {"target_modules": ["{first}", "{last}"], "bias": "all"},
            "bias lora_only": {
                "target_modules": ["{second}", "{last}"],
                "bias": "lora_only",
                "layers_to_transform": [1],
            },
            "embedding": {"target_modules": ["{embedding}", "{second}"]},
            "all-linear": {"target_modules": "all-linear", "exclude_modules": ["{second}"]},
            "regex": {"target_modules": r".*{layers}\.[02]\..*{last}"},
        },
        trained={
            "LORA": {"r": 4, "lora_alpha": 8},
            "KaSA": {"r": 4, "lora_alpha": 8, "kasa_config": {"beta": 0.01, "gamma": 0.01}},
            "VeLoRA": {"r": 4, "lora_alpha": 8, "velora_config": {"num_groups": 5, "init_type": "random"}},
            "MonteCLoRA": {
                "r": 4,
                "lora_alpha": 8,
                "monteclora_config": {
                    "num_samples": 3,
                    "sample_scaler": 0.3,
                    "kl_loss_weight": 1e-3,
                    "use_entropy": True,
                    "buffer_size": 1,
                },
            },
        },
        trained_elsewhere=("LORA",),
        rounds=("LORA with DoRA",),  # norms cancel in a quotient, but for the last digit
        meets_ties=True,
        scales=True,
    ),
}

# Options of X-LoRA that are compared with PEFT by tests/test_xlora.py alone: it is made of folders of LoRAs.
XLORA: dict[str, Options] = {
    "X-LoRA": {},
    "X-LoRA by layer, deep": {
        **{"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 8, "xlora_dropout_p": 0.0},
        **{"softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    },
    "X-LoRA of the best two": {
        **{"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
        **{"layerwise_scalings": True, "scaling_pass_value": 0.5, "xlora_depth": 2, "xlora_size": 8},
    },
}

PROMPTS: dict[str, PromptCase] = {
    "PREFIX_TUNING": PromptCase(
        config="PrefixTuningConfig",
        row="prefix",
        tiny={"num_virtual_tokens": 3},
        needed={"num_virtual_tokens": 2},
        llama={
            "prefix": {"num_virtual_tokens": 3},
            "prefix with saved modules": {"num_virtual_tokens": 3, "modules_to_save": ["norm"]},
            "prefix with projection": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12},
        },
        model={"num_virtual_tokens": 3},
        others={"mistral": "prefix"},
        generates=True,
        trained=("prefix", "prefix with projection"),
        trained_elsewhere={"num_virtual_tokens": 3},
        finetune={"num_virtual_tokens": 4},
        is_a_side=True,
    ),
    "CARTRIDGE": PromptCase(
        config="CartridgeConfig",
        row="cartridge",
        tiny={"num_virtual_tokens": 3},
        needed={"num_virtual_tokens": 2},
        llama={
            "cartridge": {"num_virtual_tokens": 4, "num_frozen_tokens": 2},
            "cartridge without frozen tokens": {"num_virtual_tokens": 3, "num_frozen_tokens": 0},
        },
        model={"num_virtual_tokens": 3},
        generates=True,
        trained=("cartridge",),
        finetune={"num_virtual_tokens": 4},
    ),
    "PROMPT_TUNING": PromptCase(
        config="PromptTuningConfig",
        row="prompt",
        tiny={"num_virtual_tokens": 3},
        needed={"num_virtual_tokens": 2},
        llama={
            "prompt": {"num_virtual_tokens": 3, "modules_to_save": ["lm_head"]},
            "prompt of vocabulary": {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"},
        },
        model={"num_virtual_tokens": 3},
        generates=True,
        trained=("prompt of vocabulary",),
        trained_elsewhere={"num_virtual_tokens": 3},
        finetune={"num_virtual_tokens": 4},
        is_a_side=True,
    ),
    "P_TUNING": PromptCase(
        config="PromptEncoderConfig",
        row="p-tuning",
        tiny={"num_virtual_tokens": 3, "encoder_hidden_size": 8},
        needed={"num_virtual_tokens": 2},
        llama={
            "p-tuning": {"num_virtual_tokens": 3},
            "p-tuning with LSTM": {
                "num_virtual_tokens": 4,
                "encoder_reparameterization_type": "LSTM",
                "encoder_hidden_size": 8,
            },
        },
        model={"num_virtual_tokens": 3},
        others={"qwen2": "p-tuning"},
        trained=("p-tuning", "p-tuning with LSTM"),
        trained_elsewhere={"num_virtual_tokens": 3, "encoder_hidden_size": 12},
        finetune={"num_virtual_tokens": 4, "encoder_hidden_size": 16},
        file_is_whole=False,  # it holds what the encoder gave
    ),
    "MULTITASK_PROMPT_TUNING": PromptCase(
        config="MultitaskPromptTuningConfig",
        row="multitask",
        tiny={"num_virtual_tokens": 3, "num_tasks": 2},
        needed={"num_virtual_tokens": 2},
        llama={"multitask": {"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2}},
        model={"num_virtual_tokens": 3, "num_tasks": 3, "num_ranks": 2},
        generates=True,
        trained=("multitask",),
        finetune={"num_virtual_tokens": 4, "num_tasks": 2},
        has_tasks=True,
    ),
    "CPT": PromptCase(
        config="CPTConfig",
        row="CPT",
        tiny={"cpt_token_ids": [4, 5, 6], "cpt_tokens_type_mask": [1, 2, 4]},
        needed={"task_type": "CAUSAL_LM", "cpt_token_ids": [3], "cpt_mask": [1], "cpt_tokens_type_mask": [4]},
        llama={
            "CPT": {
                "cpt_token_ids": [3, 14, 15, 9, 26, 5, 35, 8],
                "cpt_tokens_type_mask": [1, 2, 3, 4, 5, 6, 7, 8],
                "opt_weighted_loss_type": "decay",
                "opt_loss_decay_factor": 0.7,
                "opt_projection_epsilon": 2.0,
                "opt_projection_format_epsilon": 3.0,
            },
        },
        model={"cpt_token_ids": [3, 14, 15, 9], "cpt_tokens_type_mask": [1, 2, 3, 4]},
        trained=("CPT",),
        finetune={"cpt_token_ids": [3, 4, 5, 6], "cpt_tokens_type_mask": [1, 2, 3, 4], "cpt_mask": [1, 1, 1, 1]},
        file_is_whole=False,  # it holds the embeddings where they were moved to
    ),
    "SHADOW": PromptCase(
        config="ShadowConfig",
        row="shadow",
        tiny={"r": 4},
        llama={
            "shadow": {"r": 4, "shadow_dropout": 0.0},
            "shadow of other sizes": {
                "target_modules": r".*layers\.[12]",
                "shadow_num_hidden_layers": 2,
                "shadow_hidden_size": 16,
                "shadow_num_attention_heads": 2,
                "shadow_intermediate_size": 24,
                "update_hidden_size": 6,
                "auxiliary_loss_weight": 0.0,
                "modules_to_save": ["lm_head"],
            },
        },
        model={"r": 4},
        others={"qwen2": "shadow of other sizes"},
        generates=True,
        trained=("shadow",),
        finetune={"r": 4},
        is_a_side=True,
    ),
    "ADAPTION_PROMPT": PromptCase(
        config="AdaptionPromptConfig",
        row="adaption",
        tiny={"adapter_len": 3, "adapter_layers": 2},
        needed={"adapter_len": 2, "adapter_layers": 1},
        llama={"adaption": {"adapter_len": 4, "adapter_layers": 2}},
        model={"adapter_len": 4, "adapter_layers": 2},
        others={"mistral": "adaption"},
        generates=True,
        trained=("adaption",),
        trained_elsewhere={"adapter_len": 3, "adapter_layers": 2},
        finetune={"adapter_len": 4, "adapter_layers": 2},
        is_a_side=True,
    ),
}

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # large, so that no module is hidden by a small base
}
SMALLER = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**SIZES, "intermediate_size": 40, "max_position_embeddings": 64}
OF_AN_ENCODER = Modules(
    first="query",
    second="value",
    last="output.dense",
    layers="layer",
    norm="LayerNorm",
    part="intermediate",
    embedding="word_embeddings",
)
OF_A_MIXTURE = Modules(
    first="q_proj",
    second="v_proj",
    last="o_proj",
    layers="layers",
    norm="norm",
    part="mlp",
    embedding="embed_tokens",
)
OF_LATENT_ATTENTION = Modules(
    first="kv_a_proj_with_mqa",
    second="kv_b_proj",
    last="o_proj",
    layers="layers",
    norm="norm",
    part="mlp",
    embedding="embed_tokens",
)
OF_A_FUSED_DECODER = Modules(
    first="query_key_value",
    second="self_attention.dense",
    last="dense_4h_to_h",
    layers="h",
    norm="ln_f",
    part="mlp",
    embedding="word_embeddings",
)
OF_A_DECODER = Modules(
    first="q_proj",
    second="v_proj",
    last="down_proj",
    layers="layers",
    norm="norm",
    part="mlp",
    embedding="embed_tokens",
)
# Rows of LoRA that concern layers and names, which GPT-2 and Llama show as well; BERT's own are about heads and biases.
OF_DECODERS = ("plain", "rslora", "patterns", "layers_to_transform", "regex")

# Kinds of rope whose parts all bite in a head of 8 features and texts of 12 tokens.
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 100.0}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"beta_fast": 2.0, "beta_slow": 0.5},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 100.0, "original_max_position_embeddings": 8},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]},
}
OF_QWEN3_5 = Modules(
    first="in_proj_qkv",
    second="v_proj",
    last="out_proj",
    layers="layers",
    norm="norm",
    part="mlp",
    embedding="embed_tokens",
)
OF_GEMMA = Modules(
    first="q_proj",
    second="v_proj",
    last="down_proj",
    layers="layers",
    norm="norm",
    part="mlp",
    embedding="embed_tokens",
)
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GROWTH = {"llama_4_scaling_beta": 0.8, "original_max_position_embeddings": 5}
WITH_GROUPS = {**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}
BOTH_CLASSES = ("SequenceClassification", "TokenClassification", "")
ALL_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "")

QWEN3_5 = {
    **{**ENCODER, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 12},
    **{"initializer_range": 0.1, "rms_norm_eps": 1e-2},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8},
    "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5},
}

ARCHITECTURES: dict[str, Architecture] = {
    # Its adapters are `MethodCase.llama`, and its prompts for language models `PromptCase.llama`.
    "llama": Architecture(
        sizes={**ENCODER, "num_key_value_heads": 2},
        model_types={"llama": {}, "mistral": {}, "qwen2": {"tie_word_embeddings": True}, "qwen3": {}},
        modules=OF_A_DECODER,
        heads=ALL_HEADS,
        adapters={"QUESTION_ANS": ["default"]},
        prompts={"SEQ_CLS": ("prefix",), "TOKEN_CLS": ("p-tuning",)},
        switches={
            "llama": ("llama", {}),
            "yarn": ("llama", {"rope_parameters": {**YARN, "truncate": False, "mscale": 0.7, "mscale_all_dim": 0.5}}),
            "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
            "longrope": ("llama", {"rope_parameters": LONGROPE}),
            "qwen2-relu2": ("qwen2", {"tie_word_embeddings": True, "hidden_act": "relu2"}),
        },
        grid={
            **{act: ("llama", {"hidden_act": act}) for act in ("gelu_fast", "quick_gelu", "mish", "laplace", "tanh")},
            "longrope-short": ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 32}}),
            "yarn-default": ("mistral", {"rope_parameters": YARN}),
            "qwen3-windows": (
                "qwen3",
                {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1, "head_dim": 12},
            ),
        },
        refused={
            "partial rope": ("llama", {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}),
            "attention_dropout of a bidirectional model": ("llama", {"is_causal": False}),
        },
    ),
    "gpt2": Architecture(
        sizes={**SIZES, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": None},
        model_types={"gpt2": {}},
        conv1d=True,
        not_trained=("GLORA",),
        modules=Modules(
            first="c_attn",
            second="attn.c_proj",
            last="mlp.c_proj",
            layers="h",
            norm="ln_f",
            part="mlp",
            embedding="wte",
        ),
        heads=ALL_HEADS,
        adapters={"CAUSAL_LM": None, "SEQ_CLS": ["default"]},
        more={
            "output head": {"target_modules": ["lm_head", "c_attn"]},
            "both embeddings": {"target_modules": ["lm_head", "wte"]},
        },
        prompts={"CAUSAL_LM": ("prefix", "p-tuning", "CPT", "adaption"), "SEQ_CLS": ("prompt",)},
        generates=("prefix", "prompt", "multitask", "adaption"),
        training=(
            "CAUSAL_LM",
            {**SMALLER, "max_position_embeddings": 32, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
        ),
    ),
    "gemma": Architecture(
        sizes={**ENCODER, "num_key_value_heads": 2, "head_dim": 8},
        model_types={"gemma": {}, "gemma2": {"sliding_window": 4}, "gemma3_text": {"sliding_window": 4}},
        modules=OF_A_DECODER,
        heads=("SequenceClassification", "TokenClassification", ""),
        prompts={"CAUSAL_LM": ("prefix",)},
        switches={
            "gemma3": (
                "gemma3_text",
                {"layer_types": MIXED, "query_pre_attn_scalar": 24, "final_logit_softcapping": 3.0},
            ),
            "gemma1": ("gemma", {"attention_bias": True}),
            "gemma2": ("gemma2", {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0}),
        },
        grid={
            "gemma1-untied": ("gemma", {"tie_word_embeddings": False, "hidden_act": "relu"}),
            "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
            "gemma2-full": ("gemma2", {"layer_types": ["full_attention"] * 3, "final_logit_softcapping": 1.0}),
            "gemma3-ropes": (
                "gemma3_text",
                {"layer_types": MIXED, "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT_ROPE}},
            ),
            "gemma3-biases": ("gemma3_text", {"attention_bias": True, "attn_logit_softcapping": 1.0}),
        },
        refused={
            "gemma1 in both directions": ("gemma", {"use_bidirectional_attention": True}),
            "gemma3 in both directions": ("gemma3_text", {"use_bidirectional_attention": True}),
            "gemma2 with a partial rope": (
                "gemma2",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ),
        },
    ),
    "gemma4_text": Architecture(
        sizes={
            **{**ENCODER, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16},
            **{"sliding_window": 4, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 6},
            "layer_types": [*MIXED[:2], *MIXED[:2]],
        },
        model_types={"gemma4_text": {}},
        noise=0.05,
        adapter_noise=0.05,
        modules=Modules(
            first="q_proj",
            second="o_proj",
            last="down_proj",
            layers="layers",
            norm="norm",
            part="mlp",
            embedding="embed_tokens",
        ),
        heads=("",),
        switches={
            "gemma4": (
                "gemma4_text",
                {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "final_logit_softcapping": 3.0},
            ),
            "gemma4-keys-are-values": (
                "gemma4_text",
                {
                    **{"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0},
                    "attention_bias": True,
                },
            ),
        },
        grid={
            "gemma4-one-shared": ("gemma4_text", {"num_kv_shared_layers": 1}),
            "gemma4-full": (
                "gemma4_text",
                {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": False},
            ),
        },
        refused={
            "gemma4 with experts": ("gemma4_text", {"enable_moe_block": True}),
            "gemma4 in both directions": ("gemma4_text", {"use_bidirectional_attention": "all"}),
        },
    ),
    # The text parts of multimodal models are compared in test_multimodal.py.
    "gemma3": Architecture(
        sizes={"text_config": {**ENCODER, "num_key_value_heads": 2, "head_dim": 8, "layer_types": MIXED}},
        model_types={"gemma3": {}},
        modules=OF_GEMMA,
    ),
    "gemma4": Architecture(
        sizes={
            "text_config": {
                **{**ENCODER, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16},
                **{"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 6, "num_kv_shared_layers": 2},
                "layer_types": [*MIXED[:2], *MIXED[:2]],
            }
        },
        model_types={"gemma4": {}},
        modules=OF_GEMMA,
    ),
    "bert": Architecture(
        sizes=ENCODER,
        model_types={"bert": {"type_vocab_size": 3, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}},
        modules=OF_AN_ENCODER,
        heads=("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", ""),
        adapters={"SEQ_CLS": None, "QUESTION_ANS": ["default"], "FEATURE_EXTRACTION": ["all-linear"]},
        left_out=OF_DECODERS,
        more={
            "layer_replication": {"layer_replication": [[0, 3], [0, 1]], "target_modules": ["query", "output.dense"]}
        },
        prompts={
            "SEQ_CLS": ("prefix", "multitask"),
            "TOKEN_CLS": ("prompt",),
            "QUESTION_ANS": ("prefix", "prompt"),
            "FEATURE_EXTRACTION": ("p-tuning",),
        },
        training=(
            "SEQ_CLS",
            {
                **SMALLER,
                "intermediate_size": 32,
                "max_position_embeddings": 32,
                "num_labels": 3,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        ),
        not_trained=("ADAPTION_PROMPT",),
        types=True,
    ),
    "roberta": Architecture(
        sizes={**ENCODER, "type_vocab_size": 2},
        model_types={"roberta": {}, "xlm-roberta": {"type_vocab_size": 1}},
        modules=OF_AN_ENCODER,
        heads=("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", ""),
        # With all-linear PEFT adapts a classifier of tokens, which it then cannot save whole.
        adapters={
            "SEQ_CLS": ["all-linear", "bias all"],
            "TOKEN_CLS": [
                *("plain", "patterns", "layers_to_transform", "a saved container", "bias all", "embedding", "IA3")
            ],
        },
        prompts={"SEQ_CLS": ("p-tuning",), "TOKEN_CLS": ("prefix",)},
        types=True,
    ),
    "t5": Architecture(
        sizes={
            "vocab_size": 96,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        model_types={"t5": {}, "mt5": {}},
        modules=Modules(
            first="q",
            second="EncDecAttention.v",
            last="wo",
            layers="block",
            norm="layer_norm",
            part="SelfAttention",
            embedding="embed_tokens",
        ),
        adapters={"SEQ_2_SEQ_LM": None},
        left_out=tuple(METHODS["LORA"].models),
        more={
            "defaults": {},
            "all-linear": {"target_modules": "all-linear", "exclude_modules": ["o"]},
            "one layer": {"target_modules": ["k", "wo"], "layers_to_transform": [1], "rank_pattern": {"k": 2}},
            "embeddings": {"target_modules": ["embed_tokens", "v"]},
            "output head": {"target_modules": ["lm_head", "wo"]},
            "relative positions": {"target_modules": ["relative_attention_bias", "q"]},
            "modules_to_save": {"target_modules": ["q"], "modules_to_save": ["final_layer_norm", "lm_head"]},
        },
        instead={
            "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 9, "lora_alpha": 7, "target_modules": TARGETS},
            "BOFT": {"target_modules": TARGETS},
            "HIRA": {"r": 4, "target_modules": TARGETS},
            "LN_TUNING": {"exclude_modules": r"decoder.*\.0\.layer_norm"},
            "TRAINABLE_TOKENS": {"token_indices": [36, 47, 44]},  # which are in the inputs of test_t5_peft.py
            "VERA": {"r": 24, "d_initial": 1.0, "target_modules": TARGETS},
        },
        prompts={"SEQ_2_SEQ_LM": ("prefix", "prompt", "p-tuning", "multitask")},
        generates=("prefix", "prompt", "multitask"),
        training=(
            "SEQ_2_SEQ_LM",
            {"vocab_size": 64, "d_model": 24, "d_ff": 32, "num_layers": 2, "num_heads": 3, "dropout_rate": 0.0},
        ),
        not_trained=("ADAPTION_PROMPT",),
        lively=0.2,
    ),
    "granite": Architecture(
        sizes=WITH_GROUPS,
        model_types={
            "granite": {
                **{"embedding_multiplier": 3.0, "attention_multiplier": 0.2},
                **{"residual_multiplier": 0.7, "logits_scaling": 0.5},
            }
        },
        modules=OF_A_DECODER,
        heads=("",),
        switches={
            "granite": ("granite", {"attention_bias": True, "mlp_bias": True}),
            "granite-tied": ("granite", {"tie_word_embeddings": True, "head_dim": 12, "rope_parameters": YARN}),
        },
        grid={"granite-multiplied-by-1": ("granite", {"embedding_multiplier": 1.0, "residual_multiplier": 1.0})},
        refused={
            "granite with a partial rope": (
                "granite",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ),
        },
    ),
    "olmo2": Architecture(
        sizes=WITH_GROUPS,
        model_types={"olmo2": {}, "olmo3": {"sliding_window": 4}},
        modules=OF_A_DECODER,
        heads=("SequenceClassification", ""),
        switches={
            "olmo3": (
                "olmo3",
                {
                    **{"layer_types": MIXED, "attention_bias": True},
                    "rope_parameters": {"full_attention": YARN, "sliding_attention": DEFAULT_ROPE},
                },
            ),
            "olmo2": ("olmo2", {"head_dim": 12}),
        },
        grid={
            "olmo2-biases": ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
            "olmo3-full": ("olmo3", {"layer_types": ["full_attention"] * 3}),
            "olmo3-old-rope": ("olmo3", {"rope_theta": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        },
        refused={
            "olmo2 with a partial rope": ("olmo2", {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}),
            "olmo3 with one rope for all layers": ("olmo3", {"rope_parameters": DEFAULT_ROPE}),
        },
    ),
    "smollm3": Architecture(
        sizes=WITH_GROUPS,
        model_types={"smollm3": {"no_rope_layers": [1, 0, 1]}},
        modules=OF_A_DECODER,
        heads=ALL_HEADS,
        switches={
            "smollm3": ("smollm3", {"attention_bias": True, "mlp_bias": True}),
            "smollm3-windows": (
                "smollm3",
                {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", *MIXED[:2]]},
            ),
        },
        grid={
            "smollm3-untied": ("smollm3", {"tie_word_embeddings": False, "head_dim": 12}),
            "smollm3-without-rope": ("smollm3", {"no_rope_layers": [0, 0, 0]}),
            "smollm3-default-window": ("smollm3", {"use_sliding_window": True, "sliding_window": 4}),
        },
        refused={"smollm3 in both directions": ("smollm3", {"is_causal": False})},
    ),
    "stablelm": Architecture(
        sizes=WITH_GROUPS,
        model_types={"stablelm": {}},
        modules=OF_A_DECODER,
        heads=BOTH_CLASSES,
        switches={
            "stablelm": ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
            "stablelm-parallel": (
                "stablelm",
                {"use_parallel_residual": True, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
            ),
        },
        grid={
            "stablelm-whole-heads": (
                "stablelm",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 1.0}, "tie_word_embeddings": True},
            ),
            "stablelm-parallel-norms": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
        },
        refused={"stablelm in both directions": ("stablelm", {"is_causal": False})},
    ),
    "glm": Architecture(
        sizes={**WITH_GROUPS, "head_dim": 12},
        model_types={"glm": {}, "glm4": {"attention_bias": False}},
        modules=OF_A_DECODER,
        heads=BOTH_CLASSES,
        switches={
            "glm4": ("glm4", {"attention_bias": True}),
            "glm": ("glm", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.34}, "tie_word_embeddings": True}),
        },
        grid={
            "glm-without-biases": ("glm", {"attention_bias": False}),
            "glm4-whole-heads": ("glm4", {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 1.0}}),
        },
        refused={"glm in both directions": ("glm", {"is_causal": False})},
    ),
    "starcoder2": Architecture(
        sizes=WITH_GROUPS,
        model_types={"starcoder2": {"sliding_window": 4}},
        modules=dataclasses.replace(OF_A_DECODER, last="c_proj"),
        heads=BOTH_CLASSES,
        switches={
            "starcoder2": ("starcoder2", {}),
            "starcoder2-without-biases": (
                "starcoder2",
                {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False, "hidden_act": "relu"},
            ),
        },
        grid={"starcoder2-heads": ("starcoder2", {"head_dim": 12, "rope_parameters": YARN})},
        refused={
            "starcoder2 with a partial rope": (
                "starcoder2",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ),
        },
    ),
    "cohere": Architecture(
        sizes=WITH_GROUPS,
        model_types={"cohere": {"logit_scale": 0.5}, "cohere2": {"logit_scale": 2.0, "sliding_window": 4}},
        modules=OF_A_DECODER,
        heads=("",),
        switches={
            "cohere": ("cohere", {"use_qk_norm": True, "attention_bias": True}),
            "cohere2": ("cohere2", {"layer_types": MIXED, "tie_word_embeddings": False}),
        },
        grid={
            "cohere-yarn": ("cohere", {"rope_parameters": YARN, "head_dim": 12}),
            "cohere2-biases": ("cohere2", {"attention_bias": True, "layer_types": ["full_attention"] * 3}),
        },
        refused={
            "cohere with a partial rope": (
                "cohere",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ),
            "cohere without a scale": ("cohere", {"logit_scale": None}),
        },
    ),
    "ministral": Architecture(
        sizes=WITH_GROUPS,
        model_types={
            "ministral": {"sliding_window": 4, "head_dim": 8},
            "ministral3": {"head_dim": 12, "rope_parameters": {**DEFAULT_ROPE, **GROWTH}},
        },
        modules=OF_A_DECODER,
        heads=ALL_HEADS,
        switches={
            "ministral3": ("ministral3", {"rope_parameters": {**YARN, **GROWTH}}),
            "ministral": ("ministral", {"layer_types": MIXED, "tie_word_embeddings": True}),
        },
        grid={
            "ministral-full": ("ministral", {"layer_types": ["full_attention"] * 3, "head_dim": 12}),
            "ministral3-windows": ("ministral3", {"sliding_window": 4}),
        },
        refused={
            "ministral3 without growth": ("ministral3", {"rope_parameters": YARN}),
            "ministral with a partial rope": (
                "ministral",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ),
        },
        to_build={"ministral": {"head_dim": 128}},
    ),
    "phi3": Architecture(
        sizes={**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0},
        model_types={"phi3": {}},
        modules=Modules(
            first="qkv_proj",
            second="o_proj",
            last="down_proj",
            layers="layers",
            norm="norm",
            part="mlp",
            embedding="embed_tokens",
        ),
        heads=("SequenceClassification", "TokenClassification", ""),
        prompts={"CAUSAL_LM": ("prefix",)},
        switches={
            "phi3-long": (
                "phi3",
                {"rope_parameters": {**LONGROPE}, "original_max_position_embeddings": 8, "sliding_window": 5},
            ),
            "phi3-partial": (
                "phi3",
                {"partial_rotary_factor": 0.75, "hidden_act": "gelu", "tie_word_embeddings": True},
            ),
        },
        grid={
            "phi3-short": ("phi3", {"rope_parameters": {**LONGROPE}, "original_max_position_embeddings": 32}),
            "phi3-plain": ("phi3", {}),
        },
        refused={"phi3 with heads of another size": ("phi3", {"head_dim": 12})},
    ),
    "phi": Architecture(
        sizes={**ENCODER, "num_key_value_heads": 2, "pad_token_id": 0},
        model_types={"phi": {}},
        modules=Modules(
            first="q_proj",
            second="dense",
            last="fc2",
            layers="layers",
            norm="final_layernorm",
            part="mlp",
            embedding="embed_tokens",
        ),
        heads=("SequenceClassification", "TokenClassification", ""),
        switches={
            "phi": ("phi", {"qk_layernorm": True, "rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.75}}),
            "phi-linear": ("phi", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}, "hidden_act": "relu"}),
        },
        grid={"phi-default": ("phi", {})},
        refused={
            "phi whose head is the embedding": ("phi", {"tie_word_embeddings": True}),
            "phi with heads of another size": ("phi", {"head_dim": 12}),
        },
    ),
    "gpt_neox": Architecture(
        sizes={**ENCODER, "pad_token_id": 0},
        model_types={"gpt_neox": {}},
        modules=Modules(
            first="query_key_value",
            second="attention.dense",
            last="dense_4h_to_h",
            layers="layers",
            norm="final_layer_norm",
            part="mlp",
            embedding="embed_in",
        ),
        heads=ALL_HEADS,
        switches={
            "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 100}),
            "gpt_neox-sequential": (
                "gpt_neox",
                {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
            ),
        },
        grid={
            "gpt_neox-yarn": ("gpt_neox", {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}}),
            "gpt_neox-gelu_fast": ("gpt_neox", {"hidden_act": "gelu_fast", "rotary_pct": 1.0}),
        },
    ),
    "opt": Architecture(
        sizes={
            **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 40},
            **{"init_std": 0.2, "max_position_embeddings": 64, "pad_token_id": 1},
        },
        model_types={"opt": {}},
        modules=Modules(
            first="q_proj",
            second="v_proj",
            last="fc2",
            layers="layers",
            norm="final_layer_norm",
            part="self_attn",
            embedding="embed_tokens",
        ),
        heads=("SequenceClassification", "QuestionAnswering", ""),
        switches={
            "opt": ("opt", {}),
            "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
            "opt-plain": (
                "opt",
                {
                    **{"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
                    **{"activation_function": "gelu", "_remove_final_layer_norm": True},
                },
            ),
        },
        grid={"opt-350m-untied": ("opt", {"word_embed_proj_dim": 40, "tie_word_embeddings": False})},
    ),
    "gptj": Architecture(
        sizes={**SIZES, "n_positions": 64, "rotary_dim": 4, "pad_token_id": 0},
        model_types={"gptj": {}},
        modules=Modules(
            first="q_proj",
            second="out_proj",
            last="fc_out",
            layers="h",
            norm="ln_f",
            part="mlp",
            embedding="wte",
        ),
        heads=("SequenceClassification", "QuestionAnswering", ""),
        types=True,
        prompts={"CAUSAL_LM": ("prefix",)},
        switches={
            "gptj": ("gptj", {}),
            "gptj-whole": ("gptj", {"rotary_dim": 8, "n_inner": 40, "activation_function": "relu"}),
        },
        refused={
            "gptj whose head is the embedding": ("gptj", {"tie_word_embeddings": True}),
            "gptj that turns nothing": ("gptj", {"rotary_dim": 0}),
        },
    ),
    "bloom": Architecture(
        sizes={**SIZES, "pad_token_id": 0},
        model_types={"bloom": {"pretraining_tp": 2}},
        modules=OF_A_FUSED_DECODER,
        heads=ALL_HEADS,
        prompts={"CAUSAL_LM": ("prefix",)},
        switches={
            "bloom": ("bloom", {"n_head": 4}),
            "bloom-post": (
                "bloom",
                {"n_head": 2, "apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False},
            ),
        },
        grid={"bloom-uneven": ("bloom", {"hidden_size": 24, "n_head": 6})},
        refused={"bloom that leaves out biases": ("bloom", {"slow_but_exact": True})},
    ),
    "falcon": Architecture(
        sizes={**SIZES, "ffn_hidden_size": 40, "max_position_embeddings": 64, "pad_token_id": 0},
        model_types={"falcon": {}},
        modules=OF_A_FUSED_DECODER,
        heads=ALL_HEADS,
        switches={
            "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
            "falcon-old": ("falcon", {"tie_word_embeddings": False}),
            "falcon-alibi": (
                "falcon",
                {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "activation": "relu"},
            ),
        },
        grid={
            "falcon-one-norm": (
                "falcon",
                {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
            ),
            "falcon-alibi-uneven": ("falcon", {"alibi": True, "hidden_size": 24, "num_attention_heads": 6}),
            "falcon-yarn": ("falcon", {"rope_parameters": {**YARN}, "parallel_attn": False, "multi_query": False}),
        },
        refused={
            "falcon with two norms in the old architecture": ("falcon", {"num_ln_in_parallel_attn": 2}),
            "falcon with a partial rope": (
                "falcon",
                {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}},
            ),
        },
    ),
    "qwen3_5_text": Architecture(
        sizes=QWEN3_5,
        model_types={"qwen3_5_text": {}},
        modules=OF_QWEN3_5,
        prompts={"CAUSAL_LM": ("prompt",)},
        switches={
            "qwen3_5": ("qwen3_5_text", {}),
            "qwen3_5-tied": (
                "qwen3_5_text",
                {
                    **{"tie_word_embeddings": True, "attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
                    **{"linear_num_value_heads": 2, "linear_conv_kernel_dim": 3, "num_key_value_heads": 4},
                    "rope_parameters": {**YARN, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]},
                },
            ),
        },
        grid={
            "qwen3_5-linear-last": (
                "qwen3_5_text",
                {"layer_types": ["full_attention", "full_attention", "linear_attention", "linear_attention"]},
            ),
        },
        refused={"qwen3_5 without a gate": ("qwen3_5_text", {"attn_output_gate": False})},
    ),
    "mixtral": Architecture(
        sizes={**WITH_GROUPS, "num_local_experts": 5},
        model_types={"mixtral": {}},
        modules=OF_A_MIXTURE,
        heads=BOTH_CLASSES,
        switches={
            "mixtral": ("mixtral", {"sliding_window": 4, "head_dim": 12}),
            "mixtral-tied": ("mixtral", {"num_experts_per_tok": 1, "tie_word_embeddings": True}),
        },
        grid={"mixtral-all": ("mixtral", {"num_experts_per_tok": 5, "hidden_act": "gelu"})},
        refused={
            "mixtral with noise": ("mixtral", {"router_jitter_noise": 0.1}),
            "mixtral of more experts than there are": ("mixtral", {"num_experts_per_tok": 6}),
        },
    ),
    "qwen3_moe": Architecture(
        sizes={**WITH_GROUPS, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 12},
        model_types={"qwen3_moe": {}, "qwen2_moe": {"shared_expert_intermediate_size": 20}},
        modules=OF_A_MIXTURE,
        heads=BOTH_CLASSES,
        switches={
            "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "head_dim": 12}),
            "qwen2_moe": (
                "qwen2_moe",
                {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
            ),
            "qwen3_moe-windows": (
                "qwen3_moe",
                {"attention_bias": True, "use_sliding_window": True, "sliding_window": 4, "tie_word_embeddings": True},
            ),
        },
        grid={
            "qwen2_moe-plain": ("qwen2_moe", {"qkv_bias": False, "norm_topk_prob": True}),
            "qwen3_moe-dense": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}),
        },
        refused={"qwen2_moe with heads of another size": ("qwen2_moe", {"head_dim": 12})},
    ),
    "olmoe": Architecture(
        sizes={**WITH_GROUPS, "num_experts": 6, "num_experts_per_tok": 3},
        model_types={"olmoe": {}},
        modules=OF_A_MIXTURE,
        heads=("",),
        switches={
            "olmoe": ("olmoe", {"clip_qkv": 0.7}),
            "olmoe-biases": ("olmoe", {"attention_bias": True, "norm_topk_prob": True, "tie_word_embeddings": True}),
        },
        grid={"olmoe-plain": ("olmoe", {})},
        refused={"olmoe with heads of another size": ("olmoe", {"head_dim": 12})},
    ),
    "gpt_oss": Architecture(
        sizes={**WITH_GROUPS, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 4, "head_dim": 12},
        model_types={"gpt_oss": {}},
        modules=OF_A_MIXTURE,
        heads=BOTH_CLASSES,
        switches={
            "gpt_oss": ("gpt_oss", {"rope_parameters": {**YARN, "truncate": False}, "swiglu_limit": 0.5}),
            "gpt_oss-full": (
                "gpt_oss",
                {
                    **{"layer_types": ["full_attention"] * 3, "swiglu_alpha": 1.2, "num_experts_per_tok": 1},
                    **{"attention_bias": False, "tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE},
                },
            ),
        },
        grid={"gpt_oss-all": ("gpt_oss", {"num_experts_per_tok": 6})},
        refused={
            "gpt_oss of more experts than there are": ("gpt_oss", {"num_experts_per_tok": 7}),
            "gpt_oss turned in part": ("gpt_oss", {"rope_parameters": {**DEFAULT_ROPE, "partial_rotary_factor": 0.5}}),
        },
    ),
    "deepseek_v3": Architecture(
        sizes={
            **{**WITH_GROUPS, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 3},
            **{"moe_intermediate_size": 16, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
            **{"q_lora_rank": 14, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 5},
        },
        model_types={"deepseek_v3": {}, "deepseek_v2": {"norm_topk_prob": False}},
        modules=OF_LATENT_ATTENTION,
        heads=("SequenceClassification", ""),
        switches={
            "deepseek_v3": ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}}),
            "deepseek_v3-plain": (
                "deepseek_v3",
                {
                    **{"q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False, "n_shared_experts": 2},
                    **{"attention_bias": True, "tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE},
                },
            ),
            "deepseek_v2": (
                "deepseek_v2",
                {
                    **{"topk_method": "group_limited_greedy", "mlp_bias": True, "routed_scaling_factor": 1.7},
                    **{"attention_bias": True, "rope_parameters": {**YARN, "mscale_all_dim": 0.7}},
                },
            ),
        },
        grid={
            "deepseek_v2-greedy": ("deepseek_v2", {"q_lora_rank": None, "first_k_dense_replace": 0}),
            "deepseek_v3-dense": ("deepseek_v3", {"first_k_dense_replace": 3}),
        },
        refused={
            "deepseek_v3 with groups of keys": ("deepseek_v3", {"num_key_value_heads": 2}),
            "deepseek_v3 with uneven groups": ("deepseek_v3", {"n_group": 3}),
            "deepseek_v3 with too few groups": ("deepseek_v3", {"topk_group": 1}),
            "deepseek_v3 without a shared expert": ("deepseek_v3", {"n_shared_experts": 0}),
            "deepseek_v2 chosen otherwise": ("deepseek_v2", {"topk_method": "noaux_tc"}),
            "deepseek_v2 with factors that add up to 1": ("deepseek_v2", {"norm_topk_prob": True}),
        },
        to_build={"deepseek_v2": {"num_experts_per_tok": 6}},
    ),
    "qwen3_5": Architecture(
        sizes={"text_config": QWEN3_5},
        model_types={"qwen3_5": {}},
        modules=OF_QWEN3_5,
        switches={"qwen3_5-with-images": ("qwen3_5", {})},
    ),
}


class Adapter(NamedTuple):
    """A config that PEFT has too."""

    config: str
    options: Options

    @property
    def method(self) -> MethodCase | PromptCase:
        """The row that it is of."""
        peft_type: str = getattr(pj, self.config).peft_type
        return METHODS[peft_type] if peft_type in METHODS else PROMPTS[peft_type]

    def make(self, library: ModuleType, **more: Any) -> Any:
        """The config, of `peft_jax` or of `peft`."""
        return getattr(library, self.config)(**{**self.options, **more})


def filled(value: Any, modules: Modules) -> Any:
    """Options with the names of an architecture's modules in place of those in braces."""
    if isinstance(value, str):
        return value.format_map(dataclasses.asdict(modules))
    if isinstance(value, Mapping):
        return {filled(key, modules): filled(one, modules) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, modules) for one in value]
    return value


def tiny_configs() -> dict[str, Any]:
    """A config of each method, and of its variants, for a layer ``dense``."""
    found = {}
    for name, method in METHODS.items():
        for case, options in {name: method.tiny, **method.variants}.items():
            found[case] = Adapter(method.config, options).make(pj, target_modules=["dense"])
    return found


def stacked_configs(targets: Sequence[str]) -> dict[str, Any]:
    """A config of each method, and of its variants, for the scanned model of test_rows.py."""
    found = {}
    for name, method in METHODS.items():
        for case, options in {name: method.tiny, **method.variants}.items():
            found[case] = Adapter(method.config, options).make(pj, **{"target_modules": targets, **method.stacked})
    return found


def llama_adapters() -> dict[str, Adapter]:
    """The adapters that are compared with PEFT on Llama, by name."""
    found = {}
    for method in METHODS.values():
        for name, options in method.llama.items():
            found[name] = Adapter(method.config, filled({**method.common, **options}, ARCHITECTURES["llama"].modules))
    return found


def adapters_of(architecture: Architecture) -> dict[str, Adapter]:
    """The adapters that are compared with PEFT on another architecture than Llama, by name."""
    found = {}
    for method in METHODS.values():
        for name, options in method.models.items():
            is_refused = architecture.conv1d and not method.conv1d
            if name not in architecture.left_out and not is_refused:
                options = architecture.instead.get(name, options)
                found[name] = Adapter(method.config, filled({**method.common, **options}, architecture.modules))
    lora = METHODS["LORA"]
    for name, options in architecture.more.items():
        found[name] = Adapter(lora.config, filled({**lora.common, **options}, architecture.modules))
    return found


def refused_of(architecture: Architecture) -> dict[str, Adapter]:
    """The adapters that an architecture does not take, as PyTorch stores its matrices as (in, out), by name."""
    found = {}
    for method in METHODS.values():
        if architecture.conv1d and not method.conv1d:
            for name, options in method.models.items():
                found[name] = Adapter(method.config, filled({**method.common, **options}, architecture.modules))
    return found


def llama_prompts() -> dict[str, Adapter]:
    """The prompts that are compared with PEFT on Llama, by name."""
    found = {}
    for prompt in PROMPTS.values():
        for name, options in prompt.llama.items():
            found[name] = Adapter(prompt.config, options)
    return found


def prompts() -> dict[str, Adapter]:
    """The prompts that are compared with PEFT on other architectures and tasks, by the name of their row."""
    return {prompt.row: Adapter(prompt.config, prompt.model) for prompt in PROMPTS.values()}


def trained_elsewhere() -> dict[str, Adapter]:
    """The adapters that are trained beside PEFT on other architectures than Llama, by name."""
    found = {}
    for method in METHODS.values():
        for name in method.trained_elsewhere:
            found[name] = Adapter(method.config, method.trained[name])
    for name, prompt in PROMPTS.items():
        if prompt.trained_elsewhere is not None:
            found[name] = Adapter(prompt.config, prompt.trained_elsewhere)
    return found


def auto_class(library: ModuleType, task: str) -> Any:
    """The class of models for a task of PEFT, of `peft_jax` or of `transformers`."""
    head, _ = TASKS[task]
    return getattr(library, f"AutoModelFor{head}" if head else "AutoModel")


def every_method() -> dict[str, MethodCase | PromptCase]:
    """All rows of methods and of prompts, by ``peft_type``."""
    return {**METHODS, **PROMPTS}

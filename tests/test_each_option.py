"""For each option of each command a test that fails where the option is ignored; `make test-options` shows that."""

import ast
import functools
from pathlib import Path

import pytest
from test_record_forms import SHOWN_BY

from peft_jax.cli.main import COMMANDS
from peft_jax.cli.shared.command_line import option_groups

CLI, FINETUNE, COMMAND = "test_cli.py::test_", "test_finetune.py::test_", "test_commands.py::test_"
PROGRAMS, FORMS = "test_compilation_cache.py::test_", "test_record_forms.py::test_"
HEADS, PROCESSES = "test_head_tasks.py::test_finetune_sets_up_the_head_that_is_asked_for", "test_processes.py::test_"
RUN_BY = f"{CLI}no_option_is_ignored"
CHANGED_BY = f"{FINETUNE}no_option_is_ignored"
GGUF = "test_gguf.py::test_the_commands_find_the_file_again"
KEPT = "test_kept_quantized.py::test_the_commands_hand_the_flag_to_the_reader"
METHOD = "test_finetune_methods.py::test_each_method_trains_by_its_name[VERA]"
SAVED = f"{FINETUNE}evaluations_and_checkpoints_come_when_asked_and_at_the_end"
JOINED = f"{PROCESSES}what_finds_the_others_reaches_jax"
READ = f"{FORMS}finetune_and_eval_read_data_as_preview_does"
CHOSEN = f"{COMMAND}choices_reach_the_model"
WRITTEN = f"{CLI}rank_alpha_and_targets_are_written"


def _programs(command: str) -> dict[str, str]:
    test = f"{PROGRAMS}each_command_keeps_programs_where_it_is_told_to[{command}]"
    return {"compilation_cache": test, "no_compilation_cache": test}


def _data(command: str) -> dict[str, str]:
    names = ("columns", "data_split", "data_subset", "data_revision")
    return {name: f"{READ}[{command}-{name}]" for name in names}


CASES: dict[str, dict[str, str]] = {
    "finetune": {
        "model": f"{FINETUNE}the_base_drops_as_its_config_says_unless_it_is_switched_off",
        "gguf_file": GGUF,
        "task": f"{HEADS}[task]",
        "problem_type": f"{HEADS}[problem_type]",
        "label_names": f"{HEADS}[label_names]",
        "load_in_8bit": f"{RUN_BY}[load_in_8bit]",
        "load_in_4bit": f"{RUN_BY}[load_in_4bit]",
        "keep_quantized": f"{KEPT}[finetune]",
        "dtype": f"{CHANGED_BY}[dtype]",
        "remat": f"{FINETUNE}remat_and_mesh_reach_the_training_step",
        "peft": METHOD,
        "peft_config": METHOD,
        "r": WRITTEN,
        "lora_alpha": f"{RUN_BY}[lora_alpha]",
        "lora_dropout": f"{CHANGED_BY}[lora_dropout]",
        "target_modules": WRITTEN,
        "adapter_config": f"{FINETUNE}an_adapter_config_in_pefts_format_is_taken",
        "adapter": f"{FINETUNE}a_warm_start_goes_on_from_an_adapter",
        "compute_dtype": f"{FINETUNE}compute_dtype_reaches_the_model",
        "start_batches": f"{FINETUNE}a_start_looks_at_the_batches_that_are_asked_for",
        "data": f"{FORMS}a_mixture_is_resumed_to_the_same_bits",
        **_data("finetune"),
        "prompt_template": f"{CHANGED_BY}[prompt_template]",
        "cutoff_len": f"{CLI}long_examples_are_cut_or_split_and_counted[cut]",
        "long": f"{CLI}long_examples_are_cut_or_split_and_counted[split]",
        "stride": f"{HEADS}[stride]",
        "train_on_inputs": f"{CHANGED_BY}[train_on_inputs]",
        "packing": f"{CHANGED_BY}[packing]",
        "val_size": f"{CHANGED_BY}[val_size]",
        "streaming": "test_streaming.py::test_a_streamed_run_that_goes_on_is_one_in_memory",
        "epochs": f"{FINETUNE}epochs_count_steps_and_the_last_batch_may_be_small",
        "max_steps": SAVED,
        "batch_size": f"{FINETUNE}epochs_count_steps_and_the_last_batch_may_be_small",
        "micro_batch_size": f"{FINETUNE}micro_batches_draw_their_own_dropout",
        "learning_rate": f"{RUN_BY}[learning_rate]",
        "lr_scheduler": f"{CHANGED_BY}[lr_scheduler]",
        "warmup_steps": f"{CHANGED_BY}[warmup_steps]",
        "weight_decay": f"{CHANGED_BY}[weight_decay]",
        "max_grad_norm": f"{CHANGED_BY}[max_grad_norm]",
        "no_base_dropout": f"{FINETUNE}the_base_drops_as_its_config_says_unless_it_is_switched_off",
        "optimizer": f"{CHANGED_BY}[optimizer1]",
        "seed": f"{RUN_BY}[seed]",
        "mesh": f"{FINETUNE}remat_and_mesh_reach_the_training_step",
        "coordinator_address": f"{JOINED}[flags]",
        "num_processes": f"{JOINED}[flags]",
        "process_id": f"{JOINED}[flags]",
        "distributed": f"{JOINED}[the cluster]",
        "initialization_timeout": f"{JOINED}[flags]",
        **_programs("finetune"),
        "output": f"{CLI}a_run_writes_an_adapter_that_peft_loads",
        "eval_steps": SAVED,
        "early_stopping": f"{FINETUNE}early_stopping_keeps_the_best",
        "save_steps": SAVED,
        "save_total_limit": SAVED,
        "resume": "test_resume.py::test_ctrl_c_saves_and_says_how_to_resume",
        "config": "test_option_file.py::test_a_run_can_be_run_again_by_its_own_file",
        "tensorboard": f"{FINETUNE}tensorboard_gets_the_metrics",
    },
    "preview": {name: f"{FORMS}no_option_of_preview_is_ignored[{name}]" for name in SHOWN_BY},
    "generate": {
        "prompts": f"{COMMAND}generate_says_what_pytorch_says",
        "file": f"{COMMAND}prompts_come_from_words_files_and_standard_input",
        "prompt_template": f"{COMMAND}generate_says_what_pytorch_says",
        "task_id": "test_finetune_tasks.py::test_an_answer_is_that_of_its_task",
        "batch_size": f"{COMMAND}seed_and_batches",
        "model": f"{COMMAND}base_element_type_and_int8",
        "gguf_file": GGUF,
        "adapter": f"{COMMAND}generate_says_what_pytorch_says",
        "load_in_8bit": f"{COMMAND}base_element_type_and_int8",
        "load_in_4bit": f"{COMMAND}base_element_type_and_int8",
        "keep_quantized": f"{KEPT}[generate]",
        "dtype": f"{COMMAND}base_element_type_and_int8",
        "compute_dtype": f"{COMMAND}compute_dtype_is_the_adapters",
        "max_new_tokens": f"{CHOSEN}[words0-max_new_tokens-7]",
        "do_sample": f"{CHOSEN}[words1-do_sample-True]",
        "greedy": f"{COMMAND}generation_config_is_heeded_and_the_command_line_goes_first[fields4-words4-expected4]",
        "temperature": f"{CHOSEN}[words2-temperature-0.5]",
        "top_k": f"{CHOSEN}[words3-top_k-3]",
        "top_p": f"{CHOSEN}[words5-top_p-0.5]",
        "min_p": f"{CHOSEN}[words6-min_p-0.5]",
        "repetition_penalty": f"{CHOSEN}[words7-repetition_penalty-1.5]",
        "stop_token": f"{CHOSEN}[words8-eos_token_id-None]",
        "ignore_generation_config": (
            f"{COMMAND}generation_config_is_heeded_and_the_command_line_goes_first[fields5-words5-expected5]"
        ),
        "seed": f"{COMMAND}seed_and_batches",
        **_programs("generate"),
        "json": f"{COMMAND}generate_says_what_pytorch_says",
    },
    "eval": {
        "model": f"{COMMAND}eval_is_the_loss_of_pytorch",
        "gguf_file": GGUF,
        "adapter": f"{COMMAND}eval_is_the_loss_of_pytorch",
        "load_in_8bit": f"{COMMAND}eval_heeds_element_type_and_int8",
        "load_in_4bit": f"{COMMAND}eval_heeds_element_type_and_int8",
        "keep_quantized": f"{KEPT}[eval]",
        "dtype": f"{COMMAND}eval_heeds_element_type_and_int8",
        "compute_dtype": f"{COMMAND}eval_computes_adapters_in_the_type_that_is_asked_for",
        **_programs("eval"),
        "data": f"{COMMAND}eval_is_the_loss_of_pytorch",
        **_data("eval"),
        "prompt_template": f"{COMMAND}eval_is_the_loss_of_pytorch",
        "cutoff_len": f"{COMMAND}eval_in_words",
        "long": f"{COMMAND}eval_in_words",
        "stride": f"{READ}[eval-stride]",
        "batch_size": f"{COMMAND}eval_batches",
        "json": f"{COMMAND}eval_is_the_loss_of_pytorch",
    },
    "merge": {
        **_programs("merge"),
        "adapter": f"{COMMAND}merge_writes_what_pytorch_loads",
        "output": f"{COMMAND}merge_writes_what_pytorch_loads",
        "model": f"{COMMAND}merge_rounds_once[bfloat16-float16]",
        "gguf_file": GGUF,
        "dtype": f"{COMMAND}merge_rounds_once[bfloat16-float16]",
    },
    "inspect": {
        "adapter": "test_inspect.py::test_what_is_told_is_what_is_there[plain]",
        "model": "test_inspect.py::test_what_is_told_is_what_is_there[plain]",
        "gguf_file": GGUF,
        "json": "test_inspect.py::test_what_is_told_is_what_is_there[plain]",
    },
    "demo": {
        **_programs("demo"),
        "output": f"{CLI}the_demo_says_what_it_does_and_compiles_each_program_once",
    },
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_has_a_test(command: str) -> None:
    assert {one.name for _, group in option_groups(COMMANDS[command]) for one in group} == CASES[command].keys()


@functools.cache
def _tests_of(file: str) -> set[str]:
    parsed = ast.parse(Path(__file__).with_name(file).read_text())
    return {node.name for node in parsed.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_test_exists(command: str) -> None:
    for name in CASES[command].values():
        file, test = name.partition("[")[0].split("::")
        assert test in _tests_of(file), name

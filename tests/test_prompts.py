"""Prompts on a model handle: switching, nesting, int8, packing, dropout, errors; their numbers are PEFT's elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import PROMPTS, Adapter

import peft_jax as pj
from peft_jax import interop
from peft_jax.core.adapted_tree import map_adapted
from peft_jax.core.weight import MergeError
from peft_jax.methods import base
from peft_jax.models import LlamaConfig
from peft_jax.models.llama.family import LLAMA
from peft_jax.models.modules.inputs import ForwardInputs
from peft_jax.prompts.base import PromptMethod
from peft_jax.train import make_evaluation_step, make_training_step
from peft_jax.train.mesh import make_mesh, place

IDS = np.array([[5, 17, 2, 40], [8, 8, 50, 3]])
SIZES = dict(
    vocab_size=96,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
CASES = {name: Adapter(prompt.config, prompt.tiny).make(pj) for name, prompt in PROMPTS.items()}
SIDES = [name for name, prompt in PROMPTS.items() if prompt.is_a_side]  # one for each thing that a prompt gives a model
every_side = pytest.mark.parametrize("config", [CASES[name] for name in SIDES], ids=SIDES)
every_prompt = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def tasks(config):
    return {"task_ids": np.array([1, 0])} if PROMPTS[config.peft_type].has_tasks else {}


def llama(**options):
    return pj.AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **options}))


def perturbed(model, name):
    """The model with all arrays of one of its prompts moved."""

    def move(_, leaf):
        if not isinstance(leaf.method, PromptMethod) or leaf.tag.name != name:
            return leaf
        keys = jax.random.split(jax.random.key(0), len(leaf.params))
        roles = sorted(leaf.params)
        noise = {r: 0.3 * jax.random.normal(k, leaf.params[r].shape) for r, k in zip(roles, keys, strict=True)}
        return dataclasses.replace(leaf, params={role: array + noise[role] for role, array in leaf.params.items()})

    return map_adapted(move, model)


def prompted(config, model=None, name="default"):
    return perturbed(pj.get_peft_model(llama() if model is None else model, config, name), name)


def logits(model, config=None, **options):
    """Logits of the inputs, without those of virtual tokens."""
    return np.asarray(model(IDS, **(tasks(config) if config else {}), **options).logits)[:, -IDS.shape[1] :]


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1, np.abs(want).max()))


def apart(got, want):
    assert np.abs(got - want).max() > 1e-3


@every_prompt
def test_twins_labels_summary_switching_and_files(config, tmp_path):
    model, plain = prompted(config), llama()
    trainable, frozen = pj.partition(model)
    labels = jax.tree.leaves(pj.trainable_labels(trainable))
    kinds = {role.split("_")[0].rpartition(".")[2] for role in labels}
    assert kinds and kinds <= {"prompt", "mlp", "delta", "prefix", "adaption", "shadow"}
    for ours, want in zip(jax.tree.leaves(pj.combine(trainable, frozen)), jax.tree.leaves(model), strict=True):
        assert ours is want
    count = sum(leaf.size for leaf in jax.tree.leaves(trainable))
    padding = SIZES["hidden_size"] * 3 + 1 if config.peft_type == "ADAPTION_PROMPT" else 0  # of the layer without one
    assert f"trainable params: {count - padding:,d} ||" in pj.summary(model)
    assert f"default  {config.peft_type}" in pj.summary(model)
    on, off = logits(model, config), logits(plain)
    apart(on, off)
    np.testing.assert_array_equal(logits(model.disable_adapter()), off)
    np.testing.assert_array_equal(logits(model.disable_adapter().set_adapter("default"), config), on)
    np.testing.assert_array_equal(logits(model.unload()), off)
    np.testing.assert_array_equal(logits(pj.delete_adapter(model, "default")), off)
    model.save_pretrained(tmp_path)
    again = pj.PeftModel.from_pretrained(plain, tmp_path)
    close(logits(again, config), on)
    assert jax.tree.leaves(pj.partition(again)[0]) == []


@every_prompt
def test_nothing_merges_a_prompt(config):
    model = prompted(config)
    with pytest.raises(MergeError, match=f"{config.peft_type} adapter has no merged form.*unload"):
        model.merge_and_unload()
    with pytest.raises(MergeError, match="has no merged form"):
        pj.merge(model.params)
    with pytest.raises(MergeError, match="takes effect in a model handle's call"):
        inputs = ForwardInputs(input_ids=IDS)
        pj.adapt(lambda params: LLAMA.apply(model.config, params, inputs))(model.params)
    close(logits(pj.merge(model.disable_adapter())), logits(llama()))


@every_side
def test_a_prompt_on_int8_is_a_prompt_on_the_dequantized_base(config):
    int8 = pj.quantize(llama())
    on_int8 = prompted(config, int8)
    dense = prompted(config, pj.merge(int8))
    close(logits(on_int8, config), logits(dense, config))
    apart(logits(on_int8, config), logits(int8))


@every_side
def test_a_prompt_beside_lora(config):
    """As on a base with LoRA merged, in either order of attaching; each can be switched and taken off by itself."""
    plain, lora = llama(), pj.LoraConfig(r=2, target_modules=["k_proj", "o_proj"], init_lora_weights=False)
    with_lora = pj.get_peft_model(plain, lora, "lora")
    both = prompted(config, with_lora, "prompt")
    expected = logits(prompted(config, pj.merge(with_lora)), config)
    close(logits(both, config), expected)
    close(logits(pj.get_peft_model(prompted(config, plain, "prompt"), lora, "lora"), config), expected)
    assert {"lora_A", "lora_B"} < set(jax.tree.leaves(pj.trainable_labels(pj.partition(both)[0])))
    np.testing.assert_array_equal(logits(both.set_adapter("lora")), logits(with_lora))
    np.testing.assert_array_equal(logits(pj.delete_adapter(both, "prompt")), logits(with_lora))
    close(logits(both.set_adapter("prompt"), config), logits(prompted(config, plain), config))


def test_a_prompt_beside_lora_on_the_embedding_and_a_tied_head():
    plain = llama(tie_word_embeddings=True)
    lora = pj.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False)
    with_lora = pj.get_peft_model(plain, lora, "lora")
    prompt = CASES["PROMPT_TUNING"]
    expected = logits(prompted(prompt, pj.merge(with_lora)))
    close(logits(prompted(prompt, with_lora, "prompt")), expected)
    close(logits(pj.get_peft_model(prompted(prompt, plain, "prompt"), lora, "lora")), expected)


@every_side
def test_a_prompt_on_bfloat16_stays_float32(config):
    base = pj.AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype="bfloat16")
    model = prompted(config, base)
    assert {leaf.dtype for leaf in jax.tree.leaves(pj.partition(model)[0])} == {jnp.dtype("float32")}
    out = model(IDS).logits
    assert out.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf, model)
    want = np.asarray(wide(IDS).logits)
    assert np.abs(np.asarray(out, np.float32) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "ADAPTION_PROMPT"])
def test_a_prompt_on_a_mesh(name):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    on_mesh = prompted(CASES[name], place(llama(), mesh))
    close(logits(on_mesh), logits(prompted(CASES[name])))
    (spec, *_) = {leaf.sharding.spec for leaf in jax.tree.leaves(pj.partition(on_mesh)[0])}
    assert set(spec) <= {None, ("fsdp", "expert")}


def test_several_prompts_take_turns():
    model = prompted(CASES["PREFIX_TUNING"], name="a")
    both = prompted(CASES["PROMPT_TUNING"], model, "b")
    with pytest.raises(
        ValueError, match=r"Prompts \['a', 'b'\] are active, and a model takes one. Choose: pj.set_adapter"
    ):
        both(IDS)
    alone = prompted(CASES["PREFIX_TUNING"], name="a")
    close(logits(both.set_adapter("a")), logits(alone))
    assert both.set_adapter("b")(IDS).logits.shape[1] == IDS.shape[1] + 3
    with pytest.raises(ValueError, match="Adapter name 'a' is taken"):
        pj.get_peft_model(both, CASES["PREFIX_TUNING"], "a")


def test_prompts_of_one_shape_share_their_programs():
    first, second = prompted(CASES["PREFIX_TUNING"], name="a"), pj.get_peft_model(llama(), CASES["PREFIX_TUNING"], "b")
    run = jax.jit(lambda model, ids: model(ids).logits)
    apart(run(first, IDS), run(second, IDS))
    assert run._cache_size() == 1


def test_virtual_tokens_have_logits_and_no_labels():
    model = prompted(CASES["PROMPT_TUNING"])
    out = model(IDS, labels=IDS, output_hidden_states=True)
    assert out.logits.shape == (2, 7, SIZES["vocab_size"]) and out.hidden_states.shape[2] == 7
    # The last virtual token predicts the first token of the inputs.
    chosen = jnp.take_along_axis(jax.nn.log_softmax(out.logits[:, 2:-1]), IDS[..., None], axis=-1)
    np.testing.assert_allclose(out.loss, -chosen.mean(), rtol=1e-5)
    embeds = jnp.take(llama().params["model"]["embed_tokens"]["embedding"], IDS, axis=0)
    close(model(inputs_embeds=embeds).logits, out.logits)


def test_texts_packed_into_a_row_see_the_prefix_alone():
    model = prompted(CASES["PREFIX_TUNING"])
    packed = model(IDS.reshape(1, -1), segment_ids=np.repeat([[1, 2]], 4, axis=1)).logits
    close(np.asarray(packed).reshape(2, 4, -1), logits(model))
    apart(np.asarray(model(IDS.reshape(1, -1)).logits).reshape(2, 4, -1), logits(model))


def test_positions_count_on_from_the_prefix():
    model = prompted(CASES["PREFIX_TUNING"])
    close(logits(model, position_ids=jnp.arange(4)[None]), logits(model))
    apart(logits(model, position_ids=jnp.array([[0, 2, 4, 6]])), logits(model))


def test_a_stream_is_what_generate_gives():
    class Streamer:
        def __init__(self):
            self.columns = []

        def put(self, value):
            self.columns.append(np.asarray(value).reshape(2, -1))

        def end(self):
            self.ended = True

    model, streamer = prompted(CASES["PROMPT_TUNING"]), Streamer()
    whole = model.generate(IDS, max_new_tokens=6, eos_token_id=0)
    model.generate(IDS, max_new_tokens=6, eos_token_id=0, streamer=streamer)
    np.testing.assert_array_equal(np.concatenate(streamer.columns, axis=1), whole)


def test_dropout_of_the_lstm_is_between_its_layers():
    options = {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 4}
    model = prompted(pj.PromptEncoderConfig(**options, encoder_dropout=0.5))
    twice = [pj.with_dropout(model, jax.random.key(seed)) for seed in (1, 1, 2)]
    first, same, other = (logits(one) for one in twice)
    np.testing.assert_array_equal(first, same)
    apart(first, other)
    apart(first, logits(model))
    single = prompted(pj.PromptEncoderConfig(**options, encoder_dropout=0.5, encoder_num_layers=1))
    np.testing.assert_array_equal(logits(pj.with_dropout(single, jax.random.key(1))), logits(single))
    mlp = prompted(CASES["P_TUNING"])
    np.testing.assert_array_equal(logits(pj.with_dropout(mlp, jax.random.key(1))), logits(mlp))


def test_cpt_moves_within_its_ball_and_outputs_not_at_all():
    config = pj.CPTConfig(cpt_token_ids=[4, 5, 6], cpt_tokens_type_mask=[1, 2, 4], opt_projection_epsilon=5.0)
    model, plain = prompted(config), pj.get_peft_model(llama(), config)
    moved = [interop.get_peft_model_state_dict(one)["prompt_embeddings"] for one in (model, plain)]
    norms = np.linalg.norm(moved[0] - moved[1], axis=1) / np.sqrt(SIZES["hidden_size"] / 2048)
    np.testing.assert_allclose(norms[0], 0.1, rtol=1e-4)
    assert 0.1 < norms[1] <= 5.0001 and norms[2] < 1e-6
    gradient = jax.grad(lambda trainable: pj.combine(trainable, pj.partition(model)[1])(IDS).logits.sum())
    (moves,) = jax.tree.leaves(gradient(pj.partition(model)[0]))
    assert np.abs(moves[:2]).min() > 0 and not np.asarray(moves[2]).any()


def test_a_prompt_from_a_file_is_trained_on_where_the_file_holds_it(tmp_path):
    for name in [name for name, prompt in PROMPTS.items() if prompt.file_is_whole]:
        model = prompted(CASES[name])
        model.save_pretrained(tmp_path / name)
        again = pj.PeftModel.from_pretrained(llama(), tmp_path / name, is_trainable=True)
        assert sum(leaf.size for leaf in jax.tree.leaves(pj.partition(again)[0])) > 0
        close(logits(again, CASES[name]), logits(model, CASES[name]))
    for name in [name for name, prompt in PROMPTS.items() if not prompt.file_is_whole]:
        prompted(CASES[name]).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} adapter holds what its encoder gave, not the encoder"):
            pj.PeftModel.from_pretrained(llama(), tmp_path / name, is_trainable=True)


def test_the_loss_of_a_step_leaves_virtual_tokens_out():
    model = prompted(CASES["PROMPT_TUNING"])
    step = make_training_step(lambda model, ids, mask: model(ids, attention_mask=mask).logits, optax.sgd(0.1))
    batch = {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "labels": IDS}
    want = model(IDS, labels=IDS).loss
    evaluation = make_evaluation_step(lambda model, ids, mask: model(ids, attention_mask=mask).logits)
    total, count = evaluation(model, batch)
    trainable, frozen = pj.partition(model)
    metrics = step(trainable, optax.sgd(0.1).init(trainable), frozen, batch, jax.random.key(0))[2]
    assert int(count) == IDS.size
    np.testing.assert_allclose([metrics.loss, float(total) / int(count)], want, rtol=1e-6)


WRONG_CONFIGS = {
    "no tokens": (
        lambda: pj.PrefixTuningConfig(),
        "PrefixTuningConfig needs num_virtual_tokens of at least 1, got None",
    ),
    "unknown start": (
        lambda: pj.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="ZEROS"),
        "prompt_tuning_init='ZEROS' is unknown. Write one of TEXT, SAMPLE_VOCAB, RANDOM",
    ),
    "text without tokenizer": (
        lambda: pj.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a"),
        "needs tokenizer_name_or_path",
    ),
    "tokenizer without text": (
        lambda: pj.PromptTuningConfig(num_virtual_tokens=2, tokenizer_kwargs={"use_fast": True}),
        "tokenizer_kwargs go with prompt_tuning_init='TEXT'",
    ),
    "unknown encoder": (
        lambda: pj.PromptEncoderConfig(num_virtual_tokens=2, encoder_reparameterization_type="GRU"),
        "'GRU' is unknown. Write one of MLP, LSTM",
    ),
    "layers of an MLP": (
        lambda: pj.PromptEncoderConfig(num_virtual_tokens=2, encoder_num_layers=3),
        "encoder_num_layers and encoder_dropout go with encoder_reparameterization_type='LSTM'",
    ),
    "unknown weights": (
        lambda: pj.PrefixTuningConfig(num_virtual_tokens=2, init_weights="one"),
        "init_weights='one' is unknown",
    ),
    "no source file": (
        lambda: pj.MultitaskPromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init="ONLY_SOURCE_SHARED"),
        "needs prompt_tuning_init_state_dict_path",
    ),
    "no layers": (lambda: pj.AdaptionPromptConfig(adapter_len=2), "needs adapter_layers of at least 1, got None"),
    "lengths of a context": (
        lambda: pj.CPTConfig(cpt_token_ids=[1, 2], cpt_mask=[1]),
        "A CPT context has one length, got {'cpt_token_ids': 2, 'cpt_mask': 1",
    ),
    "task of CPT": (lambda: pj.CPTConfig(task_type="SEQ_CLS"), "CPT is for causal language models"),
}


@pytest.mark.parametrize("make, message", WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_wrong_fields_are_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)


def with_task_but_no_tasks(model):
    return prompted(CASES["PREFIX_TUNING"], model)(IDS, task_ids=np.array([0, 1]))


WRONG_USES = {
    "other size": (
        lambda model: pj.get_peft_model(model, pj.PromptTuningConfig(num_virtual_tokens=2, token_dim=8)),
        "PromptTuningConfig(token_dim=8) does not fit this model, whose token_dim is 16. Leave token_dim out",
    ),
    "bare tree": (
        lambda model: pj.apply_adapter(model.params, CASES["PROMPT_TUNING"]),
        "PromptTuningConfig is for a model handle",
    ),
    "too many layers": (
        lambda model: pj.get_peft_model(model, pj.AdaptionPromptConfig(adapter_len=2, adapter_layers=4)),
        "adapter_layers=4, but the model has 3 modules 'self_attn' with keys",
    ),
    "adaption on Qwen": (
        lambda model: pj.get_peft_model(llama(model_type="qwen2"), CASES["ADAPTION_PROMPT"]),
        "ADAPTION_PROMPT is for llama, mistral",
    ),
    "saved module": (
        lambda model: pj.get_peft_model(model, CASES["PROMPT_TUNING"].replace(modules_to_save=["norms"])),
        "modules_to_save 'norms' hits none",
    ),
    "saved carrier": (
        lambda model: pj.get_peft_model(model, CASES["PROMPT_TUNING"].replace(modules_to_save=["embed_tokens"])),
        "modules_to_save names 'model.embed_tokens', where the prompt's arrays lie",
    ),
    "positions": (
        lambda model: prompted(CASES["PROMPT_TUNING"], model)(IDS, position_ids=jnp.arange(4)[None]),
        "position_ids= cannot be given beside virtual tokens: Positions count from the first of them",
    ),
    "packing": (
        lambda model: prompted(CASES["PROMPT_TUNING"], model)(IDS, segment_ids=np.ones_like(IDS)),
        "segment_ids= cannot be given beside virtual tokens",
    ),
    "no task": (
        lambda model: prompted(CASES["MULTITASK_PROMPT_TUNING"], model)(IDS),
        "needs to know each row's task. Give task_ids=",
    ),
    "too many tasks": (
        lambda model: prompted(CASES["MULTITASK_PROMPT_TUNING"], model)(IDS, task_ids=np.array([0, 1, 1])),
        "task_ids has 3 rows, and the inputs have 2",
    ),
    "unknown task": (
        lambda model: prompted(CASES["MULTITASK_PROMPT_TUNING"], model)(IDS, task_ids=np.array([0, 2])),
        "task_ids are from 0 to 2, but the prompt has the tasks 0 to 1",
    ),
    "unknown task of a generation": (
        lambda model: prompted(CASES["MULTITASK_PROMPT_TUNING"], model).generate(IDS, task_ids=[-1, 0]),
        "task_ids are from -1 to 0",
    ),
    "types without CPT": (
        lambda model: prompted(CASES["PROMPT_TUNING"], model)(IDS, labels=IDS, input_type_mask=IDS),
        "input_type_mask is for CPT, and the adapter is PROMPT_TUNING",
    ),
    "types without a prompt": (lambda model: model(IDS, labels=IDS, input_type_mask=IDS), "no such adapter is active"),
    "types without labels": (
        lambda model: prompted(CASES["CPT"], model)(IDS, input_type_mask=IDS),
        "input_type_mask says which labels count, and none are given",
    ),
    "types of other tokens": (
        lambda model: prompted(CASES["CPT"], model)(IDS, labels=IDS, input_type_mask=IDS[:1]),
        "input_type_mask must be (2, 4), like labels, got (1, 4)",
    ),
    "task without tasks": (with_task_but_no_tasks, "task_ids are for MULTITASK_PROMPT_TUNING"),
    "context out of range": (
        lambda model: pj.get_peft_model(model, pj.CPTConfig(cpt_token_ids=[96])),
        "cpt_token_ids are from 96 to 96, but the vocabulary has ids 0 to 95",
    ),
    "context without outputs": (
        lambda model: pj.get_peft_model(model, pj.CPTConfig(cpt_token_ids=[9]))(IDS, labels=IDS),
        "The largest of cpt_tokens_type_mask is 1",
    ),
    "tree": (
        lambda model: interop.set_peft_model_state_dict(model.params, CASES["PROMPT_TUNING"], {}),
        "A PROMPT_TUNING adapter goes on a model handle",
    ),
    "missing tensor": (
        lambda model: interop.set_peft_model_state_dict(model, CASES["PROMPT_TUNING"], {}),
        "prompt_embeddings is missing",
    ),
    "wrong shape": (
        lambda model: interop.set_peft_model_state_dict(
            model, CASES["PROMPT_TUNING"], {"prompt_embeddings": np.ones((3, 8), np.float32)}
        ),
        "prompt_embeddings has shape (3, 8), not (3, 16)",
    ),
}


@pytest.mark.parametrize("use, message", WRONG_USES.values(), ids=WRONG_USES)
def test_wrong_uses_are_errors(use, message):
    with pytest.raises(ValueError) as error:
        use(llama())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_enums_are_strings():
    config = pj.PromptTuningConfig(num_virtual_tokens=2, prompt_tuning_init=pj.PromptTuningInit.SAMPLE_VOCAB)
    assert config.to_dict()["prompt_tuning_init"] == "SAMPLE_VOCAB" == config.prompt_tuning_init
    assert base.PeftConfig.from_dict(config.to_dict()) == config
    assert (
        pj.PrefixTuningConfig(num_virtual_tokens=2, task_type=pj.TaskType.SEQ_CLS).to_dict()["task_type"] == "SEQ_CLS"
    )

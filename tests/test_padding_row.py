"""The row of padding: lookups train it as PyTorch's do, which is not at all where the embedding has a padding_idx."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import close, tolerance

import peft_jax as pj
from peft_jax.models.registry import BY_MODEL_TYPE, read_architecture

PAD = 3
IDS = np.array([[5, PAD, 17, 2, PAD], [8, 8, PAD, 3, 21]])
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": PAD}
FAMILIES = {
    "llama": ("LlamaConfig", "CausalLM", "embed_tokens", {}),
    "qwen2": ("Qwen2Config", "CausalLM", "embed_tokens", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
    "bert": ("BertConfig", "SequenceClassification", "word_embeddings", {}),
    "roberta": ("RobertaConfig", "SequenceClassification", "word_embeddings", {}),
    "gpt2": ("GPT2Config", "CausalLM", "wte", {}),
}
ADAPTERS = {
    "LORA": ("LoraConfig", {"r": 2, "target_modules": ["{embedding}"]}),
    "DORA": ("LoraConfig", {"r": 2, "target_modules": ["{embedding}"], "use_dora": True}),
    "HIRA": ("HiraConfig", {"r": 2, "target_modules": ["{embedding}"]}),
    "OFT": ("OFTConfig", {"oft_block_size": 4, "target_modules": ["{embedding}"]}),
    "tokens": ("TrainableTokensConfig", {"token_indices": [5, PAD], "target_modules": ["{embedding}"]}),
    "saved": ("LoraConfig", {"r": 2, "target_modules": ["{linear}"], "modules_to_save": ["{embedding}"]}),
}
POSITIONS = {"positions": ("LoraConfig", {"r": 2, "target_modules": ["position_embeddings"]})}
ROWS = [("llama", name) for name in ADAPTERS] + [("qwen2", "saved"), ("bert", "LORA"), ("bert", "saved")]
ROWS += [("roberta", "LORA"), ("roberta", "positions"), ("gpt2", "LORA"), ("gpt2", "saved")]


def made(library, family, name):
    cls, options = (ADAPTERS | POSITIONS)[name]
    _, task, embedding, _ = FAMILIES[family]
    linear = {"gpt2": "c_attn", "bert": "query", "roberta": "query"}.get(family, "q_proj")
    filled = {}
    for field, value in options.items():
        is_names = isinstance(value, list) and isinstance(value[0], str)
        filled[field] = [one.format(embedding=embedding, linear=linear) for one in value] if is_names else value
    return getattr(library, cls)(task_type="CAUSAL_LM" if task == "CausalLM" else "SEQ_CLS", **filled)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folders = {}
    for family, (config, task, _, more) in FAMILIES.items():
        torch.manual_seed(0)
        loader = getattr(transformers, f"AutoModelFor{task}")
        model = loader.from_config(getattr(transformers, config)(**SIZES, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folders[family] = tmp_path_factory.mktemp(family)
        model.save_pretrained(folders[family])
    return folders


def gradients(model):
    """By the keys of the adapter's file."""
    trainable, frozen = pj.partition(model)
    mask = np.ones_like(IDS)

    def loss(trainable):
        return jnp.sin(3 * pj.combine(trainable, frozen)(IDS, mask).logits).sum()

    found = jax.grad(loss)(trainable)
    return pj.get_peft_model_state_dict(pj.combine(found, frozen))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "name"), ROWS, ids=["-".join(row) for row in ROWS])
def test_gradients_of_the_embedding_are_pytorchs(family, name, bases, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import transformers

    task = FAMILIES[family][1]
    theirs = getattr(transformers, f"AutoModelFor{task}").from_pretrained(bases[family])
    theirs = peft.get_peft_model(theirs, made(peft, family, name)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    torch.sin(3 * theirs(torch.tensor(IDS), attention_mask=torch.ones(IDS.shape)).logits).sum().backward()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    found = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    want = {key: tensor.numpy() for key, tensor in found.items()}

    base = getattr(pj, f"AutoModelFor{task}").from_pretrained(bases[family])
    model = pj.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    got = gradients(model)
    assert got.keys() >= want.keys()  # and the base's own weight
    for key, gradient in want.items():
        close(got[key], gradient)

    every = dataclasses.replace(base, config=dataclasses.replace(base.config, trains_padding=True))
    np.testing.assert_array_equal(every(IDS, np.ones_like(IDS)).logits, base(IDS, np.ones_like(IDS)).logits)
    other = gradients(pj.PeftModel.from_pretrained(every, tmp_path, is_trainable=True))
    differs = any(np.abs(other[key] - want[key]).max() > 100 * tolerance(want[key]) for key in want)
    assert differs == (family != "gpt2" and name not in ("HIRA", "OFT")), "the switch"


def test_without_a_padding_id_the_program_is_what_it_was():
    from peft_jax.core.ids import rows_at

    table, ids = jnp.ones((4, 2)), jnp.array([1])
    assert "untrained_row" not in str(jax.make_jaxpr(rows_at)(table, ids))
    with_row = jax.jit(lambda table, ids: rows_at(table, ids, 1)).lower(table, ids).as_text()
    assert with_row == jax.jit(lambda table, ids: rows_at(table, ids)).lower(table, ids).as_text()


def test_a_row_of_a_batch_of_tables_gets_no_gradient():
    from peft_jax.core.ids import rows_at

    tables, ids = jnp.ones((2, 4, 3)), jnp.array([1, 2, 1])
    got = jax.grad(lambda tables: jax.vmap(lambda table: rows_at(table, ids, 1))(tables).sum())(tables)
    np.testing.assert_array_equal(got[:, :, 0], [[0, 0, 1, 0]] * 2)


@pytest.mark.parametrize("kind", BY_MODEL_TYPE)
def test_the_switch_is_no_entry_of_a_config(kind):
    """config.json has what transformers knows; a model that trains the row is saved like any."""
    config = read_architecture({"model_type": kind})
    hf = dataclasses.replace(config, trains_padding=True).to_hf()
    assert hf == config.to_hf() and "trains_padding" not in hf

"""T5 models of PyTorch transformers and ours read from their checkpoints, for several test files."""

import numpy as np
import pytest
import torch
import transformers

import peft_jax as pj

SIZES = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_decoder_layers": 2,  # with more than num_layers transformers does not generate
    "num_heads": 4,  # 4 * 8 is not d_model
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "eos_token_id": None,  # a text that goes on proves more
}
V1, V1_1 = {"feed_forward_proj": "relu"}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = {
    "v1.0": ("t5", V1),
    "v1.1": ("t5", V1_1),
    "v1.1 tied": ("t5", V1_1),
    "silu, own tables": ("t5", {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 0.1}),
    "mt5": ("mt5", {"num_layers": 2, "num_decoder_layers": 1}),
}
UNTIED = {"v1.1": ("lm_head",), "silu, own tables": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")}


def torch_model(kind, options, untied=()):
    """A model with random weights everywhere, large enough that all of them matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **options})
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="sdpa").eval()
    for name in untied:
        model.get_submodule(name).weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def enlivened(model):
    """The model with other weights, which does not repeat itself as one does whose embeddings outweigh all else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "shared.weight" or name.endswith("embed_tokens.weight"):
                parameter.mul_(0.1)
            elif name != "lm_head.weight":
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pairs(tmp_path_factory, change=lambda model: model):
    """A function from a case's name to the PyTorch model and ours, read from its checkpoint."""
    made = {}

    def make(name):
        if name not in made:
            model = change(torch_model(*CASES[name], UNTIED.get(name, ())))
            folder = tmp_path_factory.mktemp("t5")
            model.save_pretrained(folder)
            made[name] = (model, pj.AutoModelForSeq2SeqLM.from_pretrained(folder))
        return made[name]

    return make


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return pairs(tmp_path_factory)


@pytest.fixture(scope="module")
def lively_pair(tmp_path_factory):
    return pairs(tmp_path_factory, enlivened)


def close(got, want, factor=1.0):
    want = want.detach().numpy() if isinstance(want, torch.Tensor) else np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=factor * 1e-5 * max(1, np.abs(want).max()))


def as_torch(arrays):
    return {name: torch.tensor(np.asarray(array)) for name, array in arrays.items()}

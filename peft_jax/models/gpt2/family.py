"""The record of GPT-2."""

import re
from typing import Any

from peft_jax.interop.gguf_file import GGUFTensor
from peft_jax.models.family import OTHERWISE, Family, Sharding, stacked_layouts, targets
from peft_jax.models.gguf_architecture import GGUFArchitecture
from peft_jax.models.gpt2 import model
from peft_jax.models.gpt2.config import GPT2Config
from peft_jax.models.modules.decoder import decoder_cache


def stored_in_out(tensor: GGUFTensor, config: Any) -> GGUFTensor:
    """A kernel as transformers' Conv1D has it, which llama.cpp transposes."""
    is_kernel = re.fullmatch(r"blk\.\d+\.(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", tensor.name)
    return tensor.transposed() if is_kernel else tensor


GGUF = {
    "gpt2": GGUFArchitecture(
        model_type="gpt2",
        fields={
            "context_length": "n_positions",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "embedding_length": "n_embd",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        restore=stored_in_out,
    ),
}

GPT2 = Family(
    config=GPT2Config,
    module=model.GPT2,
    layouts=stacked_layouts("h", stored_in_out=True),
    backbone="transformer",
    embedding="wte",
    heads=model.HEAD.names,
    peft_defaults={
        "gpt2": {
            OTHERWISE: targets("c_attn"),
            "ADAPTION_PROMPT": {"target_modules": "attn"},
            "BEFT": {},
            "C3A": targets("mlp.c_proj"),
            "FOURIERFT": targets("mlp.c_proj"),
            "IA3": targets("c_attn", "mlp.c_proj", feedforward_modules=("mlp.c_proj",)),
            "LN_TUNING": targets("ln_1", "ln_2", "ln_f"),
            "OSF": targets("c_attn", "c_proj"),
            "WAVEFT": targets("mlp.c_proj"),
        },
    },
    sharding=Sharding(columns="c_attn|c_fc|lm_head", rows="c_proj", tables="wte"),
    adaption_carrier="c_attn",
    ignored=(r"(.*\.)?h\.\d+\.attn\.(masked_)?bias",),  # causal masks in old checkpoints
    init_cache=decoder_cache,
    gguf=GGUF,
)

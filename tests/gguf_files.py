"""GGUF files for the tests, written by gguf's own writer from the tensors of a Hugging Face checkpoint.

The names and the order of rows are those of llama.cpp's converter (convert_hf_to_gguf.py). The package quantizes to the
kinds with one scale a block; blocks of the K kinds are drawn, since it dequantizes these alone.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer

Kind = gguf.GGMLQuantizationType
# The bytes of a block at which its scales in float16 begin.
SCALES = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon")
KINDS = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0, *SCALES, Kind.MXFP4, Kind.F16, Kind.BF16, Kind.F32)
SENTENCES = ["Reverse the word.", "  two spaces, 日本 é 12345", "<s>a</s> b\n\nc"]


def stored(values: np.ndarray, kind: Kind) -> np.ndarray:
    """A tensor's bytes in a kind: of its values, or for the K kinds of drawn blocks."""
    if kind not in SCALES:
        return gguf.quantize(values, kind)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(values.size)
    blocks = rng.integers(0, 256, (values.size // elements, size), np.uint8)
    for start in SCALES[kind]:
        scales = (1e-3 + 1e-3 * rng.random((len(blocks), 1))).astype(np.float16)
        blocks[:, start : start + 2] = scales.view(np.uint8)
    return blocks.reshape(*values.shape[:-1], -1)


def turns_in_pairs(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp turns them: its ``LlamaModel.permute``."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


def apart(values: np.ndarray, groups: int, heads: int) -> np.ndarray:
    """Rows of queries, keys and values by groups of heads as llama.cpp writes them for BLOOM and Falcon: by kind."""
    by_group = values.reshape(groups, heads // groups + 2, -1, *values.shape[1:])
    parts = (by_group[:, :-2], by_group[:, -2], by_group[:, -1])
    return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])


def of_gpt_oss(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of gpt-oss under the names of llama.cpp's converter: gates and what they gate apart, experts turned."""
    found = {}
    for key, values in tensors.items():
        name = f"{key}.weight" if key.endswith(("_proj", ".sinks")) else key.replace("_proj_bias", "_proj.bias")
        values = values.swapaxes(1, 2) if values.ndim == 3 else values
        if ".gate_up_proj." in name:
            found[name.replace("gate_up_proj", "gate_proj")] = values[:, ::2]
            found[name.replace("gate_up_proj", "up_proj")] = values[:, 1::2]
        else:
            found[name] = values
    return found


def write_gguf(
    path: Path,
    architecture: str,
    hf: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind_of: Callable[[str], Kind] = lambda name: Kind.F32,
    *,
    tokenizer: str | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    left_out: str = "",
) -> dict[str, np.ndarray]:
    """Write a file, and return the bytes of each tensor by GGUF's name.

    Args:
        path: The file.
        architecture: Its ``general.architecture``.
        hf: The fields of config.json, with the common names.
        tensors: Tensors by transformers' keys.
        kind_of: The kind of a matrix, by GGUF's name; vectors are float32.
        tokenizer: Contents of a tokenizer.json of byte-level BPE.
        more: Writes further metadata and tensors.
        left_out: Regex of GGUF's names that are not written.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(hf["max_position_embeddings"])
    writer.add_block_count(hf["num_hidden_layers"])
    writer.add_embedding_length(hf["hidden_size"])
    writer.add_head_count(hf["num_attention_heads"])
    writer.add_vocab_size(hf["vocab_size"])
    epsilon = next(hf[name] for name in EPSILONS if name in hf)
    if architecture in ("gpt2", "bloom"):
        writer.add_feed_forward_length(4 * hf["hidden_size"])
        writer.add_layer_norm_eps(epsilon)
    elif architecture == "t5":
        writer.add_feed_forward_length(hf["d_ff"])
        writer.add_decoder_block_count(hf["num_decoder_layers"])
        writer.add_key_length(hf["d_kv"])
        writer.add_layer_norm_eps(epsilon)
        writer.add_relative_attn_buckets_count(hf["relative_attention_num_buckets"])
        writer.add_decoder_start_token_id(hf["decoder_start_token_id"])
    else:
        writer.add_feed_forward_length(hf["intermediate_size"])
        is_rms = "rms_norm_eps" in hf
        (writer.add_layer_norm_rms_eps if is_rms else writer.add_layer_norm_eps)(epsilon)
        writer.add_head_count_kv(hf["num_key_value_heads"])
        ropes = hf["rope_parameters"]
        writer.add_rope_freq_base(ropes.get("full_attention", ropes)["rope_theta"])
        head_dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
        if head_dim * hf["num_attention_heads"] != hf["hidden_size"]:
            writer.add_key_length(head_dim)
        writer.add_rope_dimension_count(int(head_dim * ropes.get("partial_rotary_factor", 1)))
    if architecture.endswith(("moe", "-oss")):
        writer.add_expert_count(hf.get("num_experts") or hf["num_local_experts"])
        writer.add_expert_used_count(hf["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(hf.get("moe_intermediate_size") or hf["intermediate_size"])
        if "shared_expert_intermediate_size" in hf:
            writer.add_expert_shared_feed_forward_length(hf["shared_expert_intermediate_size"])
    if architecture.startswith(("gemma", "gpt-oss")):
        writer.add_sliding_window(hf["sliding_window"])
    if architecture == "gpt-oss" and hf["rope_parameters"]["rope_type"] == "yarn":
        add_yarn(writer, hf["rope_parameters"])
    for cap in ("attn", "final"):
        if architecture == "gemma2":
            getattr(writer, f"add_{cap}_logit_softcapping")(hf[f"{cap}_logit_softcapping"])
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if hf.get(f"{name}_token_id") is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", hf[f"{name}_token_id"])
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer, hf["vocab_size"])
    more(writer)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], hf["num_hidden_layers"])
    written = {}
    for key, values in (of_gpt_oss(tensors) if architecture == "gpt-oss" else tensors).items():
        spelled = key.removeprefix("transformer.") if architecture == "bloom" else key
        name = names.get_name(spelled, (".weight", ".bias"))
        assert name is not None, key
        if left_out and re.fullmatch(left_out, name):
            continue
        if architecture == "llama" and ".attn_q." in name:
            values = turns_in_pairs(values, hf["num_attention_heads"])
        if architecture == "llama" and ".attn_k." in name:
            values = turns_in_pairs(values, hf["num_key_value_heads"])
        if architecture == "bloom" and ".attn_qkv." in name:
            values = apart(values, hf["num_attention_heads"], hf["num_attention_heads"])
        if architecture == "falcon" and ".attn_qkv." in name:
            values = apart(values, hf["num_key_value_heads"], hf["num_attention_heads"])
        if architecture == "gpt2" and re.search(r"(attn_qkv|attn_output|ffn_up|ffn_down)\.weight", name):
            values = values.T
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if "ffn_gate_inp_shexp" in name:
            values = values[0]
        is_plain = values.ndim == 1 or values.shape[-1] % 32 != 0 or name.endswith(".bias")
        kind = Kind.F32 if is_plain else kind_of(name)
        data = stored(np.ascontiguousarray(values, np.float32), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
        written[name] = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def add_yarn(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    """The metadata of positions that YaRN stretches."""
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if "beta_fast" in rope:
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def add_tokenizer(writer: gguf.GGUFWriter, file: str, size: int, split: str = "default") -> None:
    """The metadata of a byte-level BPE tokenizer, filled up with unused tokens, as llama.cpp writes them."""
    tokenizer = Tokenizer.from_file(file)
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    special = tokenizer.get_added_tokens_decoder()
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [gguf.TokenType.NORMAL if number in by_id else gguf.TokenType.UNUSED for number in range(size)]
    for number in special:
        kinds[number] = gguf.TokenType.CONTROL
    merges = [" ".join(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_chat_template("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")


def add_sentencepiece(writer: gguf.GGUFWriter, size: int) -> None:
    """The metadata of a small SentencePiece tokenizer, whose merges follow from its scores."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "ab", "▁ab", "cd"]
    types = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    types += [gguf.TokenType.NORMAL] * (len(pieces) - len(types))
    filled = [f"[PAD{number}]" for number in range(len(pieces), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces + filled)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types(types + [gguf.TokenType.UNUSED] * len(filled))
    writer.add_unk_token_id(0)

"""Which modules a config means, against PEFT's own functions on real module names; and that nothing is silent."""

import random
import re

import jax.numpy as jnp
import pytest

import peft_jax as pj
from peft_jax.core.bounded_regex import is_quick, matches
from peft_jax.core.targets import below_others, check_targets, is_saved_module, is_target, pattern_value

ROWS = {
    "list": {"target_modules": ["q_proj", "v_proj"]},
    "whole paths": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "an end is not a suffix of letters": {"target_modules": ["proj"]},
    "regex": {"target_modules": r".*\.[01]\.(self_attn|mlp)\.(k|gate)_proj"},
    "regex is matched whole": {"target_modules": r"layers\.0"},
    "excluded list": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded regex": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "layers with pattern": {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers"},
    "layers with patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["h", "layers"],
    },
    "layers of no such pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]},
    "a whole path ignores layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "saved modules": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "saved container": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "GPT-2": {"target_modules": ["c_attn", "mlp.c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    "BERT": {"target_modules": ["query", "output.dense"], "exclude_modules": r".*attention\.output\.dense"},
    "BERT's layers": {"target_modules": ["value"], "layers_to_transform": [0, 1], "layers_pattern": "layer"},
    "T5": {"target_modules": r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"},
    "T5's blocks": {"target_modules": ["q", "wo"], "layers_to_transform": 1},
    "GPT-NeoX": {"target_modules": ["query_key_value", "dense"], "exclude_modules": ["attention.dense"]},
    "OPT": {"target_modules": ["out_proj", "fc2"], "layers_to_transform": [2], "modules_to_save": ["fc1"]},
    "heads": {"target_modules": ["lm_head", "classifier", "embed_out"]},
}


@pytest.fixture(scope="module")
def module_names():
    """Of seven architectures."""
    import torch
    import transformers as hf

    tiny = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.device("meta"):
        models = [
            hf.LlamaForCausalLM(hf.LlamaConfig(**tiny, intermediate_size=16)),
            hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)),
            hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8)
            ),
            hf.BertForSequenceClassification(hf.BertConfig(**tiny, intermediate_size=16)),
            hf.RobertaForTokenClassification(hf.RobertaConfig(**tiny, intermediate_size=16)),
            hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**tiny, intermediate_size=16)),
            hf.OPTForCausalLM(hf.OPTConfig(**tiny, ffn_dim=16, word_embed_proj_dim=16)),
        ]
    return [name for model in models for name, _ in model.named_modules() if name]


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_targets_equal_pefts(options, module_names):
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs, ours = LoraConfig(**options), pj.LoraConfig(**options)
    want = [name for name in module_names if check_target_module_exists(theirs, name)]
    assert [name for name in module_names if is_target(ours, name)] == want
    assert 0 < len(want) < len(module_names) or options in (
        ROWS["an end is not a suffix of letters"],
        ROWS["regex is matched whole"],
        ROWS["layers of no such pattern"],
    )


PATTERNS = [
    "q_proj",
    r"layers\.1\.self_attn\.q_proj",
    r".*\.[02]\.mlp",
    r"mlp\.(up|down)_proj",
    "layer.0.output.dense",
    "q",
]


@pytest.mark.parametrize("patterns", [PATTERNS, PATTERNS[::-1]], ids=["in order", "the other way"])
def test_patterns_equal_pefts(patterns, module_names):
    from peft.utils.other import get_pattern_key

    values = {pattern: number for number, pattern in enumerate(patterns)}
    want = [values.get(get_pattern_key(patterns, name), -1) for name in module_names]
    assert [pattern_value(values, name, -1) for name in module_names] == want
    assert len(set(want)) >= 5


@pytest.mark.parametrize("pattern", [*PATTERNS, "q_proj|v_proj", "v_proj|q_proj", "(q|v)_proj", "mlp", "layers"])
def test_the_older_rule_of_patterns_is_pefts(pattern, module_names):
    """The one of `peft.tuners.c3a.model` and `peft.tuners.fourierft.model`."""
    want = [re.match(rf".*\.{pattern}$", name) is not None for name in module_names]
    assert [pattern_value({pattern: True}, name, False, below_others) for name in module_names] == want


@pytest.mark.parametrize("pattern", ["[", "v_proj)|(x"])
def test_a_pattern_that_is_no_expression_is_named_as_it_was_written(pattern):
    with pytest.raises(ValueError, match=re.escape(f"a key of n_frequency_pattern={pattern!r} is no regular")):
        pj.FourierFTConfig(target_modules=["q"], n_frequency_pattern={pattern: 3})


def test_saved_modules_are_named_by_their_ends_and_hold_what_they_contain():
    config = pj.LoraConfig(modules_to_save=["head", "layers.1.mlp"])
    names = ["lm_head", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj", "model.head.dense", "model.norm"]
    assert [is_saved_module(config, name) for name in names] == [True, True, False, True, False]


TREE = {
    "model": {
        "layers": {"q_proj": {"kernel": jnp.ones((2, 4, 4))}, "norm": {"scale": jnp.ones((2, 4))}},
        "heads": {"kernel": jnp.ones((4, 2, 2))},
    }
}
LAYOUT = {r".*q_proj\.kernel": pj.Layout((0,), (1,), (2,)), r".*norm\.scale": pj.Layout((0,), (), (1,))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_prj"]}, r"Target module 'q_prj' hits none of .* Nearest: \['q_proj'"),
        ({"target_modules": ["q_proj", "k_proj"]}, "Target module 'k_proj' hits none"),
        ({"target_modules": "q_proj"}, "regex 'q_proj' hits none .* matched against whole paths"),
        ({"target_modules": ["norm"]}, "Target module 'norm' hits none"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["no_such"]}, "exclude_modules 'no_such' hits none"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "Every module that .* is excluded"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["no_such"]}, "modules_to_save 'no_such' hits none"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 7]}, r"layers_to_transform \[7\].*found: \[0, 1\]"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}}, "Pattern 'v_proj' of rank_pattern"),
        (
            {"target_modules": ["heads"]},
            r"'model.heads.kernel' of shape \(4, 2, 2\) .* ambiguous: no convention .* Write layout=",
        ),
        ({}, "target_modules is not given"),
    ],
)
def test_what_hits_nothing_is_an_error_with_a_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        pj.apply_lora(TREE, pj.LoraConfig(**options), layout=LAYOUT)


def test_layouts_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"Name each of the axes 0 to 2 once"):
        pj.apply_lora(TREE, pj.LoraConfig(target_modules=["q_proj"]), layout={".*q_proj.kernel": pj.Layout()})
    with pytest.raises(ValueError, match=r"\['no_such'\] match no leaf"):
        pj.apply_lora(TREE, pj.LoraConfig(target_modules=["q_proj"]), layout={"no_such": pj.Layout()})
    with pytest.raises(ValueError, match="no path component 'layers'"):
        pj.apply_lora(
            {"q": {"kernel": jnp.ones((2, 4, 4))}},
            pj.LoraConfig(target_modules=["q"]),
            layout={".*": pj.Layout((0,), (1,), (2,))},
        )


def test_all_linear_means_every_matmul_weight():
    tree = {
        "a": {"kernel": jnp.ones((4, 4))},
        "b": {"weight": jnp.ones((6, 4))},
        "c": {"embedding": jnp.ones((4, 4))},
        "d": {"scale": jnp.ones(4)},
    }
    params = pj.apply_lora(tree, pj.LoraConfig(r=1, target_modules="all-linear"))
    assert params["a"]["kernel"].params["lora_A"].shape == (4, 1)
    assert params["b"]["weight"].params["lora_B"].shape == (1, 6)  # a PyTorch weight is (out, in)
    assert params["c"]["embedding"] is tree["c"]["embedding"] and params["d"]["scale"] is tree["d"]["scale"]
    assert params["a"]["kernel"].tag.config.target_modules == ("a", "b")


def test_a_taken_name_is_an_error():
    params = pj.apply_lora({"q": {"kernel": jnp.ones((4, 4))}}, pj.LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match="name 'default' is taken"):
        pj.apply_lora(params, pj.LoraConfig(target_modules=["q"]))


def test_a_weight_has_its_axes_already_and_a_stacked_leaf_one_role():
    quantized = pj.quantize({"q": {"weight": jnp.ones((4, 4))}})
    with pytest.raises(ValueError, match="is quantized or adapted already.*leave layout= out"):
        pj.apply_lora(quantized, pj.LoraConfig(target_modules=["q"]), layout={"q.weight": pj.Layout()})
    stack = {"layers": {"q": {"kernel": jnp.ones((2, 4, 6))}}}
    config = pj.LoraConfig(target_modules=["layers.0.q"], modules_to_save=["layers.1.q"])
    with pytest.raises(ValueError, match="which one leaf cannot be. Save all of its layers, or none"):
        pj.apply_lora(stack, config, layout={".*": pj.Layout((0,), (1,), (2,))})
    with pytest.raises(ValueError, match="hits none of"):  # integers are no weights
        pj.apply_lora({"q": {"kernel": jnp.ones((4, 4), int)}}, pj.LoraConfig(target_modules=["q"]))


@pytest.mark.parametrize(
    ("layers", "pattern", "said"),
    [
        (99, None, r"layers_to_transform \[99\] hits no target. Layers found: \[0, 1, 2\]\."),
        ([-1], None, r"layers_to_transform \[-1\] hits no target. Layers found: \[0, 1, 2\]\."),
        ([0, 99], None, r"layers_to_transform \[99\] hits no target. Layers found: \[0, 1, 2\]\."),
        ([0], "h", r"layers_to_transform \[0\] hits no target. Layers found: \[\]\. layers_pattern 'h' names no list"),
    ],
    ids=str,
)
def test_layers_that_match_nothing_are_told_in_the_same_words(layers, pattern, said):
    modules = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    config = pj.LoraConfig(target_modules=["q_proj"], layers_to_transform=layers, layers_pattern=pattern)
    with pytest.raises(ValueError, match=said):
        check_targets(config, modules, modules)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+b",
        r"(a|b)*c?(ab?){1,2}",
        r"(?!.*lm).*(a|ab)+",
        r"^(x\d+\.?)*$",
        r"[^a]*(a[a-c]+)*",
        r"(?i)(A+b)*",
        r"(?i:A+b)*c?",
        r"(?i)(?-i:a+b)*",
    ]
    + [r"(\w+\.)+\bq", r"(a*)*", r"(|a)+b", r"((a|ab)(c|bcd))*", r"(\Ba+)+", r"(.)*\D(\S\s?)*", r"(?<!a)(b.*)+"],
)
def test_bounded_matches_are_pythons(pattern):
    letters = random.Random(0)
    texts = ["".join(letters.choices("abcqx.1_ AB", k=letters.randint(0, 9))) for _ in range(400)]
    texts += ["abab", "aaab", "x1.x2.", "ab", "abcdbcd", "a.b.q"]
    assert not is_quick(pattern)
    for text in texts:
        assert matches(pattern, text) is (re.fullmatch(pattern, text) is not None), text


def test_references_in_slow_expressions_are_refused():
    with pytest.raises(ValueError, match="with groupref and repetitions in each other may take forever"):
        matches(r"(a+)+\1b", "aaab")

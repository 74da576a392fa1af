"""Programs and expressions that come with a file take bounded time."""

import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from peft_jax.core.bounded_regex import matches
from peft_jax.core.time_limit import TooLongError, time_limit
from peft_jax.prompts.tokenizer import read_tokenizer

NAME = "model.layers.0.self_attn.q_proj" * 3
PATTERNS = [
    "(a+)+$",
    "(.*)*x",
    "(.*.*)*y",
    "((a|aa)+)+$",
    "(.{1,500}){1,500}q",
    "(a{1,1000}){1,1000}",
    "(.*){50}x",
    "(.|..)*z",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expressions_that_backtrack_are_quick(pattern: str) -> None:
    begin = time.process_time()
    assert not matches(pattern, NAME)
    assert time.process_time() - begin < 3


def test_what_takes_longer_than_its_limit_is_stopped() -> None:
    begin = time.monotonic()
    with pytest.raises(TooLongError, match=r"longer than 0\.2 s"), time_limit(0.2):
        while True:
            pass
    assert time.monotonic() - begin < 5
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is raised afterwards


TEMPLATES = {
    "a power": ("{{ 2 ** 2 }}", r"computes with '\*\*'"),
    "a large number": ("{{ 'a' * 10000000000 }}", "computes with '1000000'"),
    "a long text": ("a" * 1_000_001, "no text of at most 1000000 characters"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_that_one_operation_would_hang_in_are_refused(case: str, tmp_path: pytest.TempPathFactory) -> None:
    template, said = TEMPLATES[case]
    letters = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=template).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=said):
        read_tokenizer(str(tmp_path))

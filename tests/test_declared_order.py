"""The modules of our models are in the order in which PyTorch declares theirs, by which some of PEFT's files count."""

import pytest
from cases import ARCHITECTURES

from peft_jax.core.declared_order import in_declared_order
from peft_jax.models.registry import BY_MODEL_TYPE

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

QUICK = ("llama", "opt", "qwen3_5_text", "xlm-roberta")  # one of each way in which the order is told
MODEL_TYPES = [
    pytest.param(name, model_type, id=model_type, marks=() if model_type in QUICK else pytest.mark.slow)
    for name, row in ARCHITECTURES.items()
    for model_type in row.model_types
]
ENCODERS = {"bert": "MaskedLM", "t5": "Seq2SeqLM"}
OF_VISION = ("vision_tower", "visual", "multi_modal_projector")  # which our models of text have not


@pytest.mark.parametrize(("name", "model_type"), MODEL_TYPES)
def test_modules_are_in_pytorchs_order(name, model_type):
    row = ARCHITECTURES[name]
    fields = {**row.sizes, **row.model_types[model_type]}
    config = transformers.AutoConfig.for_model(model_type, **fields)
    kind = ENCODERS.get(name, "CausalLM")
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    told = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    family = BY_MODEL_TYPE[model.config.model_type]
    declared = family.declared_modules(family.config.from_hf(told))
    linear = [path for path, part in model.named_modules() if isinstance(part, torch.nn.Linear | Conv1D)]
    linear = [path for path in linear if not set(path.split(".")) & set(OF_VISION)]
    assert in_declared_order(sorted(linear), declared) == linear
    assert len(linear) > 4

"""The records of BERT, and of RoBERTa and XLM-RoBERTa."""

import dataclasses

from peft_jax.interop.checkpoint import Row
from peft_jax.models.bert.config import BertConfig, RobertaConfig
from peft_jax.models.bert.model import Bert, Roberta
from peft_jax.models.bert.task_heads import CLASSIFIERS
from peft_jax.models.config import FEATURE_EXTRACTION, MASKED_LM, SEQ_CLS
from peft_jax.models.family import OTHERWISE, Family, Sharding, rows_by_layout, stacked_layouts, targets

BEFT = targets("value")
IA3 = targets("key", "value", "output.dense", feedforward_modules=("output.dense",))


def rows(family: Family, config: BertConfig) -> tuple[Row, ...]:
    """Rows of all leaves; a decoder that is not tied has the bias by another name."""
    found = rows_by_layout(family, config)
    if config.task_type != MASKED_LM or config.tie_word_embeddings:
        return found
    decoder = family.heads[MASKED_LM]
    bias = f"{decoder.rpartition('.')[0]}.bias"
    renamed = []
    for row in found:
        renamed.append(row._replace(key=f"{decoder}.bias") if row.path == bias else row)
    return tuple(renamed)


BERT = Family(
    config=BertConfig,
    module=Bert,
    layouts=stacked_layouts("layer"),
    backbone="bert",
    embedding="embeddings.word_embeddings",
    heads={MASKED_LM: "cls.predictions.decoder", **CLASSIFIERS},
    peft_defaults={
        "bert": {
            OTHERWISE: targets("query", "value"),
            "BEFT": BEFT,
            "IA3": IA3,
            "LN_TUNING": {},
        },
    },
    sharding=Sharding(
        columns=r"self\.(query|key|value)|intermediate\.dense", rows=r"output\.dense", tables="word_embeddings"
    ),
    extras=(r"(bert\.)?pooler\..*",),
    ignored=(r"(.*\.)?embeddings\.position_ids",),
    renamed={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},  # TensorFlow's names
    own_rows=rows,
    replicable=tuple(BertConfig.tasks),
)

ROBERTA = dataclasses.replace(
    BERT,
    config=RobertaConfig,
    module=Roberta,
    backbone="roberta",
    heads={MASKED_LM: "lm_head.decoder", **CLASSIFIERS},
    class_layers={SEQ_CLS: "classifier.out_proj"},
    peft_defaults={
        "roberta": {
            OTHERWISE: targets("query", "value"),
            "ADALORA": targets("query", "key", "value", "dense"),
            "BEFT": BEFT,
            "IA3": IA3,
            "LN_TUNING": {},
        },
        "xlm-roberta": {
            OTHERWISE: targets("query", "value"),
            "ADALORA": {},
            "BEFT": {},
            "IA3": {},
            "LN_TUNING": {},
            "VBLORA": {},
        },
    },
    extras=(r"(roberta\.)?pooler\..*",),
    replicable=(FEATURE_EXTRACTION,),
)

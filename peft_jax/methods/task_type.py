"""PEFT's names for what a model does."""

import enum


class TaskType(enum.StrEnum):
    """The task of an adapter, for the field ``task_type`` of every config; a plain string of the same name will do.

    Example:
        >>> TaskType.CAUSAL_LM == "CAUSAL_LM"
        True
    """

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

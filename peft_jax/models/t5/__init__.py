"""The T5 family: T5, T5 v1.1, FLAN-T5 and mT5."""

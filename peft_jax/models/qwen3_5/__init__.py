"""Qwen3.5: the text model, whose layers have a gated memory of fixed size, or attend."""

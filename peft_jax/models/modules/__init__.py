"""Layers, attention and heads that several architectures share."""

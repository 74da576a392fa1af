"""Falcon, in both of its architectures."""

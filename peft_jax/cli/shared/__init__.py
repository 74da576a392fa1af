"""Pieces that several commands use."""

"""Gemma 1 and 2, and the text model of Gemma 3."""

"""The text model of Gemma 4."""

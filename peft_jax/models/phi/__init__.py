"""Phi-1, Phi-1.5 and Phi-2."""

"""Paths and targets, adapted leaves, partition and masks, merge."""

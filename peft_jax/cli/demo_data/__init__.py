"""Paths of the checkpoint and the instruction data that ship with the package."""

from pathlib import Path

MODEL = Path(__file__).with_name("model")
TRAIN = Path(__file__).with_name("instructions_train.json")
HELD_OUT = Path(__file__).with_name("instructions_heldout.json")

"""What PEFT computes from a damaged adapter that is accepted: the same, or it is a failure."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from subjects import Trunk
from watchdog import Late, watchdog

IDS = np.array([[5, 17, 2, 23, 9], [8, 8, 3, 21, 1]])
CLOSE = 1e-5  # of the largest logit


class Oracle:
    """PEFT on the base of `subjects.Trunk`.

    Attributes:
        compared: How many adapters both loaded.
        refused: How many PEFT refuses that are loaded here.
        alive: How many of those compared change what the base computes.
    """

    def __init__(self) -> None:
        transformers.utils.logging.set_verbosity_error()
        self.base = transformers.AutoModelForCausalLM.from_pretrained(Trunk.folder).eval()
        self.compared = self.refused = self.alive = 0
        with torch.no_grad():
            self.untouched = self.base(input_ids=torch.tensor(IDS)).logits.numpy()

    def __call__(self, folder: Path, found: Any) -> None:
        """Raise AssertionError unless an adapter that was loaded computes here what it computes in PEFT."""
        try:
            with watchdog():  # PEFT's regular expressions may take for ever
                wanted = self.logits(folder)
        except (Exception, Late):  # PEFT has no errors of its own for most damage
            self.refused += 1
            return
        logits = np.asarray(found(IDS).logits)
        self.compared += 1
        self.alive += bool(np.abs(wanted[:, -IDS.shape[1] :] - self.untouched).max() > 1e-3)
        if logits.shape != wanted.shape:
            raise AssertionError(f"the logits are {logits.shape}, and PEFT's {wanted.shape}")
        distance = np.abs(logits - wanted).max() / np.abs(wanted).max()
        if not distance <= CLOSE:
            raise AssertionError(f"the logits differ from PEFT's by {distance:.2g} of the largest")

    def logits(self, folder: Path) -> np.ndarray:
        """The logits that PEFT computes."""
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(self.base), str(folder)).eval()
        with torch.no_grad():
            found: np.ndarray = theirs(input_ids=torch.tensor(IDS)).logits.numpy()
        return found

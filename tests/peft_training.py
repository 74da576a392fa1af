"""Training in PEFT, as its documentation says, for tests that train the same here."""

from collections.abc import Iterable, Mapping
from typing import Any


def train_in_peft(model: Any, batches: Iterable[Mapping[str, Any]], rate: float) -> list[float]:
    """A step of AdamW on each batch; what a method updates after a step is told. Returns the losses."""
    import torch

    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    losses = []
    for number, batch in enumerate(batches, 1):
        loss = model(**{name: torch.tensor(array).long() for name, array in batch.items()}).loss
        for penalty in ("_get_kasa_loss", "_get_monteclora_loss"):  # PEFT leaves them to its caller
            if hasattr(model.base_model, penalty):
                loss = loss + getattr(model.base_model, penalty)()
        loss.backward()
        optimizer.step()
        if hasattr(model.base_model, "update_and_allocate"):
            first = 0 if model.peft_type == "ADAMSS" else 1  # the number of the first step, as PEFT's callback has it
            model.base_model.update_and_allocate(number - 1 + first)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

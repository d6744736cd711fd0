"""What a user may have called during training: one small protocol."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """How an epoch went."""

    number: int
    """From 1."""
    loss: float
    """Mean over its images."""
    accuracy: float | None
    """On the validation images; None without any."""
    seconds: float


class Callback(Protocol):
    """Called on the master after each epoch. It travels there by pickle; ``FitResult`` has it as it ended."""

    def on_epoch(self, epoch: Epoch) -> bool | None:
        """Look at the epoch; True ends the training."""

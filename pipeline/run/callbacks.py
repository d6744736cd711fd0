"""What a user may have called during training: one small protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """How an epoch went."""

    number: int
    """From 1."""
    loss: float
    """Mean over its images."""
    accuracy: float | None
    """On the validation images; None without any, or where other metrics are wanted."""
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Everything that was measured on the validation images, by name."""
    images: int = 0
    """How many were trained on."""
    training_seconds: float = 0.0
    """Of ``seconds``, without the validation."""


class Callback(Protocol):
    """Called on the master after each epoch. It travels there by pickle; ``FitResult`` has it as it ended."""

    def on_epoch(self, epoch: Epoch) -> bool | None:
        """Look at the epoch; True ends the training."""

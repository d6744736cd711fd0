"""What outputs are held against: named functions of a module, so that they travel to workers."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree


def of_all(output: Any, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy, summed over all tensors that are returned; each smaller map against every second, third ... label.

    Most networks return one tensor; with auxiliary heads or deep supervision it is a tuple, a list or a dictionary.
    """
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    for one in pytree.tree_leaves(output):
        total = total + F.cross_entropy(one, _like(y, one))
    return total


def of_logits(output: Any, y: torch.Tensor) -> torch.Tensor:
    """Of a dataclass with a field `logits`, as transformers' models return."""
    return of_all(output.logits, y)


def of_first(output: Any, y: torch.Tensor) -> torch.Tensor:
    """Of the first of several outputs; the others are features."""
    return of_all(output[0], y)


def of_stack(output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of one tensor that has all heads along its second axis, (B, heads, K, ...)."""
    return of_all(output.unbind(1), y)


def of_image(output: Any, y: torch.Tensor) -> torch.Tensor:
    """Squared difference of an image of numbers; of several outputs the first is the image."""
    image = output if isinstance(output, torch.Tensor) else output[0]
    return F.mse_loss(image, y)


def of_variational(output: Any, y: torch.Tensor) -> torch.Tensor:
    """A variational autoencoder's: the image, and how far mean and logarithm of the variance are from (0, 0)."""
    image, mean, log_variance = output[:3]
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return F.mse_loss(image, y) + 0.1 * divergence


def _like(y: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Labels at the places of a map of scores, (B, K, ...)."""
    for axis, size in enumerate(scores.shape[2:], start=1):
        y = y[(slice(None),) * axis + (slice(None, None, y.shape[axis] // size),)]
    return y

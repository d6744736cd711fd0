"""BatchNorm over images that are split between ranks: the same mean and variance as over the whole batch.

Every rank sums its own images, an exchange adds the sums up, and each rank normalises with the result. All three parts
are differentiable, so the backward pass through the exchange gives the exact gradient. The sums are of distances from
the running mean, which all ranks know: sums of squares of the values themselves would lose digits where the mean is
large beside the spread.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def sums(module: nn.Module, x_BCE: torch.Tensor) -> torch.Tensor:
    """Sums ``s_2C`` of distances and of squared distances over this rank's images and positions."""
    assert isinstance(module, _BatchNorm)
    distance = x_BCE - _shift(module, x_BCE)
    axes = [axis for axis in range(x_BCE.dim()) if axis != 1]
    return torch.stack([distance.sum(axes), distance.square().sum(axes)])


def normalise(module: nn.Module, x_BCE: torch.Tensor, total_2C: torch.Tensor, count: int) -> torch.Tensor:
    """The output for this rank's images; ``total_2C`` are the sums over all ranks, of ``count`` values per channel."""
    assert isinstance(module, _BatchNorm)
    distance, variance = _moments(total_2C, count)
    shape = [1, -1] + [1] * (x_BCE.dim() - 2)
    scale = (variance + module.eps).rsqrt()
    if module.affine:
        scale = scale * module.weight
    centred = x_BCE - _shift(module, x_BCE) - distance.view(shape)
    y_BCE = centred * scale.view(shape)
    return y_BCE + module.bias.view(shape) if module.affine else y_BCE


@torch.no_grad()
def track(module: nn.Module, total_2C: torch.Tensor, count: int) -> None:
    """Update the running statistics as the undivided BatchNorm would.

    Raises ``ValueError`` where there is one value per channel, as torch does.
    """
    assert isinstance(module, _BatchNorm)
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {count}")
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)
    distance, variance = _moments(total_2C, count)
    module.running_mean.add_(momentum * distance)  # new mean = (1 - m) old + m (old + distance)
    module.running_var.mul_(1 - momentum).add_(momentum * variance * count / (count - 1))


def _moments(total_2C: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean distance from the shift, and variance (of the whole batch, biased)."""
    distance = total_2C[0] / count
    return distance, total_2C[1] / count - distance.square()


def _shift(module: _BatchNorm, x_BCE: torch.Tensor) -> torch.Tensor:
    shape = [1, -1] + [1] * (x_BCE.dim() - 2)
    mean = module.running_mean
    return x_BCE.new_zeros(()) if mean is None else mean.detach().clone().view(shape)

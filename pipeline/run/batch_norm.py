"""BatchNorm over images that are split between ranks: the same mean and variance as over the whole batch.

Every rank sums over its own images, an exchange adds the sums up, and each rank normalises with the result. All three
parts are differentiable, so the backward pass through the exchange gives the exact gradient. The sums are of distances
from the running mean, which all ranks know: sums of squares of the values themselves would lose digits where the mean
is large beside the spread.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def sums(module: nn.Module, x_BCE: torch.Tensor) -> torch.Tensor:
    """Sums ``s_2C`` of distances and of squared distances over this rank's images and positions."""
    assert isinstance(module, _BatchNorm)
    axes = [axis for axis in range(x_BCE.dim()) if axis != 1]
    count = x_BCE.numel() // x_BCE.shape[1]
    variance_C, mean_C = torch.var_mean(x_BCE, axes, correction=0)
    distance_C = mean_C - _shift(module, mean_C)
    return torch.stack([distance_C * count, (variance_C + distance_C.square()) * count])


def normalise(module: nn.Module, x_BCE: torch.Tensor, total_2C: torch.Tensor, count: int) -> torch.Tensor:
    """The output for this rank's images; ``total_2C`` are the sums over all ranks, of ``count`` values per channel."""
    assert isinstance(module, _BatchNorm)
    distance_C, variance_C = _moments(total_2C, count)
    scale_C = (variance_C + module.eps).rsqrt()
    if module.affine:
        scale_C = scale_C * module.weight
    offset_C = -(distance_C + _shift(module, distance_C)) * scale_C
    if module.affine:
        offset_C = offset_C + module.bias
    shape = [1, -1] + [1] * (x_BCE.dim() - 2)
    return torch.addcmul(offset_C.view(shape), x_BCE, scale_C.view(shape))


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


def _shift(module: _BatchNorm, like_C: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like_C) if module.running_mean is None else module.running_mean.detach().clone()

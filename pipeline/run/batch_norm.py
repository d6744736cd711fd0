"""BatchNorm over images that are split between ranks: the same mean and variance as over the whole batch.

Every rank takes mean and variance of its own images, an exchange brings those of all ranks together, and each rank
combines them (Chan, Golub and LeVeque, 1979) and normalises with the result. All parts are differentiable, so the
backward pass through the exchange gives the exact gradient. Sums of squares would travel as easily, but lose all digits
where the mean is large beside the spread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def moments(x_BCE: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """``m_RC``: mean and variance of this rank's images in rows ``2 * rank`` and the next, zeros elsewhere."""
    axes = [axis for axis in range(x_BCE.dim()) if axis != 1]
    variance_C, mean_C = torch.var_mean(x_BCE, axes, correction=0)
    zero = torch.zeros_like(mean_C)
    return torch.stack([zero] * (2 * rank) + [mean_C, variance_C] + [zero] * (2 * (ranks - rank - 1)))


def normalise(module: nn.Module, x_BCE: torch.Tensor, moments_RC: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
    """The output for this rank's images; ``moments_RC`` are those of all ranks, which have so many ``images``."""
    assert isinstance(module, _BatchNorm)
    mean_C, variance_C = _combined(moments_RC, images)
    scale_C = (variance_C + module.eps).rsqrt()
    if module.affine:
        scale_C = scale_C * module.weight
    offset_C = -mean_C * scale_C
    if module.affine:
        offset_C = offset_C + module.bias
    shape = [1, -1] + [1] * (x_BCE.dim() - 2)
    return torch.addcmul(offset_C.view(shape), x_BCE, scale_C.view(shape))


@torch.no_grad()
def track(module: nn.Module, moments_RC: torch.Tensor, images: Sequence[int], positions: int) -> None:
    """Update the running statistics as the undivided BatchNorm would, with ``positions`` values per image and channel.

    Raises ``ValueError`` where there is one value per channel, as torch does.
    """
    assert isinstance(module, _BatchNorm)
    count = sum(images) * positions
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {count}")
    assert module.running_mean is not None
    assert module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    momentum = module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)
    mean_C, variance_C = _combined(moments_RC, images)
    # By `data`, so that it counts as no change, as with torch: an earlier use of the module may have kept them.
    module.running_mean.data.mul_(1 - momentum).add_(momentum * mean_C)
    module.running_var.data.mul_(1 - momentum).add_(momentum * variance_C * count / (count - 1))


def _combined(moments_RC: torch.Tensor, images: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance over all ranks' images."""
    part_R1 = torch.tensor(images, dtype=moments_RC.dtype, device=moments_RC.device).unsqueeze(1) / sum(images)
    means_RC, variances_RC = moments_RC[0::2], moments_RC[1::2]
    mean_C = (part_R1 * means_RC).sum(0)
    return mean_C, (part_R1 * (variances_RC + (means_RC - mean_C).square())).sum(0)

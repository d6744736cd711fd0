"""BatchNorm over images that are split between ranks: the same mean and variance as over the whole batch.

Every rank takes mean and variance of its own images, an exchange brings those of all ranks together, and each rank
combines them (Chan, Golub and LeVeque, 1979) and normalises with the result. Both parts have gradients, so the backward
pass through the exchange gives the exact one. Sums of squares would travel as easily, but lose all digits
where the mean is large beside the spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn


def moments(x_BCE: torch.Tensor, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``x_BCE`` itself, and ``m_RC``: mean and variance of this rank's images in rows ``2 * rank`` and the next.

    The other rows are zeros. What goes on with the images must take those given back: the gradient of the moments is
    added to theirs at once, which saves the sum of two gradients of all images.
    """
    same_BCE, mean_C, variance_C = _Moments.apply(x_BCE)  # type: ignore[no-untyped-call]
    zero = torch.zeros_like(mean_C)
    return same_BCE, torch.stack([zero] * (2 * rank) + [mean_C, variance_C] + [zero] * (2 * (ranks - rank - 1)))


def normalise(
    x_BCE: torch.Tensor,
    moments_RC: torch.Tensor,
    images: Sequence[int],
    weight_C: torch.Tensor | None,
    bias_C: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The output for this rank's images; ``moments_RC`` are those of all ranks, which have so many ``images``."""
    normalised: torch.Tensor = _Normalised.apply(  # type: ignore[no-untyped-call]
        x_BCE, moments_RC, images, weight_C, bias_C, eps
    )
    return normalised


def of_all(
    x_BCE: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output for a batch that is whole, and its ``m_RC``, mean and variance, as those of one rank."""
    output, moments_RC = _OfAll.apply(x_BCE, weight_C, bias_C, eps)  # type: ignore[no-untyped-call]
    return output, moments_RC


class _OfAll(torch.autograd.Function):
    """BatchNorm with a mean and a variance that are exact to rounding, whatever the order in memory."""

    @staticmethod
    def forward(
        ctx: Any, x_BCE: torch.Tensor, weight_C: torch.Tensor | None, bias_C: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mean_C, variance_C = _mean_and_variance(x_BCE)
        ctx.save_for_backward(x_BCE, mean_C, (variance_C + eps).rsqrt(), weight_C)
        ctx.eps = eps
        moments_RC = torch.stack([mean_C, variance_C])
        ctx.mark_non_differentiable(moments_RC)
        output = nn.functional.batch_norm(x_BCE, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)
        return output, moments_RC

    @staticmethod
    def backward(ctx: Any, gradient_BCE: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BCE, mean_C, inverse_C, weight_C = ctx.saved_tensors
        affine = weight_C is not None
        found = torch.ops.aten.native_batch_norm_backward(
            _dense_as(x_BCE, gradient_BCE), x_BCE, weight_C, None, None, mean_C, inverse_C, True, ctx.eps,
            [ctx.needs_input_grad[0], affine, affine],
        )  # fmt: skip
        return *found, None


class _Moments(torch.autograd.Function):
    """The images, with their mean and (biased) variance over all axes but the channels'."""

    @staticmethod
    def forward(ctx: Any, x_BCE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean_C, variance_C = _mean_and_variance(x_BCE)
        ctx.save_for_backward(x_BCE, mean_C)
        ctx.set_materialize_grads(False)
        return x_BCE, mean_C, variance_C

    @staticmethod
    def backward(
        ctx: Any,
        gradient_BCE: torch.Tensor | None,
        mean_gradient_C: torch.Tensor | None,
        variance_gradient_C: torch.Tensor | None,
    ) -> torch.Tensor | None:
        if mean_gradient_C is None or variance_gradient_C is None:
            return gradient_BCE
        x_BCE, mean_C = cast(tuple[torch.Tensor, ...], ctx.saved_tensors)
        slope_C = 2 * variance_gradient_C / _per_channel(x_BCE)
        offset_C = mean_gradient_C / _per_channel(x_BCE) - slope_C * mean_C
        slope_1C1, offset_1C1 = _over_channels(slope_C, x_BCE), _over_channels(offset_C, x_BCE)
        # Not in place, as others may hold the same gradient.
        scaled_BCE = x_BCE * slope_1C1 if gradient_BCE is None else torch.addcmul(gradient_BCE, x_BCE, slope_1C1)
        return scaled_BCE.add_(offset_1C1)


class _Normalised(torch.autograd.Function):
    """What BatchNorm makes of the moments of all ranks, by torch's own kernels, with the gradient of those moments."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BCE: torch.Tensor,
        moments_RC: torch.Tensor,
        images: Sequence[int],
        weight_C: torch.Tensor | None,
        bias_C: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        mean_C, variance_C = _combined(moments_RC, images)
        ctx.save_for_backward(x_BCE, moments_RC, mean_C, variance_C, weight_C)
        ctx.images, ctx.eps = images, eps
        return nn.functional.batch_norm(x_BCE, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, gradient_BCE: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_BCE, moments_RC, mean_C, variance_C, weight_C = ctx.saved_tensors
        scale_C = torch.ones_like(mean_C) if weight_C is None else weight_C
        # With y = weight * (x - mean) / sqrt(variance + eps) + bias, all but the first follow from the last two.
        x_gradient_BCE, weight_gradient_C, bias_gradient_C = torch.ops.aten.native_batch_norm_backward(
            _dense_as(x_BCE, gradient_BCE),
            x_BCE,
            scale_C,
            mean_C,
            variance_C,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        inverse_C = (variance_C + ctx.eps).rsqrt()
        slope_C = scale_C * inverse_C
        mean_gradient_C = -bias_gradient_C * slope_C
        variance_gradient_C = weight_gradient_C * slope_C * inverse_C * -0.5
        # As in `_combined`; the mean of all adds nothing to the gradient of the variance: there, that is at its least.
        part_R1 = _parts(moments_RC, ctx.images)
        variances_gradient_RC = part_R1 * variance_gradient_C
        means_gradient_RC = part_R1 * mean_gradient_C + 2 * variances_gradient_RC * (moments_RC[0::2] - mean_C)
        moments_gradient_RC = torch.stack([means_gradient_RC, variances_gradient_RC], dim=1).view_as(moments_RC)
        affine = (None, None) if weight_C is None else (weight_gradient_C, bias_gradient_C)
        return x_gradient_BCE, moments_gradient_RC, None, *affine, None


@torch.no_grad()
def track(
    mean_C: torch.Tensor,
    variance_C: torch.Tensor,
    momentum: float,
    moments_RC: torch.Tensor,
    images: Sequence[int],
    positions: int,
) -> None:
    """Update running statistics as the undivided BatchNorm would, with ``positions`` values per image and channel.

    Raises ``ValueError`` where there is one value per channel, as torch does.
    """
    count = sum(images) * positions
    if count < 2:
        raise ValueError(f"Expected more than 1 value per channel when training, got {count}")
    new_mean_C, new_variance_C = _combined(moments_RC, images)
    # By `data`, so that it counts as no change, as with torch: an earlier use of the module may have kept them.
    mean_C.data.mul_(1 - momentum).add_(momentum * new_mean_C)
    variance_C.data.mul_(1 - momentum).add_(momentum * new_variance_C * count / (count - 1))


def _mean_and_variance(x_BCE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance of each channel.

    The sum of the centred squares is as safe as torch's own way and, over strided axes, several times as fast.
    """
    mean_C = x_BCE.mean([0, *range(2, x_BCE.dim())])
    centred_BCP = (x_BCE - _over_channels(mean_C, x_BCE)).reshape(*x_BCE.shape[:2], -1)
    return mean_C, torch.linalg.vecdot(centred_BCP, centred_BCP).sum(0) / _per_channel(x_BCE)


def _combined(moments_RC: torch.Tensor, images: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and (biased) variance over all ranks' images."""
    part_R1 = _parts(moments_RC, images)
    means_RC, variances_RC = moments_RC[0::2], moments_RC[1::2]
    mean_C = (part_R1 * means_RC).sum(0)
    return mean_C, (part_R1 * (variances_RC + (means_RC - mean_C).square())).sum(0)


def _over_channels(value_C: torch.Tensor, x_BCE: torch.Tensor) -> torch.Tensor:
    """One value per channel, to be broadcast over images and positions."""
    return value_C.view([1, -1] + [1] * (x_BCE.dim() - 2))


def _per_channel(x_BCE: torch.Tensor) -> int:
    return x_BCE.numel() // x_BCE.shape[1]


def _parts(moments_RC: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
    """Each rank's part of all images."""
    return torch.tensor(images, dtype=moments_RC.dtype, device=moments_RC.device).unsqueeze(1) / sum(images)


def _dense_as(x_BCE: torch.Tensor, gradient_BCE: torch.Tensor) -> torch.Tensor:
    """The gradient in the memory order of the images, which torch's kernel takes for granted."""
    last = x_BCE.dim() == 4 and not x_BCE.is_contiguous() and x_BCE.is_contiguous(memory_format=torch.channels_last)
    return gradient_BCE.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

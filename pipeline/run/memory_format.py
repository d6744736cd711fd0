"""The order of a tensor's numbers in memory: images by channel as torch has them, or with the channels last.

What torch calls ``channels_last`` suits many networks on a CPU, above all those with narrow or depthwise convolutions
and BatchNorm, and slows others down. Shapes and results are the same. Only tensors with four axes know the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from pipeline.graph.operations import Graph

_AXES = 4


def may_have_channels_last(graph: Graph) -> bool:
    """Whether torch can run the model so.

    The backward pass of GroupNorm ends in a segmentation fault (torch 2.13) where its weights need a gradient and its
    input, with the channels last, needs none: at the beginning of a network, or behind frozen layers. What a part that
    runs as it is makes of another order is not known.
    """
    return not graph.opaque and not any(one.main.operator == "group_norm" for one in graph.operations)


def empty(shape: Sequence[int], *, channels_last: bool, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An uninitialised tensor of ``shape`` in that order."""
    return torch.empty(
        shape,
        dtype=dtype,
        device=device,
        memory_format=torch.channels_last if channels_last and len(shape) == _AXES else torch.contiguous_format,
    )


def arranged(tensor: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """The tensor itself if it is in that order, else a copy that is."""
    if not channels_last or tensor.dim() != _AXES:
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)


def arrange(tensors: Iterable[torch.Tensor], *, channels_last: bool) -> None:
    """Bring parameters and buffers into that order, in place.

    Also where axes of length 1 make both orders the same numbers in memory: torch chooses its kernels by the strides,
    and a depthwise convolution of small images takes up to a hundred times as long with those of the other order.
    """
    for tensor in tensors:
        if tensor.dim() != _AXES:
            continue
        wanted = empty(tensor.shape, channels_last=channels_last, dtype=tensor.dtype, device="meta").stride()
        if tensor.stride() != wanted:
            other = empty(tensor.shape, channels_last=channels_last, dtype=tensor.dtype, device=tensor.device)
            tensor.data = other.copy_(tensor.data)


def in_memory_order(tensor: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """The same numbers with the axes as they follow each other in memory: ``(B, C, H, W)`` as ``(B, H, W, C)``."""
    return tensor.permute(0, 2, 3, 1) if channels_last and tensor.dim() == _AXES else tensor


def flat(tensor: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """All its numbers as they follow each other in memory; see ``shaped_as``."""
    return in_memory_order(tensor, channels_last=channels_last).reshape(-1)


def shaped_as(numbers: torch.Tensor, like: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """What ``flat`` made of a tensor shaped as ``like``, as a view with that shape."""
    ordered = in_memory_order(like, channels_last=channels_last)
    viewed = numbers.view(ordered.shape)
    return viewed if ordered is like else viewed.permute(0, 3, 1, 2)

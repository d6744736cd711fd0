"""The random part of dropout and stochastic depth: on every shard the mask that one device would have drawn.

All ranks draw all masks, whole, in the order of the operations, from generators that began with one seed, and keep what
belongs to their box. A mask is drawn exactly as torch draws it on a CPU, so that a plain loop that begins with
``torch.manual_seed`` and draws nothing else meets the same masks.
"""

from __future__ import annotations

import math

import torch

from pipeline.graph.rules import Noise
from pipeline.graph.trace import Graph
from pipeline.plan.instructions import TensorSpec
from pipeline.plan.layouts import Box, Range

# Dropout that keeps mean and variance of SELU's output sets what it drops to the least value SELU can have.
_SELU_LIMIT = 1.7580993408473766


class Masks:
    """The masks of one step."""

    def __init__(self, graph: Graph, seed: int) -> None:
        self._random = tuple(operation for operation in graph.operations if operation.noise is not None)
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn: dict[str, torch.Tensor] = {}

    def draw(self, batch_size: int, dtype: torch.dtype) -> None:
        """Draw the masks for one batch."""
        self._drawn.clear()
        for operation in self._random:
            assert operation.noise is not None
            assert operation.shape is not None
            shape = _mask_shape(operation.noise, (batch_size, *operation.shape))
            if operation.noise.p < 1:
                self._drawn[operation.name] = _empty(shape, operation.noise.order, dtype).bernoulli_(
                    1 - operation.noise.p, generator=self._generator
                )
            else:
                self._drawn[operation.name] = torch.zeros(shape, dtype=dtype)

    def apply(self, name: str, noise: Noise, x: torch.Tensor, spec: TensorSpec, box: Box) -> torch.Tensor:
        """The operation's output for the local part ``x``, which is in ``box``."""
        mask = self._drawn[name]
        whole = Box(Range(0, spec.images), Range(0, spec.channels))
        index = tuple(
            one if extent > 1 else slice(None) for one, extent in zip(spec.slices(whole, box), mask.shape, strict=True)
        )
        mask = mask[index].to(x.device)
        if not noise.alpha:
            return x * (mask / (1 - noise.p)) if noise.p < 1 else x * mask
        if noise.p == 1:
            return x * mask
        scale = 1 / math.sqrt((_SELU_LIMIT**2 * noise.p + 1) * (1 - noise.p))
        shift = (mask - 1) * (_SELU_LIMIT * scale) + _SELU_LIMIT * scale * noise.p
        return x * (mask * scale) + shift


def _empty(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor whose axes are in memory as those of the tensor that one device would have drawn for."""
    order = order or tuple(range(len(shape)))
    outermost_first = [shape[axis] for axis in order]
    return torch.empty(outermost_first, dtype=dtype).permute([order.index(axis) for axis in range(len(order))])


def _mask_shape(noise: Noise, shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = {"element": len(shape), "channel": 2, "image": 1, "batch": 0}[noise.per]
    return shape[:kept] + (1,) * (len(shape) - kept)

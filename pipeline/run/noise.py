"""Random numbers within a network: on every shard those that one device would have drawn.

All ranks draw all of them, whole, in the order of the calls, from torch's own generator, which begins with one seed,
and keep what belongs to their part. A mask of dropout is drawn exactly as torch draws it on a CPU, so that a plain loop
that begins with ``torch.manual_seed`` meets the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from pipeline.graph.interpret import Caller
from pipeline.graph.nodes import Node
from pipeline.graph.operations import Graph, Operation
from pipeline.plan.instructions import TensorSpec
from pipeline.plan.layouts import Box, Range

# Dropout that keeps mean and variance of SELU's output sets what it drops to the least value SELU can have.
_SELU_LIMIT = 1.7580993408473766


class Draws:
    """The random numbers of one step."""

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self._graph, self._device = graph, device
        self._noisy = {one.name: one for one in graph.operations if one.noise is not None}
        self._callers = {
            training: [Caller(one) for node in graph.sources if (one := _in_mode(graph, node, training)) is not None]
            for training in (True, False)
        }
        self._masks: dict[str, torch.Tensor] = {}
        self.values: dict[str, torch.Tensor] = {}
        """By call, the tensors that were drawn, whole."""

    def draw(self, images: int, weight: Callable[[str], Any], *, training: bool) -> None:
        """Draw the random numbers for one batch."""
        self._masks.clear()
        made: dict[str, Any] = {}
        waiting = iter(self._callers[training])
        for name in self._graph.drawn:
            if name in self._noisy:
                if training:
                    self._masks[name] = _mask(self._noisy[name], images)
                continue
            for one in waiting:
                made[one.node.name] = one(made.__getitem__, weight, images)
                if one.node.name == name:
                    break
        self.values = {name: made[name].to(self._device) for name in self._graph.drawn if name in made}

    def apply(self, operation: Operation, x: torch.Tensor, spec: TensorSpec | None, box: Box) -> torch.Tensor:
        """The output of a random operation for the local part ``x``, which is in ``box``."""
        assert operation.noise is not None
        noise, mask = operation.noise, self._masks[operation.name]
        if spec is not None:
            whole = Box(Range(0, spec.images), Range(0, spec.channels))
            index = tuple(
                one if extent > 1 else slice(None)
                for one, extent in zip(spec.slices(whole, box), mask.shape, strict=True)
            )
            mask = mask[index]
        elif mask.shape[operation.images_axis] > 1:
            each = operation.per_image
            mask = mask.narrow(operation.images_axis, box.images.start * each, len(box.images) * each)
        mask = mask.to(x.device)
        if not noise.alpha:
            return x * (mask / (1 - noise.p)) if noise.p < 1 else x * mask
        if noise.p == 1:
            return x * mask
        scale = 1 / math.sqrt((_SELU_LIMIT**2 * noise.p + 1) * (1 - noise.p))
        shift = (mask - 1) * (_SELU_LIMIT * scale) + _SELU_LIMIT * scale * noise.p
        return x * (mask * scale) + shift


def _in_mode(graph: Graph, node: Node, training: bool) -> Node | None:
    return node if training else graph.evaluation.get(node.name, node)


def _mask(operation: Operation, images: int) -> torch.Tensor:
    """The mask of dropout for a whole batch."""
    noise = operation.noise
    assert noise is not None
    if noise.folded:
        axis = operation.images_axis
        shape = tuple(one * images if place == axis else one for place, one in enumerate(noise.folded))
    else:
        assert operation.shape is not None
        shape = (images, *operation.shape)
    kept = len(shape) if noise.per == "element" else 2
    shape = shape[:kept] + (1,) * (len(shape) - kept)
    if noise.p == 1:
        return torch.zeros(shape, dtype=operation.dtype)
    return _empty(shape, noise.order, operation.dtype).bernoulli_(1 - noise.p)


def _empty(shape: tuple[int, ...], order: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An empty tensor whose axes are in memory as those of the tensor that one device would have drawn for."""
    order = order or tuple(range(len(shape)))
    outermost_first = [shape[axis] for axis in order]
    return torch.empty(outermost_first, dtype=dtype).permute([order.index(axis) for axis in range(len(order))])

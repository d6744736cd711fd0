"""How long a step of torch's DistributedDataParallel will take: its buckets of gradients go around a ring as they fill.

Each bucket is summed by a ring all-reduce when its last gradient is there on all ranks, one bucket after the other and
beside the rest of the backward pass. An emulated device is taken for a real one, whose waiting is no work.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.operations import Graph
from pipeline.plan.costs import LAYOUTS, Costs
from pipeline.plan.link_cases import Links

Times = NDArray[np.float64]

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20
"""How many bytes close the first and every further bucket, unless one says otherwise to torch."""


def parts_of(batch_size: int, ranks: int) -> NDArray[np.int_]:
    """How many images of a batch each rank gets, (rank): equal parts, of which the first take the remainder."""
    found: NDArray[np.int_] = batch_size // ranks + (np.arange(ranks) < batch_size % ranks)
    return found


def part_seconds(costs: Costs, batch_size: int) -> Times:
    """How long each rank computes for its part of a batch in s, (rank, direction)."""
    found: Times = _segments(costs, batch_size).sum(axis=1)
    return found


def predict_data_parallel(graph: Graph, costs: Costs, batch_size: int, itemsize: int, links: Links) -> Times:
    """Predicted time of one step in s, (case), with equal parts of the batch on all ranks."""
    seconds = _segments(costs, batch_size)
    backward = seconds[..., 1]
    computed = costs.beginning + seconds[..., 0].sum(axis=1)
    summed = np.zeros(links.cases)
    for segment, size in _buckets(graph, costs, itemsize):
        # Backward, segments come last to first.
        ready = float((computed + backward[:, segment:].sum(axis=1)).max())
        summed = np.maximum(summed, ready) + _ring(costs, size, links)
    trained = {one.name: one.shape for op in graph.operations for one in op.parameters if one.trained}
    weights = sum(math.prod(shape) for shape in trained.values())
    update = float((costs.update_overhead + costs.update * weights).max())
    step: Times = np.maximum(summed, float((computed + backward.sum(axis=1)).max())) + update
    return step


def _segments(costs: Costs, batch_size: int) -> Times:
    """Every whole segment for a rank's part of the batch, (rank, segment, direction) in s."""
    images = np.maximum(parts_of(batch_size, costs.devices), 1)[:, None, None]  # who has none takes part with one
    return costs.whole_segments(images) * costs.stretch[:, LAYOUTS.index("ddp"), None, None]


def _buckets(graph: Graph, costs: Costs, itemsize: int) -> list[tuple[int, float]]:
    """The last segment, going backward, that each bucket waits for, and its bytes."""
    if costs.devices == 1:
        return []
    found: list[tuple[int, float]] = []
    segment, size = len(costs.segments), 0.0
    first_use: dict[str, str] = {}  # there, going backward, the gradient is complete
    for operation in graph.operations:
        for parameter in operation.parameters:
            first_use.setdefault(parameter.name, operation.name)
    for operation in reversed(graph.operations):
        place = costs.place_of(operation.name)
        segment = segment if place is None else min(segment, place)
        for parameter in reversed(operation.parameters):
            if not parameter.trained or first_use[parameter.name] != operation.name:
                continue
            size += math.prod(parameter.shape) * itemsize
            if size >= (BUCKET if found else FIRST_BUCKET):
                found.append((segment, size))
                size = 0.0
    return [*found, (segment, size)] if size else found


def _ring(costs: Costs, size: float, links: Links) -> Times:
    """How long it takes to sum a bucket of ``size`` bytes in s, (case)."""
    ranks = costs.devices
    hop = links.latency + size / ranks * links.seconds_per_byte
    if not links.alike:
        here = np.arange(ranks)
        hop = hop[:, here, (here + 1) % ranks]
    slowest: Times = hop.reshape(links.cases, -1).max(axis=1)
    return 2 * (ranks - 1) * slowest + size * float(costs.reducing.max())

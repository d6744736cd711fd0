"""The predicted step of DistributedDataParallel: what its buckets hide behind the backward pass."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from pipeline.graph.trace import Graph, trace
from pipeline.plan.costs import LAYOUTS
from pipeline.plan.data_parallel import BUCKET, FIRST_BUCKET, _buckets, part_seconds, parts_of, predict_data_parallel
from pipeline.plan.link_cases import Links
from pipeline.run.batches import part_of
from tests.unit.test_search import costs_of

BATCH = 8
RATE = 1e8
"""Bytes/s."""


def _network(hidden: int) -> Graph:
    """Convolutions with little to send and much to compute, then dense layers of which it is the other way round."""
    layers = [nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten()]
    return trace(nn.Sequential(*layers, nn.Linear(64 * 9, hidden), nn.Linear(hidden, 10)), torch.zeros(2, 3, 32, 32))


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.stem, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(self.stem(self.first(x)), self.first.weight)
        return self.last(y.mean((2, 3)))  # type: ignore[no-any-return]


def _bytes(graph: Graph) -> float:
    return 4 * sum(float(np.prod(one.shape)) for op in graph.operations for one in op.parameters)


def test_without_links_a_step_is_the_computing_of_the_largest_part() -> None:
    graph = _network(64)
    costs = costs_of(graph, [1e10, 1e10, 5e9])
    free = Links.uniform(np.array([0.0]), np.array([np.inf]))
    part = part_seconds(costs, BATCH)
    assert list(parts_of(BATCH, 3)) == [len(part_of(rank, 3, range(BATCH))) for rank in range(3)] == [3, 3, 2]
    assert list(parts_of(2, 3)) == [1, 1, 0]
    expected = [costs.only([rank]).whole_segments(3 if rank < 2 else 2)[0].sum(axis=0) for rank in range(3)]
    assert part == pytest.approx(np.array(expected))
    trained = _bytes(graph) / 4
    assert predict_data_parallel(graph, costs, BATCH, 4, free) == pytest.approx(part.sum(axis=1).max() + 1e-9 * trained)


@pytest.mark.parametrize("hidden", [64, 1000, 16000])
def test_buckets_close_as_torch_closes_them(hidden: int) -> None:
    graph = _network(hidden)
    costs = costs_of(graph, [1e10] * 2)
    shapes = [one.shape for op in reversed(graph.operations) for one in reversed(op.parameters)]
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, BUCKET]  # type: ignore[attr-defined]
    places, _ = dist._compute_bucket_assignment_by_size([torch.empty(one) for one in shapes], limits)  # type: ignore[attr-defined]
    expected = [sum(4 * math.prod(shapes[place]) for place in bucket) for bucket in places]
    assert [size for _, size in _buckets(graph, costs, 4)] == expected
    assert FIRST_BUCKET == dist._DEFAULT_FIRST_BUCKET_BYTES  # type: ignore[attr-defined]
    assert _buckets(graph, costs.only([0]), 4) == []


def test_a_weight_that_is_used_twice_is_summed_after_its_first_use() -> None:
    graph = trace(_Twice(), torch.zeros(2, 3, 8, 8))
    costs = costs_of(graph, [1e10] * 2)
    [(segment, size)] = _buckets(graph, costs, 4)
    assert segment == 0
    assert size == 4 * sum(one.numel() for one in _Twice().parameters())


def test_the_sums_of_the_first_bucket_hide_behind_the_rest_of_the_backward_pass() -> None:
    graph = _network(16000)
    costs = costs_of(graph, [1e10] * 2)
    links = Links.uniform(np.zeros(2), np.array([np.inf, RATE]))
    free, slow = predict_data_parallel(graph, costs, BATCH, 4, links)
    ring = _bytes(graph) / RATE  # of two ranks: twice half of it
    backward = costs.whole_segments(BATCH // 2)[0, :, 1].sum()
    assert 0 < slow - free < ring
    assert slow - free == pytest.approx(max(ring - backward, 0), abs=0.2 * backward)
    slower = replace(costs, reducing=np.full(2, 1e-8))
    behind = predict_data_parallel(graph, slower, BATCH, 4, links)[1]
    assert behind - slow == pytest.approx(1e-8 * _bytes(graph), rel=0.05)


def test_its_computing_is_stretched_as_its_own_probe_was() -> None:
    graph = _network(64)
    costs = costs_of(graph, [1e10] * 2)
    stretch = np.ones((2, len(LAYOUTS)))
    stretch[:, LAYOUTS.index("ddp")] = 1.5
    assert part_seconds(replace(costs, stretch=stretch), BATCH) == pytest.approx(1.5 * part_seconds(costs, BATCH))


def test_the_slowest_hop_of_a_ring_counts() -> None:
    graph = _network(64)
    costs = costs_of(graph, [1e10] * 3, latency=0.0, bandwidth=1e12)
    usual = predict_data_parallel(graph, costs, 9, 4, Links.measured(costs))[0]
    slow = costs.seconds_per_byte.copy()
    slow[0, 2] = 1 / RATE  # no neighbours in the ring from 0 over 1 to 2
    assert predict_data_parallel(graph, replace(costs, seconds_per_byte=slow), 9, 4, Links.measured(costs))[0] == usual
    slow[2, 0] = 1 / RATE
    slower = replace(costs, seconds_per_byte=slow)
    ring = predict_data_parallel(graph, slower, 9, 4, Links.measured(slower))[0]
    backward = costs.whole_segments(3)[0, :, 1].sum()
    assert ring - usual == pytest.approx(4 * _bytes(graph) / 3 / RATE, abs=backward)

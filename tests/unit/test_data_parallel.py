"""The predicted step of DistributedDataParallel: what its buckets hide behind the backward pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.graph.trace import Graph, trace
from pipeline.plan.costs import LAYOUTS
from pipeline.plan.data_parallel import _buckets, part_seconds, predict_data_parallel
from pipeline.plan.link_cases import Links
from tests.unit.test_search import costs_of

BATCH = 8
RATE = 1e8
"""Bytes/s."""
MIB = 2**20


def _network(hidden: int) -> Graph:
    """Convolutions with little to send and much to compute, then dense layers of which it is the other way round."""
    layers = [nn.Conv2d(3, 64, 5), nn.ReLU(), nn.Conv2d(64, 64, 5), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten()]
    return trace(nn.Sequential(*layers, nn.Linear(64 * 9, hidden), nn.Linear(hidden, 10)), torch.zeros(2, 3, 32, 32))


def _bytes(graph: Graph) -> float:
    return 4 * sum(float(np.prod(one.shape)) for op in graph.operations for one in op.parameters)


def test_without_links_a_step_is_the_computing_of_the_largest_part() -> None:
    graph = _network(64)
    costs = costs_of(graph, [1e10, 1e10, 5e9])
    free = Links.uniform(np.array([0.0]), np.array([np.inf]))
    part = part_seconds(costs, BATCH)
    assert part == pytest.approx(costs.whole_segments(3).sum(axis=1)), "three of eight images"
    trained = _bytes(graph) / 4
    assert predict_data_parallel(graph, costs, BATCH, 4, free) == pytest.approx(part.sum(axis=1).max() + 1e-9 * trained)


def test_buckets_close_as_torch_closes_them() -> None:
    graph = _network(16000)  # 36 MiB in the first dense layer, 0.6 MiB in the second
    costs = costs_of(graph, [1e10] * 2)
    sizes = [size for _, size in _buckets(graph, costs, 4)]
    assert sum(sizes) == pytest.approx(_bytes(graph))
    assert [round(one / MIB, 1) for one in sizes] == [35.8, 0.4], "all after the convolutions, then these"
    assert _buckets(graph, costs.only([0]), 4) == []


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

"""What a plan says of itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.costs import Costs
from pipeline.plan.plan import Strategy
from pipeline.plan.strategies import plan_network
from pipeline.plan.summary import Summary, summarise
from tests.unit.test_search import costs_of

LABELS = ("cpu@0.5", "cpu")


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("20:50"), torch.zeros(2, 3, 32, 32))


def _summary(graph: Graph, costs: Costs, strategy: Strategy) -> Summary:
    plan = plan_network(graph, strategy, batch_size=32, labels=LABELS, costs=costs)
    return summarise(graph, plan, costs, all_labels=LABELS)


def test_one_device_is_as_fast_as_itself_however_real_steps_differ_from_their_parts(graph: Graph) -> None:
    costs = costs_of(graph, [5e9, 1e10])
    stretch = np.array([[1.1, 1.2, 1.3, 1.4]] * 2)
    real = replace(costs, stretch=stretch, beginning=np.full(2, 0.01), update_alone=np.full(2, 0.5))
    summary = _summary(graph, real, "single")
    assert summary.baseline == "cpu"
    assert summary.speedup == pytest.approx(1.0)
    assert summary.step_seconds > 1.2 * _summary(graph, costs, "single").step_seconds


def test_the_rows_tell_what_each_device_computes_and_by_what_it_is_divided(graph: Graph) -> None:
    costs = costs_of(graph, [5e9, 1e10])
    rows = {one.operation: one for one in _summary(graph, costs, "kernel").rows}
    assert rows["conv2"].layouts == "R → K"
    assert sum(rows["conv2"].shares) == 50
    assert rows["conv2"].shares[1] == pytest.approx(2 * rows["conv2"].shares[0], rel=0.15)
    assert rows["dense"].layouts == "K → P"
    assert sum(rows["dense"].shares) == 50 * 5 * 5  # features

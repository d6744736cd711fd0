"""Plans keep to the memory of their devices, and say so where they cannot."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import InputError
from pipeline.graph.trace import Graph, trace
from pipeline.networks import network
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import fits, most_within_memory, needed_memory
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import plan_graph
from pipeline.plan.strategies import plan_network
from tests import synthetic

LABELS = ("cpu", "cpu", "cpu@0.5")
PROCESS = 3e8


@pytest.fixture(scope="module")
def graph() -> Graph:
    return trace(network("150:800"), torch.zeros(2, 3, 32, 32))


def _plan(graph: Graph, left: Sequence[float], strategy: Strategy, batch_size: int = 32) -> Plan:
    calibration = synthetic.calibration_of(graph, LABELS)
    calibration["memory_limit"] = ("device", PROCESS + np.array(left))
    plan = plan_graph(graph, calibration, batch_size=batch_size, strategy=strategy, labels=LABELS)
    assert fits(graph, plan, replace(Costs.of(calibration)))
    return plan


@pytest.mark.parametrize(("strategy", "part"), [("kernel", 0.6), ("batch", 0.95)])
def test_a_device_gets_what_it_can_hold_and_the_others_the_rest(graph: Graph, strategy: Strategy, part: float) -> None:
    free = _plan(graph, (1e12,) * 3, strategy)
    wanted = needed_memory(graph, free)
    limits = (1e12, part * wanted[1], 1e12)
    plan = _plan(graph, limits, strategy)
    shares, before = np.array(plan.convolution_shares(graph)), np.array(free.convolution_shares(graph))
    assert 0 < shares[1] < 0.97 * before[1]
    assert shares[[0, 2]].sum() > before[[0, 2]].sum()
    # No more than is needed is taken away.
    assert needed_memory(graph, plan)[1] > 0.85 * limits[1]


def test_a_device_that_can_hold_nothing_is_left_without_work(graph: Graph) -> None:
    plan = _plan(graph, (1e12, 1e6, 1e12), "auto")
    assert 1 not in plan.devices or plan.convolution_shares(graph)[1] == 0


def test_the_fastest_device_that_can_hold_the_network_is_taken_alone(graph: Graph) -> None:
    assert _plan(graph, (1e6, 1e6, 1e12), "auto").devices == (2,)


def test_single_takes_the_fastest_device_that_can_hold_the_network(graph: Graph) -> None:
    assert _plan(graph, (1e6, 1e12, 1e12), "single").devices == (1,)


def test_a_narrow_layer_is_shared_out_where_each_device_can_hold_less_than_a_kernel_more() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 512, 3, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(512, 512, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph, labels = trace(model, torch.zeros(2, 3, 32, 32)), ["cpu"] * 4
    calibration = synthetic.calibration_of(graph, labels)
    free = needed_memory(graph, plan_graph(graph, calibration, batch_size=8, strategy="kernel", labels=labels))
    left = 1.2 * free.max() * np.ones(4)
    left[1] = 0.93 * free[1]
    calibration["memory_limit"] = ("device", PROCESS + left)
    plan = plan_graph(graph, calibration, batch_size=8, strategy="kernel", labels=labels)
    assert fits(graph, plan, Costs.of(calibration))
    assert plan.convolution_shares(graph)[1] > 0


@pytest.mark.parametrize("strategy", ["single", "equal", "paper", "ddp", "kernel", "auto"])
def test_what_fits_nowhere_is_refused_with_what_would_help(graph: Graph, strategy: Strategy) -> None:
    with pytest.raises(
        InputError, match=r"device \d \(cpu.*\) needs about \d+ MiB .*batch size 32, but has \d+ MiB"
    ) as error:
        _plan(graph, (1e6,) * 3, strategy)
    assert "\n" not in str(error.value)


def test_a_smaller_batch_is_proposed_where_it_fits(graph: Graph) -> None:
    need = needed_memory(graph, _plan(graph, (1e12,) * 3, "single", batch_size=16))[0]
    with pytest.raises(InputError, match="a batch of 16 images would fit"):
        _plan(graph, (1.05 * need,) * 3, "single", batch_size=32)


def test_two_devices_with_too_little_each_get_what_they_can_hold(graph: Graph) -> None:
    labels, costs = LABELS[:2], Costs.of(synthetic.calibration_of(graph, LABELS[:2]))
    plan_with = functools.partial(plan_network, graph, "kernel", batch_size=32, labels=labels, costs=costs)
    wanted = 0.7, 0.3
    need = needed_memory(graph, plan_with(shares=wanted))
    # Neither fits half of it beside the other, and the second has room for little more than what is left.
    tight = replace(costs, memory=1.03 * need)
    most = most_within_memory(graph, plan_with, tight)
    assert most is not None
    plan = plan_with(most=most)
    assert fits(graph, plan, tight)
    assert plan.convolution_shares(graph) == pytest.approx(wanted, abs=0.06)


def test_auto_names_a_batch_that_would_fit(graph: Graph) -> None:
    need = needed_memory(graph, _plan(graph, (1e12,) * 3, "kernel", batch_size=4)).max()
    with pytest.raises(InputError, match=r"a batch of \d+ images would fit"):
        _plan(graph, (1.02 * need,) * 3, "auto", batch_size=256)

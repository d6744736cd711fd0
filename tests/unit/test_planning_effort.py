"""Planning stays quick however many devices there are: counted in calls, which no machine makes more or fewer of."""

from __future__ import annotations

import cProfile
import pstats

import torch
from torch import nn

from pipeline.graph.trace import trace
from pipeline.plan.planner import plan_graph
from tests.synthetic import calibration_of


def test_a_plan_for_sixteen_times_as_many_devices_takes_no_more_calls_than_for_a_few() -> None:
    layers = [layer for _ in range(9) for layer in (nn.Conv2d(256, 256, 3, padding=1), nn.ReLU())]
    graph = trace(
        nn.Sequential(nn.Conv2d(3, 256, 3), *layers, nn.Flatten(), nn.Linear(256 * 36, 10)), torch.zeros(2, 3, 8, 8)
    )

    def calls(devices: int) -> int:
        labels = ["cpu"] * devices
        calibration = calibration_of(graph, labels)
        with cProfile.Profile() as profile:
            plan_graph(graph, calibration, batch_size=devices, strategy="auto", labels=labels)
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    calls(16)  # pays what only a first plan does, such as imports
    few = calls(16)
    assert calls(256) < 1.15 * few

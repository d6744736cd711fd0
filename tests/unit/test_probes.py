"""What real steps take longer than predicted goes where it belongs, and nothing becomes negative."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from pipeline.calibration import links, probes
from pipeline.graph.trace import Graph, trace
from pipeline.plan.costs import Costs
from pipeline.plan.instructions import COMPANIES
from tests import synthetic

IMAGES, FRACTIONS = 16, (0.75, 0.25)


@pytest.fixture(scope="module")
def graph() -> Graph:
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()]
    return trace(nn.Sequential(*layers, nn.Linear(32 * 28 * 28, 10)), torch.zeros(2, 3, 32, 32))


def _predicted(graph: Graph, calibration: xr.Dataset) -> np.ndarray:
    costs = Costs.of(calibration)
    return np.array([probes._predicted(graph, probe, costs, IMAGES, FRACTIONS) for probe in probes.PROBES])


def _measured(graph: Graph, factors: tuple[float, float, float]) -> xr.Dataset:
    """A calibration whose probes took so many times as long as it predicts."""
    calibration = synthetic.calibration_of(graph, ["cpu", "cpu@0.5"]).drop_vars("probe_step_time")
    times = _predicted(graph, calibration) * factors
    return calibration.assign(probe_step_time=(("probe", "repetition"), times[:, None]))


def test_with_what_is_found_the_probes_take_what_they_took(graph: Graph) -> None:
    calibration = _measured(graph, (1.2, 1.6, 1.3))
    found = probes.fitted(calibration, graph, IMAGES, FRACTIONS)
    measured = calibration.probe_step_time.values[:, 0]
    assert _predicted(graph, found) == pytest.approx(measured, rel=0.01)
    growth = dict(zip(COMPANIES, found.turn_growth.values, strict=True))
    assert growth["master"] == 0  # of which the probes say nothing
    assert growth["everyone"] > 0.01
    assert growth["moments"] > 0.01
    assert found.summing_time > 1e-10


def test_steps_that_were_faster_than_predicted_make_nothing_negative(graph: Graph) -> None:
    found = probes.fitted(_measured(graph, (0.7, 0.7, 0.7)), graph, IMAGES, FRACTIONS)
    assert (found.turn_growth >= 0).all()
    assert (found.turn_growth < 0.01).all()
    assert 0 < found.summing_time < 1e-10


def test_steps_that_take_forever_are_believed_up_to_a_limit(graph: Graph) -> None:
    found = probes.fitted(_measured(graph, (100.0, 100.0, 1000.0)), graph, IMAGES, FRACTIONS)
    assert found.turn_growth.sel(company="everyone") == 2
    assert found.summing_time == pytest.approx(1e-8)


def test_waiting_grows_with_the_computing_as_measured_and_not_at_all_where_nobody_can_tell() -> None:
    before = np.linspace(0.001, 0.02, 12)
    waits = 0.003 + 0.25 * before
    waits[5] = 1.0  # somebody else had the core
    assert links._line(before, waits) == pytest.approx((0.003, 0.25), rel=0.05)
    assert links._line(before[:3], np.array([0.002, 0.004, 0.003])) == (0.003, 0.0)
    assert links._line(before, 0.01 - 0.1 * before)[1] == 0  # who computes longer is not waited for less
    assert links._line(before[:0], waits[:0]) == (0.0, 0.0)

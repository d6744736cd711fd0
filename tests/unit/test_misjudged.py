"""A calibration that misjudges a device: that device alone, by as much as is said, and the plan follows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from pipeline.calibration.misjudged import misjudged
from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.networks import network
from pipeline.plan.planner import plan_graph
from pipeline.results.contracts import validate_calibration
from tests import synthetic

GRAPH = trace(network("20:50"), torch.zeros(2, 3, 32, 32))
LABELS = ["cpu", "cpu@0.5"]


@pytest.fixture(scope="module")
def calibration() -> xr.Dataset:
    return synthetic.calibration_of(GRAPH, LABELS)


def test_all_times_of_the_device_change_and_nothing_else(calibration: xr.Dataset) -> None:
    wrong = misjudged(calibration, 1, -0.3)
    validate_calibration(wrong)
    for name in ("forward_time", "backward_time", "update_time"):
        assert wrong[name].dims == calibration[name].dims
        assert wrong[name].attrs["units"] == "s"
        np.testing.assert_allclose(wrong[name].isel(device=1), 0.7 * calibration[name].isel(device=1))
    xr.testing.assert_identical(wrong.isel(device=0), calibration.isel(device=0))
    xr.testing.assert_identical(wrong["link_time"], calibration["link_time"])


@pytest.mark.parametrize("strategy", ["paper", "kernel"])
def test_a_device_that_is_judged_too_slow_gets_less_and_one_judged_too_fast_more(
    calibration: xr.Dataset, strategy: str
) -> None:
    share = []
    for error in (-0.5, 0.0, 0.5):
        plan = plan_graph(GRAPH, misjudged(calibration, 1, error), batch_size=16, strategy=strategy, labels=LABELS)
        share.append(plan.convolution_shares(GRAPH)[1])
    assert share[0] > share[1] > share[2]


@pytest.mark.parametrize(
    ("device", "error", "says"),
    [
        (2, 0.1, "device 2 cannot be misjudged: the calibration is of devices 0 to 1"),
        (0, -1.0, "an error of -1 leaves"),
    ],
)
def test_what_cannot_be_is_refused(calibration: xr.Dataset, device: int, error: float, says: str) -> None:
    with pytest.raises(InputError, match=says):
        misjudged(calibration, device, error)

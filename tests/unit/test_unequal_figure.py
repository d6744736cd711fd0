"""What a calibration gains, costs and loses where it is wrong: computed, drawn and told from the stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pipeline.analysis import style
from pipeline.analysis.figures import FIGURES
from pipeline.analysis.unequal_figure import gains, lost, payback
from pipeline.results.contracts import CellIndex
from pipeline.results.stores import combine, combine_calibrations
from tests import synthetic
from tests.unit.test_figures import texts

SETS = ("2 x cpu", "cpu + cpu@0.5", "cpu + cpu@0.25")


@pytest.fixture
def timing() -> xr.Dataset:
    """Steps of 1, 2 and 4 s with equal shares on ever less equal devices; of 1 s with `paper`, 0.5 s with `kernel`."""
    grid = synthetic.timing(synthetic.indices(("50:500", "150:800"), (32,), SETS)).copy(deep=True)
    for device_set, seconds in zip(SETS, (1.0, 2.0, 4.0), strict=True):
        for strategy, one in {"equal": seconds, "paper": 1.0, "kernel": 0.5}.items():
            grid["step_time"].loc[{"device_set": device_set, "strategy": strategy}] = one
    grid["status"].loc[{"network": "150:800", "device_set": SETS[2]}] = "not planned"
    return grid


@pytest.fixture
def calibration() -> xr.Dataset:
    """One calibration of a pair that took 6 s, and one of four devices that took 90 s."""
    four = synthetic.calibration().isel(device=[0, 0, 0, 1]).assign(calibration_time=90.0)
    four = four.isel(source=[0, 0, 0, 1], destination=[0, 0, 0, 1]).assign_coords(device_set="3 x cpu + cpu@0.5")
    return combine_calibrations([four, synthetic.calibration()])


def test_gains_are_ratios_to_equal_shares_over_the_ratio_of_the_calibrated_speeds(timing: xr.Dataset):
    found = gains(timing)
    assert found is not None
    assert found.attrs["network"] == "50:500", "the network that was measured on most pairs"
    assert list(found["device_set"].values) == list(SETS)
    np.testing.assert_allclose(found["ratio"], [1, 0.5, 0.25])
    np.testing.assert_allclose(found["gain"].sel(strategy="paper"), [1, 2, 4])
    np.testing.assert_allclose(found["gain"].sel(strategy="kernel"), [2, 4, 8])


def test_the_interval_of_a_gain_holds_what_the_repetitions_allow(timing: xr.Dataset):
    timing["step_time"].loc[{"device_set": SETS[1], "strategy": "equal"}] = [1.8, 1.9, 2.0, 2.1, 2.2]
    one = gains(timing).sel(device_set=SETS[1], strategy="paper")
    assert 1.8 <= one["low"] < one["gain"] == 2 < one["high"] <= 2.2


def test_a_calibration_has_paid_when_it_has_saved_the_time_it_took(timing: xr.Dataset, calibration: xr.Dataset):
    paid = payback(gains(timing), calibration)
    one = paid.sel(device_set="cpu + cpu@0.5")
    assert one["seconds"] == 6, "its own calibration, not the larger one that has its devices too"
    assert one["steps"].sel(strategy="paper") == pytest.approx(6 / (2 - 1))
    assert one["steps"].sel(strategy="kernel") == pytest.approx(6 / (2 - 0.5))
    assert paid["seconds"].sel(device_set="2 x cpu") == 90, "the larger one, as there is no other"
    assert np.isinf(paid["steps"].sel(device_set="2 x cpu", strategy="paper")), "nothing is gained there"
    assert np.isnan(paid["seconds"].sel(device_set="cpu + cpu@0.25")), "no calibration has such a device"


def test_a_loss_is_told_against_the_right_calibration():
    losses = lost(synthetic.miscalibration())
    assert losses is not None
    assert losses.attrs["device"] == "cpu@0.5"
    np.testing.assert_allclose(losses["loss"].sel(strategy="paper"), [0.25, 0.05, 0, 0.25])
    np.testing.assert_allclose(losses["simulated"].sel(strategy="kernel"), [0.5, 0.1, 0, 0.5])


def test_the_sentences_say_the_numbers(timing: xr.Dataset, calibration: xr.Dataset):
    said = FIGURES["unequal"].say(timing, calibration, synthetic.miscalibration()).splitlines()
    assert "(``paper``) a step is up to 4.00 times as fast as with equal ones" in said[0]
    assert "on ``cpu + cpu@0.25`` (emulated)" in said[0]
    (pair,) = (line for line in said if line.startswith("- On ``cpu + cpu@0.5``"))
    assert "calibrated speeds 1:0.5" in pair
    assert "``paper`` 2.00 (2.00 to 2.00), ``kernel`` 4.00 (4.00 to 4.00)" in pair
    assert "took 6 s, which is saved with ``paper`` after 6 steps, ``kernel`` after 4 steps" in pair
    (same,) = (line for line in said if line.startswith("- On ``2 x cpu``"))
    assert "``paper`` never, ``kernel`` after 180 steps" in same
    (wrong,) = (line for line in said if "the step of ``paper`` changes" in line)
    assert "+25% (" in wrong
    assert "simulated +50%) at -50%" in wrong
    assert "at +0%" not in wrong


def test_the_marks_are_the_gains_the_steps_and_the_losses(timing: xr.Dataset, calibration: xr.Dataset):
    figure = FIGURES["unequal"].draw(timing, calibration, synthetic.miscalibration())
    drawn = [[np.asarray(line.get_ydata(), float) for line in axis.get_lines()] for axis in figure.axes]
    for axis, expected in enumerate(([1, 2, 4], [180, 4], [0.25, 0.05, 0, 0.25])):
        assert any(line.shape == (len(expected),) and np.allclose(line, expected) for line in drawn[axis]), expected


ALONE = CellIndex("50:500", 32, "cpu", "loopback", "single")


@pytest.mark.parametrize("strategy", ["single", "kernel"])
def test_without_a_pair_the_figure_and_the_sentence_say_so(calibration: xr.Dataset, strategy: str, tmp_path: Path):
    index = ALONE if strategy == "single" else ALONE._replace(device_set="2 x cpu", strategy=strategy)
    grid = combine([synthetic.cell(index)], [index])
    wrong = synthetic.miscalibration(errors=(-0.5, 0.5))
    figure = FIGURES["unequal"].draw(grid, calibration, wrong)
    style.save(figure, tmp_path / "unequal")
    assert "No strategy was measured beside equal shares" in texts(figure)
    assert "No strategy was measured beside equal shares" in FIGURES["unequal"].say(grid, calibration, wrong)


def test_without_the_right_calibration_to_compare_with_the_rest_is_drawn(
    timing: xr.Dataset, calibration: xr.Dataset, tmp_path: Path
):
    wrong = synthetic.miscalibration(errors=(-0.5, 0.5))
    figure = FIGURES["unequal"].draw(timing, calibration, wrong)
    style.save(figure, tmp_path / "unequal")
    assert "not measured" in texts(figure)
    assert "is wrong in the calibration" not in FIGURES["unequal"].say(timing, calibration, wrong)


def test_wrong_calibrations_without_a_right_one_are_not_compared():
    assert lost(synthetic.miscalibration(errors=(-0.5, 0.5))) is None

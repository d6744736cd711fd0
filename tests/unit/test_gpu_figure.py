"""Speedup over GPUs and the gain of CPUs beside one: computed, drawn and told from the stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from pipeline.analysis import paper, selection, style
from pipeline.analysis.figures import FIGURES
from pipeline.analysis.gpu_figure import counted_gpus, gain_beside
from pipeline.results.contracts import CellIndex
from pipeline.results.stores import combine
from tests import synthetic
from tests.unit.test_figures import texts

BATCHES = (32, 256)


@pytest.fixture(scope="module")
def timing() -> xr.Dataset:
    return synthetic.timing(synthetic.indices(("500:1500",), (32,), ("cpu@0.45", "2 x cpu@0.45")))


@pytest.fixture
def simulation() -> xr.Dataset:
    """GPUs 20 and 4 times as fast as a CPU; one CPU beside them gains 25 % for the slow one, none for the fast one."""
    grid = synthetic.simulation(device_sets=synthetic.SETS_WITH_GPUS)
    for device_set, gain in {
        "gpu + 1 x cpu@0.45": 0.9,
        "gpu + 4 x cpu@0.45": 1.1,
        "gpu-1T + 1 x cpu@0.45": 1.25,
        "gpu-1T + 4 x cpu@0.45": 2.0,
    }.items():
        alone = grid["predicted_step_time"].sel(device_set=device_set, strategy="single", drop=True)
        for strategy in ("paper", "kernel", "batch"):
            grid["predicted_step_time"].loc[{"device_set": device_set, "strategy": strategy}] = alone / gain
    return grid


def test_the_lines_over_the_number_of_gpus_are_the_simulated_speedups(simulation: xr.Dataset, timing: xr.Dataset):
    counted = counted_gpus(simulation)
    assert counted is not None
    assert list(counted["count"].values) == [1, 2, 3]
    assert counted.attrs["network"] == "500:1500"
    times = simulation["predicted_step_time"].sel(network="500:1500", link="loopback", strategy="kernel")
    figure = FIGURES["gpus"].draw(simulation, timing)
    for axis, batch_size in zip(figure.axes, BATCHES, strict=False):
        one = times.sel(batch_size=batch_size)
        expected = [(one.sel(device_set="gpu") / one.sel(device_set=s)).item() for s in ("gpu", "2 x gpu", "3 x gpu")]
        lines = [np.asarray(line.get_ydata(), float) for line in axis.get_lines()]
        assert any(line.shape == (3,) and np.allclose(line, expected) for line in lines)
        (claim,) = (one for one in paper.CLAIMS if one.device_kind == "gpu")
        stars = [line for line in axis.get_lines() if line.get_marker() == "*"]
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in stars] == [(claim.device_count, claim.speedup)]


def test_the_gain_of_cpus_is_told_over_the_ratio_of_speeds(simulation: xr.Dataset, timing: xr.Dataset):
    gain = gain_beside(simulation)
    assert gain is not None
    assert list(gain["gpu"].values) == ["gpu-1T", "gpu"], "the slowest first"
    np.testing.assert_allclose(gain["ratio"].sel(batch_size=32), [4, 20])
    np.testing.assert_allclose(gain["gain"].sel(batch_size=32, cpus=1), [1.25, 0.9])
    said = FIGURES["gpus"].say(simulation, timing)
    assert "1 ``cpu@0.45`` gains 25.0% at 4 times its speed and nothing from 20 times on" in said
    assert "4 ``cpu@0.45`` gain 10.0% at 20 times its speed." in said


def test_a_cpu_that_never_pays_is_said_never_to_pay(simulation: xr.Dataset, timing: xr.Dataset):
    beside = [s for s in map(str, simulation["device_set"].values) if " + 1 x" in s]
    for strategy in ("paper", "kernel", "batch"):
        place = {"device_set": beside, "strategy": strategy}
        simulation["predicted_step_time"].loc[place] = 1e6
    assert "1 ``cpu@0.45`` gains nothing from 4 times its speed on" in FIGURES["gpus"].say(simulation, timing)


def test_the_paper_stands_beside_its_number_of_gpus_only(simulation: xr.Dataset, timing: xr.Dataset):
    first = FIGURES["gpus"].say(simulation, timing).splitlines()[0]
    assert first.count("the paper measured 2.45") == 1
    assert "on 3 (best exact split" in first
    other = FIGURES["gpus"].say(
        synthetic.simulation(networks=("50:500",), device_sets=synthetic.SETS_WITH_GPUS), timing
    )
    assert "the paper measured" not in other


def test_where_no_gpu_was_measured_the_figure_and_the_sentence_say_so(simulation: xr.Dataset, timing: xr.Dataset):
    assert "no GPU measured" in texts(FIGURES["gpus"].draw(simulation, timing))
    assert "No GPU was measured: ``gpu.yaml``" in FIGURES["gpus"].say(simulation, timing)


def test_measured_gpus_are_marked_and_told(simulation: xr.Dataset, tmp_path: Path):
    wanted = [CellIndex("500:1500", 32, "gpu", "loopback", "single")]
    wanted += [CellIndex("500:1500", 32, "gpu + gpu1", "loopback", strategy) for strategy in ("single", "kernel")]
    cells = [synthetic.cell(index) for index in wanted]
    for one, seconds in zip(cells, (8.0, 8.0, 4.0), strict=True):
        one["step_time"][:] = seconds
        one["device_throughput"][:] = 4.0
    timing = combine(cells, wanted)
    assert selection.families(timing) == {"gpu": ["gpu", "gpu + gpu1"]}, "another GPU is one more of the same kind"
    figure = FIGURES["gpus"].draw(simulation, timing)
    style.save(figure, tmp_path / "gpus")
    assert "open marks measured" in texts(figure)
    marks = [line for line in figure.axes[0].get_lines() if line.get_markerfacecolor() == "white"]
    assert any(np.array_equal(line.get_ydata(), [2.0]) or 2.0 in np.asarray(line.get_ydata()) for line in marks)
    said = FIGURES["gpus"].say(simulation, timing)
    assert "on ``gpu + gpu1``: ``kernel`` is 2.00 times as fast as one GPU (95 % interval 2.00 to 2.00)" in said
    assert "No GPU was measured" not in said


def test_without_gpus_nothing_is_drawn_but_that(timing: xr.Dataset, tmp_path: Path):
    grid = synthetic.simulation(device_sets=("cpu@0.45", "4 x cpu@0.45"))
    figure = FIGURES["gpus"].draw(grid, timing)
    style.save(figure, tmp_path / "gpus")
    assert "Nothing was simulated on GPUs" in texts(figure)
    assert "Nothing was simulated on GPUs" in FIGURES["gpus"].say(grid, timing)

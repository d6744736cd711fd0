"""Which predictions are far off and why, against errors that were put in by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipeline.analysis.far_off import ROUNDS, UNTOLD, far_off
from pipeline.analysis.instruction_times import KINDS, times_by_rank
from pipeline.analysis.prediction_tables import MOST, far_off_table, instructions_table, write_predictions
from pipeline.analysis.sections import write_page
from pipeline.analysis.statistics import prediction_error
from pipeline.analysis.step_findings import prediction_finding
from pipeline.results.contracts import CellIndex
from pipeline.results.stores import combine
from tests import synthetic

SET = "cpu + cpu@0.5"


def timing(*strategies: str) -> xr.Dataset:
    """A grid of one place whose steps all take as long, foretold to the instruction."""
    wanted = [CellIndex("50:500", 32, SET, "loopback", strategy) for strategy in strategies]
    grid = synthetic.timing(wanted)
    grid["step_time"][:] = grid["step_time"].max("repetition")
    grid["predicted_step_time"][:] = grid["step_time"].median("repetition")
    for end in ("start", "end"):
        grid[f"predicted_{end}"] = grid[f"instruction_{end}"].where(grid["strategy"] != "ddp")
    return grid


def off_by(grid: xr.Dataset, strategy: str, error: float) -> None:
    grid["predicted_step_time"].loc[{"strategy": strategy}] *= 1 + error


def last_longer(grid: xr.Dataset, phase: str, device: int, factor: float) -> None:
    """Foretell each computation of a phase on a device to take so many times as long, and what follows to be later."""
    cell = grid.squeeze()
    length = (cell["predicted_end"] - cell["predicted_start"]).sel(device=device)
    of_phase = (cell["instruction_phase"] == phase) & (cell["instruction_kind"] == "compute")
    grown = ((factor - 1) * length.where(of_phase, 0)).fillna(0).cumsum("instruction")
    shape = grid["predicted_end"].sel(device=device).shape
    grid["predicted_end"] = grid["predicted_end"] + grown.values.reshape((*shape, 1))
    before = np.concatenate([[0], grown.values[:-1]])
    grid["predicted_start"] = grid["predicted_start"] + before.reshape((*shape, 1))


def test_a_rank_is_idle_while_it_waits_and_before_the_others_end():
    nothing = (np.nan, np.nan)
    steps = np.array([[(0, 3), (0, 2)], [(3, 4), (2, 4)], [(4, 5), nothing]], float)
    names = np.array(["forward", "exchange", "update"], object)
    found = times_by_rank(steps[..., 0], steps[..., 1], names)
    wanted = {"forward": [3, 2], "backward": [0, 0], "exchange": [1, 1], "update": [1, 0], "idle": [0, 2]}
    np.testing.assert_allclose(found.T, [wanted[kind] for kind in KINDS])


def test_cells_beyond_fifteen_percent_are_listed_the_largest_error_first():
    grid = timing("equal", "paper", "kernel", "batch")
    for strategy, error in (("equal", -0.16), ("paper", 0.149), ("kernel", 0.3), ("batch", -0.149)):
        off_by(grid, strategy, error)
    assert [(one.strategy, round(one.error, 9)) for one in far_off(grid)] == [("kernel", 0.3), ("equal", -0.16)]
    assert prediction_error(grid).notnull().sum() == 4


@pytest.mark.parametrize(("apart", "cause"), [(0.21, ROUNDS), (0.19, "backward")])
def test_rounds_that_differ_by_the_error_are_its_cause(apart: float, cause: str):
    grid = timing("kernel")
    off_by(grid, "kernel", 0.2)
    last_longer(grid, "backward", 1, 1.5)
    middle = grid["step_time"].median()
    grid["step_time"] = middle * (1 + apart * (grid["round"] - (grid["repetition"] != 0) / 2).clip(-0.5, 0.5))
    grid["step_time"].loc[{"repetition": 0}] = middle
    grid["round"].loc[{"repetition": 0}] = 2.0
    (found,) = far_off(grid)
    assert found.between_rounds == pytest.approx(apart)
    assert found.error == pytest.approx(0.2)
    assert found.cause == cause


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_else_it_is_the_kind_that_errs_most_on_the_device_that_waits_least(phase: str):
    grid = timing("kernel")
    off_by(grid, "kernel", 0.2)
    slow = grid["instruction_end"].copy(deep=True)
    slow.loc[{"instruction": 9, "device": 1}] += 0.1  # device 1 updates the longest
    grid["instruction_end"] = grid["predicted_end"] = slow
    last_longer(grid, phase, 1, 2.0)
    (found,) = far_off(grid)
    assert found.cause == phase
    assert found.why.startswith(f"{phase} computation on device 1, cpu@0.5: predicted ")
    cell = grid.squeeze()
    of_phase = (cell["instruction_phase"] == phase) & (cell["instruction_kind"] == "compute")
    took = (cell["instruction_end"] - cell["instruction_start"]).sel(device=1).where(of_phase).sum().item()
    assert f"predicted {2 * took:.3g} s, measured {took:.3g} s" in found.why
    said = prediction_finding(grid)
    assert "1 of 1 prediction is off by more than 15%: " in said
    assert f"{phase} computation in 1." in said


def test_a_rank_of_a_plan_that_leaves_devices_out_is_not_taken_for_a_device_of_the_set():
    """On a slow and a fast device ``single`` runs on the second, which is rank 0 of its plan."""
    sets = ("cpu@0.5 + cpu", "2 x cpu")
    indices = [CellIndex("50:500", 32, one, "loopback", name) for one in sets for name in ("kernel", "single")]
    cells = [synthetic.cell(one) for one in indices]
    alone = [one.isel(device=[int(np.argmax(one["share"].values))]).assign_coords(device=[0]) for one in cells]
    cells = [one if one.strategy == "single" else all_of_them for one, all_of_them in zip(alone, cells, strict=True)]
    for one in cells:
        one["predicted_end"] *= 1.5
        one["predicted_step_time"] *= 1.5
    grid = combine(cells, indices)
    why = {(one.device_set, one.strategy): one.why.partition(":")[0] for one in far_off(grid)}
    assert why[sets[0], "single"].endswith(" on rank 0 of the plan")
    assert why[sets[1], "single"].endswith(" on device 0, cpu")
    assert why[sets[0], "kernel"].endswith((" on device 0, cpu@0.5", " on device 1, cpu"))
    labels = instructions_table(grid).groupby(["device_set", "strategy"])["device_label"].unique().map(list)
    assert labels[sets[0], "single"] == ["rank 0 of the plan"]
    assert labels[sets[1], "single"] == ["cpu"]
    assert sorted(labels[sets[0], "kernel"]) == ["cpu", "cpu@0.5"]


def test_an_error_that_no_kept_instruction_shows_is_told_to_be_so():
    grid = timing("kernel", "ddp")
    off_by(grid, "kernel", 0.3)
    off_by(grid, "ddp", 0.2)
    kernel, ddp = far_off(grid)
    assert kernel.cause == ddp.cause == UNTOLD
    assert "does not show it" in kernel.why
    assert "not its instructions" in ddp.why
    said = prediction_finding(grid)
    assert "2 of 2 predictions are off by more than 15%: the store does not tell why in 2." in said


def test_a_cell_that_was_timed_for_auto_too_is_listed_once():
    grid = timing("kernel", "auto")
    for name in ("step_time", "predicted_step_time"):
        grid[name].loc[{"strategy": "auto"}] = grid[name].sel(strategy="kernel")
    off_by(grid, "kernel", 0.3)
    off_by(grid, "auto", 0.3)
    assert [one.strategy for one in far_off(grid)] == ["kernel"]


def test_the_report_lists_ten_of_them_below_the_figure_and_the_file_has_all(tmp_path: Path):
    sets = (SET, "2 x cpu")
    grid = synthetic.timing(synthetic.indices(("50:500",), (32,), sets))
    grid["predicted_step_time"] *= 1.5
    count = int(prediction_error(grid).notnull().sum())
    assert count > MOST
    write_predictions(grid, tmp_path)
    assert len(pd.read_csv(tmp_path / "predictions_far_off.csv")) == len(far_off_table(grid)) == count
    assert (tmp_path / "prediction_table.rst").read_text().count("<tr><td>") == MOST
    for name in ("svg", "rst"):
        (tmp_path / f"prediction.{name}").write_text("It errs.\n")
    assert "include:: prediction_table.rst" in write_page(tmp_path).read_text()


def test_where_none_is_far_off_the_report_says_so(tmp_path: Path):
    grid = timing("kernel", "paper")
    write_predictions(grid, tmp_path)
    assert (tmp_path / "prediction_table.rst").read_text() == "No prediction is off by more than 15%.\n"
    assert "None of 2 predictions is off by more than 15%." in prediction_finding(grid)

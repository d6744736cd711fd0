"""Prediction against measurement by kind of instruction: what a moment counts as, and that all parts add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipeline.analysis.choice import step_interval
from pipeline.analysis.figures import FIGURES, write_figures
from pipeline.analysis.instruction_figures import shown_cell
from pipeline.analysis.instruction_times import KINDS, SPREAD, has_instructions, kind_errors, kind_times, times_by_kind
from pipeline.analysis.prediction_tables import (
    cells_table,
    instructions_table,
    kinds_table,
    strategies_table,
    write_predictions,
)
from pipeline.analysis.sections import write_page
from pipeline.analysis.statistics import prediction_error
from pipeline.results.contracts import INDEX, CellIndex
from tests import synthetic

NONE = (np.nan, np.nan)
SETS = ("cpu@0.45", "2 x cpu@0.45", "cpu + cpu@0.5")


@pytest.fixture(scope="module")
def timing() -> xr.Dataset:
    return synthetic.timing(synthetic.indices(("50:500", "500:1500"), (32,), SETS))


def kinds(*instructions: tuple[str, tuple[float, float], tuple[float, float]]) -> dict[str, float]:
    """Time by kind of a step of two devices, each instruction being its kind and its start and end on either."""
    names = np.array([one[0] for one in instructions], object)
    times = np.array([one[1:] for one in instructions], float)
    found = times_by_kind(times[..., 0], times[..., 1], names)
    return {kind: round(time, 9) for kind, time in zip(KINDS, found, strict=True) if time}


def test_while_one_device_waits_for_another_the_time_is_of_what_the_other_does():
    found = kinds(("forward", (0, 3), (0, 2)), ("exchange", (3, 4), (2, 4)), ("update", (4, 5), (4, 4.5)))
    assert found == {"forward": 3, "exchange": 1, "update": 1}


def test_a_moment_of_two_kinds_counts_half_for_each():
    found = kinds(("exchange", NONE, (0, 2)), ("forward", (0, 2), NONE), ("backward", (2, 4), (2, 5)))
    assert found == {"forward": 1, "exchange": 1, "backward": 3}


def test_moments_before_the_first_instruction_and_between_two_are_idle():
    assert kinds(("forward", (0.5, 1), (0.7, 2)), ("backward", (2.25, 3), (2.5, 3))) == {
        "forward": 1.5,
        "backward": 0.75,
        "idle": 0.75,
    }


def test_a_device_that_computes_longer_than_predicted_errs_in_computing_alone():
    predicted = kinds(("forward", (0, 2), (0, 2)), ("exchange", (2, 3), (2, 3)))
    measured = kinds(("forward", (0, 3), (0, 2)), ("exchange", (3, 4), (2, 4)))
    assert measured == {**predicted, "forward": 3}


def test_an_exchange_beside_a_computation_counts_the_same_predicted_and_as_the_clock_of_a_run_tells_it():
    before, after = ("forward", (0, 1), (0, 1)), ("backward", (1.25, 3), (1.25, 3))
    predicted = kinds(before, ("exchange", (1, 3.5), (1, 3.5)), after)
    # A quarter of a second to put it under way and half of one to end it, as one piece that ends where it ended.
    measured = kinds(before, ("exchange", (2.75, 3.5), (2.75, 3.5)), after)
    assert measured == predicted == {"forward": 1, "backward": 1.75, "exchange": 0.75}


def test_what_a_predicted_exchange_takes_of_its_device_after_it_ended_counts_as_exchange():
    before, after = ("forward", (0, 1), (0, 1)), ("update", (1.5, 2), (1.5, 2))
    assert kinds(before, ("exchange", (1, 1.25), (1, 1.25)), after) == {"forward": 1, "exchange": 0.5, "update": 0.5}


def test_the_kinds_of_a_step_add_up_to_it_and_their_errors_to_that_of_the_step(timing):
    told = has_instructions(timing)
    times = kind_times(timing)
    ends = timing["instruction_end"].max(["instruction", "device"]).where(told)
    xr.testing.assert_allclose(times["measured_time"].sum("kind", skipna=False), ends.transpose(*INDEX))
    total = kind_errors(timing).sum("kind", skipna=False)
    xr.testing.assert_allclose(total, prediction_error(timing).where(told).transpose(*INDEX))
    assert total.notnull().sum() == told.sum() > 0


def test_an_error_of_one_kind_is_found_there(timing):
    timing = timing.sel(device_set=[SETS[0]])  # of one device: none computes while another does something else
    off = timing.copy(deep=True)
    update = off["instruction_kind"] == "update"
    off["predicted_end"] = off["predicted_end"] + 0.1 * off["step_time"].median("repetition") * update
    change = (kind_errors(off) - kind_errors(timing)).where(has_instructions(timing))
    np.testing.assert_allclose(change.sel(kind="update").median(), 0.1)
    np.testing.assert_allclose(change.drop_sel(kind="update").fillna(0), 0, atol=1e-12)
    assert "in the update" in FIGURES["predicted_instructions"].say(off).split(",")[1]


def test_ddp_has_no_predicted_instructions_and_that_is_said(timing, tmp_path: Path):
    assert not has_instructions(timing).sel(strategy="ddp").any()
    assert prediction_error(timing).sel(strategy="ddp").notnull().any()
    assert "not its instructions, of ``ddp`` (4 cells)" in FIGURES["predicted_instructions"].say(timing)
    row = strategies_table(timing).set_index("strategy").loc["ddp"]
    assert row["cells"] == 4
    assert np.isnan(row["forward_error"])
    write_predictions(timing, tmp_path)
    page = (tmp_path / "predicted_instructions_table.rst").read_text()
    assert max(map(len, page.splitlines())) < 10_000  # or it is refused as part of a page
    assert page.count("not predicted") == 1
    assert "nan" not in page


def test_a_study_whose_instructions_were_not_predicted_still_has_its_steps(timing, tmp_path: Path):
    old = timing.drop_vars(["predicted_start", "predicted_end"])
    assert FIGURES["predicted_instructions"].say(old).startswith("Of no cell")
    assert FIGURES["prediction"].say(old).split("\n")[0].endswith(" cells.")
    write_predictions(old, tmp_path)
    assert len(pd.read_csv(tmp_path / "predictions.csv")) == len(cells_table(timing))
    assert pd.read_csv(tmp_path / "predicted_instructions.csv").empty


def test_the_table_of_cells_has_each_with_its_interval_and_error(timing):
    table = cells_table(timing)
    assert len(table) == int(prediction_error(timing).notnull().sum())
    assert (table["low_s"] <= table["measured_s"]).all()
    assert (table["measured_s"] <= table["high_s"]).all()
    np.testing.assert_allclose(table["error"], table["predicted_s"] / table["measured_s"] - 1)


def test_the_table_of_kinds_adds_up_to_the_steps(timing):
    table = kinds_table(timing)
    assert set(table["kind"]) == {*KINDS, SPREAD}
    steps = cells_table(timing).set_index(list(INDEX))["error"].drop("ddp", level="strategy").sort_index()
    by_cell = table.groupby(list(INDEX))["error_of_step"].sum().sort_index()
    np.testing.assert_allclose(by_cell, steps)


def test_the_table_of_instructions_has_what_the_store_has(timing):
    table = instructions_table(timing)
    place = {"network": "50:500", "batch_size": 32, "device_set": SETS[2], "link": "loopback", "strategy": "kernel"}
    cell = timing.sel(place)
    rows = table[(table[list(INDEX)] == pd.Series(place)).all(axis=1)]
    assert len(rows) == int(cell["instruction_end"].notnull().sum())
    assert set(table["kind"]) == set(kinds_table(timing)["kind"]) - {"idle", SPREAD}
    row = rows[(rows["name"] == "conv2") & (rows["kind"] == "backward") & (rows["device"] == 1)].iloc[0]
    here = {"instruction": row["instruction"], "device": 1}
    assert row["device_label"] == "cpu@0.5"
    assert row["predicted_end_s"] == cell["predicted_end"].sel(here).item()
    assert row["measured_start_s"] == cell["instruction_start"].sel(here).item()


def test_the_table_by_strategy_has_the_median_the_tail_and_parts_that_add_up(timing):
    table = strategies_table(timing).set_index("strategy")
    error = prediction_error(timing).sel(strategy="kernel").values.ravel()
    error = error[np.isfinite(error)]
    row = table.loc["kernel"]
    assert row["median"] == pytest.approx(np.median(abs(error)))
    assert row["p95"] == pytest.approx(np.quantile(abs(error), 0.95))
    assert sum(row[f"{kind}_part"] for kind in (*KINDS, SPREAD)) == pytest.approx(1)
    assert table.loc["all", "cells"] == table.drop("all")["cells"].sum()


def test_the_interval_of_a_step_draws_whole_rounds():
    index = CellIndex("50:500", 32, "cpu", "loopback", "single")
    cell = synthetic.cell(index, repetitions=60)
    of_round = np.repeat([1.0, 2.0, 3.0], 20)
    grid = synthetic.combine([cell.assign(step_time=("repetition", of_round))], [index])
    alike = step_interval(grid.assign(round=xr.zeros_like(grid["round"])))
    apart = step_interval(grid.assign(round=grid["round"].copy(data=(of_round - 1).reshape(grid["round"].shape))))
    assert (apart["low"].item(), apart["high"].item()) == (1, 3)
    assert (alike["low"].item(), alike["high"].item()) == (2, 2)


def test_the_marks_of_the_figure_are_the_errors_of_the_cells(timing):
    figure = FIGURES["predicted_instructions"].draw(timing)
    below = figure.axes[len(KINDS) + KINDS.index("backward")]
    errors = kind_errors(timing).sel(kind="backward", strategy="kernel").values
    drawn = [np.sort(line.get_ydata()) for line in below.get_lines()]
    wanted = np.sort(errors[np.isfinite(errors)])
    assert any(one.shape == wanted.shape and np.allclose(one, wanted) for one in drawn)


def test_the_timeline_has_two_lanes_a_device_that_end_with_the_step(timing):
    place = shown_cell(timing)
    assert place is not None
    assert place["strategy"] not in ("single", "ddp")
    (axis,) = FIGURES["predicted_timeline"].draw(timing).axes
    lanes = sorted((label.get_position()[1], label.get_text().split()[-1]) for label in axis.get_yticklabels())
    assert [name for _, name in lanes] == ["predicted", "measured"] * 2
    cell = timing.sel(place)
    scale = 1 if "/ s" in axis.get_xlabel() else 1e3
    ends = [line.get_xdata()[0] / scale for line in axis.get_lines()]
    np.testing.assert_allclose(ends, [cell["predicted_end"].max(), cell["instruction_end"].max()])


def test_the_page_has_the_table_below_its_figure(timing, tmp_path: Path):
    write_figures({"timing": timing}, tmp_path, ["predicted_instructions"])
    assert "include:: predicted_instructions_table.rst" not in write_page(tmp_path).read_text()
    written = write_predictions(timing, tmp_path)
    assert {path.name for path in written} == {
        "predictions.csv",
        "predictions_far_off.csv",
        "predicted_kinds.csv",
        "predicted_instructions.csv",
        "prediction_table.rst",
        "predicted_instructions_table.rst",
    }
    page = write_page(tmp_path).read_text()
    assert page.index("predicted_instructions.svg") < page.index("include:: predicted_instructions_table.rst")

"""What `auto` takes beside the fastest other strategy, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import xarray as xr

from pipeline.analysis.choice import auto_against_fastest, repeatability
from pipeline.analysis.instruction_findings import instructions_finding
from pipeline.analysis.prediction_tables import strategies_table
from pipeline.analysis.statistics import copied
from pipeline.analysis.step_findings import choice_finding, prediction_finding
from pipeline.results.contracts import CellIndex
from pipeline.results.stores import combine
from tests import synthetic


def grid(steps: Mapping[str, Sequence[Sequence[float]]]) -> xr.Dataset:
    """A grid of one place, from the steps of each strategy in s, by round."""
    cells = []
    for strategy, rounds in steps.items():
        index = CellIndex("50:500", 32, "cpu + cpu@0.5", "loopback", strategy)
        times = np.concatenate([np.array(one, float) for one in rounds])
        made = synthetic.cell(index, repetitions=len(times))
        made["step_time"] = ("repetition", times)
        made["round"] = ("repetition", np.repeat(np.arange(float(len(rounds))), [len(one) for one in rounds]))
        cells.append((index, made))
    return combine([made for _, made in cells], [index for index, _ in cells])


def test_auto_is_compared_with_the_fastest_other_strategy():
    timing = grid({"paper": [[4.0, 4], [4, 4]], "kernel": [[2.0, 2], [2, 2]], "auto": [[2.1, 2.1], [2.1, 2.1]]})
    (found,) = auto_against_fastest(timing)
    assert (found.network, found.batch_size, found.device_set) == ("50:500", 32, "cpu + cpu@0.5")
    assert found.fastest == "kernel"
    assert found.chosen == "kernel"
    assert found.ratio == pytest.approx(1.05)
    assert (found.low, found.high) == pytest.approx((1.05, 1.05))
    assert found.exceeds
    assert dict(found.medians) == pytest.approx({"paper": 4, "kernel": 2, "auto": 2.1})
    finding = choice_finding(timing)
    assert "in 1 of 1 places more than 1.03 times, in 1 beyond the spread" in finding
    assert "None had one round" in finding
    assert "1.05 times (95 % interval 1.05 to 1.05) as long as ``kernel``, having chosen ``kernel``" in finding


def test_a_round_that_is_slow_for_all_strategies_does_not_widen_the_interval():
    together = grid({"kernel": [[2.0, 2], [6, 6], [2, 2]], "auto": [[2.0, 2], [6, 6], [2, 2]]})
    (found,) = auto_against_fastest(together)
    assert (found.low, found.high) == (1.0, 1.0)
    assert found.same
    assert "In 1 it took the very plan of the fastest" in choice_finding(together)
    apart = grid({"kernel": [[2.0, 2], [2, 2], [2, 2]], "auto": [[2.0, 2], [6, 6], [2, 2]]})
    (wide,) = auto_against_fastest(apart)
    assert not wide.same
    assert wide.low == pytest.approx(1.0)
    assert wide.high > 1.5
    assert not wide.exceeds


def test_there_is_nothing_to_compare_where_auto_or_all_others_are_missing():
    for steps in ({"kernel": [[1.0, 1]]}, {"auto": [[1.0, 1]]}):
        assert auto_against_fastest(grid(steps)) == []
    assert "No step of ``auto``" in choice_finding(grid({"kernel": [[1.0, 1]]}))


def test_repeatability_is_how_far_each_round_is_from_the_others():
    timing = grid({"kernel": [[2.0, 2], [3, 3]], "paper": [[1.0, 1, 1]]})
    found = repeatability(timing).sel(strategy="kernel").squeeze()
    assert found["forecast_error"].item() == pytest.approx((3 / 2 - 1 + 1 - 2 / 3) / 2)  # each told by the other
    assert found["between_rounds"].item() == pytest.approx((3 - 2) / 2.5)
    assert repeatability(timing).sel(strategy="paper").isnull().all()
    assert "would be off by 41.7% in the one cell of several rounds; a round" in prediction_finding(timing)
    both = prediction_finding(grid({"kernel": [[2.0, 2], [3, 3]], "paper": [[2.0, 2], [3, 3]]}))
    assert "would be off by 41.7% in the median and 41.7% at the 95th percentile of the 2 cells of several" in both


def test_a_round_is_told_by_the_median_of_all_steps_of_the_others():
    timing = grid({"kernel": [[1.0, 1, 1], [2.0], [4.0]]})
    wanted = [3 / 1 - 1, 1 - 1 / 2, 1 - 1 / 4]
    assert repeatability(timing)["forecast_error"].item() == pytest.approx(np.mean(wanted))


def test_steps_of_a_store_without_rounds_are_all_of_one():
    timing = grid({"kernel": [[2.0, 2], [3, 3]], "auto": [[2.0, 2], [3, 3]]}).drop_vars(["round", "chosen", "stolen"])
    (found,) = auto_against_fastest(timing)
    assert found.chosen == ""
    assert found.rounds == 1
    assert "1 had one round" in choice_finding(timing)
    assert repeatability(timing)["forecast_error"].isnull().all()
    assert "Measurements differ" not in prediction_finding(timing)


def test_a_cell_of_auto_that_was_timed_for_another_strategy_counts_once_among_all():
    steps = {"kernel": [[2.0, 2], [2, 2.5]], "paper": [[3.0, 3], [3, 3]], "auto": [[2.0, 2], [2, 2.5]]}
    twice, apart = grid(steps), grid(steps | {"auto": [[2.0, 2], [2, 2.6]]})
    for timing in (twice, apart):
        timing["predicted_step_time"].loc[{"strategy": ["kernel", "auto"]}] = 2.2
        timing["predicted_step_time"].loc[{"strategy": "paper"}] = 3.6
        timing["peak_memory"][:], timing["predicted_memory"][:] = 1e9, 1.1e9
    assert list(copied(twice)["strategy"].values[copied(twice).values.ravel()]) == ["auto"]
    assert not copied(apart).any()
    said = prediction_finding(twice)
    assert "is off by 15.0% in the median and 19.5% at the 95th percentile of 2 cells (1 more of ``auto`` was" in said
    assert "``auto`` 10.0% and 10.0%" in said
    assert "of 4 ranks" in said
    assert "is off by 10.0% in the median and 19.0% at the 95th percentile of 3 cells;" in prediction_finding(apart)
    assert "of 6 ranks" in prediction_finding(apart)
    table = strategies_table(twice).set_index("strategy")
    assert list(table["cells"]) == [1, 1, 1, 2]
    assert table.loc["all", "median"] == pytest.approx(0.15)
    assert table.loc["auto", "forecast_median"] == table.loc["kernel", "forecast_median"] > 0
    assert table.loc["all", "forecast_median"] == pytest.approx(table.loc["kernel", "forecast_median"] / 2)
    assert "predicted instructions of 2 cells" in instructions_finding(twice)
    assert "predicted instructions of 3 cells" in instructions_finding(apart)


def test_the_predicted_memory_is_told_beside_the_measured() -> None:
    timing = grid({"kernel": [[2.0, 2]]})
    timing["peak_memory"][:] = 1e9
    timing["predicted_memory"][:] = 0.9e9
    timing["predicted_memory"].loc[{"device": 0}] = 1.2e9
    assert "off by 15.0% in the median and by 20.0% at most, of 2 ranks" in prediction_finding(timing)

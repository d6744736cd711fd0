"""What `auto` takes beside the fastest other strategy, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import xarray as xr

from pipeline.analysis.choice import auto_against_fastest, repeatability
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
    np.testing.assert_allclose(sorted(repeatability(timing)), [1 / 3, 1 / 2])
    assert "Measurements differ, too" in prediction_finding(timing)
    assert repeatability(grid({"kernel": [[1.0, 2]]})).size == 0


def test_steps_of_a_store_without_rounds_are_all_of_one():
    timing = grid({"kernel": [[2.0, 2], [3, 3]], "auto": [[2.0, 2], [3, 3]]}).drop_vars(["round", "chosen", "stolen"])
    (found,) = auto_against_fastest(timing)
    assert found.chosen == ""
    assert found.rounds == 1
    assert "1 had one round" in choice_finding(timing)
    assert repeatability(timing).size == 0
    assert "Measurements differ" not in prediction_finding(timing)


def test_the_predicted_memory_is_told_beside_the_measured() -> None:
    timing = grid({"kernel": [[2.0, 2]]})
    timing["peak_memory"][:] = 1e9
    timing["predicted_memory"][:] = 0.9e9
    timing["predicted_memory"].loc[{"device": 0}] = 1.2e9
    assert "off by 15.0% in the median and by 20.0% at most, of 2 ranks" in prediction_finding(timing)

"""Two studies side by side: only what both measured, in numbers that follow the stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.analysis.comparison import compare, summary_of, write_comparison
from tests import synthetic


def test_cells_that_both_measured_are_compared(tmp_path: Path) -> None:
    sets = ("cpu@0.45", "2 x cpu@0.45")
    wanted = synthetic.indices(networks=("50:500", "500:1500"), batch_sizes=(32,), device_sets=sets)
    timing = synthetic.timing(wanted)
    other = synthetic.timing([index for index in wanted if index[0] == "50:500"])
    table = compare(timing, other.assign(step_time=2 * other.step_time))
    assert set(table["network"]) == {"50:500"}
    assert len(table) == sum(index[0] == "50:500" for index in wanted)
    assert table["ratio"].to_numpy() == pytest.approx(2)
    assert ((table["low"] > 1.5) & (table["high"] < 2.5)).all()
    assert table["speedup"].to_numpy() == pytest.approx(table["speedup_there"].to_numpy())
    text = summary_of(table)
    assert f"{len(table)} cells in common" in text
    assert "2.00 times as fast" in text
    page = write_comparison(table, tmp_path / "compared.html", here="this <one>", there="that")
    written = page.read_text(encoding="utf-8")
    assert "this &lt;one&gt;" in written
    assert written.count("<tr") == len(table) + 1


def test_studies_without_a_common_cell_say_so() -> None:
    grids = (synthetic.indices(networks=(name,), batch_sizes=(32,)) for name in ("50:500", "150:800"))
    table = compare(*map(synthetic.timing, grids))
    assert table.empty
    assert "no measured cell in common" in summary_of(table)

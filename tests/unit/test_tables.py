"""The headline table sets the paper's two speedups beside what was measured, and says where nothing was."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline.analysis import paper
from pipeline.analysis.statistics import simulated_speedup, speedup
from pipeline.analysis.tables import NOT_MEASURED, headline, html_table, markdown, write_headline
from tests import synthetic


@pytest.fixture(scope="module")
def timing():
    sets = ("cpu@0.45", "4 x cpu@0.45", "cpu + 3 x cpu@0.45")
    return synthetic.timing(synthetic.indices(("50:500", "500:1500"), (32, 64), sets))


def test_the_claims_are_those_of_the_abstract():
    assert [(c.device_kind, c.device_count, c.speedup) for c in paper.CLAIMS] == [("cpu", 4, 3.28), ("gpu", 3, 2.45)]


def test_the_best_split_of_the_papers_network_stands_first_then_the_literal_method_then_ddp(timing):
    table = headline(timing).set_index("claim").loc["4 CPUs"]
    assert list(table["strategy"]) == ["kernel", "paper", "ddp"]
    assert set(table["network"]) == {"500:1500"}
    assert set(table["device_set"]) == {"4 x cpu@0.45"}
    assert set(table["baseline_device"]) == {"cpu@0.45"}
    assert set(table["emulated"]) == {"emulated"}
    measured = speedup(timing)["speedup"].sel(network="500:1500", device_set="4 x cpu@0.45", strategy="kernel")
    assert table["speedup"].iloc[0] == pytest.approx(measured.max().item())
    np.testing.assert_allclose(table["efficiency"] * table["bound"], table["speedup"])


def test_what_was_not_measured_is_said_to_be_so(timing):
    row = headline(timing).set_index("claim").loc["3 GPUs"]
    assert row["strategy"] == NOT_MEASURED
    assert row["paper"] == 2.45
    assert np.isnan(row["speedup"])


def test_without_the_papers_network_the_largest_measured_one_is_taken():
    small = synthetic.timing(synthetic.indices(("50:500", "150:800"), (32,), ("cpu", "4 x cpu")))
    assert headline(small)["network"].iloc[0] == "150:800"
    assert headline(small)["emulated"].iloc[0] == "no"


def test_a_set_of_unequal_or_fewer_devices_is_no_match():
    other = synthetic.timing(synthetic.indices(("500:1500",), (32,), ("cpu", "3 x cpu", "cpu + 3 x cpu@0.5")))
    assert list(headline(other)["strategy"]) == [NOT_MEASURED, NOT_MEASURED]


def test_the_table_is_written_for_people_and_for_programs(timing, tmp_path: Path):
    written = write_headline(timing.assign_attrs(hardware="<b>|2 cores"), tmp_path)
    assert {path.name for path in written} == {f"headline.{end}" for end in ("html", "csv", "md", "rst")}
    page = (tmp_path / "headline.html").read_text()
    assert "3.28x" in page
    assert NOT_MEASURED in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert len(pd.read_csv(tmp_path / "headline.csv")) == len(headline(timing))
    assert "2 cores" in (tmp_path / "headline.md").read_text()


def test_markdown_and_html_have_a_row_per_row(timing):
    table = headline(timing)
    assert markdown(table).count("\n") == len(table) + 2
    assert html_table(table).count("<tr>") == len(table) + 1
    assert "a\\|b" in markdown(table.assign(device_set="a|b"))


def test_the_simulated_speedup_of_the_same_cell_stands_beside_the_measured_one(timing):
    simulation = synthetic.simulation()
    table = headline(timing.sel(batch_size=[32]), simulation).set_index(["claim", "strategy"])
    place = {"network": "500:1500", "batch_size": 32, "device_set": "4 x cpu@0.45", "link": "loopback"}
    for strategy in ("kernel", "paper", "ddp"):
        wanted = simulated_speedup(simulation).sel({**place, "strategy": strategy}).item()
        assert table.loc[("4 CPUs", strategy), "simulated"] == pytest.approx(wanted)
    assert headline(timing.sel(batch_size=[64]), simulation)["simulated"].isna().all()


def test_what_was_only_simulated_stands_in_its_column_alone(timing):
    simulation = synthetic.simulation(device_sets=("gpu", "3 x gpu"))
    table = headline(timing, simulation).set_index("claim").loc["3 GPUs"]
    place = {"network": "500:1500", "device_set": "3 x gpu", "link": "loopback"}
    ratios = simulated_speedup(simulation).sel(place)
    assert table["simulated"].iloc[0] == pytest.approx(ratios.drop_sel(strategy=["ddp", "auto"]).max().item())
    assert list(table["strategy"])[1:] == ["paper", "ddp"]
    assert table["speedup"].isna().all()
    assert set(table["baseline_device"]) == {"gpu"}
    assert "5,000 GFLOP/s" in _note_of(timing, simulation)


def _note_of(timing, simulation) -> str:
    with tempfile.TemporaryDirectory() as folder:
        write_headline(timing, folder, simulation=simulation)
        return Path(folder, "headline.md").read_text()

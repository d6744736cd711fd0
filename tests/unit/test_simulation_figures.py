"""The figures of many devices, other links and break-even, and of what each idea brings, follow their stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from pipeline.analysis import selection, style
from pipeline.analysis.figures import FIGURES
from pipeline.analysis.statistics import simulated_speedup, speedup
from pipeline.results.contracts import CellIndex
from pipeline.results.stores import combine
from tests import synthetic
from tests.unit.test_figures import texts

SIMULATED = [name for name, entry in FIGURES.items() if "simulation" in entry.stores]
SETS = ("cpu@0.45", "2 x cpu@0.45", "4 x cpu@0.45")


@pytest.fixture(scope="module")
def timing() -> xr.Dataset:
    return synthetic.timing(synthetic.indices(("50:500", "500:1500"), (32,), SETS))


@pytest.fixture
def simulation() -> xr.Dataset:
    return synthetic.simulation()


def set_speedups(simulation: xr.Dataset, speedups: list[float], **cells: object) -> None:
    """Make the speedups along what `cells` leaves open those given; `single` stays as it is."""
    alone = simulation["predicted_step_time"].sel(strategy="single", drop=True)
    chosen = {name: value for name, value in cells.items() if name != "strategy"}
    place = simulation["predicted_step_time"].sel(cells)
    simulation["predicted_step_time"].loc[cells] = (alone.sel(chosen) / np.array(speedups)).broadcast_like(place)


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize(
    "poor",
    [synthetic.simulation(device_sets=("cpu",)), synthetic.simulation(strategies=("kernel",))],
    ids=["one device", "no baseline"],
)
def test_where_nothing_was_simulated_the_figure_and_the_sentence_say_so(timing, poor, name: str, tmp_path: Path):
    figure = FIGURES[name].draw(poor, timing)
    style.save(figure, tmp_path / name)
    assert "Nothing was simulated" in texts(figure)
    assert "Nothing was simulated" in FIGURES[name].say(poor, timing)


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize(
    "changes",
    [
        {"networks": ("150:800",), "batch_sizes": (8,)},
        {"device_sets": ("gpu", "2 x gpu", "8 x gpu"), "links": ("1Gbit/s",)},
        {"links": ("loopback",)},
        {"strategies": ("single", "kernel")},
        {"device_sets": ("8 x cpu",)},
    ],
    ids=["never measured", "other devices", "the real link only", "one strategy", "one set"],
)
def test_a_grid_unlike_the_measured_one_still_gives_a_figure_and_a_sentence(timing, changes, name: str, tmp_path: Path):
    grid = synthetic.simulation(**changes)
    style.save(FIGURES[name].draw(grid, timing), tmp_path / name)
    assert "nan" not in FIGURES[name].say(grid, timing)


@pytest.mark.parametrize("name", SIMULATED)
def test_nothing_measured_leaves_what_was_simulated(name: str, tmp_path: Path):
    simulation = synthetic.simulation(device_sets=synthetic.SETS_WITH_GPUS)
    index = CellIndex("50:500", 32, "cpu@0.45", "loopback", "single")
    grid = combine([synthetic.cell(index)], [index])
    figure = FIGURES[name].draw(simulation, grid)
    style.save(figure, tmp_path / name)
    assert "Simulated" in FIGURES[name].say(simulation, grid)
    assert "Measured" not in FIGURES[name].say(simulation, grid)


def test_the_scaling_lines_and_marks_are_the_simulated_and_measured_speedups(simulation, timing):
    figure = FIGURES["scaling"].draw(simulation, timing)
    place = {"network": "500:1500", "batch_size": 32, "link": "loopback", "strategy": "kernel"}
    lines = [np.asarray(line.get_ydata(), float) for axis in figure.axes for line in axis.get_lines()]
    expected = simulated_speedup(simulation).sel(place).values
    assert any(line.shape == expected.shape and np.allclose(line, expected) for line in lines)
    for device_set in SETS[1:]:
        measured = speedup(timing)["speedup"].sel(place).sel(device_set=device_set).item()
        assert any(line.size == 1 and np.isclose(line[0], measured) for line in lines)


def test_the_scaling_finding_tells_where_each_strategy_saturates(simulation, timing):
    place = {"network": "500:1500", "batch_size": 32, "link": "loopback"}
    for strategy, speedups in {
        "ddp": [1, 0.9, 0.5, 0.2, 0.1],
        "paper": [1, 1.5, 2.25, 2.3, 2.0],
        "kernel": [1, 2, 4, 15, 15.5],
        "batch": [1, 2, 4, 16, 61],
    }.items():
        set_speedups(simulation, speedups, **place, strategy=strategy)
    said = FIGURES["scaling"].say(simulation, timing)
    line = said.splitlines()[0]
    assert line.startswith("- Simulated on up to 64 ``cpu@0.45`` (emulated), loopback: ``ddp``")
    assert line.endswith("; 500:1500, batch 32.")
    assert "``ddp`` never gains" in line
    assert "``paper`` saturates at 4 devices (speedup 2.25)" in line
    assert "``kernel`` saturates at 16 devices (speedup 15)" in line
    assert "``batch`` still gains at 64 devices (speedup 61)" in line
    measured = speedup(timing)["speedup"].sel(place).sel(device_set="4 x cpu@0.45", strategy="kernel").item()
    assert f"``kernel`` {measured:.2f} (4.00)" in said


def test_the_links_finding_tells_over_which_links_splitting_pays(simulation, timing):
    simulation = simulation.sel(network=["50:500"])
    place = {"network": "50:500", "batch_size": 32, "device_set": "4 x cpu@0.45"}
    links = {"link": ["10Mbit/s+1ms", "1Gbit/s+100us", "100Gbit/s+10us"]}
    for strategy, speedups in {"paper": [0.1, 0.4, 0.83], "kernel": [0.7, 0.9, 3.1], "batch": [1.07, 2, 3]}.items():
        set_speedups(simulation, speedups, **place, **links, strategy=strategy)
    set_speedups(simulation, [1.2, 0.7, 3.1], **place, **links, strategy="ddp")
    said = FIGURES["links"].say(simulation, timing).splitlines()[0]
    assert said.endswith(": 50:500, batch 32.")
    assert "Simulated over 3 links, ``4 x cpu@0.45`` (emulated) are faster than one device with ``ddp`` over 2," in said
    assert "``paper`` over none (speedup at most 0.83)" in said
    assert "``kernel`` over 1, the slowest 100Gbit/s+10us (speedup 3.10)" in said
    assert "``batch`` over 3, the slowest 10Mbit/s+1ms (speedup 1.07)" in said


def test_links_of_one_delay_share_a_panel_and_the_real_one_stands_with_the_shortest(timing):
    names = ("loopback", *(f"{rate}bit/s{delay}" for rate in ("10M", "1G", "100G") for delay in ("", "+1ms", "+50ms")))
    grid = synthetic.simulation(links=names)
    assert selection.by_delay(selection.links(grid)) == {
        "0 ms": ["10Mbit/s", "1Gbit/s", "100Gbit/s"],
        "1 ms": ["10Mbit/s+1ms", "1Gbit/s+1ms", "100Gbit/s+1ms"],
        "50 ms": ["10Mbit/s+50ms", "1Gbit/s+50ms", "100Gbit/s+50ms"],
    }
    axes = FIGURES["links"].draw(grid, timing).axes
    assert [axis.get_title(loc="left") for axis in axes] == ["delay 0 ms", "delay 1 ms", "delay 50 ms"]
    assert [len(axis.get_xticks()) for axis in axes] == [4, 3, 3]
    assert selection.by_delay(["1Gbit/s", "2Gbit/s+1ms"]) == {"": ["1Gbit/s", "2Gbit/s+1ms"]}


def test_the_links_shown_beside_measured_ones_are_of_their_delay():
    names = ("loopback", *(f"{rate}bit/s{delay}" for rate in ("10M", "100M", "1G", "10G") for delay in ("", "+1ms")))
    wanted = synthetic.indices(("50:500",), (32,), ("cpu", "2 x cpu"), links=("loopback", "1Gbit/s+1ms"))
    shown = selection.shown_links(synthetic.simulation(links=names), synthetic.timing(wanted))
    assert shown == ["100Mbit/s+1ms", "1Gbit/s+1ms", "loopback"]


def test_links_are_ordered_from_slow_to_fast_and_the_real_one_is_last():
    names = ("loopback", "1Gbit/s", "100Mbit/s+1ms", "1Gbit/s+5ms")
    assert selection.links(synthetic.simulation(links=names)) == [
        "100Mbit/s+1ms",
        "1Gbit/s+5ms",
        "1Gbit/s",
        "loopback",
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_at_most_three_links_are_shown_and_the_measured_one_is_among_them(timing, count: int):
    names = ("loopback", *(f"{10 * rate + 10}Mbit/s" for rate in range(count - 1)))
    shown = selection.shown_links(synthetic.simulation(links=names), timing)
    assert len(shown) <= 3
    assert shown[-1] == "loopback"
    assert set(shown) <= set(names)


def test_the_break_even_finding_tells_from_which_batch_on_splitting_pays(simulation, timing):
    place = {"link": "1Gbit/s+100us", "device_set": "4 x cpu@0.45"}
    for network, speedups in {"50:500": [0.4, 1.25], "500:1500": [0.3, 0.9]}.items():
        for strategy in ("paper", "kernel", "batch"):
            set_speedups(simulation, speedups, **place, network=network, strategy=strategy)
    set_speedups(simulation, [9.0, 9.0], **place, network="50:500", strategy="auto")
    said = FIGURES["break_even"].say(simulation, timing)
    assert "over 1Gbit/s+100us in 1 of 4 cells (50:500 from batch 256 on (1.25), 500:1500 never)" in said
    reached = speedup(timing)["speedup"].sel(device_set="4 x cpu@0.45", batch_size=32)
    best = reached.sel(strategy=["equal", "paper", "kernel", "batch"]).max("strategy").values
    assert f"pays in 2 of 2 such cells (speedup {best.min():.2f} to {best.max():.2f})" in said


def test_the_thick_line_parts_the_cells_in_which_splitting_pays(simulation, timing):
    place = {"link": "1Gbit/s+100us", "device_set": "4 x cpu@0.45"}
    for network, speedups in {"50:500": [0.4, 1.25], "500:1500": [0.3, 0.9]}.items():
        for strategy in ("paper", "kernel", "batch"):
            set_speedups(simulation, speedups, **place, network=network, strategy=strategy)
    figure = FIGURES["break_even"].draw(simulation, timing)
    axis = next(axis for axis in figure.axes if "1Gbit/s+100us" in axis.get_title(loc="left"))
    edges = {(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axis.get_lines()}
    assert edges == {((0, 1), (1, 1)), ((1, 1), (1, 2))}
    assert {"0.40", "1.25", "0.30", "0.90"} <= {text.get_text() for text in axis.texts}


def test_a_described_device_is_called_an_assumption(timing):
    grid = synthetic.simulation(device_sets=("gpu", "4 x gpu"))
    for name in SIMULATED:
        assert "5,000 GFLOP/s assumed" in FIGURES[name].say(grid, timing)
        assert "5,000 GFLOP/s assumed" in texts(FIGURES[name].draw(grid, timing))


def test_the_waterfall_tells_times_and_megabytes_against_the_step_before(timing):
    grid = timing.sel(network=["500:1500"]).drop_sel(strategy="auto").copy(deep=True)
    for strategy, seconds, megabytes in (
        ("single", 8.0, 0),
        ("paper", 4.0, 300),
        ("kernel", 3.0, 60),
        ("batch", 3.3, 90),
    ):
        grid["step_time"].loc[{"strategy": strategy}] = seconds
        exchanges = grid["instruction_kind"].sel(strategy=strategy) == "exchange"
        each = xr.where(exchanges, 1e6 * megabytes / exchanges.sum("instruction"), 7.0)
        grid["instruction_master_bytes"].loc[{"strategy": strategy}] = each.transpose(
            *grid["instruction_master_bytes"].sel(strategy=strategy).dims
        )
    said = FIGURES["waterfall"].say(grid)
    assert "sends 60 instead of 300 MB through the master's link: 500:1500, batch 32, on" in said
    assert "\n- 500:1500, batch 32, on ``4 x cpu@0.45`` (emulated), each" in said
    assert "``single`` 8 s; ``paper`` 4 s (-50.0%), 300 MB; ``kernel`` 3 s (-25.0%), 60 MB" in said
    assert "``batch`` 3.3 s (+10.0%), 90 MB" in said
    times, moved = FIGURES["waterfall"].draw(grid).axes[:2]
    colors = {to_hex(style.STRATEGIES[name].color): name for name in ("single", "paper", "kernel", "batch")}
    bars = {colors[to_hex(bar.get_facecolor())]: bar for bar in times.patches if to_hex(bar.get_facecolor()) in colors}
    assert {name: round(bar.get_width(), 6) for name, bar in bars.items()} == {
        "single": 8,
        "paper": 4,
        "kernel": 3,
        "batch": 3.3,
    }
    assert sorted(round(bar.get_width(), 6) for bar in moved.patches) == [0, 60, 90, 300]

"""Figures draw what the stores hold, say where it comes from, and cope with grids that hold little."""

from __future__ import annotations

from pathlib import Path

import matplotlib.colors
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from pipeline.analysis import selection, style
from pipeline.analysis.figures import FIGURES, write_figures
from pipeline.results.contracts import CellIndex, unmeasured_cell
from pipeline.results.stores import combine
from tests import synthetic

SETS = ("cpu@0.45", "2 x cpu@0.45", "cpu + cpu@0.5")


@pytest.fixture(scope="module")
def stores() -> dict[str, xr.Dataset]:
    networks, sets = ("50:500", "500:1500"), (*SETS, "cpu")
    wanted = [i for i in synthetic.indices(networks, (32,), sets) if i.network == "50:500" or i.device_set != SETS[2]]
    return synthetic.study() | {"timing": synthetic.timing(wanted)}


def texts(figure: Figure) -> str:
    return "\n".join(str(text.get_text()) for text in figure.findobj(match=lambda a: hasattr(a, "get_text")))


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_units_a_source_and_says_what_is_emulated(stores, name: str):
    entry = FIGURES[name]
    figure = entry.draw(*(stores[store] for store in entry.stores))
    shown = texts(figure)
    assert f"Data: {', '.join(f'{store}.zarr' for store in entry.stores)}" in shown
    assert "simulation" not in entry.stores or "simulated" in shown.lower()
    assert "synthetic machine" in shown
    assert "emulated" in shown
    drawn = [axis for axis in figure.axes if axis.axison]
    assert drawn
    assert all(axis.get_xlabel() for axis in drawn[-1:])


@pytest.mark.parametrize("name", FIGURES)
def test_every_finding_has_numbers_and_no_nan(stores, name: str):
    entry = FIGURES[name]
    said = entry.say(*(stores[store] for store in entry.stores))
    assert "simulation" not in entry.stores or "Simulated" in said
    assert any(character.isdigit() for character in said)
    assert "nan" not in said
    assert said.endswith("\n")


def test_all_figures_are_written_as_svg_png_and_words_and_again_the_same(stores, tmp_path: Path):
    folder = tmp_path / "a"
    written = write_figures(stores, folder)
    assert {path.name for path in written} == {f"{n}.{end}" for n in FIGURES for end in ("svg", "png", "rst")}
    again = style.save(FIGURES["speedup"].draw(stores["timing"]), tmp_path / "speedup")
    assert again[0].read_bytes() == (tmp_path / "a" / "speedup.svg").read_bytes()


def test_the_speedup_line_of_a_strategy_runs_through_the_measured_speedups(stores):
    figure = FIGURES["speedup"].draw(stores["timing"])
    lines = {tuple(np.round(line.get_ydata(), 6)) for axis in figure.axes for line in axis.get_lines()}
    from pipeline.analysis.statistics import speedup

    ratio = speedup(stores["timing"])["speedup"].sel(network="50:500", device_set="2 x cpu@0.45", strategy="kernel")
    assert (1.0, round(ratio.item(), 6)) in lines


def test_a_network_that_was_not_split_on_a_set_is_said_to_be_not_measured(stores):
    assert "not measured" in texts(FIGURES["activity"].draw(stores["timing"]))


@pytest.mark.parametrize(
    "cells",
    [
        [synthetic.cell(CellIndex("50:500", 32, "cpu", "loopback", "single"))],
        [synthetic.cell(CellIndex("50:500", 32, "2 x cpu", "loopback", "kernel"))],
        [unmeasured_cell(CellIndex("resnet18", 8, "2 x cpu", "loopback", "kernel"), ["cpu", "cpu"], "failed: x")],
    ],
    ids=["one device only", "no baseline", "no cell that ended well"],
)
@pytest.mark.parametrize("name", [name for name, entry in FIGURES.items() if entry.stores == ("timing",)])
def test_a_poor_grid_still_gives_a_figure_and_a_sentence(cells, name: str, tmp_path: Path):
    grid = combine(cells, [tuple(c[n].item() for n in CellIndex._fields) for c in cells])
    style.save(FIGURES[name].draw(grid), tmp_path / name)
    assert FIGURES[name].say(grid).strip()


def test_a_noisy_cell_carries_an_asterisk(stores):
    noisy = stores["timing"].copy(deep=True)
    noisy["step_time"][{"repetition": slice(0, 2)}] *= 1.5
    assert " *" in texts(FIGURES["step_time"].draw(noisy)).replace("* IQR", "")
    assert "in 0 of" in FIGURES["speedup"].say(stores["timing"])
    assert "in 0 of" not in FIGURES["speedup"].say(noisy)


@pytest.mark.parametrize("name", ["speedup", "step_time", "convolution_share", "waterfall"])
def test_every_figure_of_medians_marks_what_is_noisy_or_of_few_repetitions(name: str):
    wanted = synthetic.indices(("50:500",), (32,), ("cpu@0.45", "2 x cpu@0.45"))
    grid = combine([synthetic.cell(index, repetitions=3) for index in wanted], wanted)
    assert " n=3" in texts(FIGURES[name].draw(grid))
    noisy = combine([synthetic.cell(index) for index in wanted], wanted)
    assert " n=" not in texts(FIGURES[name].draw(noisy))
    noisy["step_time"][{"repetition": slice(0, 2)}] *= 1.5
    assert " *" in texts(FIGURES[name].draw(noisy)).replace("* IQR", "")
    assert " *" in texts(FIGURES[name].draw(noisy)).replace(" * IQR", "").replace(" · ", "")


def test_a_figure_whose_store_is_missing_says_so_and_the_others_are_drawn(stores, tmp_path: Path):
    write_figures({"timing": stores["timing"]}, tmp_path, ["scaling", "accuracy", "speedup"])
    assert "has no simulation.zarr" in (tmp_path / "scaling.rst").read_text()
    assert "has no accuracy.zarr" in (tmp_path / "accuracy.rst").read_text()
    assert "times as fast" in (tmp_path / "speedup.rst").read_text()


def test_strategies_differ_in_lightness_or_hatch_and_in_marker():
    looks = list(style.STRATEGIES.values())
    lightness = [np.dot(matplotlib.colors.to_rgb(look.color), (0.2126, 0.7152, 0.0722)) for look in looks]
    for i, one in enumerate(looks):
        for j, other in enumerate(looks[:i]):
            assert one.marker != other.marker
            assert one.hatch != other.hatch or abs(lightness[i] - lightness[j]) > 0.1


def test_drawing_leaves_the_settings_of_the_reader_alone(stores):
    before = dict(matplotlib.rcParams)
    FIGURES["speedup"].draw(stores["timing"])
    assert dict(matplotlib.rcParams) == before


def test_networks_are_ordered_by_size_and_named_ones_come_last():
    names = ["resnet18", "500:1500", "50:500", "150:800"]
    assert sorted(names, key=selection.network_size) == ["50:500", "150:800", "500:1500", "resnet18"]


def test_the_bars_of_a_device_are_its_compute_exchange_and_idle_time(stores):
    figure = FIGURES["activity"].draw(stores["timing"])
    place = {"network": "50:500", "batch_size": 32, "device_set": "2 x cpu@0.45", "strategy": "ddp"}
    cell = stores["timing"].sel(place).isel(device=0)
    bars = sorted((bar.get_y(), bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches)[:3]
    expected = [1e3 * float(cell[f"{name}_time"].median()) for name in ("compute", "exchange", "idle")]
    np.testing.assert_allclose([width for _, _, width in bars], expected)


def test_the_lanes_of_the_timeline_hold_every_instruction_of_the_last_repetition(stores):
    figure = FIGURES["timeline"].draw(stores["timing"])
    place = {"network": "500:1500", "batch_size": 32, "device_set": "2 x cpu@0.45", "strategy": "ddp"}
    cell = stores["timing"].sel(place)
    lefts = [bar.get_x() for bar in figure.axes[0].patches if bar.get_x() > 0]
    started = cell["instruction_start"].values[cell["instruction_start"].values > 0]
    np.testing.assert_allclose(sorted(lefts), sorted(started))


def test_findings_say_the_numbers_of_the_stores():
    calibration = FIGURES["calibration"].say(synthetic.calibration())
    assert "3.48 s on ``cpu``, 6.96 s on ``cpu@0.5`` (emulated)" in calibration
    assert "0.1 ms latency and 2 GB/s" in calibration
    grid = synthetic.timing(synthetic.indices(("50:500", "150:800"), (32,), ("cpu", "2 x cpu")))
    grid["convolution_time"][:] = grid["step_time"] * xr.DataArray([0.6, 0.75], dims="network")
    said = FIGURES["convolution_share"].say(grid)
    assert said.startswith(
        "- Convolutions, forward and backward, take 60% to 75% of a step on one device; the paper says"
    )
    assert "60% (50:500, batch 32) to 75% (150:800, batch 32)" in said
    for name, part in (("compute", 0.5), ("exchange", 0.3), ("idle", 0.2)):
        grid[f"{name}_time"][:] = part * grid["step_time"]
    assert "compute 50%, exchange 30%, idle 20%" in FIGURES["activity"].say(grid)


def test_the_share_of_convolutions_is_not_cut_off_where_it_passes_all_of_a_step(stores):
    grid = stores["timing"].copy(deep=True)
    grid["convolution_time"] = grid["step_time"].where(grid["strategy"] == "single") * 1.2
    assert FIGURES["convolution_share"].draw(grid).axes[0].get_ylim()[1] > 1.2
    assert FIGURES["convolution_share"].draw(stores["timing"]).axes[0].get_ylim() == (0, 1)


def test_quartiles_show_on_a_dark_bar(stores):
    (axis, *_) = FIGURES["waterfall"].draw(stores["timing"]).axes
    effects = [line.get_path_effects() for line in axis.collections]
    assert effects
    assert all(len(one) == 1 for one in effects)


def test_the_activity_of_devices_has_no_column_of_a_network_that_was_not_split_there():
    wanted = synthetic.indices(("50:500",), (32,), ("2 x cpu", "cpu + cpu@0.5"))
    wanted += synthetic.indices(("500:1500",), (32,), ("3 x cpu",), ("single", "kernel"))
    titles = [axis.get_title(loc="left") for axis in FIGURES["activity"].draw(synthetic.timing(wanted)).axes]
    assert titles == ["50:500, batch 32"] * 2


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [((0.2, 9), ["0.2", "0.3", "0.5", "1", "2", "3", "5"]), ((0.9, 2e3), ["1", "10", "100", "1000"])],
)
def test_logarithmic_axes_are_labelled_with_plain_numbers(limits: tuple[float, float], wanted: list[str]):
    axis = Figure().subplots()
    axis.set(xscale="log", xlim=limits)
    style.plain_logarithmic(axis.xaxis)
    axis.figure.draw_without_rendering()
    low, high = limits
    ticks = [*axis.xaxis.get_major_ticks(), *axis.xaxis.get_minor_ticks()]
    shown = sorted((tick.get_loc(), tick.label1.get_text()) for tick in ticks if low <= tick.get_loc() <= high)
    assert [text for _, text in shown if text] == wanted


def test_the_legend_fits_however_many_strategies_there_are():
    wanted = synthetic.indices(("50:500", "500:1500"), (32,), ("cpu@0.45", "2 x cpu@0.45"))
    figure = FIGURES["speedup"].draw(synthetic.timing(wanted))
    (legend,) = figure.legends
    assert "auto" in [text.get_text() for text in legend.get_texts()]
    figure.draw_without_rendering()
    assert legend.get_window_extent().x1 <= figure.bbox.x1

"""All figures of the study, each with the sentences that say what it shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pipeline.analysis import findings
from pipeline.analysis.accuracy_figure import accuracy_over_epochs
from pipeline.analysis.calibration_figure import calibration_curves
from pipeline.analysis.grid_figures import convolution_over_size, speedup_over_devices, time_per_step
from pipeline.analysis.prediction_figure import predicted_against_measured
from pipeline.analysis.simulation_figures import break_even_map, speedup_over_links, speedup_over_many_devices
from pipeline.analysis.step_figures import step_timeline, time_per_device
from pipeline.analysis.style import save
from pipeline.analysis.waterfall_figure import step_by_step
from pipeline.results.contracts import INDEX, grid_dims


class Entry(NamedTuple):
    """One figure: the stores it is drawn from, how it is drawn from them, and what is said of it."""

    stores: tuple[str, ...]
    draw: Callable[..., Figure]
    say: Callable[..., str]


FIGURES: Mapping[str, Entry] = {
    "speedup": Entry(("timing",), speedup_over_devices, findings.speedup_finding),
    "step_time": Entry(("timing",), time_per_step, findings.step_time_finding),
    "convolution_share": Entry(("timing",), convolution_over_size, findings.convolution_finding),
    "activity": Entry(("timing",), time_per_device, findings.activity_finding),
    "timeline": Entry(("timing",), step_timeline, findings.timeline_finding),
    "waterfall": Entry(("timing",), step_by_step, findings.waterfall_finding),
    "scaling": Entry(("simulation", "timing"), speedup_over_many_devices, findings.scaling_finding),
    "links": Entry(("simulation", "timing"), speedup_over_links, findings.links_finding),
    "break_even": Entry(("simulation", "timing"), break_even_map, findings.break_even_finding),
    "accuracy": Entry(("accuracy",), accuracy_over_epochs, findings.accuracy_finding),
    "prediction": Entry(("timing",), predicted_against_measured, findings.prediction_finding),
    "calibration": Entry(("calibration",), calibration_curves, findings.calibration_finding),
}


def no_grid() -> xr.Dataset:
    """A grid without any cell: what stands for the simulation where none was made."""
    empty = {name: np.array([], int if name == "batch_size" else object) for name in INDEX}
    grid = xr.Dataset(coords=empty)
    for name, kind in (("predicted_step_time", float), ("status", object), ("device_label", object)):
        dims = grid_dims(name)
        grid[name] = (dims, np.empty((0,) * len(dims), kind))
    return grid


def write_figures(
    timing: xr.Dataset,
    accuracy: xr.Dataset,
    calibration: xr.Dataset,
    folder: str | os.PathLike[str],
    *,
    simulation: xr.Dataset | None = None,
) -> list[Path]:
    """Write every figure of FIGURES as `folder`/NAME.svg and NAME.png, and what it shows as NAME.rst."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    simulation = no_grid() if simulation is None else simulation
    stores = {"timing": timing, "accuracy": accuracy, "calibration": calibration, "simulation": simulation}
    written: list[Path] = []
    for name, entry in FIGURES.items():
        datasets = [stores[store] for store in entry.stores]
        says = folder / f"{name}.rst"
        says.write_text(entry.say(*datasets), encoding="utf-8")
        written += [*save(entry.draw(*datasets), folder / name), says]
    return written

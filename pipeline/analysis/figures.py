"""All figures of the study, each with the sentences that say what it shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import xarray as xr
from matplotlib.figure import Figure

from pipeline.analysis import findings
from pipeline.analysis.accuracy_figure import accuracy_over_epochs
from pipeline.analysis.calibration_figure import calibration_curves
from pipeline.analysis.grid_figures import convolution_over_size, speedup_over_devices, time_per_step
from pipeline.analysis.prediction_figure import predicted_against_measured
from pipeline.analysis.step_figures import step_timeline, time_per_device
from pipeline.analysis.style import save


class Entry(NamedTuple):
    """One figure: the store it is drawn from, how it is drawn, and what is said of it."""

    store: str
    draw: Callable[[xr.Dataset], Figure]
    say: Callable[[xr.Dataset], str]


FIGURES: Mapping[str, Entry] = {
    "speedup": Entry("timing", speedup_over_devices, findings.speedup_finding),
    "step_time": Entry("timing", time_per_step, findings.step_time_finding),
    "convolution_share": Entry("timing", convolution_over_size, findings.convolution_finding),
    "activity": Entry("timing", time_per_device, findings.activity_finding),
    "timeline": Entry("timing", step_timeline, findings.timeline_finding),
    "accuracy": Entry("accuracy", accuracy_over_epochs, findings.accuracy_finding),
    "prediction": Entry("timing", predicted_against_measured, findings.prediction_finding),
    "calibration": Entry("calibration", calibration_curves, findings.calibration_finding),
}


def write_figures(
    timing: xr.Dataset, accuracy: xr.Dataset, calibration: xr.Dataset, folder: str | os.PathLike[str]
) -> list[Path]:
    """Write every figure of FIGURES as `folder`/NAME.svg and NAME.png, and what it shows as NAME.rst."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stores = {"timing": timing, "accuracy": accuracy, "calibration": calibration}
    written: list[Path] = []
    for name, entry in FIGURES.items():
        dataset = stores[entry.store]
        says = folder / f"{name}.rst"
        says.write_text(entry.say(dataset), encoding="utf-8")
        written += [*save(entry.draw(dataset), folder / name), says]
    return written

"""All figures of the study, each with the sentences that say what it shows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import xarray as xr
from matplotlib.figure import Figure

from pipeline.analysis import accuracy_findings, grid_findings, instruction_findings, simulation_findings, step_findings
from pipeline.analysis.accuracy_figure import accuracy_over_epochs
from pipeline.analysis.calibration_figure import calibration_curves
from pipeline.analysis.choice_figure import auto_beside_others
from pipeline.analysis.gpu_figure import gpus
from pipeline.analysis.gpu_findings import gpu_finding
from pipeline.analysis.grid_figures import convolution_over_size, speedup_over_devices, time_per_step
from pipeline.analysis.instruction_figures import predicted_instructions, predicted_timeline
from pipeline.analysis.prediction_figure import predicted_against_measured
from pipeline.analysis.simulation_figures import break_even_map, speedup_over_links, speedup_over_many_devices
from pipeline.analysis.step_figures import step_timeline, time_per_device
from pipeline.analysis.style import nothing, save
from pipeline.analysis.unequal_figure import unequal_devices
from pipeline.analysis.unequal_findings import unequal_finding
from pipeline.analysis.waterfall_figure import step_by_step


class Entry(NamedTuple):
    """One figure: the stores it is drawn from, how it is drawn from them, and what is said of it."""

    stores: tuple[str, ...]
    draw: Callable[..., Figure]
    say: Callable[..., str]


FIGURES: Mapping[str, Entry] = {
    "convolution_share": Entry(("timing",), convolution_over_size, grid_findings.convolution_finding),
    "speedup": Entry(("timing",), speedup_over_devices, grid_findings.speedup_finding),
    "gpus": Entry(("simulation", "timing"), gpus, gpu_finding),
    "break_even": Entry(("simulation", "timing"), break_even_map, simulation_findings.break_even_finding),
    "links": Entry(("simulation", "timing"), speedup_over_links, simulation_findings.links_finding),
    "unequal": Entry(("timing", "calibration", "miscalibration"), unequal_devices, unequal_finding),
    "step_time": Entry(("timing",), time_per_step, grid_findings.step_time_finding),
    "accuracy": Entry(("accuracy",), accuracy_over_epochs, accuracy_findings.accuracy_finding),
    "scaling": Entry(("simulation", "timing"), speedup_over_many_devices, simulation_findings.scaling_finding),
    "waterfall": Entry(("timing",), step_by_step, grid_findings.waterfall_finding),
    "prediction": Entry(("timing",), predicted_against_measured, step_findings.prediction_finding),
    "predicted_instructions": Entry(("timing",), predicted_instructions, instruction_findings.instructions_finding),
    "predicted_timeline": Entry(("timing",), predicted_timeline, instruction_findings.timeline_error_finding),
    "choice": Entry(("timing",), auto_beside_others, step_findings.choice_finding),
    "calibration": Entry(("calibration",), calibration_curves, step_findings.calibration_finding),
    "activity": Entry(("timing",), time_per_device, step_findings.activity_finding),
    "timeline": Entry(("timing",), step_timeline, step_findings.timeline_finding),
}


def write_figures(
    stores: Mapping[str, xr.Dataset], folder: str | os.PathLike[str], names: Iterable[str] = FIGURES
) -> list[Path]:
    """Write the figures of FIGURES with these names as `folder`/NAME.svg and NAME.png, and what it shows as NAME.rst.

    `stores` are the data sets by name, such as `timing`. A figure whose store is not among them says so.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name in names:
        entry = FIGURES[name]
        missing = [f"{store}.zarr" for store in entry.stores if store not in stores]
        says = folder / f"{name}.rst"
        if missing:
            why = f"The study has no {' and no '.join(missing)}: snakemake --cores all makes it."
            figure, said = nothing(name.replace("_", " ").capitalize(), why, ""), f"{why}\n"
        else:
            datasets = [stores[store] for store in entry.stores]
            figure, said = entry.draw(*datasets), entry.say(*datasets)
        says.write_text(said, encoding="utf-8")
        written += [*save(figure, folder / name), says]
    return written

"""The figure of the planner's predictions: how far is each predicted step from the measured one?"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from pipeline.analysis import selection
from pipeline.analysis.statistics import prediction_error
from pipeline.analysis.style import (
    MUTED,
    canvas,
    emulated_marks_note,
    legend,
    nothing,
    plain_logarithmic,
    source_line,
    strategy_look,
    style,
    subtitle,
    time_scale,
)


def predicted_against_measured(timing: xr.Dataset, *, store: str = "timing.zarr") -> Figure:
    """Relative error of the predicted step time of every cell, over its measured time and by strategy."""
    title, source = "Predicted and measured step times", source_line(timing, store)
    error = prediction_error(timing)
    if not error.notnull().any():
        return nothing(title, "No cell was both measured and predicted.", source)
    shown = [name for name in selection.strategies(timing) if error.sel(strategy=name).notnull().any()]
    labels = sorted({str(label) for label in timing["device_label"].values.ravel() if label})
    note = subtitle("each mark is a cell of the grid", "the bar is the median", emulated_marks_note(labels))
    median = timing["step_time"].median("repetition")
    scale, unit = time_scale(median.where(error.notnull()).values)
    with style():
        figure, axes = canvas(1, 2, title=title, subtitle=note, source=source, panel=(3.6, 2.8), width=8)
        over_time, by_strategy = axes[0]
        for place, name in enumerate(shown):
            look = strategy_look(name)
            found, took = error.sel(strategy=name).values.ravel(), scale * median.sel(strategy=name).values.ravel()
            there = np.isfinite(found)
            marks = {"color": look.color, "marker": look.marker, "linestyle": "", "markeredgecolor": "white"}
            over_time.plot(took[there], found[there], **marks)
            spread = place + np.linspace(-0.18, 0.18, int(there.sum())) if there.sum() > 1 else [float(place)]
            by_strategy.plot(spread, np.sort(found[there]), **marks)
            by_strategy.hlines(float(np.median(found[there])), place - 0.3, place + 0.3, color=look.color, linewidth=2)
        for axis in (over_time, by_strategy):
            axis.axhline(0, color=MUTED, linewidth=1)
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        over_time.set(
            title="over the step", xlabel=f"measured step / {unit}", ylabel="predicted / measured - 1", xscale="log"
        )
        plain_logarithmic(over_time.xaxis)
        by_strategy.set(title="by strategy", xlabel="strategy", ylabel="predicted / measured - 1")
        by_strategy.set_xticks(range(len(shown)), shown)
        legend(figure, [
            Line2D([], [], color=strategy_look(name).color, marker=strategy_look(name).marker, linestyle="",
                   markeredgecolor="white", label=name)
            for name in shown
        ])  # fmt: skip
    return figure

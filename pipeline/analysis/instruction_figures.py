"""Figures of predicted and measured instructions: time by kind and strategy, and one step side by side."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from pipeline.analysis import selection
from pipeline.analysis.instruction_times import (
    KINDS,
    TIMELINES,
    Times,
    busy,
    has_instructions,
    kind_errors,
    kind_times,
    kinds_of,
)
from pipeline.analysis.statistics import prediction_error
from pipeline.analysis.style import (
    ACTIVITIES,
    INK,
    MUTED,
    canvas,
    emulated_marks_note,
    emulation_note,
    legend,
    nothing,
    patch,
    source_line,
    strategy_look,
    style,
    subtitle,
    time_scale,
)

_STORE = "timing.zarr"
_WHY_NOTHING = "Of no cell were the instructions both measured and predicted."


def predicted_instructions(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """A column per kind of instruction: predicted over measured time, and below the difference by strategy."""
    title, source = "Where predictions err: kinds of instructions", source_line(timing, store)
    told = has_instructions(timing)
    if not told.any():
        return nothing(title, _WHY_NOTHING, source)
    times = kind_times(timing)
    errors = kind_errors(timing, times)
    shown = [name for name in selection.strategies(timing) if told.sel(strategy=name).any()]
    labels = sorted({str(label) for label in timing["device_label"].values.ravel() if label})
    note = subtitle("each mark is a cell of the grid", "the bar is the median", emulated_marks_note(labels))
    scale, unit = time_scale(times["measured_time"].values)
    furthest = 1.08 * float(abs(errors.sel(kind=list(KINDS))).max())
    with style():
        figure, axes = canvas(2, len(KINDS), title=title, subtitle=note, source=source, panel=(2.15, 2.1))
        for (above, below), kind in zip(axes.T, KINDS, strict=True):
            _times_panel(above, scale * times.sel(kind=kind), shown)
            above.set(title=kind, xlabel=f"measured / {unit}")
            _errors_panel(below, errors.sel(kind=kind), shown)
            below.set_ylim(-furthest, furthest)
        axes[0, 0].set_ylabel(f"predicted / {unit}")
        axes[1, 0].set_ylabel("(predicted - measured)\n/ measured step")
        for axis in axes[1, 1:]:
            axis.tick_params(labelleft=False)
        legend(figure, [Line2D([], [], label=name, **_marks(name)) for name in shown])
    return figure


def _marks(name: str) -> dict[str, Any]:
    look = strategy_look(name)
    return {"color": look.color, "marker": look.marker, "linestyle": "", "markeredgecolor": "white"}


def _times_panel(axis: Axes, times: xr.Dataset, shown: list[str]) -> None:
    ends = []
    for name in shown:
        measured, predicted = (times[one].sel(strategy=name).values.ravel() for one in reversed(TIMELINES))
        there = (measured > 0) & (predicted > 0)  # on logarithmic axes
        axis.plot(measured[there], predicted[there], **_marks(name))
        ends += [*measured[there], *predicted[there]]
    limits = (min(ends) / 1.5, max(ends) * 1.5) if ends else (0.1, 10.0)
    axis.plot(limits, limits, color=MUTED, linewidth=1, zorder=1)
    axis.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_formatter("{x:g}")
        one.set_minor_formatter(NullFormatter())  # within one decade there would be too many to read


def _errors_panel(axis: Axes, errors: xr.DataArray, shown: list[str]) -> None:
    axis.axhline(0, color=MUTED, linewidth=1)
    for place, name in enumerate(shown):
        found = errors.sel(strategy=name).values.ravel()
        found = np.sort(found[np.isfinite(found)])
        spread = place + np.linspace(-0.22, 0.22, found.size) if found.size > 1 else [float(place)]
        axis.plot(spread, found, **_marks(name))
        axis.hlines(float(np.median(found)), place - 0.34, place + 0.34, color=strategy_look(name).color, linewidth=2)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axis.set_xticks(range(len(shown)), shown, rotation=45, ha="right", rotation_mode="anchor", size=8)
    axis.set_xlabel("strategy")


def predicted_timeline(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """One step as predicted and as measured, two lanes for each device; see `shown_cell` for which."""
    title, source = "One step as predicted and as measured", source_line(timing, store)
    place = shown_cell(timing)
    if place is None:
        return nothing(title, f"On several devices: {_WHY_NOTHING[0].lower()}{_WHY_NOTHING[1:]}", source)
    cell = timing.sel(place).transpose("instruction", "device", ...)
    of_set, labels = selection.device_labels(timing, str(place["device_set"])), selection.rank_labels(cell)
    ranks = np.flatnonzero(cell["instruction_end"].notnull().any("instruction").values)
    where = f"{place['network']}, batch {place['batch_size']}, {place['device_set']}, link {place['link']}"
    note = subtitle(where, f"strategy {place['strategy']}", emulation_note(of_set))
    scale, unit = time_scale(cell["instruction_end"].values)
    with style():
        figure, axes = canvas(1, 1, title=title, subtitle=note, source=source, panel=(10, 0.6 + 0.62 * len(ranks)))
        axis = axes[0, 0]
        ticks: dict[float, str] = {}
        for lane, (name, (first, last)) in enumerate(TIMELINES.items()):
            start, end = scale * cell[first].values, scale * cell[last].values
            kinds = kinds_of(cell["instruction_kind"].values, cell["instruction_phase"].values)
            (busy_from, until), length = busy(start, end, kinds == "exchange"), float(np.nanmax(end))
            for row, rank in enumerate(ranks):
                y = 2.5 * row + lane
                _lane(axis, y, length, busy_from[..., rank], until[..., rank], kinds)
                which = name.partition("_")[0]
                ticks[y] = f"{rank}  {labels[rank]}   {which}" if lane == 0 else which
            axis.axvline(length, color=INK, linewidth=1, linestyle="--" if lane == 0 else "-")
        axis.set_yticks(list(ticks), list(ticks.values()), size=8)
        axis.set_ylim(2.5 * len(ranks) - 0.9, -0.6)
        axis.set_xlim(left=0)
        axis.set_xlabel(f"time since the start of the step / {unit}")
        axis.grid(visible=False, axis="y")
        entries = [patch(ACTIVITIES[name], name) for name in ("forward", "backward", "update", "exchange", "idle")]
        ends = [Line2D([], [], color=INK, linewidth=1, linestyle=line) for line in ("--", "-")]
        for handle, name in zip(ends, ("end as predicted", "end as measured"), strict=True):
            handle.set_label(name)
        legend(figure, [*entries, *ends])
    return figure


def _lane(
    axis: Axes, y: float, length: float, from_PI: Times, until_PI: Times, kinds_I: npt.NDArray[np.object_]
) -> None:
    """What one device does in a step; what it computes is drawn over the exchanges that run beside."""
    axis.barh(y, length, height=0.9, color=ACTIVITIES["idle"].color, linewidth=0)
    for kind in ("exchange", "forward", "backward", "update"):
        some = (kinds_I == kind) & (from_PI < until_PI)
        look = ACTIVITIES[kind]
        axis.barh(np.full(some.sum(), y), (until_PI - from_PI)[some], left=from_PI[some], height=0.9, color=look.color,
                  hatch=look.hatch, edgecolor="white", linewidth=0.3)  # fmt: skip


def shown_cell(timing: xr.Dataset) -> dict[str, str | int] | None:
    """Coordinates of the step to show: at the showcase the split strategy whose predicted step is off by the middle.

    A single example is typical so, neither the best nor the worst. None where there is none.
    """
    place = selection.showcase(timing)
    if place is None:
        return None
    told, error = has_instructions(timing).sel(place), abs(prediction_error(timing).sel(place))
    split = [name for name in selection.strategies(timing) if name != "single" and told.sel(strategy=name).item()]
    split.sort(key=lambda name: error.sel(strategy=name).item())
    return {**place, "strategy": split[(len(split) - 1) // 2]} if split else None

"""The figure of what each idea brings: step time and bytes from one device, by the literal method, to `auto`."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.analysis import selection
from pipeline.analysis.statistics import baseline, flags, summary
from pipeline.analysis.style import (
    FLAGGED,
    INK,
    MUTED,
    Look,
    canvas,
    emulation_note,
    is_emulated,
    legend,
    nothing,
    patch,
    source_line,
    strategy_look,
    style,
    subtitle,
    time_scale,
    whisker,
)
from pipeline.results.contracts import OK

STEPS = ("single", "paper", "kernel", "batch", "auto")
"""From one device to all ideas together; what a strategy saves is told against the one before it."""

_SAVED = Look("#e9ecef")


def step_by_step(timing: xr.Dataset, *, store: str = "timing.zarr") -> Figure:
    """Measured step times beside the megabytes through the master's link: a row per set, a bar per strategy."""
    title, source = "What each idea brings, step by step", source_line(timing, store)
    sets = [s for s in selection.showcase_sets(timing) if waterfall(timing, s) is not None]
    if not sets:
        return nothing(title, "No strategy from paper to auto was measured on several devices.", source)
    note = subtitle("measured: median, quartiles and, in %, against the bar above", FLAGGED, emulation_note(sets))
    with style():
        figure, axes = canvas(len(sets), 2, title=title, subtitle=note, source=source, panel=(4.2, 2.1), width=8.6)
        used: set[str] = set()
        for row, device_set in zip(axes, sets, strict=True):
            cells = waterfall(timing, device_set)
            if cells is not None:
                used |= set(map(str, cells["strategy"].values))
                _times(row[0], cells, device_set)
                _megabytes(row[1], cells)
        legend(figure, [*(patch(strategy_look(s), s) for s in STEPS if s in used),
                        patch(_SAVED, "saved against the bar above")])  # fmt: skip
    return figure


def waterfall(timing: xr.Dataset, device_set: str) -> xr.Dataset | None:
    """Medians and quartiles of the step in s and `moved` in bytes, (strategy), for a set's largest network.

    `single` is the fastest device alone. None where no split strategy of STEPS was measured on the set.
    """
    split = selection.networks(timing, [device_set])
    if not split:
        return None
    link = selection.main_link(timing)
    batch_size = selection.main_batch_size(timing, split[-1], link, [device_set])
    place = {"network": split[-1], "batch_size": batch_size, "device_set": device_set, "link": link}
    cells = timing.sel(place)
    measured = {s for s in selection.strategies(timing) if cells["status"].sel(strategy=s).item() == OK}
    if not measured & set(STEPS[1:]):
        return None
    times = {s: cells["step_time"].sel(strategy=s, drop=True) for s in STEPS[1:] if s in measured}
    alone = baseline(timing)["baseline_time"].sel(place)
    if alone.notnull().any():
        times = {"single": alone, **times}
    numbers = summary(xr.concat(list(times.values()), "strategy", coords="minimal", compat="override"))
    numbers = numbers.assign_coords(strategy=list(times))
    moved = [0.0 if s == "single" else _moved(cells.sel(strategy=s)) for s in times]
    return numbers.assign(moved=("strategy", moved)).assign_coords(place)


def _moved(cell: xr.Dataset) -> float:
    """Bytes that the exchanges of a step move through the master's link; NaN where none was recorded."""
    if "instruction_master_bytes" not in cell:
        return np.nan
    exchanged = cell["instruction_master_bytes"].where(cell["instruction_kind"] == "exchange")
    return float(exchanged.sum().item()) if cell["instruction_master_bytes"].notnull().any() else np.nan


def change(cells: xr.Dataset, place: int) -> float:
    """Median step of a strategy over that of the one before it, less one."""
    return float(cells["median"].values[place] / cells["median"].values[place - 1] - 1)


def _times(axis: Axes, cells: xr.Dataset, device_set: str) -> None:
    scale, unit = time_scale(cells["median"].values)
    for y, strategy in enumerate(map(str, cells["strategy"].values)):
        cell, look = cells.isel(strategy=y), strategy_look(strategy)
        median, low, high = (scale * cell[name].item() for name in ("median", "lower", "upper"))
        before = scale * cells["median"].values[y - 1] if y else median
        if before > median:
            axis.barh(y, before - median, left=median, height=0.72, color=_SAVED.color, linewidth=0)
        axis.barh(y, median, height=0.72, color=look.color, hatch=look.hatch, edgecolor="white", linewidth=0)
        whisker(axis, median, y, low, high, 2)
        text = f"{median:#.3g}".rstrip(".") + (f"  ({change(cells, y):+.0%})" if y else "")
        text += flags(cell["noisy"].item(), cell["count"].item())
        axis.annotate(text, (max(high, median), y), (4, 0), textcoords="offset points", va="center", size=7.5)
    emulated = " (emulated)" if is_emulated([device_set]) else ""
    axis.set_title(f"{cells['network'].item()}, batch {cells['batch_size'].item()}, {device_set}{emulated}")
    _finish(axis, cells, f"time per step / {unit}")


def _megabytes(axis: Axes, cells: xr.Dataset) -> None:
    moved = cells["moved"].values / 1e6
    for y, strategy in enumerate(map(str, cells["strategy"].values)):
        look = strategy_look(strategy)
        known = bool(np.isfinite(moved[y]))
        if known:
            axis.barh(y, moved[y], height=0.72, color=look.color, hatch=look.hatch, edgecolor="white", linewidth=0)
        text = f"{moved[y]:.3g}" if known else "not recorded"
        axis.annotate(text, (moved[y] if known else 0, y), (4, 0), textcoords="offset points", va="center", size=7.5,
                      color=INK if known else MUTED)  # fmt: skip
    axis.set_title("through the master's link")
    _finish(axis, cells, "data per step / MB")
    axis.tick_params(labelleft=False)


def _finish(axis: Axes, cells: xr.Dataset, label: str) -> None:
    names = [str(name) for name in cells["strategy"].values]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel(label)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.22)
    axis.set_xlim(left=0)

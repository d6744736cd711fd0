"""Figures of what happens within one step: compute, exchange and idle time per device, and the timeline."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.analysis import selection
from pipeline.analysis.statistics import summary
from pipeline.analysis.style import (
    ACTIVITIES,
    INK,
    canvas,
    emulation_note,
    is_emulated,
    legend,
    nothing,
    only_left,
    patch,
    source_line,
    style,
    subtitle,
    time_scale,
    unmeasured,
    whisker,
)
from pipeline.results.contracts import OK

_STORE = "timing.zarr"
_ACTIVITY_TIMES = {"compute": "compute_time", "exchange": "exchange_time", "idle": "idle_time"}


def time_per_device(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """Median compute, exchange and idle time of every device by strategy; a row per set, a column per network.

    Whiskers are the quartiles of the step.
    """
    title, source = "What the devices do during a step", source_line(timing, store)
    sets, link = selection.showcase_sets(timing), selection.main_link(timing)
    if not sets:
        return nothing(title, "The grid has no set of several devices.", source)
    names = selection.networks(timing, sets)
    note = subtitle("medians, quartiles of the step as whisker", f"link {link}", emulation_note(sets))
    shown = {s: _split_strategies(timing, s, link) for s in sets}
    lanes = {s: len(shown[s]) * (len(selection.device_labels(timing, s)) + 0.9) for s in sets}
    with style():
        figure, axes = canvas(
            len(sets), len(names), title=title, subtitle=note, source=source,
            panel=(2.6, 0.6 + 0.17 * sum(lanes.values()) / len(sets)), width=8.6, sharey="row",
            height_ratios=[4 + lanes[s] for s in sets],
        )  # fmt: skip
        for row, device_set in zip(axes, sets, strict=True):
            split = selection.networks(timing, [device_set])
            for axis, network in zip(row, names, strict=True):
                if network not in split:
                    unmeasured(axis, network)
                    continue
                batch_size = selection.main_batch_size(timing, network, link, [device_set])
                cells = timing.sel(network=network, batch_size=batch_size, link=link, device_set=device_set)
                _activity_panel(
                    axis, cells, {one: _lanes_of(timing, device_set, one, link) for one in shown[device_set]}
                )
                axis.set_title(f"{network}, batch {batch_size}")
            row[0].set_ylabel(device_set + (" (emulated)" if is_emulated([device_set]) else ""), weight="bold")
        only_left(axes)
        legend(figure, [patch(ACTIVITIES[name], name) for name in _ACTIVITY_TIMES])
    return figure


def _split_strategies(timing: xr.Dataset, device_set: str, link: str) -> list[str]:
    status = timing["status"].sel(device_set=device_set, link=link)
    return [s for s in selection.strategies(timing) if s != "single" and (status.sel(strategy=s) == OK).any()]


def _lanes_of(timing: xr.Dataset, device_set: str, strategy: str, link: str) -> list[str]:
    """What the lanes of a set are called, the same in all panels of a row: by rank where any plan leaves some out."""
    labels = selection.device_labels(timing, device_set)
    share = timing["share"].sel(device_set=device_set, strategy=strategy, link=link)
    ranks = share.notnull().sum("device").values
    known = len(set(labels)) == 1 or np.isin(ranks, (0, len(labels))).all()
    return labels if known else [f"rank {rank}" for rank in range(len(labels))]


def _activity_panel(axis: Axes, cells: xr.Dataset, lanes: dict[str, list[str]]) -> None:
    """``lanes`` are what the devices are called, by strategy."""
    scale, unit = time_scale(cells["step_time"].sel(strategy=list(lanes)).values)
    ticks: dict[float, str] = {}
    y = 0.0
    for strategy, labels in lanes.items():
        cell = cells.sel(strategy=strategy)
        medians = {name: scale * summary(cell[source])["median"].values for name, source in _ACTIVITY_TIMES.items()}
        step = (
            scale * cell["step_time"].quantile([0.25, 0.5, 0.75], "repetition").values if cell["status"] == OK else None
        )
        for rank, label in enumerate(labels):
            left = 0.0
            for name, values in medians.items():
                look = ACTIVITIES[name]
                axis.barh(y, values[rank], left=left, height=0.9, color=look.color, hatch=look.hatch, linewidth=0,
                          edgecolor="white")  # fmt: skip
                left += float(np.nan_to_num(values[rank]))
            ticks[y] = f"{strategy}   {label}" if rank == 0 else label
            y += 1
        if step is not None:
            whisker(axis, step[1], y - len(labels) / 2 - 0.5, step[0], step[2], 2.2)
            axis.plot([step[1]] * 2, [y - len(labels) - 0.5, y - 0.5], color=INK, linewidth=0.9)
        y += 0.9
    axis.set_yticks(list(ticks), list(ticks.values()), size=7.5)
    axis.set_ylim(y - 1.2, -0.8)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"time / {unit}")
    axis.set_xlim(left=0)


def step_timeline(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """One measured step as a Gantt chart, a panel per strategy, a lane per device; what is not covered is idle.

    Shows the largest network on the largest set of equal devices, or of unequal ones where there are no equal ones.
    """
    title, source = "One step, instruction by instruction", source_line(timing, store)
    place = selection.showcase(timing)
    if "instruction_start" not in timing or place is None:
        return nothing(title, "The grid has no timeline of several devices.", source)
    cells = timing.sel(place).transpose("strategy", "instruction", "device", ...)
    device_set = str(place["device_set"])
    ends = cells["instruction_end"]
    shown = [
        s for s in _split_strategies(timing, device_set, str(place["link"])) if ends.sel(strategy=s).notnull().any()
    ]
    if not shown:
        return nothing(title, f"No timeline was recorded for {place['network']} on {device_set}.", source)
    labels = selection.device_labels(timing, device_set)
    where = f"{place['network']}, batch {place['batch_size']}, {device_set}, link {place['link']}"
    note = subtitle(where, "last step of the middle round", emulation_note(labels))
    scale, unit = time_scale(ends.sel(strategy=shown).values)
    span = scale * float(ends.sel(strategy=shown).max())
    with style():
        figure, axes = canvas(
            len(shown), 1, title=title, subtitle=note, source=source, panel=(10, 0.62 + 0.22 * len(labels)), sharex=True
        )
        for axis, strategy in zip(axes[:, 0], shown, strict=True):
            _lanes(axis, cells.sel(strategy=strategy), scale, span)
            axis.set_title(strategy)
        axes[-1, 0].set_xlim(0, 1.01 * span)
        axes[-1, 0].set_xlabel(f"time since the start of the step / {unit}")
        legend(figure, [patch(ACTIVITIES[n], n) for n in ("forward", "backward", "update", "exchange", "idle")])
    return figure


def _fitting(name: str, fraction: float) -> str:
    """As much of an instruction's name as a bar of this fraction of the axis holds: all, the first part, nothing."""
    shortened = (name, f"{name.partition('+')[0]} …")
    return next((text for text in shortened if 0.009 * (len(text) + 1) < fraction), "")


def _lanes(axis: Axes, cell: xr.Dataset, scale: float, span: float) -> None:
    labels = selection.rank_labels(cell)
    start, end = scale * cell["instruction_start"].values, scale * cell["instruction_end"].values
    length = float(np.nanmax(end))
    axis.barh(range(len(labels)), length, height=0.82, color=ACTIVITIES["idle"].color, linewidth=0)
    for number, (name, kind, phase) in enumerate(
        zip(*(cell[f"instruction_{part}"].values for part in ("name", "kind", "phase")), strict=True)
    ):
        look = ACTIVITIES["exchange" if kind == "exchange" else phase if phase in ACTIVITIES else "compute"]
        for rank in np.flatnonzero(np.isfinite(start[number, : len(labels)])):
            width = end[number, rank] - start[number, rank]
            axis.barh(rank, width, left=start[number, rank], height=0.82, color=look.color, hatch=look.hatch,
                      edgecolor="white", linewidth=0.3)  # fmt: skip
            label = _fitting(str(name), width / span)
            if kind != "exchange" and label:
                axis.text(start[number, rank] + width / 2, float(rank), label, color="white", size=7, ha="center",
                          va="center", clip_on=True)  # fmt: skip
    axis.set_yticks(range(len(labels)), [f"{rank}  {label}" for rank, label in enumerate(labels)], size=8)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")

"""Figures over the whole grid: speedup over devices, time per step by strategy, share of convolution."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.analysis import paper, selection
from pipeline.analysis.statistics import baseline, convolution_share, flags, speedup, summary
from pipeline.analysis.style import (
    FLAGGED,
    INK,
    MUTED,
    canvas,
    emulation_note,
    is_emulated,
    legend,
    nothing,
    only_left,
    patch,
    source_line,
    step_of_sequence,
    strategy_look,
    style,
    subtitle,
    time_scale,
    unmeasured,
    whisker,
)
from pipeline.results.contracts import OK

_STORE = "timing.zarr"


def speedup_over_devices(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """Speedup over the number of equal devices, a column per network and a row per kind of device.

    Bars are 95 % bootstrap intervals; the device count, the bound of aggregate calibrated throughput and the paper's
    own figure are drawn for comparison.
    """
    title, source = "Speedup over the number of devices", source_line(timing, store)
    families, names = selection.families(timing), selection.networks(timing)
    if not families:
        return nothing(title, "The grid has no set of several equal devices.", source)
    link, ratios = selection.main_link(timing), speedup(timing)
    shown = [s for s in selection.strategies(timing) if s != "single"]
    note = subtitle(
        "over one such device, median with 95 % bootstrap interval", FLAGGED, f"link {link}", emulation_note(families)
    )
    with style():
        figure, axes = canvas(
            len(families), len(names), title=title, subtitle=note, source=source, panel=(2.75, 2.9), width=8.6,
            sharex="row", sharey="row",
        )  # fmt: skip
        for row, (label, sets) in zip(axes, families.items(), strict=True):
            split = selection.networks(timing, sets)
            for axis, network in zip(row, names, strict=True):
                if network not in split:
                    unmeasured(axis, network)
                    continue
                batch_size = selection.main_batch_size(timing, network, link, sets)
                cells = ratios.sel(network=network, batch_size=batch_size, link=link, device_set=sets)
                _speedup_panel(axis, cells, shown, label)
                axis.set_title(f"{network}, batch {batch_size}")
            row[0].set_ylim(bottom=0)  # only now: it ends the fitting to what is drawn, for all panels of the row
            row[0].set_ylabel(f"speedup over one {label}" + (" (emulated)" if is_emulated([label]) else ""))
        only_left(axes)
        legend(figure, [*(_line(s) for s in shown), *_reference_lines()])
    return figure


def _speedup_panel(axis: Axes, cells: xr.Dataset, shown: list[str], label: str) -> None:
    counts = cells["device_count"].values
    axis.plot([1, counts.max()], [1, counts.max()], color="#b4bac2", linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
    bound = cells["aggregate_bound"].values
    x, y = np.r_[1, counts[np.isfinite(bound)]], np.r_[1, bound[np.isfinite(bound)]]
    axis.plot(x, y, color=INK, linewidth=1.2, linestyle=(0, (1, 1.6)), zorder=1)
    dodge = 0.024 * (counts.max() - 1)
    for position, strategy in enumerate(shown):
        look, line = strategy_look(strategy), cells.sel(strategy=strategy)
        measured = line["speedup"].notnull().values
        x, y = counts[measured] + dodge * (position - (len(shown) - 1) / 2), line["speedup"].values[measured]
        low, high = line["speedup_low"].values[measured], line["speedup_high"].values[measured]
        start = [1.0] if x.size and counts[measured].min() > 1 else []
        axis.plot([*start, *x], [*start, *y], color=look.color, zorder=2)
        axis.errorbar(
            x, y, yerr=np.clip([y - low, high - y], 0, None), fmt=look.marker, color=look.color, elinewidth=1.2,
            capsize=2, markeredgecolor="white", markeredgewidth=0.7, zorder=3,
        )  # fmt: skip
        for place, cell in zip(zip(x, high, strict=True), np.flatnonzero(measured), strict=True):
            one = line.isel(device_set=int(cell))
            text = flags(one["noisy"].item(), one["repetitions"].item())
            axis.annotate(text, place, (0, 1), textcoords="offset points", ha="center", size=7, color=look.color)
    axis.plot(1, 1, marker="D", color=strategy_look("single").color, markeredgecolor="white", zorder=4)
    for claim in paper.CLAIMS:
        if label.startswith(claim.device_kind) and str(cells["network"].item()) == claim.network:
            axis.plot(
                claim.device_count, claim.speedup, "*", color="white", markeredgecolor=INK, markersize=13, zorder=2
            )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("devices")


def _line(strategy: str) -> Line2D:
    look = strategy_look(strategy)
    return Line2D([], [], color=look.color, marker=look.marker, markeredgecolor="white", label=strategy)


def _reference_lines() -> list[Line2D]:
    star = Line2D([], [], color="none", marker="*", markerfacecolor="white", markeredgecolor=INK, markersize=10)
    star.set_label("the paper's best")
    return [
        Line2D([], [], color="#b4bac2", linewidth=1.2, linestyle=(0, (5, 3)), label="device count"),
        Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (1, 1.6)), label="aggregate throughput"),
        star,
    ]


def time_per_step(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """Time per step of every strategy on every set of devices, a column per network.

    Bars are medians, whiskers quartiles, dots the raw repetitions; an asterisk marks IQR / median above 0.1.
    """
    title, source = "Time per training step", source_line(timing, store)
    names, sets, shown = selection.networks(timing), selection.device_sets(timing), selection.strategies(timing)
    if not names:
        return nothing(title, "No cell of the grid was measured.", source)
    link = selection.main_link(timing)
    rows = [(device_set, s) for device_set in sets for s in shown if _measured(timing, device_set, s, link)]
    gaps = np.cumsum([0.0] + [1.0 if a[0] == b[0] else 1.7 for a, b in pairwise(rows)])
    note = subtitle("median, quartiles and repetitions", FLAGGED, f"link {link}", emulation_note(sets))
    with style():
        figure, axes = canvas(
            1, len(names), title=title, subtitle=note, source=source, panel=(2.75, 0.55 + 0.155 * gaps[-1] + 0.3),
            width=8.6, sharey=True,
        )  # fmt: skip
        for axis, network in zip(axes[0], names, strict=True):
            batch_size = selection.main_batch_size(timing, network, link)
            cells = timing.sel(network=network, batch_size=batch_size, link=link)
            _step_panel(axis, cells, rows, gaps)
            axis.set_title(f"{network}, batch {batch_size}")
        middles = {s: float(np.mean([y for y, row in zip(gaps, rows, strict=True) if row[0] == s])) for s in sets}
        axes[0, 0].set_yticks(list(middles.values()), [_set_name(s) for s in middles])
        axes[0, 0].set_ylim(gaps[-1] + 0.8, -0.8)
        only_left(axes)
        legend(figure, [patch(strategy_look(s), s) for s in shown])
    return figure


def _measured(timing: xr.Dataset, device_set: str, strategy: str, link: str) -> bool:
    return bool((timing["status"].sel(device_set=device_set, strategy=strategy, link=link) == OK).any())


def _set_name(device_set: str) -> str:
    return device_set.replace(" + ", "\n+ ") + ("\n(emulated)" if is_emulated([device_set]) else "")


def _step_panel(axis: Axes, cells: xr.Dataset, rows: list[tuple[str, str]], gaps: np.ndarray) -> None:
    scale, unit = time_scale(cells["step_time"].where(cells["status"] == OK).values)
    for y, (device_set, strategy) in zip(gaps, rows, strict=True):
        cell = cells.sel(device_set=device_set, strategy=strategy)
        if cell["status"].item() != OK:
            continue
        look, numbers = strategy_look(strategy), summary(cell["step_time"])
        median, low, high = (scale * numbers[name].item() for name in ("median", "lower", "upper"))
        axis.barh(y, median, height=0.92, color=look.color, hatch=look.hatch, edgecolor="white", linewidth=0)
        whisker(axis, median, y, low, high, 1.8)
        samples = scale * cell["step_time"].values
        axis.plot(samples, np.full(samples.shape, y), ".", color=INK, markersize=2, alpha=0.55, zorder=4)
        text = f"{median:#.3g}".rstrip(".") + flags(numbers["noisy"].item(), numbers["count"].item())
        axis.annotate(text, (np.nanmax([high, *samples]), y), (4, 0), textcoords="offset points",
                      va="center", size=6.5, color=MUTED)  # fmt: skip
    axis.set_xlabel(f"time per step / {unit}")
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.14)
    axis.set_xlim(left=0)


def convolution_over_size(timing: xr.Dataset, *, store: str = _STORE) -> Figure:
    """Share of convolutions in a `single` step over network size, a line per batch size, a panel per kind of device."""
    title, source = "Share of convolutions in a training step", source_line(timing, store)
    if "single" not in timing["strategy"].values:
        return nothing(title, "The grid has no single cells.", source)
    shares, devices = convolution_share(timing), baseline(timing)["baseline_device"]
    names, link = selection.networks(timing), selection.main_link(timing)
    panels: dict[str, str] = {}
    for device_set in selection.device_sets(timing):
        if shares.sel(device_set=device_set, link=link).notnull().any():
            label = next((str(d) for d in devices.sel(device_set=device_set).values.flat if d), device_set)
            panels.setdefault(label, device_set)
    if not panels:
        return nothing(title, "No convolution time was measured.", source)
    note = subtitle("forward and backward, one device", "median and quartiles", FLAGGED, emulation_note(panels))
    with style():
        figure, axes = canvas(
            1, len(panels), title=title, subtitle=note, source=source, panel=(3.6, 2.7), width=7.2, sharey=True
        )
        for axis, (label, device_set) in zip(axes[0], panels.items(), strict=True):
            _share_panel(axis, shares.sel(device_set=device_set, link=link, network=names))
            axis.set_title(f"on one {label}" + (" (emulated)" if is_emulated([label]) else ""))
        axes[0, 0].set_ylim(0, max(1, axes[0, 0].get_ylim()[1]))
        axes[0, 0].set_ylabel("share of the step")
        only_left(axes)
        sizes = timing["batch_size"].values
        looks = [step_of_sequence(i, len(sizes)) for i in range(len(sizes))]
        lines = [
            Line2D([], [], color=look.color, marker=look.marker, markeredgecolor="white", label=f"batch {size}")
            for look, size in zip(looks, sizes, strict=True)
        ]
        low, high = paper.CONVOLUTION_SHARE
        band = patch(strategy_look("paper")._replace(color="#f6ddd0", hatch=""), f"the paper: {low:.0%} to {high:.0%}")
        legend(figure, [*lines, band])
    return figure


def _share_panel(axis: Axes, shares: xr.DataArray) -> None:
    numbers = summary(shares)
    x = np.arange(shares.sizes["network"])
    axis.axhspan(*paper.CONVOLUTION_SHARE, color="#f6ddd0", zorder=0, linewidth=0)
    for position, batch_size in enumerate(shares["batch_size"].values):
        look, line = step_of_sequence(position, shares.sizes["batch_size"]), numbers.sel(batch_size=batch_size)
        median = line["median"].values
        spread = np.clip([median - line["lower"].values, line["upper"].values - median], 0, None)
        dodge = 0.06 * (position - (shares.sizes["batch_size"] - 1) / 2)
        axis.errorbar(
            x + dodge, median, yerr=spread, color=look.color, marker=look.marker, elinewidth=1.2, capsize=2,
            markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
        for place, one in enumerate(median):
            cell = line.isel(network=place)
            text = flags(cell["noisy"].item(), cell["count"].item()) if np.isfinite(one) else ""
            axis.annotate(text, (place + dodge, one), (4, 3), textcoords="offset points", size=7, color=look.color)
    axis.set_xticks(x, [str(name) for name in shares["network"].values])
    axis.set_xlabel("network (kernels of both convolutions)")
    axis.set_xlim(-0.4, len(x) - 0.6)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))

"""Figures of what was simulated: many devices, other links, and from which network and batch on splitting pays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from pipeline.analysis import selection
from pipeline.analysis.statistics import PAYS, best_split, device_count, flags, simulated_speedup, speedup
from pipeline.analysis.style import (
    FAINT,
    FLAGGED,
    INK,
    MUTED,
    canvas,
    described_note,
    emulation_note,
    is_emulated,
    legend,
    nothing,
    only_left,
    source_line,
    strategy_look,
    style,
    subtitle,
)
from pipeline.links import LOOPBACK

_STORES = "simulation.zarr, timing.zarr"
NOTHING = "Nothing was simulated on several equal devices and on one alone."
_DASHES = (0, (5, 3))
LINKS_MAPPED = 5
"""Links, at most, for which the break-even is mapped."""
_NAMES_ABREAST = 3
_LOWEST = 0.1
# Light to dark: clearly slower, slower, faster, clearly faster than one device.
_SHADES, _LIMITS = ("#d98b6a", "#f3d9cc", "#cfe3f1", "#9ecae1", "#5b9bc7"), (0.5, PAYS, 1.5, 3.0)


def speedup_over_many_devices(simulation: xr.Dataset, timing: xr.Dataset, *, store: str = _STORES) -> Figure:
    """Simulated speedup over the number of devices of one kind, a panel per link; measured speedups as open marks."""
    title, source = "Simulated speedup on up to {} devices", source_line(simulation, store)
    place = selection.scaling(simulation, timing)
    if place is None:
        return nothing(title.format("many"), NOTHING, source)
    label, cell = str(place["label"]), {name: place[name] for name in ("network", "batch_size")}
    sets, links = selection.families(simulation)[label], selection.shown_links(simulation, timing)
    ratios = simulated_speedup(simulation).sel(cell).sel(device_set=sets)
    counts, measured = device_count(simulation).sel(device_set=sets).values, measured_scaling(timing, place)
    shown = [s for s in selection.strategies(simulation) if s != "single"]
    note = subtitle(
        f"{cell['network']}, batch {cell['batch_size']}, over one {label}",
        "open marks measured, with 95 % interval", FLAGGED, _below(), emulation_note([label]),
        described_note(simulation, [label]),
    )  # fmt: skip
    with style():
        figure, axes = canvas(
            1, len(links), title=title.format(f"{counts.max():,}"), subtitle=note, source=source, panel=(2.8, 3.1),
            width=8.6, sharex=True, sharey=True,
        )  # fmt: skip
        for axis, link in zip(axes[0], links, strict=True):
            axis.plot(counts, counts, color="#b4bac2", linewidth=1.2, linestyle=_DASHES, zorder=1)
            axis.axhline(1, color=MUTED, linewidth=0.9, zorder=1)
            for strategy, apart in zip(shown, _dodge(shown), strict=True):
                _curve(axis, counts, ratios.sel(link=link, strategy=strategy).values, strategy)
                if measured is not None and link in measured["link"].values:
                    _measured_marks(axis, measured.sel(link=link), strategy, 2**apart)
            axis.set(title=f"link {link}", xlabel="devices", xscale="log")
            ticks = [count for count in counts if math.log2(count) % 2 == 0]
            axis.set_xticks(ticks, [f"{count:,}" for count in ticks])
            axis.xaxis.set_minor_locator(NullLocator())
            _speedup_axis(axis, ratios.sel(link=links).values)
        axes[0, 0].set_ylabel("simulated speedup")
        only_left(axes)
        count = Line2D([], [], color="#b4bac2", linewidth=1.2, linestyle=_DASHES, label="device count")
        legend(figure, [*(_entry(s) for s in shown), *_marks(measured is not None), count])
    return figure


def measured_scaling(timing: xr.Dataset, place: dict[str, str | int]) -> xr.Dataset | None:
    """Measured speedups of a kind of device at `label`, `network` and `batch_size`, (device_set, link, strategy)."""
    sets = selection.families(timing).get(str(place["label"]), [])
    cell = {name: place[name] for name in ("network", "batch_size")}
    if not sets or any(value not in timing[name].values for name, value in cell.items()):
        return None
    found = speedup(timing.sel(device_set=_with_baselines(timing, sets))).sel(cell).sel(device_set=sets)
    return found if found["speedup"].notnull().any() else None


def _with_baselines(timing: xr.Dataset, sets: list[str]) -> list[str]:
    """The sets, and those of one device: what a speedup on the sets is computed from."""
    alone = [s for s in map(str, timing["device_set"].values) if len(selection.device_labels(timing, s)) == 1]
    return list(dict.fromkeys([*alone, *sets]))


def speedup_over_links(simulation: xr.Dataset, timing: xr.Dataset, *, store: str = _STORES) -> Figure:
    """Simulated speedup over the bandwidth of the link, a row per kind of device, a column per delay of the link."""
    title, source = "Simulated speedup over the link", source_line(simulation, store)
    rows = selection.linked(simulation, timing)
    if not rows:
        return nothing(title, NOTHING, source)
    every = selection.links(simulation)
    columns = selection.by_delay(every) or {"": []}
    shown = [s for s in selection.strategies(simulation) if s != "single"]
    sets = [str(place["device_set"]) for place in rows]
    note = subtitle(
        f"batch {rows[0]['batch_size']}, over one device of the set", "open marks measured", FLAGGED, _below(),
        emulation_note(sets), described_note(simulation, [str(place["label"]) for place in rows]),
    )  # fmt: skip
    real = [name for name in every if name == LOOPBACK]
    marked = False
    with style():
        figure, axes = canvas(
            len(rows), len(columns), title=title, subtitle=note, source=source, panel=(1.7, 2.5), width=8.6,
            sharey="row", width_ratios=[len(some) + 1.5 * (one == 0) for one, some in enumerate(columns.values())],
        )  # fmt: skip
        for row, place in zip(axes, rows, strict=True):
            cell = {name: place[name] for name in ("network", "batch_size", "device_set")}
            ratios = simulated_speedup(simulation).sel(cell)
            for column, (axis, (delay, some)) in enumerate(zip(row, columns.items(), strict=True)):
                links = [*(real if column == 0 else []), *some]
                _link_panel(axis, ratios.sel(link=links), shown, delayed=not delay)
                axis.set_title(f"delay {delay}" if delay else "")
                if all(value in timing[name].values for name, value in cell.items()):
                    marked |= _measured_links(axis, speedup(timing).sel(cell), links, shown)
                _speedup_axis(axis, ratios.values)
            emulated = " (emulated)" if is_emulated([str(place["label"])]) else ""
            row[0].set_ylabel(f"simulated speedup\nof {place['device_set']}{emulated}\n{place['network']}")
        for axis in axes[-1]:
            axis.set_xlabel("rate in bit/s")
        only_left(axes)
        legend(figure, [*(_entry(s) for s in shown), *_marks(marked)])
    return figure


def _link_panel(axis: Axes, cells: xr.DataArray, shown: list[str], *, delayed: bool) -> None:
    links = [str(link) for link in cells["link"].values]
    rated = np.array([link != LOOPBACK for link in links], bool)
    x = _positions(links)
    axis.axhline(1, color=MUTED, linewidth=0.9, zorder=1)
    for strategy, apart in zip(shown, _dodge(shown), strict=True):
        values, look = cells.sel(strategy=strategy).values, strategy_look(strategy)
        _curve(axis, x[rated], values[rated], strategy)
        # The real link's rate is not in the store: its marks join no line.
        axis.plot(x[~rated] + apart, values[~rated], linestyle="", marker=look.marker, markersize=4.5, color=look.color,
                  markeredgecolor="white", markeredgewidth=0.5, zorder=3)  # fmt: skip
    axis.set_xticks(x, [_link_name(link, delayed=delayed) for link in links], size=7)
    axis.set_xlim(x[0] - 0.6, x[-1] + 0.6)


def _positions(links: list[str]) -> np.ndarray:
    # Marks stand side by side at the real link, which takes some room.
    return np.array([place - (0.35 if link == LOOPBACK else 0) for place, link in enumerate(links)])


def _link_name(link: str, *, delayed: bool) -> str:
    rate, _, delay = link.partition("+")
    name = "real" if link == LOOPBACK else rate.removesuffix("bit/s")
    return f"{name}\n{delay}" if delayed and delay else name


def _measured_links(axis: Axes, cells: xr.Dataset, links: list[str], shown: list[str]) -> bool:
    drawn = False
    for strategy, apart in zip(shown, _dodge(shown), strict=True):
        for x, link in zip(_positions(links), links, strict=True):
            if strategy in cells["strategy"].values and link in cells["link"].values:
                cell = cells.sel(strategy=strategy, link=link)
                if cell["speedup"].notnull():
                    _open_mark(axis, x + apart, cell, strategy)
                    drawn = True
    return drawn


def break_even_map(simulation: xr.Dataset, timing: xr.Dataset, *, store: str = _STORES) -> Figure:
    """Simulated speedup of the best exact split over network and batch size, a row per set and a column per link.

    A thick line parts the cells in which splitting pays from those in which one device is as fast; a second number is
    what was measured there.
    """
    title, source = "Simulated break-even of splitting", source_line(simulation, store)
    sets, links = selection.small_sets(simulation, timing), selection.shown_links(simulation, timing, LINKS_MAPPED)
    if not sets:
        return nothing(title, NOTHING, source)
    note = subtitle(
        "speedup of the best exact split over the fastest device", "m: measured", "the thick line is at 1",
        emulation_note(sets), described_note(simulation, sets),
    )  # fmt: skip
    # Room for two numbers in each cell.
    panel = max(0.46 * len(selection.networks(simulation)), 1.75), 0.75 + 0.4 * simulation.sizes["batch_size"]
    with style():
        figure, axes = canvas(
            len(sets), len(links), title=title, subtitle=note, source=source, panel=panel, width=8.6,
            sharex=True, sharey=True,
        )  # fmt: skip
        for row, device_set in zip(axes, sets.values(), strict=True):
            for axis, link in zip(row, links, strict=True):
                cells = break_even(simulation, device_set, link)
                _map(axis, cells, measured_best(timing, cells, device_set, link))
                axis.set_title(f"{device_set}\n{link}", fontsize=8)
            row[0].set_ylabel("batch size / images")
        for axis in axes[-1]:
            axis.set_xlabel("network", fontsize=8)
        only_left(axes)
        legend(figure, [Line2D([], [], color=INK, linewidth=2.6, label="break-even: speedup 1"), *_shade_entries()])
    return figure


def break_even(simulation: xr.Dataset, device_set: str, link: str) -> xr.DataArray:
    """Speedup of the best exact split, (network, batch_size), both small to large."""
    names, sizes = selection.networks(simulation), sorted(map(int, simulation["batch_size"].values))
    ratios = simulated_speedup(simulation).sel(device_set=device_set, link=link)
    return best_split(ratios).sel(network=names, batch_size=sizes)


def measured_best(timing: xr.Dataset, cells: xr.DataArray, device_set: str, link: str) -> xr.DataArray | None:
    """The same from what was measured, NaN elsewhere; None where the set or the link was not."""
    if device_set not in timing["device_set"].values or link not in timing["link"].values:
        return None
    found = best_split(speedup(timing)["speedup"].sel(device_set=device_set, link=link))
    return found.reindex(network=cells["network"].values, batch_size=cells["batch_size"].values)


def _map(axis: Axes, cells: xr.DataArray, measured: xr.DataArray | None) -> None:
    ratios = cells.transpose("batch_size", "network").values
    real = np.full_like(ratios, np.nan) if measured is None else measured.transpose("batch_size", "network").values
    shades = np.ma.masked_invalid(np.where(np.isfinite(ratios), np.digitize(ratios, _LIMITS), np.nan))
    colors = ListedColormap(_SHADES).with_extremes(bad=FAINT)
    axis.pcolormesh(shades, cmap=colors, vmin=-0.5, vmax=len(_SHADES) - 0.5, edgecolors="white", linewidth=1)
    for (y, x), ratio in np.ndenumerate(ratios):
        text = f"{ratio:.2f}" if np.isfinite(ratio) else "not\nsimulated"
        text += f"\nm {real[y, x]:.2f}" if np.isfinite(real[y, x]) else ""
        axis.text(x + 0.5, y + 0.5, text, ha="center", va="center", size=7 if np.isfinite(ratio) else 5.5,
                  color=INK if np.isfinite(ratio) else MUTED, linespacing=1.25)  # fmt: skip
    _break_even_line(axis, ratios)
    names = [str(name) for name in cells["network"].values]
    slanted: dict[str, Any] = (
        {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if len(names) > _NAMES_ABREAST else {}
    )
    axis.set_xticks(np.arange(len(names)) + 0.5, names, size=7, **slanted)
    axis.set_yticks(np.arange(ratios.shape[0]) + 0.5, [str(b) for b in cells["batch_size"].values])
    axis.grid(visible=False)


def _break_even_line(axis: Axes, ratios: np.ndarray) -> None:
    # Along the edges of the cells: between two simulated values nothing is known of where it runs.
    pays, known = ratios >= PAYS, np.isfinite(ratios)
    for y, x in np.ndindex(*ratios.shape):
        for other, edge in (((y, x + 1), ([x + 1, x + 1], [y, y + 1])), ((y + 1, x), ([x, x + 1], [y + 1, y + 1]))):
            inside = other[0] < ratios.shape[0] and other[1] < ratios.shape[1]
            if inside and known[y, x] and known[other] and pays[y, x] != pays[other]:
                axis.plot(*edge, color=INK, linewidth=2.6, solid_capstyle="round", zorder=4)


def _shade_entries() -> list[Line2D]:
    names = [f"below {_LIMITS[0]:g}", "up to 1", *(f"to {limit:g}" for limit in _LIMITS[2:]), f"above {_LIMITS[-1]:g}"]
    return [
        Line2D([], [], linestyle="", marker="s", markersize=8, color=color, label=name)
        for color, name in zip(_SHADES, names, strict=True)
    ]


def _curve(axis: Axes, x: np.ndarray, y: np.ndarray, strategy: str) -> None:
    known = np.isfinite(y)
    axis.plot(x[known], y[known], **_stroke(strategy))


def _stroke(strategy: str) -> dict[str, Any]:
    look = strategy_look(strategy)
    # `auto` lies on whichever strategy it chose: a broad pale line below leaves that one to be seen.
    if strategy == "auto":
        return {"color": to_rgba(look.color, 0.2), "linewidth": 5, "solid_capstyle": "round", "zorder": 1.5,
                "marker": look.marker, "markersize": 5, "markerfacecolor": look.color, "markeredgecolor": "white",
                "markeredgewidth": 0.5}  # fmt: skip
    return {"color": look.color, "marker": look.marker, "markersize": 4.5, "linewidth": 1.5,
            "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 3}  # fmt: skip


def _entry(strategy: str) -> Line2D:
    entry = Line2D([], [], label=strategy)
    entry.set(**_stroke(strategy))
    return entry


def _measured_marks(axis: Axes, cells: xr.Dataset, strategy: str, factor: float) -> None:
    if strategy not in cells["strategy"].values:
        return
    for device_set in cells["device_set"].values:
        cell = cells.sel(device_set=device_set, strategy=strategy)
        if cell["speedup"].notnull():
            _open_mark(axis, factor * int(cell["device_count"]), cell, strategy)


def _open_mark(axis: Axes, x: float, cell: xr.Dataset, strategy: str) -> None:
    look, ratio = strategy_look(strategy), cell["speedup"].item()
    spread = [[ratio - cell["speedup_low"].item()], [cell["speedup_high"].item() - ratio]]
    if mark := flags(cell["noisy"].item(), cell["repetitions"].item()):
        axis.annotate(mark, (x, ratio), (3, 3), textcoords="offset points", size=7, color=look.color, zorder=6)
    axis.errorbar(
        x, ratio, yerr=np.clip(spread, 0, None), fmt=look.marker, color=look.color, markerfacecolor="white",
        markersize=5.5, markeredgewidth=1.2, elinewidth=1.1, capsize=1.5, zorder=5,
    )  # fmt: skip


def _marks(drawn: bool) -> list[Line2D]:
    mark = Line2D([], [], linestyle="", marker="o", color=INK, markerfacecolor="white", markeredgewidth=1.4)
    mark.set_label("measured")
    return [mark] if drawn else []


def _dodge(shown: list[str]) -> np.ndarray:
    """How far the marks of each strategy stand from the middle, so that equal speedups can be told apart."""
    return np.linspace(-0.44, 0.44, len(shown)) if len(shown) > 1 else np.zeros(len(shown))


def _speedup_axis(axis: Axes, ratios: np.ndarray) -> None:
    """A logarithmic axis for all of `ratios`, but for those too low to be of any use."""
    finite = ratios[np.isfinite(ratios)]
    axis.set_yscale("log", base=2)
    axis.set_ylim(_LOWEST, 1.4 * max(float(finite.max()) if finite.size else 1.0, 1.0))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _below() -> str:
    return f"below {_LOWEST:g} not drawn"

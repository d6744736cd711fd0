"""The figure of GPUs: the speedup over their number, and when a CPU beside one pays at all."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from pipeline.analysis import paper, selection
from pipeline.analysis.statistics import PAYS, best_split, simulated_speedup, speedup
from pipeline.analysis.style import (
    INK,
    MUTED,
    STRATEGIES,
    canvas,
    described,
    emulation_note,
    legend,
    nothing,
    source_line,
    step_of_sequence,
    strategy_look,
    style,
    subtitle,
)
from pipeline.links import LOOPBACK
from pipeline.results.contracts import OK

_STORES = "simulation.zarr, timing.zarr"
NOTHING = "Nothing was simulated on GPUs, neither on several nor beside CPUs."
_MOST_GPUS = 4
_DASHES = (0, (5, 3))


class Beside(NamedTuple):
    """A set of one described or calibrated GPU and some CPUs."""

    device_set: str
    gpu: str
    cpu: str
    cpus: int


def gpus(simulation: xr.Dataset, timing: xr.Dataset, *, store: str = _STORES) -> Figure:
    """Speedup over the number of GPUs for two batch sizes, and the gain of CPUs beside one over the ratio of speeds."""
    title, source = "GPUs, and CPUs beside them", source_line(simulation, store)
    counted, gain = counted_gpus(simulation), gain_beside(simulation)
    if counted is None and gain is None:
        return nothing(title, NOTHING, source)
    assumed = described(simulation)
    first = [] if counted is None else [str(counted.attrs["label"])]
    speeds = [f"{one} described: {assumed[one]:,.0f} GFLOP/s assumed" for one in first if one in assumed]
    measured = measured_gpus(timing)
    note = subtitle(
        "simulated", "open marks measured" if measured is not None else "no GPU measured", *speeds,
        emulation_note([] if gain is None else [gain.attrs["cpu"]]),
    )  # fmt: skip
    with style():
        figure, axes = canvas(1, 3, title=title, subtitle=note, source=source, panel=(3.05, 3.1))
        shown = _count_panels(axes[0, :2], counted, measured)
        _beside_panel(axes[0, 2], gain)
        marks = [_entry(one) for one in shown]
        claim = Line2D(
            [], [], linestyle="", marker="*", markersize=10, color=INK, label=f"{paper.SOURCE}, its batch unknown"
        )
        count = Line2D([], [], color=MUTED, linewidth=1.2, linestyle=_DASHES, label="device count")
        legend(figure, [*marks, *([claim, count] if shown else [])])
    return figure


def counted_gpus(simulation: xr.Dataset) -> xr.DataArray | None:
    """Simulated speedup over one GPU, (batch_size, strategy, count), of up to four equal ones, over the first link.

    The network is the one that the paper's claim is of, or else the largest; `link`, `network` and `label` are
    attributes. None where no several GPUs were simulated.
    """
    families = {label: sets for label, sets in selection.simulated_families(simulation).items() if is_gpu(label)}
    if not families:
        return None
    label, sets = next(iter(families.items()))
    counts = [len(selection.device_labels(simulation, one)) for one in sets]
    kept = [(count, one) for count, one in zip(counts, sets, strict=True) if count <= _MOST_GPUS]
    names = selection.networks(simulation, [one for _, one in kept])
    if not names:
        return None
    claimed = [claim.network for claim in paper.CLAIMS if claim.device_kind == "gpu" and claim.network in names]
    place = {"network": (claimed or names)[-1], "link": main_link(simulation)}
    ratios = simulated_speedup(simulation).sel(place).sel(device_set=[one for _, one in kept])
    ratios = ratios.sortby("batch_size").rename(device_set="count").assign_coords(count=[count for count, _ in kept])
    return ratios.transpose("batch_size", "strategy", "count").assign_attrs(place | {"label": label})


def measured_gpus(timing: xr.Dataset) -> xr.Dataset | None:
    """Speedups that were measured on sets of GPUs alone, as `statistics.speedup` gives them; None where none was."""
    sets = [one for one in selection.device_sets(timing) if all(map(is_gpu, selection.device_labels(timing, one)))]
    if not sets:
        return None
    found = speedup(timing.sel(device_set=sets))
    return found if found["speedup"].notnull().any() else None


def gain_beside(simulation: xr.Dataset) -> xr.Dataset | None:
    """Simulated speedup of the best exact split on a GPU and CPUs over that GPU alone, over the ratio of their speeds.

    Variable `gain` over (batch_size, cpus, gpu), of the largest network and the first link, NaN where it was not
    simulated; `ratio` over (batch_size, gpu) is how many times as fast the GPU alone is as one of the CPUs, the slowest
    GPU first. Attributes `network`, `link` and `cpu`. None where no such set and its devices alone were simulated.
    """
    sets = _sets_beside(simulation)
    if "single" not in simulation["strategy"].values or not sets:
        return None
    cpu = sets[0].cpu
    alone = simulation["predicted_step_time"].where(simulation["status"] == OK).sel(strategy="single")
    link, batches = main_link(simulation), sorted(map(int, simulation["batch_size"].values))
    names = [n for n in selection.networks(simulation, [one.device_set for one in sets])
             if alone.sel(network=n, device_set=cpu).notnull().any()]  # fmt: skip
    if not names:
        return None
    labels, numbers = list(dict.fromkeys(one.gpu for one in sets)), sorted({one.cpus for one in sets})
    times = alone.sel(network=names[-1], link=link, batch_size=batches)
    ratio = (times.sel(device_set=cpu) / times.sel(device_set=labels)).transpose("batch_size", "device_set")
    ratios = best_split(simulated_speedup(simulation)).sel(network=names[-1], link=link, batch_size=batches)
    gain = np.full((len(batches), len(numbers), len(labels)), np.nan)
    for one in sets:
        if one.cpu == cpu:
            gain[:, numbers.index(one.cpus), labels.index(one.gpu)] = ratios.sel(device_set=one.device_set).values
    found = xr.Dataset(
        {"gain": (("batch_size", "cpus", "gpu"), gain), "ratio": (("batch_size", "gpu"), ratio.values)},
        coords={"batch_size": batches, "cpus": numbers, "gpu": np.array(labels, object)},
        attrs={"network": names[-1], "link": link, "cpu": cpu},
    )
    return found.isel(gpu=np.argsort(found["ratio"].values[-1], kind="stable"))


def is_gpu(label: str) -> bool:
    """Whether a device's label, or that of a described one, is of a GPU."""
    return label.startswith("gpu")


def main_link(simulation: xr.Dataset) -> str:
    """The real link where it was simulated, else the fastest."""
    return LOOPBACK if LOOPBACK in simulation["link"].values else selection.links(simulation)[-1]


def _sets_beside(simulation: xr.Dataset) -> list[Beside]:
    """The simulated sets of one GPU and equal CPUs of which each was simulated alone, too."""
    every, found = set(map(str, simulation["device_set"].values)), []
    for one in map(str, simulation["device_set"].values):
        labels = selection.device_labels(simulation, one)
        cpus = [label for label in labels if not is_gpu(label)]
        here = [label for label in labels if is_gpu(label)]
        if len(here) == 1 and len(set(cpus)) == 1 and {*here, *cpus} <= every:
            found.append(Beside(one, here[0], cpus[0], len(cpus)))
    return found


def _count_panels(axes: np.ndarray, counted: xr.DataArray | None, measured: xr.Dataset | None) -> list[str]:
    """The smallest and the largest batch; gives the strategies that are drawn."""
    if counted is None:
        for axis in axes:
            axis.set_axis_off()
            axis.text(0.5, 0.5, "not simulated\non several GPUs", transform=axis.transAxes, ha="center", color=MUTED)
        return []
    known = counted.notnull().any(["batch_size", "count"])
    shown = [s for s in STRATEGIES if s in counted["strategy"].values[known.values] and s != "single"]
    network, counts = counted.attrs["network"], counted["count"].values
    claims = [one for one in paper.CLAIMS if one.device_kind == "gpu" and one.network == network]
    for axis, batch_size in zip(axes, counted["batch_size"].values[[0, -1]], strict=True):
        axis.plot(counts, counts, color=MUTED, linewidth=1.2, linestyle=_DASHES, zorder=1)
        for strategy in shown:
            _line(axis, counts, counted.sel(batch_size=batch_size, strategy=strategy).values, strategy)
        for claim in claims:
            axis.plot(claim.device_count, claim.speedup, linestyle="", marker="*", markersize=11, color=INK, zorder=5,
                      markeredgecolor="white")  # fmt: skip
        if measured is not None:
            _measured_marks(axis, measured, network, int(batch_size), shown)
        axis.set(title=f"{network}, batch {batch_size}", xlabel=f"GPUs, link {counted.attrs['link']}", xticks=counts)
        axis.set_ylim(0, 1.12 * max(float(counted.max()), float(counts.max())))
    axes[0].set_ylabel("speedup over one GPU")
    axes[1].tick_params(labelleft=False)
    return shown


def _measured_marks(axis: Axes, measured: xr.Dataset, network: str, batch_size: int, shown: list[str]) -> None:
    if network not in measured["network"].values or batch_size not in measured["batch_size"].values:
        return
    cells = measured.sel(network=network, batch_size=batch_size).isel(link=0)
    for strategy in (one for one in shown if one in cells["strategy"].values):
        look, one = strategy_look(strategy), cells.sel(strategy=strategy)
        spread = np.stack([one["speedup"] - one["speedup_low"], one["speedup_high"] - one["speedup"]])
        axis.errorbar(
            one["device_count"].values, one["speedup"].values, yerr=np.clip(np.nan_to_num(spread), 0, None),
            fmt=look.marker, color=look.color, markerfacecolor="white", markersize=5.5, markeredgewidth=1.2,
            elinewidth=1.1, capsize=1.5, zorder=6,
        )  # fmt: skip


def _beside_panel(axis: Axes, gain: xr.Dataset | None) -> None:
    axis.set_title("CPUs beside one GPU")
    if gain is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "not simulated", transform=axis.transAxes, ha="center", color=MUTED)
        return
    axis.set_title(f"CPUs beside one GPU, {gain.attrs['network']}")
    batches, handles = (
        gain["batch_size"].values[[0, -1]] if gain.sizes["batch_size"] > 1 else gain["batch_size"].values,
        [],
    )
    for place, cpus in enumerate(map(int, gain["cpus"].values)):
        look = step_of_sequence(place, gain.sizes["cpus"])
        for batch_size in map(int, batches):
            one = gain.sel(cpus=cpus, batch_size=batch_size)
            gained = np.where(one["gain"].values >= PAYS, one["gain"].values - 1, np.nan)
            first = batch_size == batches[0]
            axis.plot(
                one["ratio"].values, gained, color=look.color, marker=look.marker, markersize=5, linewidth=1.4,
                markerfacecolor="white" if first else look.color, linestyle="--" if first else "-", zorder=3,
            )  # fmt: skip
            handles.append(
                Line2D([], [], color=look.color, marker=look.marker, linestyle="--" if first else "-",
                       markerfacecolor="white" if first else look.color, label=f"{_cpus(cpus)}, batch {batch_size}")
            )  # fmt: skip
        ratio = np.sort(gain["ratio"].values[-1])
        axis.plot(ratio, cpus / ratio, color=look.color, linewidth=0.8, linestyle=":", zorder=1)
    handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=":", label="all work split, exchange free"))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(PAYS - 1, None)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set(xlabel=f"speed of the GPU over that of one {gain.attrs['cpu']}", ylabel="gain over the GPU alone")
    axis.legend(handles=handles, fontsize=6.5, loc="upper right")


def _cpus(number: int) -> str:
    return f"{number} CPU" + ("s" if number > 1 else "")


def _line(axis: Axes, x: np.ndarray, y: np.ndarray, strategy: str) -> None:
    axis.plot(x, y, **_stroke(strategy))


def _entry(strategy: str) -> Line2D:
    entry = Line2D([], [], label=strategy)
    entry.set(**_stroke(strategy))
    return entry


def _stroke(strategy: str) -> dict[str, Any]:
    look = strategy_look(strategy)
    # `auto` lies on whichever strategy it chose: a broad pale line below leaves that one to be seen.
    broad = {"color": to_rgba(look.color, 0.2), "linewidth": 5, "markerfacecolor": look.color, "zorder": 2}
    return {"color": look.color, "marker": look.marker, "markersize": 5, "linewidth": 1.5, "zorder": 3,
            "markeredgecolor": "white", "markeredgewidth": 0.5, **(broad if strategy == "auto" else {})}  # fmt: skip

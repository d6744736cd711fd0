"""The figure of the calibration: how fast each device is at each share, and the links between them."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.analysis import selection
from pipeline.analysis.statistics import summary
from pipeline.analysis.style import (
    canvas,
    emulation_note,
    legend,
    nothing,
    plain_logarithmic,
    source_line,
    step_of_sequence,
    style,
    subtitle,
    time_scale,
)
from pipeline.analysis.wording import counted

_SEGMENTS_SHOWN = 2


def calibration_curves(calibration: xr.Dataset, *, store: str = "calibration.zarr") -> Figure:
    """Time over the share for the segments that take longest, one line per device, and message time over size.

    Of several calibrations the one of the largest network is shown.
    """
    title, source = "Calibration of devices and links", source_line(calibration, store)
    chosen = largest(calibration)
    total = with_most_images(chosen)
    shared = total.median("repetition").notnull().sum("share").max("device") > 1
    cost = total.median("repetition").max(["share", "device"]).where(shared)
    segments = [str(cost["segment"].values[i]) for i in np.argsort(-cost.values) if np.isfinite(cost.values[i])]
    if not segments:
        return nothing(title, "No segment was timed at several shares.", source)
    segments = segments[:_SEGMENTS_SHOWN]
    labels = [str(label) for label in chosen["device_label"].values if label]
    network, images = str(chosen["network"].item()), counted(int(total["images"].item()), "image")
    note = subtitle(f"{network}, {images}", "forward and backward, median and quartiles", emulation_note(labels))
    with style():
        columns = len(segments) + 1
        figure, axes = canvas(1, columns, title=title, subtitle=note, source=source, panel=(3.3, 2.8), width=8)
        for axis, segment in zip(axes[0], segments, strict=False):
            _share_curve(axis, total.sel(segment=segment), len(labels))
            axis.set_title(segment)
        _links(axes[0, -1], chosen["link_time"])
        looks = [step_of_sequence(rank, len(labels)) for rank in range(len(labels))]
        legend(figure, [
            Line2D([], [], color=look.color, marker=look.marker, markeredgecolor="white", label=f"{rank}  {label}")
            for rank, (look, label) in enumerate(zip(looks, labels, strict=True))
        ])  # fmt: skip
    return figure


def largest(calibration: xr.Dataset) -> xr.Dataset:
    """The calibration itself or, of several, the one of the largest network on most devices."""
    if "calibration" not in calibration.dims:
        return calibration
    devices = (calibration["device_label"] != "").sum("device").values
    sizes = [selection.network_size(str(network)) for network in calibration["network"].values]
    best = max(range(len(sizes)), key=lambda i: (sizes[i], devices[i]))
    return calibration.isel(calibration=best)


def with_most_images(calibration: xr.Dataset) -> xr.DataArray:
    """Forward plus backward time in s, (device, segment, share, repetition), with the most images of whole curves.

    Slow devices do large shares of a long network with few images only.
    """
    total = (calibration["forward_time"] + calibration["backward_time"]).dropna("images", how="all").sortby("images")
    there = total.notnull().any("repetition")
    whole = (there == there.any("images")).all([dim for dim in there.dims if dim != "images"])
    return total.isel(images=int(np.flatnonzero(whole.values)[-1]))


def _share_curve(axis: Axes, times: xr.DataArray, devices: int) -> None:
    numbers, (scale, unit) = summary(times), time_scale(times.values)
    for rank in range(devices):
        look, line = step_of_sequence(rank, devices), numbers.isel(device=rank)
        median = scale * line["median"].values
        spread = np.clip([median - scale * line["lower"].values, scale * line["upper"].values - median], 0, None)
        axis.errorbar(
            100 * times["share"].values, median, yerr=spread, color=look.color, marker=look.marker, elinewidth=1.1,
            capsize=2, markeredgecolor="white", markeredgewidth=0.7,
        )  # fmt: skip
    axis.set(xlabel="share of the kernels / %", ylabel=f"time / {unit}")
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)


def _links(axis: Axes, times: xr.DataArray) -> None:
    axis.set(title="links, one by one", xlabel="message / kB", ylabel="time / ms", xscale="log", yscale="log")
    pairs = [(s, d) for s in range(times.sizes["source"]) for d in range(times.sizes["destination"]) if s != d]
    for source, destination in pairs:
        numbers = summary(1e3 * times.isel(source=source, destination=destination))
        size_kb = numbers["message_bytes"] / 1e3
        axis.fill_between(size_kb, numbers["lower"], numbers["upper"], color="#f0a43c", alpha=0.18, linewidth=0)
        axis.plot(size_kb, numbers["median"], color="#b36b00", linewidth=1.1, marker=".")
    for one in (axis.xaxis, axis.yaxis):
        plain_logarithmic(one)

"""The figure of unequal devices: what a calibration gains over equal shares, what it costs, what a wrong one loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from pipeline.analysis.statistics import bootstrap_ratio, device_count, device_throughput
from pipeline.analysis.style import (
    INK,
    MUTED,
    canvas,
    emulation_note,
    legend,
    nothing,
    source_line,
    strategy_look,
    style,
    subtitle,
)
from pipeline.cluster.devices import parse_device_set
from pipeline.results.contracts import INDEX, OK

_STORES = "timing.zarr, calibration.zarr, miscalibration.zarr"
NOTHING = "No strategy was measured beside equal shares on a set of two devices."
CALIBRATED = ("paper", "kernel", "auto")
"""Strategies whose shares follow the calibration, the one that differs from `equal` in nothing else first."""
_DASHES = (0, (4, 2))


def unequal_devices(
    timing: xr.Dataset, calibration: xr.Dataset, miscalibration: xr.Dataset, *, store: str = _STORES
) -> Figure:
    """Gain over equal shares and steps until the calibration has paid over the ratio of speeds; loss over the error."""
    title, source = "Calibrated against equal shares on two devices", source_line(timing, store)
    found, losses = gains(timing), lost(miscalibration)
    if found is None:
        return nothing(title, NOTHING, source)
    sets = [str(one) for one in found["device_set"].values]
    note = subtitle(
        f"{found.attrs['network']}, batch {found.attrs['batch_size']}",
        "medians with 95 % interval",
        emulation_note(sets),
    )
    with style():
        figure, axes = canvas(1, 3, title=title, subtitle=note, source=source, panel=(3.05, 3.0))
        _gain_panel(axes[0, 0], found)
        _payback_panel(axes[0, 1], found, calibration)
        _loss_panel(axes[0, 2], losses)
        shown = [one for one in CALIBRATED if one in found["strategy"].values]
        ideal = Line2D([], [], color=MUTED, linewidth=1.2, linestyle=_DASHES, label="all work split, exchange free")
        predicted = Line2D([], [], color=INK, linewidth=1.2, linestyle=_DASHES, label="simulated")
        marks = [_entry(one) for one in shown]
        legend(figure, [*marks, ideal, *([predicted] if losses is not None else [])])
    return figure


def gains(timing: xr.Dataset) -> xr.Dataset | None:
    """How many times as fast as `equal` each calibrated strategy is, on the sets of two devices from equal to unequal.

    Variables `gain`, `low` and `high` (its 95 % interval) over (device_set, strategy), `equal_time` in s and `ratio`,
    the calibrated throughput of the slower device over the faster one's, over (device_set); attributes `network`,
    `batch_size` and `link`: those with the most such sets. None where there is no such cell.
    """
    shown = [one for one in CALIBRATED if one in timing["strategy"].values]
    if "equal" not in timing["strategy"].values or not shown:
        return None
    two = timing.sel(device_set=(device_count(timing) == 2).values)
    ok = two["status"] == OK
    throughput = device_throughput(two)
    compared = ok.sel(strategy="equal") & ok.sel(strategy=shown).any("strategy")
    both = (compared & throughput.notnull().any("device")).transpose(*INDEX[:4])
    sets = both.sum("device_set")
    if not sets.size or not sets.max():
        return None
    n, b, k = np.unravel_index(int(np.argmax(sets.values)), sets.shape)
    place = {"network": n, "batch_size": b, "link": k}
    cells = two.isel(place).isel(device_set=both.isel(place).values)
    speeds = throughput.isel(network=n, batch_size=b).sel(device_set=cells["device_set"])
    ratio = speeds.min("device") / speeds.max("device")
    times = cells["step_time"].where(cells["status"] == OK)
    rows = [[_ratio(times.sel(device_set=s, strategy="equal"), times.sel(device_set=s, strategy=one)) for one in shown]
            for s in cells["device_set"].values]  # fmt: skip
    values = np.array(rows)
    found = xr.Dataset(
        {
            "gain": (("device_set", "strategy"), values[..., 0]),
            "low": (("device_set", "strategy"), values[..., 1]),
            "high": (("device_set", "strategy"), values[..., 2]),
            "ratio": ("device_set", ratio.transpose("device_set").values),
            "equal_time": ("device_set", times.sel(strategy="equal").median("repetition").values),
        },
        coords={"device_set": cells["device_set"].values, "strategy": np.array(shown, object)},
        attrs={name: cells[name].item() for name in place},
    )
    return found.dropna("strategy", how="all", subset=["gain"]).sortby("ratio", ascending=False)


def payback(found: xr.Dataset, calibration: xr.Dataset) -> xr.Dataset:
    """After how many steps the calibration has saved, against equal shares, the time that it took.

    `found` is what `gains` gives. Variables `steps`, `low` and `high` over (device_set, strategy), infinite where
    nothing is gained, and `seconds`, what the calibration that serves the set took, over (device_set), NaN if unknown.
    """
    sets = [str(one) for one in found["device_set"].values]
    seconds = xr.DataArray([_calibration_seconds(calibration, found.attrs["network"], one) for one in sets],
                           dims="device_set")  # fmt: skip
    saved = {name: found["equal_time"] * (1 - 1 / found[name]) for name in ("gain", "low", "high")}
    steps = {
        name: (seconds / one.where(one > 0)).where((one > 0) | one.isnull(), np.inf) for name, one in saved.items()
    }
    # The larger the gain, the sooner it has paid.
    return xr.Dataset({"steps": steps["gain"], "low": steps["high"], "high": steps["low"], "seconds": seconds})


def lost(miscalibration: xr.Dataset) -> xr.Dataset | None:
    """What each error of the calibration adds to the step, as a fraction of the step without an error.

    Variables `loss`, `low` and `high` (its 95 % interval) as measured, and `simulated`, over (strategy, error), of the
    first network, batch size, device set and link; attributes name these and `device`, the label of the misjudged one.
    None where no step without an error was measured.
    """
    if not miscalibration["error"].size or 0.0 not in miscalibration["error"].values:
        return None
    one = miscalibration.isel(dict.fromkeys(INDEX[:4], 0))
    times = one["step_time"].where(one["status"] == OK)
    rows = [[_ratio(times.sel(strategy=s, error=e), times.sel(strategy=s, error=0.0)) for e in one["error"].values]
            for s in one["strategy"].values]  # fmt: skip
    values = np.array(rows) - 1
    if not np.isfinite(values[..., 0]).any():
        return None
    predicted = one["predicted_step_time"] / one["predicted_step_time"].sel(error=0.0) - 1
    dims = ("strategy", "error")
    labels = [device.label for device in parse_device_set(str(one["device_set"].item()))]
    return xr.Dataset(
        {
            "loss": (dims, values[..., 0]),
            "low": (dims, values[..., 1]),
            "high": (dims, values[..., 2]),
            "simulated": (dims, predicted.transpose(*dims).values),
        },
        coords={"strategy": one["strategy"].values, "error": one["error"].values},
        attrs={name: one[name].item() for name in INDEX[:4]} | {"device": labels[one.attrs["misjudged_device"]]},
    )


def _ratio(numerator: xr.DataArray, denominator: xr.DataArray) -> tuple[float, float, float]:
    """Ratio of the medians over the repetitions, with its 95 % interval; NaN where one was not measured."""
    above, below = (one.values[np.isfinite(one.values)] for one in (numerator, denominator))
    if not above.size or not below.size:
        return np.nan, np.nan, np.nan
    return float(np.median(above) / np.median(below)), *bootstrap_ratio(above, below)


def _calibration_seconds(calibration: xr.Dataset, network: str, device_set: str) -> float:
    """What the calibration of the network took that serves the set: its own, else the largest with all its devices."""
    every = calibration if "calibration" in calibration.dims else calibration.expand_dims("calibration")
    needed = Counter(device.label for device in parse_device_set(device_set))
    found: list[tuple[bool, int, float]] = []
    for place in range(every.sizes["calibration"]):
        one = every.isel(calibration=place)
        labels = Counter(str(label) for label in one["device_label"].values if label)
        if str(one["network"].item()) == network and needed <= labels:
            found.append((needed == labels, labels.total(), float(one["calibration_time"])))
    return max(found)[2] if found else np.nan


def _gain_panel(axis: Axes, found: xr.Dataset) -> None:
    ratio = np.geomspace(min(float(found["ratio"].min()), 0.5), 1, 50)
    axis.plot(ratio, (1 + ratio) / (2 * ratio), color=MUTED, linewidth=1.2, linestyle=_DASHES, zorder=1)
    axis.axhline(1, color=MUTED, linewidth=0.9, zorder=1)
    for strategy in map(str, found["strategy"].values):
        one = found.sel(strategy=strategy)
        _marks(axis, one["ratio"].values, one["gain"].values, one["low"].values, one["high"].values, strategy)
    axis.set(title="What calibrated shares gain", ylabel="speedup over equal shares")
    _ratio_axis(axis, found["ratio"].values)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _payback_panel(axis: Axes, found: xr.Dataset, calibration: xr.Dataset) -> None:
    axis.set_title("What the calibration costs")
    paid = payback(found, calibration)
    if not np.isfinite(paid["steps"]).any():
        axis.text(0.5, 0.5, "it has not paid", transform=axis.transAxes, ha="center", color=MUTED)
    axis.set_yscale("log")
    for strategy in map(str, found["strategy"].values):
        one = paid.sel(strategy=strategy)
        known = np.isfinite(one["steps"].values)
        high = np.where(np.isfinite(one["high"].values), one["high"].values, one["steps"].values * 1e3)
        _marks(axis, found["ratio"].values[known], one["steps"].values[known], one["low"].values[known], high[known],
               strategy)  # fmt: skip
    top = paid["steps"].values[np.isfinite(paid["steps"].values)]
    if top.size:
        axis.set_ylim(top.min() / 2, top.max() * 4)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.set_ylabel("steps until it has paid")
    _ratio_axis(axis, found["ratio"].values)


def _loss_panel(axis: Axes, losses: xr.Dataset | None) -> None:
    if losses is None:
        axis.set_title("What a wrong one loses")
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=MUTED)
        axis.set(xlabel="error of the calibration", xticks=[], yticks=[])
        return
    axis.axhline(0, color=MUTED, linewidth=0.9, zorder=1)
    names = [str(one) for one in losses["strategy"].values]
    for place, strategy in enumerate(names):
        one, look = losses.sel(strategy=strategy), strategy_look(strategy)
        error = one["error"].values
        axis.plot(error, one["simulated"].values, color=look.color, linewidth=1.2, linestyle=_DASHES, zorder=2)
        apart = 0.012 * (place - (len(names) - 1) / 2)
        _marks(axis, error + apart, one["loss"].values, one["low"].values, one["high"].values, strategy, line=False)
    axis.set(
        title="What a wrong one loses",
        xlabel=f"error of the time of {losses.attrs['device']} / %\nof {losses.attrs['device_set']}",
        ylabel="longer step", xticks=losses["error"].values,
    )  # fmt: skip
    axis.set_xticklabels([f"{100 * error:+.0f}" if error else "0" for error in losses["error"].values], size=8)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _marks(
    axis: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    strategy: str,
    *,
    line: bool = True,
) -> None:
    look, known = strategy_look(strategy), np.isfinite(y)
    spread = np.clip(np.stack([y - low, high - y]), 0, None)[:, known]
    axis.errorbar(
        x[known], y[known], yerr=np.nan_to_num(spread), color=look.color, marker=look.marker, markersize=5,
        markeredgecolor="white", markeredgewidth=0.5, linestyle="-" if line else "", linewidth=1.4, elinewidth=1.1,
        capsize=2, zorder=3,
    )  # fmt: skip


def _ratio_axis(axis: Axes, ratios: Sequence[float] | NDArray[np.float64]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(1.12, 0.88 * min(ratios))
    axis.set_xticks(list(ratios), [f"1:{ratio:.2g}" for ratio in ratios])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.minorticks_off()
    axis.set_xlabel("calibrated speeds of the two devices")


def _entry(strategy: str) -> Line2D:
    look = strategy_look(strategy)
    return Line2D([], [], color=look.color, marker=look.marker, markeredgecolor="white", label=strategy)

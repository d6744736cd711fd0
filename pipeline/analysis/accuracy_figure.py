"""The figure of the learning curves: does splitting change what is learnt?"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.analysis.learning import (
    FIRST_STEPS,
    accuracy_difference,
    control_loss_difference,
    has_single,
    loss_difference,
    seed_spread,
    shown_strategies,
)
from pipeline.analysis.style import (
    FAINT,
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

_DASHES: tuple[Any, ...] = ("-", (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_SMOOTHED_STEPS = 10


def accuracy_over_epochs(accuracy: xr.Dataset, *, store: str = "accuracy.zarr") -> Figure:
    """Learning curves with their spread over seeds, and what splitting changes beside what seeds and rounding do."""
    title, source = "Accuracy on one device and split", source_line(accuracy, store)
    shown = shown_strategies(accuracy)
    if not shown:
        return nothing(title, "No accuracy was measured.", source)
    device_set, seeds = str(accuracy.attrs["device_set"]), accuracy.sizes["seed"]
    note = subtitle(
        f"{accuracy.attrs['network']} on {device_set}", f"data: {accuracy.attrs['data']}",
        f"{seeds} seeds" if seeds > 1 else "one seed", emulation_note([device_set]),
    )  # fmt: skip
    with style():
        figure, axes = canvas(2, 2, title=title, subtitle=note, source=source, panel=(4.9, 2.7))
        (test, train), (apart, losses) = axes
        _curves(test, accuracy["accuracy"].sel(strategy=shown), marked=True)
        test.set(title="test accuracy: mean and range over seeds", xlabel="epoch", ylabel="classified correctly")
        test.yaxis.set_major_formatter(PercentFormatter(1.0))
        test.set_xlim(accuracy["epoch"].values[0] - 0.2, accuracy["epoch"].values[-1] + 0.2)
        smooth = accuracy["loss"].sel(strategy=shown).rolling(step=_SMOOTHED_STEPS, min_periods=1).mean()
        _curves(train, smooth)
        train.set(title=f"training loss: mean of {_SMOOTHED_STEPS} steps, and range", xlabel="step", ylabel="loss")
        if has_single(accuracy):
            _beside_seeds(apart, accuracy)
            _beside_rounding(losses, accuracy)
        else:
            for axis in (apart, losses):
                axis.set_axis_off()
                axis.text(0.5, 0.5, "no single run to compare with", transform=axis.transAxes, ha="center", color=MUTED)
        for axis in (test, train, losses):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        legend(figure, [_entry(strategy, at) for at, strategy in enumerate(shown)])
    return figure


def _curves(axis: Axes, values_STX: xr.DataArray, *, marked: bool = False) -> None:
    """The mean over S seeds of T strategies over X, with the range of the first strategy as a band."""
    values_STX = values_STX.transpose("seed", "strategy", ...)
    x = values_STX[values_STX.dims[-1]].values
    first = values_STX.isel(strategy=0)
    if values_STX.sizes["seed"] > 1:
        axis.fill_between(x, first.min("seed").values, first.max("seed").values, color=FAINT, linewidth=0, zorder=1)
    for position, strategy in enumerate(map(str, values_STX["strategy"].values)):
        look = strategy_look(strategy)
        (line,) = axis.plot(x, values_STX.sel(strategy=strategy).mean("seed").values, color=look.color)
        line.set(marker=look.marker if marked else "", markeredgecolor="white", **_stroke(position))


def _stroke(position: int) -> dict[str, Any]:
    # Curves that agree lie on each other: the first is a broad band, the later ones are thinner and dashed in turn.
    thin = {"linewidth": 1.4, "linestyle": _DASHES[position % len(_DASHES)], "alpha": 1.0, "zorder": 3 + position}
    return {"linewidth": 5.5, "linestyle": "-", "alpha": 0.55, "zorder": 2} if position == 0 else thin


def _entry(strategy: str, position: int) -> Line2D:
    look = strategy_look(strategy)
    entry = Line2D([], [], color=look.color, marker=look.marker, markeredgecolor="white", label=strategy)
    entry.set(**_stroke(position))
    return entry


def _beside_seeds(axis: Axes, accuracy: xr.Dataset) -> None:
    """A point for every seed and strategy, over the band in which another seed puts one device itself."""
    apart_ST = 100 * accuracy_difference(accuracy).isel(epoch=-1)
    single_S = accuracy["accuracy"].sel(strategy="single").isel(epoch=-1)
    control_S = 100 * (accuracy["control_accuracy"].isel(epoch=-1) - single_S)
    names = [str(name) for name in apart_ST["strategy"].values]
    deviation_S = 100 * (single_S - single_S.mean()).values
    if accuracy.sizes["seed"] > 1:
        low, high = float(deviation_S.min()), float(deviation_S.max())
        axis.axhspan(low, high, color=FAINT, zorder=0)
        spread = 100 * seed_spread(accuracy).isel(epoch=-1).item()
        axis.annotate(f"spread of single over seeds: {spread:.2g} points", (0.98, low), textcoords="offset points",
                      xycoords=("axes fraction", "data"), xytext=(0, 3), ha="right", size=7.5, color=MUTED)  # fmt: skip
    axis.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    single = strategy_look("single")
    _points(axis, 0, deviation_S, color=single.color, marker=single.marker)
    for place, name in enumerate(names, start=1):
        look = strategy_look(name)
        _points(axis, place, apart_ST.sel(strategy=name).values, color=look.color, marker=look.marker)
    _points(axis, len(names) + 1, control_S.values, color=INK, marker="_")
    labels = ["single:\nits seeds", *names, "single, one\nrounding"]
    axis.set_xticks(range(len(labels)), labels, size=8)
    axis.grid(visible=False, axis="x")
    axis.set(title="accuracy less single's, last epoch", xlabel="each point one seed", ylabel="percentage points")


def _points(axis: Axes, place: int, values: npt.NDArray[np.float64], *, color: str, marker: str) -> None:
    x = place + np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [place]
    drawn: dict[str, Any] = {"markersize": 7, "linestyle": "", "clip_on": False, "zorder": 3}
    axis.plot(x, values, color=color, marker=marker, markeredgecolor=color if marker == "_" else "white", **drawn)


def _beside_rounding(axis: Axes, accuracy: xr.Dataset) -> None:
    """The largest difference of any step so far, over all seeds, beside what one rounding does to one device."""
    steps = accuracy["step"].values
    furthest = loss_difference(accuracy).max("seed").transpose("strategy", "step")
    epsilon = float(np.finfo(np.float32).eps)
    for position, strategy in enumerate(map(str, furthest["strategy"].values), start=1):
        so_far = np.maximum.accumulate(furthest.sel(strategy=strategy).values)
        axis.plot(steps, _above_zero(so_far), color=strategy_look(strategy).color, **_stroke(position))
    control = np.maximum.accumulate(control_loss_difference(accuracy).max("seed").values)
    axis.plot(steps, _above_zero(control), color=INK, linewidth=5, alpha=0.18, zorder=1)
    axis.set(yscale="log", xlim=(steps[0] - 1, steps[-1] + 1))
    if control[-1] > 0:
        place = int(np.argmax(control > 0))
        place += (len(steps) - 1 - place) // 6
        axis.annotate("single, each initial weight\nmoved by one rounding", (steps[place], control[place]), va="top",
                      xytext=(0.03, 0.97), textcoords="axes fraction", size=7.5, color=MUTED,
                      arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7})  # fmt: skip
    axis.axhline(epsilon, color=MUTED, linewidth=1, linestyle=(0, (1, 1.6)))
    axis.annotate("float32 resolution", (0.98, epsilon), xycoords=("axes fraction", "data"), xytext=(0, 3), size=7.5,
                  textcoords="offset points", ha="right", color=MUTED)  # fmt: skip
    if steps[-1] > FIRST_STEPS:
        axis.axvline(FIRST_STEPS, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set(title="loss against single's, worst seed so far", xlabel="step", ylabel="relative difference")


def _above_zero(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.where(values > 0, values, np.nan)

"""The figure of the learning curves: does splitting change what is learnt?"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.analysis.style import (
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


def accuracy_over_epochs(accuracy: xr.Dataset, *, store: str = "accuracy.zarr") -> Figure:
    """Test accuracy over epochs, training loss over steps, and how far the split losses are from one device's."""
    title, source = "Accuracy on one device and split", source_line(accuracy, store)
    shown = [str(s) for s in accuracy["strategy"].values if accuracy["accuracy"].sel(strategy=s).notnull().any()]
    if not shown:
        return nothing(title, "No accuracy was measured.", source)
    device_set = str(accuracy.attrs["device_set"])
    note = subtitle(
        f"{accuracy.attrs['network']} on {device_set}", f"data: {accuracy.attrs['data']}", "same data, order and seed",
        emulation_note([device_set]),
    )  # fmt: skip
    with style():
        figure, axes = canvas(1, 3, title=title, subtitle=note, source=source, panel=(3.4, 2.8))
        test, train, apart = axes[0]
        for position, strategy in enumerate(shown):
            _curve(test, accuracy["accuracy"].sel(strategy=strategy), position, marked=True)
            _curve(train, accuracy["loss"].sel(strategy=strategy), position)
        test.set(title="test accuracy", xlabel="epoch", ylabel="images classified correctly")
        test.yaxis.set_major_formatter(PercentFormatter(1.0))
        test.xaxis.set_major_locator(MaxNLocator(integer=True))
        test.set_ylim(0, 1.08 * float(accuracy["accuracy"].max()))
        train.set(title="training loss", xlabel="step", ylabel="loss")
        _difference(apart, accuracy["loss"], shown)
        legend(figure, [_entry(strategy, position) for position, strategy in enumerate(shown)])
    return figure


def _curve(axis: Axes, values: xr.DataArray, position: int, *, marked: bool = False) -> None:
    # Curves that agree lie on each other: the first is a broad band, the later ones are thinner and dashed in turn.
    look, x = strategy_look(str(values["strategy"].item())), values[values.dims[0]].values
    marker, size = look.marker if marked else "", 9 - 2 * min(position, 2)
    (line,) = axis.plot(x, values.values, color=look.color, marker=marker, markeredgecolor="white", markersize=size)
    line.set(**_stroke(position))


def _stroke(position: int) -> dict[str, Any]:
    dashes: list[Any] = ["-", "-", (0, (3, 2)), (0, (1, 2))]
    return {"linewidth": 5.5 if position == 0 else 1.6, "linestyle": dashes[min(position, 3)],
            "alpha": 0.55 if position == 0 else 1, "zorder": 2 + position}  # fmt: skip


def _entry(strategy: str, position: int) -> Line2D:
    look = strategy_look(strategy)
    entry = Line2D([], [], color=look.color, marker=look.marker, markeredgecolor="white", label=strategy)
    entry.set(**_stroke(position))
    return entry


def _difference(axis: Axes, loss: xr.DataArray, shown: list[str]) -> None:
    axis.set(title="loss against one device", xlabel="step", ylabel="relative difference")
    others = [s for s in shown if s != "single"] if "single" in shown else []
    drawn = False
    for position, strategy in enumerate(others):
        reference = np.abs(loss.sel(strategy="single").values)
        apart = np.abs(loss.sel(strategy=strategy).values - loss.sel(strategy="single").values) / reference
        positive = np.where(apart > 0, apart, np.nan)
        if np.isfinite(positive).any():
            axis.plot(loss["step"].values, positive, color=strategy_look(strategy).color, linewidth=1.4,
                      linestyle=("-", (0, (4, 1.5)), (0, (1, 1.5)))[position % 3])  # fmt: skip
            drawn = True
    if drawn:
        axis.set_yscale("log")
        rounding = float(np.finfo(np.float32).eps)
        axis.axhline(rounding, color=MUTED, linewidth=1, linestyle=(0, (1, 1.6)))
        axis.annotate("float32 rounding", (0.98, rounding), xycoords=("axes fraction", "data"), xytext=(0, 3),
                      textcoords="offset points", ha="right", size=7.5, color=MUTED,
                      bbox={"facecolor": "white", "linewidth": 0, "pad": 0.8, "alpha": 0.8})  # fmt: skip
    else:
        why = "none" if others else "no single run to compare with"
        axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", color=MUTED)

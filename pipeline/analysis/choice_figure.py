"""The figure of what `auto` chose: every strategy's step beside that of `auto`, a row for each place of the grid."""

from __future__ import annotations

from typing import Any

import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipeline.analysis.choice import TOLERATED, Choice, auto_against_fastest
from pipeline.analysis.style import (
    FAINT,
    INK,
    MUTED,
    STRATEGIES,
    canvas,
    emulation_note,
    legend,
    nothing,
    source_line,
    strategy_look,
    style,
    subtitle,
)
from pipeline.links import LOOPBACK

_ROW_IN, _LARGEST = 0.24, 3.0


def auto_beside_others(timing: xr.Dataset, *, store: str = "timing.zarr") -> Figure:
    """Median steps of all strategies over the fastest but `auto`, whose own has its 95 % interval."""
    title, source = "auto beside the fastest other strategy", source_line(timing, store)
    rows = auto_against_fastest(timing)
    if not rows:
        return nothing(title, "No step of auto was measured beside another strategy.", source)
    labels = [str(label) for label in timing["device_label"].values.ravel() if label]
    note = subtitle(
        "→ what auto chose", f"shaded: up to {TOLERATED:g}", "bar: 95 % interval of auto",
        f"at the edge: {_LARGEST:g} and more", emulation_note(labels),
    )  # fmt: skip
    shown = [name for name in STRATEGIES if any(name in row.medians for row in rows)]
    with style():
        figure, axes = canvas(
            1, 1, title=title, subtitle=note, source=source, panel=(7.7, 0.6 + _ROW_IN * len(rows)), width=8
        )
        axis = axes[0, 0]
        axis.axvspan(1, TOLERATED, color=FAINT, linewidth=0)
        axis.axvline(1, color=MUTED, linewidth=1)
        for place, row in enumerate(rows):
            for name, took in row.medians.items():
                if name != "auto":
                    axis.plot(min(took / row.medians[row.fastest], _LARGEST), place, **_marks(name))
            axis.plot([row.low, row.high], [place, place], color=INK, linewidth=1.4, zorder=1.5)
            axis.plot(row.ratio, place, **_marks("auto"))
        axis.set_yticks(range(len(rows)), [_named(row) for row in rows], fontsize=7.5)
        axis.set(ylim=(len(rows) - 0.4, -0.6), xlabel="median step / that of the fastest other strategy")
        axis.set_xlim(right=min(_LARGEST, axis.get_xlim()[1]) * 1.02)
        legend(figure, [Line2D([], [], label=name, **_marks(name)) for name in shown])
    return figure


def _marks(name: str) -> dict[str, Any]:
    look = strategy_look(name)
    return {"color": look.color, "marker": look.marker, "linestyle": "", "markeredgecolor": "white", "clip_on": False}


def _named(row: Choice) -> str:
    over = "" if row.link == LOOPBACK else f", {row.link}"
    chose = {"": "", "auto": " → a mix"}.get(row.chosen, f" → {row.chosen}")
    return f"{row.network}, {row.batch_size}, {row.device_set}{over}{chose}"

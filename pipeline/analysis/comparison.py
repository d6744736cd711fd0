"""A study beside another one: the cells that both measured, their step times and their speedups."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pipeline.analysis.statistics import bootstrap_ratio, speedup
from pipeline.results.contracts import INDEX, OK

NUMBERS = ("seconds", "seconds_there", "ratio", "low", "high", "speedup", "speedup_there")
COLUMNS = (*INDEX, *NUMBERS)
"""Columns of a comparison: median step times in s here and there; how many times as fast it is here, with the 95 %
interval from `low` to `high`; and the speedups over each study's own baseline device."""


def compare(timing: xr.Dataset, reference: xr.Dataset) -> pd.DataFrame:
    """One row for each cell that both grids measured, in the order of `timing`."""
    here, there = speedup(timing)["speedup"], speedup(reference)["speedup"]
    rows = []
    for place in np.ndindex(tuple(timing.sizes[dim] for dim in INDEX)):
        index = {dim: timing[dim].isel({dim: at}).item() for dim, at in zip(INDEX, place, strict=True)}
        times, others = _times(timing, index), _times(reference, index)
        if not times.size or not others.size:
            continue
        low, high = bootstrap_ratio(others, times)
        rows.append(
            index
            | {
                "seconds": float(np.median(times)),
                "seconds_there": float(np.median(others)),
                "ratio": float(np.median(others) / np.median(times)),
                "low": low,
                "high": high,
                "speedup": here.sel(index).item(),
                "speedup_there": there.sel(index).item(),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def summary_of(table: pd.DataFrame) -> str:
    """What a comparison says, in one sentence."""
    if table.empty:
        return "The two studies have no measured cell in common."
    faster, slower = int((table["low"] > 1).sum()), int((table["high"] < 1).sum())
    change = (table["speedup"] / table["speedup_there"] - 1).abs().median()
    return (
        f"{len(table)} cells in common: steps are {table['ratio'].median():.2f} times as fast here in the median "
        f"({table['ratio'].min():.2f} to {table['ratio'].max():.2f}), {faster} cells faster and {slower} slower beyond "
        f"their 95 % intervals; speedups differ by {change:.1%} in the median."
    )


def write_comparison(table: pd.DataFrame, output: Path, *, here: str, there: str) -> Path:
    """Write the comparison as a page that needs no network; `here` and `there` say what was compared."""
    shown = table.assign(
        seconds=[f"{one:.3g}" for one in table["seconds"]],
        seconds_there=[f"{one:.3g}" for one in table["seconds_there"]],
        ratio=[f"{one:.2f}" for one in table["ratio"]],
        interval=[f"{low:.2f} to {high:.2f}" for low, high in zip(table["low"], table["high"], strict=True)],
        speedup=[_speedup(one) for one in table["speedup"]],
        speedup_there=[_speedup(one) for one in table["speedup_there"]],
    )
    headings = {
        **{name: name.replace("_", " ") for name in INDEX},
        "seconds": "step here / s",
        "seconds_there": "step there / s",
        "ratio": "times as fast",
        "interval": "95 % interval",
        "speedup": "speedup here",
        "speedup_there": "speedup there",
    }
    body = shown[list(headings)].rename(columns=headings).to_html(index=False, border=0, classes="comparison")
    output.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Comparison</title><style>{_LOOK}</style>'
        f"<h1>Two studies side by side</h1><p>Here: {html.escape(here)}</p><p>There: {html.escape(there)}</p>"
        f"<p><b>{html.escape(summary_of(table))}</b></p>{body}</html>\n",
        encoding="utf-8",
    )
    return output


def _times(timing: xr.Dataset, index: dict[str, object]) -> NDArray[np.float64]:
    """The step times of a measured cell in s; none where it was not measured."""
    if any(value not in timing[dim].values for dim, value in index.items()):
        return np.empty(0)
    cell = timing.sel(index)
    times = np.asarray(cell["step_time"].values if cell["status"].item() == OK else [], dtype=float)
    return np.asarray(times[np.isfinite(times)])


def _speedup(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.2f}x"


_LOOK = (
    "body{font-family:system-ui,sans-serif;margin:2rem;color:#1f2328;font-size:.85rem;max-width:80rem}"
    "table.comparison{border-collapse:collapse;font-size:.8rem;display:block;overflow-x:auto}"
    "table.comparison th{text-align:left;border-bottom:2px solid #1f2328;padding:.3rem .5rem;vertical-align:bottom}"
    "table.comparison td{border-bottom:1px solid #d5d9de;padding:.3rem .5rem;white-space:nowrap}"
)

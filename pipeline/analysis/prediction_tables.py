"""Prediction against measurement as tables: per cell, per kind of instruction, per instruction and by strategy.

The first three are written for programs, as CSV; what a reader of the report sees is the one by strategy, the cells
that are far off and, folded, all of them.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pipeline.analysis import selection
from pipeline.analysis.choice import repeatability, step_interval
from pipeline.analysis.far_off import FAR, FarOff, far_off
from pipeline.analysis.instruction_times import (
    KINDS,
    SPREAD,
    TIMELINES,
    has_instructions,
    kind_errors,
    kind_times,
    kinds_of,
    parts,
)
from pipeline.analysis.statistics import copied, flags, prediction_error, summary
from pipeline.analysis.wording import unnamed
from pipeline.results.contracts import INDEX, NOISY, OK

Row = Mapping[Any, Any]

ALL = "all"
"""What stands in place of a strategy for the cells of all of them."""
MOST = 10
"""So many of the cells that are far off the report lists."""
CELL_COLUMNS = (
    *INDEX, "predicted_s", "measured_s", "low_s", "high_s", "error", "forecast_error", "between_rounds", "repetitions",
    "noisy", "copied",
)  # fmt: skip
"""`low_s` and `high_s` bound the 95 % interval of the measured median, `error` is predicted / measured - 1.

`forecast_error` and `between_rounds` are those of `choice.repeatability`; a `copied` cell was timed as another's.
"""
KIND_COLUMNS = (*INDEX, "kind", "predicted_s", "measured_s", "error", "error_of_step")
"""`error` is of the kind's own time, `error_of_step` its difference over the measured step. `spread` has only that."""
_ENDS = {
    name: f"{'predicted' if name.startswith('predicted') else 'measured'}_{name.rpartition('_')[2]}_s"
    for names in TIMELINES.values()
    for name in names
}
INSTRUCTION_COLUMNS = (*INDEX, "instruction", "name", "kind", "device", "device_label", *_ENDS.values())
"""Start and end of an instruction on a device, since the start of the step; `kind` is that of KIND_COLUMNS.

`device` is the rank in the plan of the cell, and `device_label` says which device of the set that is where it can.
"""


def cells_table(timing: xr.Dataset) -> pd.DataFrame:
    """One row with CELL_COLUMNS for every cell that was both predicted and measured."""
    numbers, interval = summary(timing["step_time"].where(timing["status"] == OK)), step_interval(timing)
    again = repeatability(timing)
    told = {
        "predicted_s": timing["predicted_step_time"],
        "measured_s": numbers["median"],
        "low_s": interval["low"],
        "high_s": interval["high"],
        "error": prediction_error(timing),
        "forecast_error": again["forecast_error"],
        "between_rounds": again["between_rounds"],
        "repetitions": numbers["count"],
        "noisy": numbers["noisy"],
        "copied": copied(timing),
    }
    table = xr.Dataset(told).to_dataframe(dim_order=list(INDEX)).dropna(subset=["error"]).reset_index()
    return table[list(CELL_COLUMNS)]


def kinds_table(timing: xr.Dataset) -> pd.DataFrame:
    """One row with KIND_COLUMNS for every cell whose instructions were predicted and every kind, `spread` last."""
    times = kind_times(timing)
    errors = kind_errors(timing, times)
    times = times.reindex(kind=errors["kind"])
    predicted, measured = times["predicted_time"], times["measured_time"]
    told = {
        "predicted_s": predicted,
        "measured_s": measured,
        "error": (predicted / measured - 1).where(measured > 0),
        "error_of_step": errors,
    }
    table = xr.Dataset(told).to_dataframe(dim_order=[*INDEX, "kind"]).dropna(subset=["error_of_step"]).reset_index()
    return table[list(KIND_COLUMNS)]


def instructions_table(timing: xr.Dataset) -> pd.DataFrame:
    """One row with INSTRUCTION_COLUMNS for every instruction of those cells and every device that takes part in it."""
    told = has_instructions(timing).values
    frames = [_instructions_of(timing, tuple(place)) for place in np.argwhere(told)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(INSTRUCTION_COLUMNS))


def _instructions_of(timing: xr.Dataset, place: tuple[int, ...]) -> pd.DataFrame:
    columns = {"instruction_name": "name"} | _ENDS
    cell = timing.isel(dict(zip(INDEX, place, strict=True)))
    kinds = kinds_of(cell["instruction_kind"].values, cell["instruction_phase"].values)
    labels = {rank: label or unnamed(rank) for rank, label in enumerate(selection.rank_labels(cell))}
    cell = cell[list(columns)].assign(kind=("instruction", kinds))
    frame = cell.to_dataframe(dim_order=["instruction", "device"]).reset_index().rename(columns=columns)
    frame["device_label"] = frame["device"].map(labels)
    return frame.dropna(subset=list(_ENDS.values()), how="all")[list(INSTRUCTION_COLUMNS)]


def strategies_table(timing: xr.Dataset) -> pd.DataFrame:
    """A row per strategy, the last for all: how many `cells`, and how far their predicted steps and kinds are off.

    `median` and `p95` are of the absolute error of the step, `signed` is its median with its sign; `forecast_median`
    and `forecast_p95` are of the error of a forecast by the cell's other rounds, of the `forecasts` cells that have
    some. Of each kind there is the median signed error over the measured step, `KIND_error`, and what part of all that
    is off lies in it, `KIND_part`; NaN where no instruction was predicted. In the last row a cell that was timed for
    two strategies counts once.
    """
    error, errors, again = prediction_error(timing), kind_errors(timing), repeatability(timing)["forecast_error"]
    once = ~copied(timing)
    rows = []
    for name in [*selection.strategies(timing), ALL]:
        counted = once if name == ALL else timing["strategy"] == name
        found, forecast = (some.where(counted).values for some in (error, again.where(error.notnull())))
        found, forecast = found[np.isfinite(found)], forecast[np.isfinite(forecast)]
        if not found.size:
            continue
        some = errors.where(counted)
        each, part = some.median(list(INDEX)), parts(some)
        row: dict[str, Any] = {
            "strategy": name,
            "cells": found.size,
            "median": np.median(abs(found)),
            "p95": np.quantile(abs(found), 0.95),
            "signed": np.median(found),
            "forecasts": forecast.size,
            "forecast_median": np.median(forecast) if forecast.size else np.nan,
            "forecast_p95": np.quantile(forecast, 0.95) if forecast.size else np.nan,
        }
        for kind in (*KINDS, SPREAD):
            row |= {f"{kind}_error": each.sel(kind=kind).item(), f"{kind}_part": part.sel(kind=kind).item()}
        rows.append(row)
    return pd.DataFrame(rows)


def far_off_table(timing: xr.Dataset) -> pd.DataFrame:
    """One row with the fields of FarOff for every cell whose prediction is far off, the largest error first."""
    return pd.DataFrame(far_off(timing), columns=list(FarOff._fields))


def write_predictions(timing: xr.Dataset, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the tables to `folder`, as CSV and as parts of the report.

    They are predictions.csv, predictions_far_off.csv, predicted_kinds.csv, predicted_instructions.csv,
    prediction_table.rst and predicted_instructions_table.rst.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cells, strategies, furthest = cells_table(timing), strategies_table(timing), far_off_table(timing)
    tables = {
        "predictions": cells,
        "predictions_far_off": furthest,
        "predicted_kinds": kinds_table(timing),
        "predicted_instructions": instructions_table(timing),
    }
    written = [folder / f"{name}.csv" for name in tables]
    for path, table in zip(written, tables.values(), strict=True):
        table.to_csv(path, index=False, float_format="%.6g")
    of_report = {
        "prediction_table": _far_off_part(furthest),
        "predicted_instructions_table": _strategies_part(cells, strategies),
    }
    parts_of_report = [folder / f"{name}.rst" for name in of_report]
    for path, text in zip(parts_of_report, of_report.values(), strict=True):
        path.write_text(text, encoding="utf-8")
    return [*written, *parts_of_report]


def _far_off_part(furthest: pd.DataFrame) -> str:
    if furthest.empty:
        return f"No prediction is off by more than {FAR:.0%}.\n"
    return (
        f".. raw:: html\n\n   <style>{_LOOK}</style>{_element(furthest.head(MOST), _FAR_OFF_SHOWN)}\n\n"
        f".. container:: caption\n\n   {_FAR_OFF_NOTE}\n\n"
        ".. container:: data\n\n   All of them, beside this report: `a row per cell "
        "<figures/predictions_far_off.csv>`__.\n"
    )


def _strategies_part(cells: pd.DataFrame, strategies: pd.DataFrame) -> str:
    if cells.empty:
        return "No cell was both measured and predicted.\n"
    folded = f"<details><summary>All {len(cells)} cells</summary>{_element(cells, _CELL_SHOWN)}</details>"
    return (
        f".. raw:: html\n\n   <style>{_LOOK}</style>{_element(strategies, _STRATEGY_SHOWN)}\n\n"
        f".. container:: caption\n\n   {_NOTE}\n\n.. raw:: html\n\n   {folded}\n\n"
        ".. container:: data\n\n   The same as tables, beside this report: `a row per cell "
        "<figures/predictions.csv>`__, `per cell and kind <figures/predicted_kinds.csv>`__ and `per instruction and "
        "device <figures/predicted_instructions.csv>`__.\n"
    )


def _element(table: pd.DataFrame, shown: Mapping[str, Callable[[Row], str]]) -> str:
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in shown)
    rows = ("".join(f"<td>{show(row)}</td>" for show in shown.values()) for row in table.to_dict("records"))
    body = "\n   ".join(f"<tr>{row}</tr>" for row in rows)  # reStructuredText refuses long lines
    return f'<table class="predictions"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _kind_shown(kind: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        if np.isnan(row[f"{kind}_error"]):
            return "<i>not predicted</i>" if kind == KINDS[0] else ""
        return f"{row[f'{kind}_error']:+.1%}<br><i>{row[f'{kind}_part']:.0%}</i>"

    return show


def _digits(seconds: float) -> str:
    return f"{seconds:#.3g}".rstrip(".")


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: html.escape(str(row[name]))


def _forecast(row: Row, name: str) -> str:
    return f"{row[name]:.1%}" if row["forecasts"] else "<i>one round</i>"


_STRATEGY_SHOWN: Mapping[str, Callable[[Row], str]] = {
    "strategy": _text("strategy"),
    "cells": lambda row: str(row["cells"]),
    "step off by, median": lambda row: f"{row['median']:.1%}",
    "at the 95th percentile": lambda row: f"{row['p95']:.1%}",
    "with its sign": lambda row: f"{row['signed']:+.1%}",
    "forecast by the other rounds, median": lambda row: _forecast(row, "forecast_median"),
    "and at the 95th percentile": lambda row: _forecast(row, "forecast_p95"),
    **{kind: _kind_shown(kind) for kind in (*KINDS, SPREAD)},
}
_CELL_SHOWN: Mapping[str, Callable[[Row], str]] = {
    **{name.replace("_", " "): _text(name) for name in INDEX},
    "predicted / s": lambda row: _digits(row["predicted_s"]),
    "measured / s, 95 % interval": lambda row: (
        f"{_digits(row['measured_s'])} ({_digits(row['low_s'])} to {_digits(row['high_s'])})"
        f"{flags(row['noisy'], row['repetitions'])}"
    ),
    "error": lambda row: f"{row['error']:+.1%}",
}
_FAR_OFF_SHOWN: Mapping[str, Callable[[Row], str]] = {
    **{name.replace("_", " "): _text(name) for name in INDEX},
    "predicted / s": lambda row: _digits(row["predicted_s"]),
    "measured / s": lambda row: _digits(row["measured_s"]),
    "error": lambda row: f"{row['error']:+.1%}",
    "between its rounds": lambda row: (
        "<i>one round</i>" if np.isnan(row["between_rounds"]) else f"{row['between_rounds']:.1%}"
    ),
    "why": _text("why"),
}
_FAR_OFF_NOTE = (
    f"Cells whose prediction is off by more than {FAR:.0%}, the largest error first, {MOST} at most; a cell that was "
    "timed once for two strategies stands here once, and @ is an emulated device. Between its rounds: the highest less "
    "the lowest median step of a round, over the median of the cell. Why: where the rounds differ by less than the "
    "error, what errs most in its direction on the slowest device, which waits least, in the one step whose "
    "instructions were kept."
)
_NOTE = (
    "Forecast by the other rounds: each round of a cell told by the median of the others, in cells of several; a round "
    "has fewer steps than the cell that a prediction is held against, which may thus be off by less. In the row of all "
    "a cell that was timed once for two strategies counts once. "
    "Of each kind the median of predicted less measured time over the measured step: below zero it took longer than "
    "predicted. In grey, what part of all that is off lies there, whichever its sign. Idle: no device is busy. Spread: "
    "by how much the one step whose instructions were kept differs from the median of its cell, which is no error of "
    "the prediction. That devices are late by chance is predicted as a part of exchanges and measured as computing, so "
    "one may seem too long by what the other seems too short. Of ``ddp`` only the step is predicted, as torch sums its "
    "gradients within the backward pass. Per cell: * where IQR / median exceeds "
    f"{NOISY:g}, n where of few repetitions; the interval draws whole rounds."
)
_LOOK = (
    "table.predictions{border-collapse:collapse;font-size:.75rem;line-height:1.3;margin:.5rem 0}"
    "table.predictions th{text-align:left;border-bottom:2px solid #1f2328;padding:.25rem .5rem;vertical-align:bottom}"
    "table.predictions td{border-bottom:1px solid #d5d9de;padding:.25rem .5rem;vertical-align:top;white-space:nowrap}"
    "table.predictions td:last-child{white-space:normal}"
    "table.predictions i{color:#5d656f;font-style:normal;font-size:.7rem}"
    ".prose details summary{cursor:pointer;font-size:.85rem;font-weight:600;margin:.5rem 0}"
)

"""The headline table: what the paper states beside what was measured here."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pipeline.analysis import paper, selection
from pipeline.analysis.statistics import speedup
from pipeline.analysis.style import is_emulated
from pipeline.results.contracts import OK

Row = Mapping[Any, Any]

NOT_MEASURED = "not measured here"

NUMBERS = ("speedup", "low", "high", "efficiency", "bound")
COLUMNS = (
    "claim", "paper", *NUMBERS, "strategy", "network", "batch_size", "device_set", "baseline_device", "emulated",
    "noisy", "hardware",
)  # fmt: skip
"""Columns of the headline table; `low` and `high` bound the 95 % interval of the speedup."""


def headline(timing: xr.Dataset) -> pd.DataFrame:
    """For each claim of the paper the best split measured here, then the literal strategy `paper`, then `ddp`.

    A cell matches when its set has as many equal devices of that kind. Of the measured networks the paper's own is
    taken, else the largest. Where nothing matches, the numbers are NaN and `strategy` is "not measured here".
    """
    ratios = speedup(timing)
    rows = [row for claim in paper.CLAIMS for row in _rows_of(claim, timing, ratios)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows_of(claim: paper.Claim, timing: xr.Dataset, ratios: xr.Dataset) -> list[dict[str, Any]]:
    name = f"{claim.device_count} {claim.device_kind.upper()}s"
    empty = dict.fromkeys(COLUMNS, "") | dict.fromkeys(NUMBERS, np.nan)
    empty |= {"claim": name, "paper": claim.speedup, "strategy": NOT_MEASURED}
    cells = _matching(claim, timing, ratios)
    if cells is None:
        return [empty]
    split = cells.drop_sel(strategy="ddp", errors="ignore")
    rows = [_row(empty, split, timing)] if split["speedup"].notnull().any() else []
    for strategy in ("paper", "ddp"):
        found = cells["speedup"].sel(strategy=cells["strategy"] == strategy).notnull().any()
        if found and all(row["strategy"] != strategy for row in rows):
            rows.append(_row(empty, cells.sel(strategy=[strategy]), timing))
    return rows


def _matching(claim: paper.Claim, timing: xr.Dataset, ratios: xr.Dataset) -> xr.Dataset | None:
    sets = []
    for device_set in selection.device_sets(timing):
        labels = selection.device_labels(timing, device_set)
        equal = len(set(labels)) == 1 and labels[0].startswith(claim.device_kind)
        if equal and len(labels) == claim.device_count:
            sets.append(device_set)
    cells = ratios.sel(device_set=sets).drop_sel(strategy="single", errors="ignore")
    measured = [n for n in selection.networks(timing) if cells["speedup"].sel(network=n).notnull().any()]
    if not measured:
        return None
    return cells.sel(network=[claim.network if claim.network in measured else measured[-1]])


def _row(empty: dict[str, Any], cells: xr.Dataset, timing: xr.Dataset) -> dict[str, Any]:
    values = cells["speedup"]
    best = np.unravel_index(int(np.nanargmax(values.values)), values.shape)
    cell = cells.isel(dict(zip(values.dims, best, strict=True)))
    return empty | {
        "speedup": cell["speedup"].item(),
        "low": cell["speedup_low"].item(),
        "high": cell["speedup_high"].item(),
        "efficiency": cell["efficiency"].item(),
        "bound": cell["aggregate_bound"].item(),
        "strategy": str(cell["strategy"].item()),
        "network": str(cell["network"].item()),
        "batch_size": int(cell["batch_size"].item()),
        "device_set": str(cell["device_set"].item()),
        "baseline_device": str(cell["baseline_device"].item()),
        "emulated": "emulated" if is_emulated([cell["device_set"].item()]) else "no",
        "noisy": "yes" if cell["noisy"].item() else "no",
        "hardware": str(timing.attrs.get("hardware", "")),
    }


def markdown(table: pd.DataFrame) -> str:
    """The table for a README or an issue."""
    rows = [list(_SHOWN), ["---"] * len(_SHOWN), *_texts(table)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def html_table(table: pd.DataFrame) -> str:
    """The table as one HTML element with its own look, to be placed in any page."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in _SHOWN)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in _texts(table))
    return f'<style>{_LOOK}</style><table class="headline"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def write_headline(timing: xr.Dataset, folder: str | os.PathLike[str]) -> list[Path]:
    """Write the headline table as `folder`/headline.html (a page), headline.csv, .md and .rst (a part)."""
    folder, table = Path(folder), headline(timing)
    folder.mkdir(parents=True, exist_ok=True)
    element, note = html_table(table), _note(timing)
    texts = {
        "headline.html": f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Headline</title>'
        f'<body class="headline-page">{element}<p>{html.escape(note)}</p></body></html>\n',
        "headline.csv": table.to_csv(index=False),
        "headline.md": markdown(table),
        "headline.rst": f".. raw:: html\n\n   {element}\n\n{note}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _note(timing: xr.Dataset) -> str:
    measured = int((timing["status"] == OK).sum())
    emulated = " Emulated devices run at the fraction of full speed after @." if timing.attrs.get("emulated") else ""
    return (
        f"Paper: {paper.SOURCE}, 500:1500 kernels, devices and batch size not known. Here: speedup over single on the "
        f"baseline device with its 95 % bootstrap interval (* where IQR / median exceeds 0.1), the best of {measured} "
        "measured cells; efficiency is the speedup over the aggregate bound, the sum of calibrated throughputs over "
        f"that of the baseline device. Data: {timing.attrs.get('data', 'not recorded')}.{emulated}"
    )


def _texts(table: pd.DataFrame) -> list[list[str]]:
    return [[show(row) for show in _SHOWN.values()] for row in table.to_dict("records")]


def _interval(row: Row) -> str:
    return "" if np.isnan(row["low"]) else f"{row['low']:.2f} to {row['high']:.2f}{' *' * (row['noisy'] == 'yes')}"


def _number(value: float, form: str, unit: str = "") -> str:
    return "" if np.isnan(value) else f"{value:{form}}{unit}"


_SHOWN: Mapping[str, Callable[[Row], str]] = {
    "devices": lambda row: str(row["claim"]),
    "paper": lambda row: _number(row["paper"], ".2f", "x"),
    "here": lambda row: _number(row["speedup"], ".2f", "x"),
    "95 % interval": _interval,
    "strategy": lambda row: str(row["strategy"]),
    "aggregate bound": lambda row: _number(row["bound"], ".2f"),
    "efficiency": lambda row: _number(row["efficiency"], ".0%"),
    "network": lambda row: str(row["network"]),
    "batch": lambda row: str(row["batch_size"]),
    "device set": lambda row: str(row["device_set"]),
    "baseline device": lambda row: str(row["baseline_device"]),
    "emulated": lambda row: str(row["emulated"]),
    "hardware": lambda row: str(row["hardware"]),
}

_LOOK = (
    ".headline-page{font-family:system-ui,sans-serif;margin:2rem;color:#1f2328;font-size:.85rem}"
    "table.headline{border-collapse:collapse;font-size:.72rem;line-height:1.3}"
    "table.headline th{text-align:left;border-bottom:2px solid #1f2328;padding:.3rem .45rem;vertical-align:bottom}"
    "table.headline td{border-bottom:1px solid #d5d9de;padding:.3rem .45rem;vertical-align:top}"
    "table.headline td:nth-child(2),table.headline td:nth-child(3){font-weight:700;white-space:nowrap}"
)

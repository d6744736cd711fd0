"""The headline table: what the paper states beside what was measured here."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pipeline.analysis import paper, selection
from pipeline.analysis.statistics import speedup
from pipeline.analysis.style import is_emulated
from pipeline.results.contracts import OK

NOT_MEASURED = "not measured here"

COLUMNS = {
    "claim": "devices",
    "paper": "paper",
    "speedup": "here",
    "low": "from",
    "high": "to",
    "efficiency": "efficiency",
    "bound": "aggregate bound",
    "strategy": "strategy",
    "network": "network",
    "batch_size": "batch",
    "device_set": "device set",
    "baseline_device": "baseline device",
    "emulated": "emulated",
    "noisy": "noisy",
    "hardware": "hardware",
}
"""Columns of the headline table and their headings; `from` and `to` bound the 95 % interval of the speedup."""


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
    empty = dict.fromkeys(COLUMNS, "") | dict.fromkeys(("speedup", "low", "high", "efficiency", "bound"), np.nan)
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
    rows = [list(COLUMNS.values()), ["---"] * len(COLUMNS), *_texts(table)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def html_table(table: pd.DataFrame) -> str:
    """The table as one HTML element with its own look, to be placed in any page."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in COLUMNS.values())
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
        f"baseline device with its 95 % bootstrap interval, the best of {measured} measured cells; efficiency is the "
        f"speedup over the aggregate bound, the sum of calibrated throughputs over the baseline device's. Data: "
        f"{timing.attrs.get('data', 'not recorded')}.{emulated}"
    )


def _texts(table: pd.DataFrame) -> list[list[str]]:
    return [[_text(name, row[name]) for name in COLUMNS] for row in table.to_dict("records")]


def _text(name: str, value: Any) -> str:
    if isinstance(value, float):
        shown = "" if np.isnan(value) else f"{value:.0%}" if name == "efficiency" else f"{value:.2f}"
        return shown + ("x" if shown and name in ("paper", "speedup") else "")
    return str(value)


_LOOK = (
    ".headline-page{font-family:system-ui,sans-serif;margin:2rem;color:#1f2328;font-size:.85rem}"
    "table.headline{border-collapse:collapse;font-size:.8rem;line-height:1.3}"
    "table.headline th{text-align:left;border-bottom:2px solid #1f2328;padding:.35rem .6rem;vertical-align:bottom}"
    "table.headline td{border-bottom:1px solid #d5d9de;padding:.35rem .6rem;vertical-align:top}"
    "table.headline td:nth-child(2),table.headline td:nth-child(3){font-weight:700;white-space:nowrap}"
)

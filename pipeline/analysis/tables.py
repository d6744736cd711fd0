"""The headline table: what the paper states beside what was measured and simulated here."""

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
from pipeline.analysis.statistics import flags, simulated_speedup, speedup
from pipeline.analysis.style import described, is_emulated
from pipeline.links import LOOPBACK
from pipeline.results.contracts import NOISY, OK

Row = Mapping[Any, Any]

NOT_MEASURED = "not measured here"

NUMBERS = ("speedup", "low", "high", "simulated", "efficiency", "bound")
COLUMNS = (
    "claim", "paper", *NUMBERS, "strategy", "network", "batch_size", "device_set", "baseline_device", "emulated",
    "noisy", "repetitions", "hardware",
)  # fmt: skip
"""Columns of the headline table; `low` and `high` bound the 95 % interval of the speedup, `simulated` is the speedup
of the same cell as simulated, NaN where it was not."""

_LITERAL = ("paper", "ddp")
"""What stands in rows of its own below the best split."""


def headline(timing: xr.Dataset, simulation: xr.Dataset | None = None) -> pd.DataFrame:
    """For each claim of the paper the best split here, then the literal strategy `paper`, then `ddp`.

    A cell matches when its set has as many equal devices of that kind. Of the measured networks the paper's own is
    taken, else the largest. Where nothing that matches was measured, a matching simulated set stands instead, its
    measured numbers NaN; where nothing was simulated either, `strategy` is "not measured here".
    """
    ratios = speedup(timing)
    rows = [row for claim in paper.CLAIMS for row in _rows_of(claim, timing, simulation, ratios)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows_of(
    claim: paper.Claim, timing: xr.Dataset, simulation: xr.Dataset | None, ratios: xr.Dataset
) -> list[dict[str, Any]]:
    empty: dict[str, Any] = dict.fromkeys(COLUMNS, "") | dict.fromkeys(NUMBERS, np.nan)
    empty |= {"claim": f"{claim.device_count} {claim.device_kind.upper()}s", "paper": claim.speedup}
    measured = _matching(claim, timing, ratios["speedup"])
    if measured is not None:
        cells = ratios.sel(device_set=measured["device_set"], network=measured["network"])
        found = [cells.sel(place) for place in _best(measured)]
        return [empty | _measured(cell, timing) | {"simulated": _simulated(cell, simulation)} for cell in found]
    if simulation is not None:
        # An emulated link is another question: what the paper's devices were joined by is not known.
        real = simulation.sel(link=[link for link in simulation["link"].values if link == LOOPBACK] or [])
        over = _matching(claim, real, simulated_speedup(real)) if real["link"].size else None
        if over is not None:
            return [empty | _where(over.sel(place)) | {"simulated": over.sel(place).item()} for place in _best(over)]
    return [empty | {"strategy": NOT_MEASURED}]


def _matching(claim: paper.Claim, grid: xr.Dataset, ratios: xr.DataArray) -> xr.DataArray | None:
    sets = []
    for device_set in selection.device_sets(grid):
        labels = selection.device_labels(grid, device_set)
        equal = len(set(labels)) == 1 and labels[0].startswith(claim.device_kind)
        if equal and len(labels) == claim.device_count:
            sets.append(device_set)
    cells = ratios.sel(device_set=sets).drop_sel(strategy=["single", "auto"], errors="ignore")
    known = [n for n in selection.networks(grid) if cells.sel(network=n).notnull().any()]
    return cells.sel(network=[claim.network if claim.network in known else known[-1]]) if known else None


def _best(ratios: xr.DataArray) -> list[dict[str, Any]]:
    """Where the best exact split is, then the best of each strategy that has a row of its own."""
    groups = [[s for s in map(str, ratios["strategy"].values) if s != "ddp"], *([s] for s in _LITERAL)]
    places: list[dict[str, Any]] = []
    for group in groups:
        some = ratios.sel(strategy=[s for s in group if s in ratios["strategy"].values])
        if not some.notnull().any():
            continue
        best = np.unravel_index(int(np.nanargmax(some.values)), some.shape)
        place = {str(dim): some[dim].values[at] for dim, at in zip(some.dims, best, strict=True)}
        if all(place["strategy"] != other["strategy"] for other in places):
            places.append(place)
    return places


def _where(cell: xr.DataArray | xr.Dataset) -> dict[str, Any]:
    device_set = str(cell["device_set"].item())
    return {
        "strategy": str(cell["strategy"].item()),
        "network": str(cell["network"].item()),
        "batch_size": int(cell["batch_size"].item()),
        "device_set": device_set,
        "baseline_device": device_set.rpartition(" x ")[2],
        "emulated": "emulated" if is_emulated([device_set]) else "no",
    }


def _measured(cell: xr.Dataset, timing: xr.Dataset) -> dict[str, Any]:
    return {
        **_where(cell),
        "speedup": cell["speedup"].item(),
        "low": cell["speedup_low"].item(),
        "high": cell["speedup_high"].item(),
        "efficiency": cell["efficiency"].item(),
        "bound": cell["aggregate_bound"].item(),
        "baseline_device": str(cell["baseline_device"].item()),
        "noisy": "yes" if cell["noisy"].item() else "no",
        "repetitions": int(cell["repetitions"].item()),
        "hardware": str(timing.attrs.get("hardware", "")),
    }


def _simulated(cell: xr.Dataset, simulation: xr.Dataset | None) -> float:
    """The simulated speedup of a measured cell, NaN where it was not simulated."""
    place = {dim: cell[dim].item() for dim in ("network", "batch_size", "device_set", "link", "strategy")}
    if simulation is None or any(value not in simulation[dim].values for dim, value in place.items()):
        return float("nan")
    return float(simulated_speedup(simulation).sel(place).item())


def markdown(table: pd.DataFrame) -> str:
    """The table for a README or an issue."""
    rows = [list(_SHOWN), ["---"] * len(_SHOWN), *_texts(table)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def html_table(table: pd.DataFrame) -> str:
    """The table as one HTML element with its own look, to be placed in any page."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in _SHOWN)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in _texts(table))
    return f'<style>{_LOOK}</style><table class="headline"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def write_headline(
    timing: xr.Dataset, folder: str | os.PathLike[str], *, simulation: xr.Dataset | None = None
) -> list[Path]:
    """Write the headline table as `folder`/headline.html (a page), headline.csv, .md and .rst (a part)."""
    folder, table = Path(folder), headline(timing, simulation)
    folder.mkdir(parents=True, exist_ok=True)
    element, note = html_table(table), _note(timing, simulation)
    texts = {
        "headline.html": f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Headline</title>'
        f'<body class="headline-page">{element}<p>{html.escape(note)}</p></body></html>\n',
        "headline.csv": table.to_csv(index=False),
        "headline.md": f"{markdown(table)}\n{note}\n",
        "headline.rst": f".. raw:: html\n\n   {element}\n\n.. container:: caption\n\n   {note}\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _note(timing: xr.Dataset, simulation: xr.Dataset | None) -> str:
    measured = int((timing["status"] == OK).sum())
    networks = " and ".join(dict.fromkeys(claim.network for claim in paper.CLAIMS))
    given = {} if simulation is None else described(simulation)
    kinds = {claim.device_kind: given[claim.device_kind] for claim in paper.CLAIMS if claim.device_kind in given}
    assumed = "".join(f" A simulated {kind} is assumed to reach {speed:,.0f} GFLOP/s." for kind, speed in kinds.items())
    emulated = " Emulated devices run at the fraction of full speed after @." if timing.attrs.get("emulated") else ""
    return (
        f"Paper: {paper.SOURCE}, {networks} kernels; its devices and batch sizes are not known. Measured here: speedup "
        f"of the best of {measured} cells over single on the baseline device, with 95 % bootstrap interval (* where "
        f"IQR / median exceeds {NOISY:g}), on {timing.attrs.get('hardware', 'hardware not recorded')}, data "
        f"{timing.attrs.get('data', 'not recorded')}. Efficiency: the measured speedup over the aggregate calibrated "
        f"throughput of the devices, in units of the baseline device.{emulated}{assumed}"
    )


def _texts(table: pd.DataFrame) -> list[list[str]]:
    return [[show(row) for show in _SHOWN.values()] for row in table.to_dict("records")]


def _here(row: Row) -> str:
    if np.isnan(row["speedup"]):
        return NOT_MEASURED
    marks = flags(row["noisy"] == "yes", row["repetitions"])
    return f"{row['speedup']:.2f}x ({row['low']:.2f} to {row['high']:.2f}){marks}"


def _efficiency(row: Row) -> str:
    return "" if np.isnan(row["efficiency"]) else f"{row['efficiency']:.0%} of {row['bound']:.2f}"


def _strategy(row: Row) -> str:
    name = str(row["strategy"])
    if name == NOT_MEASURED:
        return ""
    return f"{name} (literal method)" if name == "paper" else name


def _devices(row: Row) -> str:
    return str(row["device_set"]) + (" (emulated)" if row["emulated"] == "emulated" else "")


_SHOWN: Mapping[str, Callable[[Row], str]] = {
    "devices": lambda row: str(row["claim"]),
    "paper": lambda row: f"{row['paper']:.2f}x",
    "measured here": _here,
    "simulated": lambda row: "" if np.isnan(row["simulated"]) else f"{row['simulated']:.2f}x",
    "efficiency against aggregate throughput": _efficiency,
    "strategy": _strategy,
    "network, batch": lambda row: ", ".join(str(row[name]) for name in ("network", "batch_size") if row[name]),
    "device set": _devices,
    "baseline device": lambda row: str(row["baseline_device"]),
}

_LOOK = (
    ".headline-page{font-family:system-ui,sans-serif;margin:2rem;color:#1f2328;font-size:.85rem}"
    "table.headline{border-collapse:collapse;font-size:.8rem;line-height:1.35}"
    "table.headline th{text-align:left;border-bottom:2px solid #1f2328;padding:.3rem .55rem;vertical-align:bottom}"
    "table.headline td{border-bottom:1px solid #d5d9de;padding:.3rem .55rem;vertical-align:top}"
    "table.headline td:nth-child(-n+4){font-weight:700}"
    "table.headline td:nth-child(2){white-space:nowrap}"
)

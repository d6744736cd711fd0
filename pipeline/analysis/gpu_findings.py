"""What the figure of GPUs shows, in sentences whose every number is read from the stores (reStructuredText)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis import paper, selection
from pipeline.analysis.gpu_figure import NOTHING, counted_gpus, gain_beside, measured_gpus
from pipeline.analysis.statistics import PAYS, best_split
from pipeline.analysis.wording import assumed, listed, named


def gpu_finding(simulation: xr.Dataset, timing: xr.Dataset) -> str:
    """Speedup over the number of GPUs beside the paper's, measured or not, and up to which GPU a CPU beside it pays."""
    counted, gain = counted_gpus(simulation), gain_beside(simulation)
    sentences = []
    if counted is not None:
        sentences += [_counted(counted.sel(batch_size=one), simulation) for one in _ends(counted["batch_size"].values)]
    sentences += _measured(timing)
    if gain is not None:
        sentences += [_beside(gain.sel(batch_size=one)) for one in _ends(gain["batch_size"].values)]
    return listed(sentences, NOTHING) if counted is not None or gain is not None else f"{NOTHING}\n"


def _ends(values: np.ndarray) -> list[int]:
    return list(dict.fromkeys([int(values[0]), int(values[-1])]))


def _counted(ratios: xr.DataArray, simulation: xr.Dataset) -> str:
    network, label = ratios.attrs["network"], ratios.attrs["label"]
    claims = {one.device_count: one for one in paper.CLAIMS if one.device_kind == "gpu" and one.network == network}
    best, told = best_split(ratios), []
    for count in map(int, ratios["count"].values):
        here = best.sel(count=count)
        if count == 1 or not here.notnull():
            continue
        own = ratios.sel(count=count)
        literal = f", ``paper`` {own.sel(strategy='paper').item():.2f}" if "paper" in own["strategy"].values else ""
        beside = f"; the paper measured {claims[count].speedup:.2f}" if count in claims else ""
        told.append(f"{here.item():.2f} on {count} (best exact split{literal}{beside})")
    return (
        f"Simulated, {network}, batch {ratios['batch_size'].item()}, {ratios.attrs['link']}, over one "
        f"{assumed(simulation, label, label)}: speedup {', '.join(told)}."
    )


def _measured(timing: xr.Dataset) -> list[str]:
    found = measured_gpus(timing)
    if found is None:
        return ["No GPU was measured: ``gpu.yaml`` measures on a machine that has one."]
    split = found["speedup"].drop_sel(strategy=["single", "ddp"], errors="ignore")
    sentences = []
    for device_set in map(str, found["device_set"].values):
        for network in selection.networks(timing, [device_set]):
            cells = split.sel(device_set=device_set, network=network)
            if cells.notnull().any():
                at = dict(zip(cells.dims, np.unravel_index(np.nanargmax(cells.values), cells.shape), strict=True))
                best = found.sel(device_set=device_set, network=network, strategy=split["strategy"]).isel(at)
                sentences.append(
                    f"Measured, {network}, batch {best['batch_size'].item()}, on {named(device_set)}: "
                    f"``{best['strategy'].item()}`` is {best['speedup'].item():.2f} times as fast as one GPU (95 % "
                    f"interval {best['speedup_low'].item():.2f} to {best['speedup_high'].item():.2f})."
                )
    return sentences or ["No split over several GPUs was measured."]


def _beside(gain: xr.Dataset) -> str:
    """Up to which ratio of speeds CPUs beside a GPU pay, and from which on they no longer do."""
    told = []
    for number in map(int, gain["cpus"].values):
        one = gain.sel(cpus=number)
        known = np.isfinite(one["gain"].values)
        ratios, gained = one["ratio"].values[known], one["gain"].values[known]
        if not known.any():
            continue
        beside = f"{number} ``{gain.attrs['cpu']}`` {'gains' if number == 1 else 'gain'}"
        pays = np.flatnonzero(gained >= PAYS)
        if not pays.size:
            told.append(f"{beside} nothing from {ratios[0]:.3g} times its speed on")
            continue
        last = int(pays[-1])
        no_longer = f" and nothing from {ratios[last + 1]:.3g} times on" if last + 1 < len(ratios) else ""
        told.append(f"{beside} {gained[last] - 1:.1%} at {ratios[last]:.3g} times its speed{no_longer}")
    return (
        f"Simulated, {gain.attrs['network']}, batch {gain['batch_size'].item()}, {gain.attrs['link']}, beside one "
        f"GPU that is so many times as fast as one ``{gain.attrs['cpu']}``: {'; '.join(told)}."
    )

"""What the figures of the simulated grid show, in sentences whose every number is read from the stores."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr

from pipeline.analysis import selection
from pipeline.analysis.simulation_figures import LINKS_MAPPED, NOTHING, break_even, measured_best, measured_scaling
from pipeline.analysis.statistics import PAYS, SATURATED, device_count, saturation, simulated_speedup, speedup
from pipeline.analysis.wording import assumed, listed, named
from pipeline.links import LOOPBACK


def scaling_finding(simulation: xr.Dataset, timing: xr.Dataset) -> str:
    """Where every strategy saturates over each shown link, and the largest measured set beside its simulation."""
    place = selection.scaling(simulation, timing)
    if place is None:
        return f"{NOTHING}\n"
    label, cell = str(place["label"]), {name: place[name] for name in ("network", "batch_size")}
    sets, sentences = selection.families(simulation)[label], []
    ratios = simulated_speedup(simulation).sel(cell).sel(device_set=sets)
    counts = device_count(simulation).sel(device_set=sets).values
    what = f"{cell['network']}, batch {cell['batch_size']}"
    shown, main = selection.shown_links(simulation, timing), selection.main_link(timing)
    for link in sorted(shown, key=lambda one: one != main):
        told = []
        for strategy in selection.strategies(simulation):
            values = ratios.sel(link=link, strategy=strategy).values
            known = np.isfinite(values)
            if strategy != "single" and known.any():
                told.append(f"``{strategy}`` {_saturates(counts[known], values[known])}")
        if told:
            devices = f"{counts.max():,} {assumed(simulation, label, label)}"
            sentences.append(f"Simulated on up to {devices}, {link}: {', '.join(told)}; {what}.")
    sentences += _scaling_measured(ratios, timing, place)
    if sentences:
        passed = f"{SATURATED - 1:.0%}"
        sentences.append(f"A strategy saturates at the first number of devices that no larger one passes by {passed}.")
    return listed(sentences, NOTHING)


def _saturates(counts: npt.NDArray[np.int_], ratios: npt.NDArray[np.float64]) -> str:
    place = saturation(counts, ratios)
    if place is None:
        rises = "still gains at" if len(counts) > 1 else "on"
        return f"{rises} {counts[-1]:,} devices (speedup {ratios[-1]:.3g})"
    if ratios[place] < PAYS:
        return "never gains"
    return f"saturates at {counts[place]:,} devices (speedup {ratios[place]:.3g})"


def _scaling_measured(ratios: xr.DataArray, timing: xr.Dataset, place: dict[str, str | int]) -> list[str]:
    """Over each link a sentence on the largest set that was both measured and simulated, where there is one."""
    measured = measured_scaling(timing, place)
    if measured is None:
        return []
    sets = [str(s) for s in measured["device_set"].values if s in ratios["device_set"].values]
    sentences = []
    for link in map(str, measured["link"].values):
        if not sets or link not in ratios["link"].values:
            continue
        cells = {"device_set": sets[-1], "link": link}
        real, simulated = measured["speedup"].sel(cells), ratios.sel(cells)
        both = [
            f"``{name}`` {real.sel(strategy=name).item():.2f} ({simulated.sel(strategy=name).item():.2f})"
            for name in selection.strategies(timing)
            if name != "single" and name in simulated["strategy"].values and real.sel(strategy=name).notnull()
        ]
        if both:
            sentences.append(f"Measured on {named(sets[-1])}, {link}, and in brackets simulated: {', '.join(both)}.")
    return sentences


def links_finding(simulation: xr.Dataset, timing: xr.Dataset) -> str:
    """Over how many simulated links each strategy is faster than one device, by kind of device."""
    sentences = []
    for place in selection.linked(simulation, timing):
        links = [link for link in selection.links(simulation) if link != LOOPBACK]
        cell = {name: place[name] for name in ("network", "batch_size", "device_set")}
        ratios = simulated_speedup(simulation).sel(cell).sel(link=links)
        told = [
            f"``{s}`` {_pays_over(ratios.sel(strategy=s))}"
            for s in selection.strategies(simulation)
            if s not in ("single", "auto") and ratios.sel(strategy=s).notnull().any()
        ]
        if told:
            devices = assumed(simulation, str(place["label"]), str(place["device_set"]))
            sentences.append(
                f"Simulated over {len(links)} links, {devices} are faster than one device with {', '.join(told)}: "
                f"{place['network']}, batch {place['batch_size']}."
            )
        sentences += _links_measured(simulation, timing, cell)
    return listed(sentences, NOTHING)


def _pays_over(ratios: xr.DataArray) -> str:
    pays = ratios.values >= PAYS
    if not pays.any():
        return f"over none (speedup at most {np.nanmax(ratios.values):.2f})"
    first = int(np.argmax(pays))
    slowest = f"{ratios['link'].values[first]} (speedup {ratios.values[first]:.2f})"
    return f"over {int(pays.sum())}, the slowest {slowest}"


def _links_measured(simulation: xr.Dataset, timing: xr.Dataset, cell: dict[str, str | int]) -> list[str]:
    """Over each emulated link that was measured a sentence that sets it beside its simulation."""
    if any(value not in timing[name].values for name, value in cell.items()):
        return []
    real, simulated = speedup(timing)["speedup"].sel(cell), simulated_speedup(simulation).sel(cell)
    sentences = []
    for link in map(str, timing["link"].values):
        both = [
            f"``{name}`` {real.sel(link=link, strategy=name).item():.2f} "
            f"({simulated.sel(link=link, strategy=name).item():.2f})"
            for name in selection.strategies(timing)
            if name != "single"
            and link in simulated["link"].values
            and name in simulated["strategy"].values
            and real.sel(link=link, strategy=name).notnull()
        ]
        if both and link != LOOPBACK:
            sentences.append(
                f"Measured on {named(str(cell['device_set']))}, {link}, and in brackets simulated: {', '.join(both)}."
            )
    return sentences


def break_even_finding(simulation: xr.Dataset, timing: xr.Dataset) -> str:
    """Over which of the mapped links, and from which batch size on, the best exact split beats one device."""
    sentences, links = [], selection.shown_links(simulation, timing, LINKS_MAPPED)
    for label, device_set in selection.small_sets(simulation, timing).items():
        told, always = [], []
        for link in links:
            cells = break_even(simulation, device_set, link)
            known = cells.values[np.isfinite(cells.values)]
            if known.size and (known >= PAYS).all():
                always.append((link, known))
            elif known.size:
                told.append(f"over {link} {_starts_to_pay(cells, known)}")
        if always:
            every = np.concatenate([known for _, known in always])
            where = ", ".join(link for link, _ in always)
            told.insert(0, f"over {where} in all cells (speedup {every.min():.2f} to {every.max():.2f})")
        if told:
            devices = assumed(simulation, label, device_set)
            sentences.append(f"Simulated on {devices}, the best exact split pays {'; '.join(told)}.")
        sentences += _break_even_measured(simulation, timing, device_set, links)
    return listed(sentences, NOTHING)


def _starts_to_pay(cells: xr.DataArray, known: npt.NDArray[np.float64]) -> str:
    if not (known >= PAYS).any():
        return f"in none of {known.size} cells (speedup at most {known.max():.2f})"
    starts = []
    for network in map(str, cells["network"].values):
        line = cells.sel(network=network)
        if line.notnull().any():
            pays = line["batch_size"].values[line.values >= PAYS]
            first = f"from batch {pays[0]} on ({line.sel(batch_size=pays[0]).item():.2f})" if pays.size else "never"
            starts.append(f"{network} {first}")
    return f"in {int((known >= PAYS).sum())} of {known.size} cells ({', '.join(starts)})"


def _break_even_measured(simulation: xr.Dataset, timing: xr.Dataset, device_set: str, links: list[str]) -> list[str]:
    """One sentence on the cells of the map that were measured, where there are such."""
    measured = []
    for link in links:
        found = measured_best(timing, break_even(simulation, device_set, link), device_set, link)
        measured += [] if found is None else [value for value in found.values.ravel() if np.isfinite(value)]
    if not measured:
        return []
    pays = sum(value >= PAYS for value in measured)
    range_of = f"speedup {min(measured):.2f} to {max(measured):.2f}"
    return [f"Measured on {named(device_set)}, it pays in {pays} of {len(measured)} such cells ({range_of})."]

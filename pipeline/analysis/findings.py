"""What each figure shows, in sentences whose every number is read from the stores (reStructuredText)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr

from pipeline.analysis import paper, selection
from pipeline.analysis.calibration_figure import largest, with_most_images
from pipeline.analysis.simulation_figures import NOTHING, break_even, measured_best, measured_scaling
from pipeline.analysis.statistics import (
    PAYS,
    baseline,
    convolution_share,
    device_count,
    prediction_error,
    saturation,
    simulated_speedup,
    speedup,
    summary,
)
from pipeline.analysis.style import described, is_emulated
from pipeline.analysis.waterfall_figure import change, waterfall
from pipeline.links import LOOPBACK
from pipeline.results.contracts import NOT_PLANNED, OK


def speedup_finding(timing: xr.Dataset) -> str:
    """The best split of every network on the largest set of each kind of device, beside its bound."""
    ratios, link, sentences = speedup(timing), selection.main_link(timing), []
    for label, sets in selection.families(timing).items():
        for network in selection.networks(timing, sets):
            batch_size = selection.main_batch_size(timing, network, link, sets)
            cells = ratios.sel(network=network, batch_size=batch_size, link=link, device_set=sets)
            splits = cells.drop_sel(strategy=["single", "ddp"], errors="ignore")
            measured = [s for s in sets if splits["speedup"].sel(device_set=s).notnull().any()]
            if not measured:
                continue
            cell, split = cells.sel(device_set=measured[-1]), splits.sel(device_set=measured[-1])
            best = split.isel(strategy=int(np.nanargmax(split["speedup"].values)))
            bound = (
                f", {best['efficiency'].item():.0%} of the aggregate throughput of {best['aggregate_bound'].item():.2f}"
            )
            sentences.append(
                f"{network}, batch {batch_size}, on {_named(measured[-1])}: ``{best['strategy'].item()}`` is "
                f"{best['speedup'].item():.2f} times as fast as one ``{label}`` (95 % interval "
                f"{best['speedup_low'].item():.2f} to {best['speedup_high'].item():.2f})"
                f"{bound if best['efficiency'].notnull() else ''}{_others(cell, str(best['strategy'].item()))}."
            )
    return _listed(sentences, "No set of several equal devices was measured.")


def _others(cell: xr.Dataset, best: str) -> str:
    reached = cell["speedup"].where(cell["strategy"].isin(["paper", "ddp"]), drop=True).dropna("strategy")
    named = {"paper": "the paper's literal method", "ddp": "``ddp``"}
    others = [f"{named[str(o['strategy'].item())]} {o.item():.2f}" for o in reached if o["strategy"].item() != best]
    return f" (beside it {', '.join(others)})" if others else ""


def step_time_finding(timing: xr.Dataset) -> str:
    """The fastest strategy on every set for the largest network, and how far the numbers can be trusted."""
    link, sentences = selection.main_link(timing), []
    for device_set in selection.device_sets(timing):
        names = selection.networks(timing, [device_set])
        if not names:
            continue
        batch_size = selection.main_batch_size(timing, names[-1], link, [device_set])
        place = {"network": names[-1], "batch_size": batch_size, "device_set": device_set, "link": link}
        times = summary(timing["step_time"].where(timing["status"] == OK).sel(place))
        if times["median"].notnull().sum() > 1:
            best = times.isel(strategy=int(np.nanargmin(times["median"].values)))
            sentences.append(
                f"{names[-1]}, batch {batch_size}, on {_named(device_set)}: ``{best['strategy'].item()}`` is fastest, "
                f"{best['median'].item():.3g} s per step (quartiles {best['lower'].item():.3g} to "
                f"{best['upper'].item():.3g} s)."
            )
    return _listed([*sentences, _quality(timing)], "No cell was measured.")


def _quality(timing: xr.Dataset) -> str:
    status = timing["status"].values
    measured, planned = int((status == OK).sum()), int((status != NOT_PLANNED).sum())
    noisy = int(summary(timing["step_time"].where(timing["status"] == OK))["noisy"].sum())
    ended = "all ended well" if measured == planned else f"{planned - measured} did not end well"
    return f"Of {planned} cells {ended}; in {noisy} of the {measured} measured ones IQR / median exceeds 0.1."


def convolution_finding(timing: xr.Dataset) -> str:
    """The range of the share of convolutions on each kind of device, beside the paper's."""
    if "single" not in timing["strategy"].values:
        return "No ``single`` cell was measured.\n"
    shares = summary(convolution_share(timing))["median"]
    devices, sentences = baseline(timing)["baseline_device"], []
    low, high = paper.CONVOLUTION_SHARE
    for label in dict.fromkeys(str(device) for device in devices.values.flat if device):
        of_label = shares.where(devices == label).median(["device_set", "link"])
        known = of_label.stack(cell=of_label.dims).dropna("cell")
        if known.size:
            least, most = known.isel(cell=int(np.argmin(known.values))), known.isel(cell=int(np.argmax(known.values)))
            ends = [least, most] if known.size > 1 else [least]
            taken = " to ".join(f"{e.item():.0%} ({e['network'].item()}, batch {e['batch_size'].item()})" for e in ends)
            sentences.append(
                f"On one {_named(label)} convolutions take {taken} of a step; the paper says {low:.0%} to {high:.0%}."
            )
    return _listed(sentences, "No convolution time was measured.")


def activity_finding(timing: xr.Dataset) -> str:
    """Mean fractions of compute, exchange and idle time over the devices, for the largest network on each set."""
    link, sentences = selection.main_link(timing), []
    for device_set in selection.showcase_sets(timing):
        names = selection.networks(timing, [device_set])
        batch_size = selection.main_batch_size(timing, names[-1], link, [device_set])
        place = {"network": names[-1], "batch_size": batch_size, "device_set": device_set, "link": link}
        cells = timing.where(timing["status"] == OK).sel(place)
        for strategy in selection.strategies(timing):
            cell = cells.sel(strategy=strategy)
            if strategy == "single" or not cell["step_time"].notnull().any():
                continue
            part = {n: (cell[f"{n}_time"] / cell["step_time"]).mean().item() for n in ("compute", "exchange", "idle")}
            exchange = f"exchange {part['exchange']:.0%}" if part["exchange"] else "exchange within that time"
            sentences.append(
                f"{names[-1]}, batch {batch_size}, on {_named(device_set)}, ``{strategy}``: the devices compute "
                f"{part['compute']:.0%} of the step, {exchange} and idle {part['idle']:.0%} (mean)."
            )
    return _listed(sentences, "No set of several devices was measured.")


def timeline_finding(timing: xr.Dataset) -> str:
    """The longest instruction and the bytes moved of every strategy in the shown step."""
    place, sentences = selection.showcase(timing), []
    if place is None or "instruction_start" not in timing:
        return "No timeline of several devices was recorded.\n"
    cells = timing.sel(place)
    for strategy in selection.strategies(timing):
        cell = cells.sel(strategy=strategy)
        length = (cell["instruction_end"] - cell["instruction_start"]).max("device")
        if strategy == "single" or not length.notnull().any():
            continue
        longest = cell.isel(instruction=int(np.nanargmax(length.values)))
        moved = f"{cell['instruction_bytes'].sum().item() / 1e6:.3g} MB move between the devices"
        apart = bool((cell["instruction_kind"] == "exchange").any())
        sentences.append(
            f"``{strategy}``: the longest of {int(length.notnull().sum())} instructions is "
            f"{longest['instruction_name'].item()} ({longest['instruction_phase'].item()}), "
            f"{length.max().item():.3g} s; {moved if apart else 'its exchange is not timed apart'}."
        )
    return _listed(sentences, f"No timeline was recorded for {place['network']} on {_named(str(place['device_set']))}.")


def accuracy_finding(accuracy: xr.Dataset) -> str:
    """Final accuracies and the largest differences from one device's."""
    final = accuracy["accuracy"].isel(epoch=-1)
    reached = ", ".join(f"``{s}`` {final.sel(strategy=s).item():.2%}" for s in map(str, final["strategy"].values))
    sentences = [f"After epoch {accuracy['epoch'].values[-1]} on ``{accuracy.attrs['data']}``: {reached}."]
    if "single" in accuracy["strategy"].values and accuracy.sizes["strategy"] > 1:
        reference, others = accuracy.sel(strategy="single"), accuracy.drop_sel(strategy="single")
        apart = 100 * np.abs(others["accuracy"] - reference["accuracy"]).max().item()
        loss = (np.abs(others["loss"] - reference["loss"]) / np.abs(reference["loss"])).max().item()
        sentences.append(
            f"Split and single accuracy differ by at most {apart:.3g} percentage points in any epoch, their training "
            f"losses by at most {loss:.1e} of the loss in any step."
        )
    return _listed(sentences, "")


def prediction_finding(timing: xr.Dataset) -> str:
    """How far predictions are off, over all cells and by strategy."""
    error = prediction_error(timing)
    sentences = []
    for name in ("", *selection.strategies(timing)):
        one = np.abs((error.sel(strategy=name) if name else error).values.ravel())
        one = one[np.isfinite(one)]
        if one.size:
            sentences.append(
                f"{f'``{name}``' if name else 'All strategies'}: the predicted step is off by {np.median(one):.1%} in "
                f"the median and {np.quantile(one, 0.95):.1%} at the 95th percentile of {one.size} cells."
            )
    return _listed(sentences, "No cell was both measured and predicted.")


def calibration_finding(calibration: xr.Dataset) -> str:
    """The time of the whole network on every device, and the links."""
    chosen = largest(calibration)
    times = with_most_images(chosen)
    whole = times.min("repetition").max("share").sum("segment")
    labels = [str(label) for label in chosen["device_label"].values if label]
    each = ", ".join(f"{whole.values[rank]:.3g} s on {_named(label)}" for rank, label in enumerate(labels))
    sentences = [f"Forward and backward of {chosen['network'].item()}, {times['images'].item()} images: {each}."]
    apart = xr.DataArray(np.arange(chosen.sizes["source"]), dims="source") != xr.DataArray(
        np.arange(chosen.sizes["destination"]), dims="destination"
    )
    latency, bandwidth = (chosen[name].where(apart).median().item() for name in ("link_latency", "link_bandwidth"))
    if np.isfinite(latency) and np.isfinite(bandwidth):
        sentences.append(
            f"The median link has {latency * 1e3:.3g} ms latency and {bandwidth / 1e9:.3g} GB/s bandwidth."
        )
    return _listed(sentences, "")


def waterfall_finding(timing: xr.Dataset) -> str:
    """Time and megabytes of every strategy from one device to `auto`, each against the one before it."""
    sentences = []
    for device_set in selection.showcase_sets(timing):
        cells = waterfall(timing, device_set)
        if cells is None:
            continue
        steps = []
        for place, strategy in enumerate(map(str, cells["strategy"].values)):
            median, moved = cells["median"].values[place], cells["moved"].values[place] / 1e6
            against = f" ({change(cells, place):+.1%})" if place else ""
            sent = f", {moved:.3g} MB moved" if place and np.isfinite(moved) else ""
            steps.append(f"``{strategy}`` {median:.3g} s{against}{sent}")
        sentences.append(
            f"{cells['network'].item()}, batch {cells['batch_size'].item()}, on {_named(device_set)}, each against the "
            f"one before: {'; '.join(steps)}."
        )
    return _listed(sentences, "No strategy from ``paper`` to ``auto`` was measured on several devices.")


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
    for link in selection.shown_links(simulation, timing):
        told = []
        for strategy in selection.strategies(simulation):
            values = ratios.sel(link=link, strategy=strategy).values
            known = np.isfinite(values)
            if strategy != "single" and known.any():
                told.append(f"``{strategy}`` {_saturates(counts[known], values[known])}")
        if told:
            devices = f"{counts.max():,} {_assumed(simulation, label, label)}"
            sentences.append(f"Simulated, {what}, on up to {devices}, {link}: {', '.join(told)}.")
    return _listed([*sentences, *_scaling_measured(ratios, timing, place)], NOTHING)


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
            sentences.append(f"Measured on {_named(sets[-1])}, {link}, and in brackets simulated: {', '.join(both)}.")
    return sentences


def links_finding(simulation: xr.Dataset, timing: xr.Dataset) -> str:
    """From which simulated link on each strategy is faster than one device, by kind of device and network."""
    links = [link for link in selection.links(simulation) if link != LOOPBACK]
    sentences = []
    if links and selection.simulated_families(simulation):
        batch_size = selection.simulated_batch_size(simulation, timing)
        ratios = simulated_speedup(simulation).sel(batch_size=batch_size, link=links)
        for label, device_set in selection.small_sets(simulation, timing).items():
            for network in selection.networks(simulation, [device_set]):
                cells = ratios.sel(network=network, device_set=device_set)
                told = [
                    f"``{s}`` {_pays_from(cells.sel(strategy=s))}"
                    for s in selection.strategies(simulation)
                    if s != "single" and cells.sel(strategy=s).notnull().any()
                ]
                if told:
                    sentences.append(
                        f"Simulated, {network}, batch {batch_size}, on {_assumed(simulation, label, device_set)}: "
                        f"faster than one device is {', '.join(told)}."
                    )
    return _listed(sentences, NOTHING)


def _pays_from(ratios: xr.DataArray) -> str:
    pays = ratios.values >= PAYS
    if not pays.any():
        return f"over no link (speedup at most {np.nanmax(ratios.values):.2f})"
    first = int(np.argmax(pays))
    if pays[first:].all():
        return f"from {ratios['link'].values[first]} on (speedup {ratios.values[first]:.2f})"
    # A link of higher rate may have a longer delay, or the work another share at each.
    return f"over {' and '.join(map(str, ratios['link'].values[pays]))} only"


def break_even_finding(simulation: xr.Dataset, timing: xr.Dataset) -> str:
    """For each kind of device and link, from which batch size on the best exact split beats one device."""
    sentences = []
    for label, device_set in selection.small_sets(simulation, timing).items():
        told = []
        for link in selection.links(simulation):
            cells = break_even(simulation, device_set, link)
            known = cells.values[np.isfinite(cells.values)]
            if known.size:
                told.append(f"over {link} {_starts_to_pay(cells, known)}")
        if told:
            devices = _assumed(simulation, label, device_set)
            sentences.append(f"Simulated, on {devices} the best exact split pays {'; '.join(told)}.")
        sentences += _break_even_measured(simulation, timing, device_set)
    return _listed(sentences, NOTHING)


def _starts_to_pay(cells: xr.DataArray, known: npt.NDArray[np.float64]) -> str:
    if (known >= PAYS).all():
        return f"in all {known.size} cells (speedup {known.min():.2f} to {known.max():.2f})"
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


def _break_even_measured(simulation: xr.Dataset, timing: xr.Dataset, device_set: str) -> list[str]:
    sentences = []
    for link in selection.links(simulation):
        found = measured_best(timing, break_even(simulation, device_set, link), device_set, link)
        if found is None or not found.notnull().any():
            continue
        values = found.values[np.isfinite(found.values)]
        sentences.append(
            f"Measured on {_named(device_set)}, {link}: the best exact split pays in {int((values >= PAYS).sum())} of "
            f"{values.size} such cells (speedup {values.min():.2f} to {values.max():.2f})."
        )
    return sentences


def _named(device_set: str) -> str:
    # As a literal, or reStructuredText takes what surrounds an @ for an address.
    return f"``{device_set}``" + (" (emulated)" if is_emulated([device_set]) else "")


def _assumed(simulation: xr.Dataset, label: str, device_set: str) -> str:
    speed = described(simulation).get(label)
    return _named(device_set) + ("" if speed is None else f" (described, {speed:,.0f} GFLOP/s assumed)")


def _listed(sentences: list[str], otherwise: str) -> str:
    if len(sentences) > 1:
        return "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    return (sentences[0] if sentences else otherwise) + "\n"

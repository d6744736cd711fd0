"""What each figure shows, in sentences whose every number is read from the stores (reStructuredText)."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis import paper, selection
from pipeline.analysis.calibration_figure import largest, with_most_images
from pipeline.analysis.statistics import baseline, convolution_share, prediction_error, speedup, summary
from pipeline.analysis.style import is_emulated
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


def _named(device_set: str) -> str:
    # As a literal, or reStructuredText takes what surrounds an @ for an address.
    return f"``{device_set}``" + (" (emulated)" if is_emulated([device_set]) else "")


def _listed(sentences: list[str], otherwise: str) -> str:
    if len(sentences) > 1:
        return "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    return (sentences[0] if sentences else otherwise) + "\n"

"""What the figures of the measured grid show, in sentences whose every number is read from the store."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis import paper, selection
from pipeline.analysis.statistics import FEWEST, baseline, convolution_share, speedup, summary
from pipeline.analysis.waterfall_figure import change, waterfall
from pipeline.analysis.wording import listed, named
from pipeline.results.contracts import NOISY, NOT_PLANNED, OK


def convolution_finding(timing: xr.Dataset) -> str:
    """The range of the share of convolutions over all devices beside the paper's, then on each kind of device."""
    if "single" not in timing["strategy"].values:
        return "No ``single`` cell was measured.\n"
    shares = summary(convolution_share(timing))["median"]
    devices, sentences, ends = baseline(timing)["baseline_device"], [], []
    for label in dict.fromkeys(str(device) for device in devices.values.flat if device):
        of_label = shares.where(devices == label).median(["device_set", "link"])
        known = of_label.stack(cell=of_label.dims).dropna("cell")
        if known.size:
            least, most = known.isel(cell=int(np.argmin(known.values))), known.isel(cell=int(np.argmax(known.values)))
            ends += [least.item(), most.item()]
            shown = [least, most] if known.size > 1 else [least]
            taken = " to ".join(
                f"{one.item():.0%} ({one['network'].item()}, batch {one['batch_size'].item()})" for one in shown
            )
            sentences.append(f"On one {named(label)}: {taken}.")
    if ends:
        low, high = paper.CONVOLUTION_SHARE
        answer = (
            f"Convolutions, forward and backward, take {min(ends):.0%} to {max(ends):.0%} of a step on one device; the "
            f"paper says {low:.0%} to {high:.0%}."
        )
        sentences.insert(0, answer)
    return listed(sentences, "No convolution time was measured.")


def speedup_finding(timing: xr.Dataset) -> str:
    """The best split of every network on the largest set of each kind of device, the paper's own network first."""
    ratios, link, told = speedup(timing), selection.main_link(timing), []
    for sets in selection.families(timing).values():
        for network in selection.networks(timing, sets):
            batch_size = selection.main_batch_size(timing, network, link, sets)
            cells = ratios.sel(network=network, batch_size=batch_size, link=link, device_set=sets)
            splits = cells.drop_sel(strategy=["single", "ddp"], errors="ignore")
            measured = [s for s in sets if splits["speedup"].sel(device_set=s).notnull().any()]
            if measured:
                claim = next((c for c in paper.CLAIMS if _is_claimed(c, timing, network, measured[-1])), None)
                sentence = _best_split(cells.sel(device_set=measured[-1]), splits.sel(device_set=measured[-1]), claim)
                told.append((claim is None, sentence))
    sentences = [sentence for _, sentence in sorted(told, key=lambda one: one[0])]
    return listed([*sentences, _quality(timing)] if sentences else [], "No set of several equal devices was measured.")


def _is_claimed(claim: paper.Claim, timing: xr.Dataset, network: str, device_set: str) -> bool:
    labels = selection.device_labels(timing, device_set)
    as_many = len(labels) == claim.device_count and labels[0].startswith(claim.device_kind)
    return as_many and network == claim.network


def _best_split(cells: xr.Dataset, splits: xr.Dataset, claim: paper.Claim | None) -> str:
    best = splits.isel(strategy=int(np.nanargmax(splits["speedup"].values)))
    name = str(best["strategy"].item())
    efficiency = (
        f", {best['efficiency'].item():.0%} of the aggregate calibrated throughput of "
        f"{best['aggregate_bound'].item():.2f}"
    )
    return (
        f"On {named(str(cells['device_set'].item()))} ``{name}`` is {best['speedup'].item():.2f} times as fast as one "
        f"``{best['baseline_device'].item()}`` (95 % interval {best['speedup_low'].item():.2f} to "
        f"{best['speedup_high'].item():.2f}){efficiency if best['efficiency'].notnull() else ''}: "
        f"{cells['network'].item()}, batch {cells['batch_size'].item()}{_others(cells, name, claim)}."
    )


def _others(cells: xr.Dataset, best: str, claim: paper.Claim | None) -> str:
    reached = cells["speedup"].where(cells["strategy"].isin(["paper", "ddp"]), drop=True).dropna("strategy")
    names = {"paper": "the paper's literal method", "ddp": "``ddp``"}
    others = [f"{names[str(o['strategy'].item())]} {o.item():.2f}" for o in reached if o["strategy"].item() != best]
    others += [f"the paper states {claim.speedup:.2f}"] if claim else []
    return f"; {', '.join(others)}" if others else ""


def step_time_finding(timing: xr.Dataset) -> str:
    """The fastest strategy on every set of unequal devices, or of equal ones where there is no other.

    Told of the largest network that was split on the set.
    """
    link, found = selection.main_link(timing), []
    for device_set in selection.device_sets(timing):
        networks = selection.networks(timing, [device_set])
        if not networks:
            continue
        batch_size = selection.main_batch_size(timing, networks[-1], link, [device_set])
        place = {"network": networks[-1], "batch_size": batch_size, "device_set": device_set, "link": link}
        times = summary(timing["step_time"].where(timing["status"] == OK).sel(place))
        if times["median"].notnull().sum() > 1:
            best = times.isel(strategy=int(np.nanargmin(times["median"].values)))
            equal = len(set(selection.device_labels(timing, device_set))) == 1
            sentence = (
                f"On {named(device_set)} ``{best['strategy'].item()}`` is fastest, {best['median'].item():.3g} s per "
                f"step (quartiles {best['lower'].item():.3g} to {best['upper'].item():.3g} s){_against_equal(times)}: "
                f"{networks[-1]}, batch {batch_size}."
            )
            found.append((equal, sentence))
    only_equal = all(equal for equal, _ in found)
    return listed([sentence for equal, sentence in found if equal == only_equal] or [_quality(timing)], "")


def _against_equal(times: xr.Dataset) -> str:
    """What ignoring the calibration costs beside the literal method, which differs in nothing but its shares."""
    if not {"equal", "paper"} <= set(times["strategy"].values):
        return ""
    ratio = (times["median"].sel(strategy="equal") / times["median"].sel(strategy="paper")).item()
    return "" if np.isnan(ratio) else f", calibrated shares {ratio:.2f} times as fast as equal ones"


def _quality(timing: xr.Dataset) -> str:
    status, times = timing["status"].values, summary(timing["step_time"].where(timing["status"] == OK))
    measured, planned = int((status == OK).sum()), int((status != NOT_PLANNED).sum())
    noisy = int(times["noisy"].sum())
    few = int((times["count"].where(timing["status"] == OK) < FEWEST).sum())
    ended = "all ended well" if measured == planned else f"{planned - measured} did not end well"
    return (
        f"Of {planned} measured cells {ended}; in {noisy} of them IQR / median exceeds {NOISY:g}, {few or 'none'} "
        f"{'has' if few <= 1 else 'have'} fewer than {FEWEST} repetitions."
    )


def waterfall_finding(timing: xr.Dataset) -> str:
    """From the literal method to the last idea, then time and megabytes of every strategy against the one before."""
    sentences: list[str] = []
    for device_set in selection.showcase_sets(timing):
        cells = waterfall(timing, device_set)
        if cells is None:
            continue
        what = f"{cells['network'].item()}, batch {cells['batch_size'].item()}, on {named(device_set)}"
        if not sentences and (answer := _from_paper(cells, what)):
            sentences.append(answer)
        steps = []
        for place, strategy in enumerate(map(str, cells["strategy"].values)):
            median, moved = cells["median"].values[place], cells["moved"].values[place] / 1e6
            against = f" ({change(cells, place):+.1%})" if place else ""
            sent = f", {moved:.3g} MB" if place and np.isfinite(moved) else ""
            steps.append(f"``{strategy}`` {median:.3g} s{against}{sent}")
        sentences.append(
            f"{what}, each step against the one before, with what goes through the master's link: {'; '.join(steps)}."
        )
    return listed(sentences, "No strategy from ``paper`` to ``auto`` was measured on several devices.")


def _from_paper(cells: xr.Dataset, what: str) -> str:
    names = list(map(str, cells["strategy"].values))
    if "paper" not in names or len(names) == names.index("paper") + 1:
        return ""
    literal, later = cells.sel(strategy="paper"), cells.isel(strategy=slice(names.index("paper") + 1, None))
    best = later.isel(strategy=int(np.nanargmin(later["median"].values)))
    moved = [one["moved"].item() / 1e6 for one in (literal, best)]
    less = (
        f", and sends {moved[1]:.3g} instead of {moved[0]:.3g} MB through the master's link"
        if np.isfinite(moved).all()
        else ""
    )
    return (
        f"Against the literal method our best, ``{best['strategy'].item()}``, changes the step by "
        f"{best['median'].item() / literal['median'].item() - 1:+.1%}{less}: {what}."
    )

"""Which cells of a grid a figure or a sentence shows when the reader did not choose."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import xarray as xr

from pipeline.analysis.statistics import device_count
from pipeline.analysis.style import STRATEGIES
from pipeline.links import parse_link
from pipeline.results.contracts import OK

_SMALL = 4
_ORDINAL = re.compile(r"^gpu\d+")


def network_size(network: str) -> tuple[float, str]:
    """Sort key: the product of the two kernel numbers; networks of other names come last, by name."""
    first, _, second = network.partition(":")
    return (float(first) * float(second), "") if first.isdigit() and second.isdigit() else (np.inf, network)


def networks(timing: xr.Dataset, sets: list[str] | None = None) -> list[str]:
    """Networks that were measured at all, or split on one of the sets, small to large."""
    status = timing["status"]
    if sets is not None:
        status = status.sel(device_set=sets).drop_sel(strategy="single", errors="ignore")
    ok = (status == OK).any([d for d in status.dims if d != "network"])
    return sorted(map(str, timing["network"].values[ok.values]), key=network_size)


def device_labels(timing: xr.Dataset, device_set: str) -> list[str]:
    """Labels of the devices of a set, by rank."""
    return [str(label) for label in timing["device_label"].sel(device_set=device_set).values if label]


def rank_labels(cell: xr.Dataset) -> list[str]:
    """Labels of the devices of a cell's plan, by rank; '' where it cannot be told which of the set they are.

    The labels of a grid are those of the whole set, while a plan that leaves devices out counts the others anew.
    """
    labels = [str(label) for label in cell["device_label"].values if label]
    ranks = int(cell["share"].notnull().sum())
    return labels if ranks == len(labels) or len(set(labels)) == 1 else [""] * ranks


def device_sets(timing: xr.Dataset) -> list[str]:
    """Sets that were measured at all, by number of devices, equal devices before unequal ones."""
    ok = (timing["status"] == OK).any([d for d in timing["status"].dims if d != "device_set"])
    names = list(map(str, timing["device_set"].values[ok.values]))
    return sorted(names, key=lambda name: (len(device_labels(timing, name)), len(set(device_labels(timing, name)))))


def strategies(timing: xr.Dataset) -> list[str]:
    """Strategies that were measured at all, in one order everywhere; unknown ones come last."""
    ok = (timing["status"] == OK).any([d for d in timing["status"].dims if d != "strategy"])
    found, known = list(map(str, timing["strategy"].values[ok.values])), list(STRATEGIES)
    return sorted(found, key=lambda name: known.index(name) if name in known else len(known))


def families(timing: xr.Dataset) -> dict[str, list[str]]:
    """Sets of equal devices by the label of their device, each by number of devices, the largest family first."""
    found: dict[str, list[str]] = {}
    for device_set in device_sets(timing):
        # Another GPU of the machine, gpu1, is one more of the first, gpu.
        labels = [_ORDINAL.sub("gpu", label) for label in device_labels(timing, device_set)]
        if len(set(labels)) == 1:
            found.setdefault(labels[0], []).append(device_set)
    count = device_count(timing)
    several = {label: sets for label, sets in found.items() if count.sel(device_set=sets).max() > 1}
    return dict(sorted(several.items(), key=lambda family: -len(family[1])))


def main_link(timing: xr.Dataset) -> str:
    """The link with the most measured cells; the first of them when several have as many."""
    ok = (timing["status"] == OK).sum([d for d in timing["status"].dims if d != "link"])
    return str(timing["link"].values[int(np.argmax(ok.values))])


def main_batch_size(timing: xr.Dataset, network: str, link: str, sets: list[str] | None = None) -> int:
    """The batch size with the most measured cells of a network; the largest of them when several have as many."""
    chosen = timing["status"].sel(network=network, link=link, device_set=sets or list(timing["device_set"].values))
    ok = (chosen == OK).sum(["device_set", "strategy"]).transpose("batch_size").values
    return int(timing["batch_size"].values[np.flatnonzero(ok == ok.max())[-1]])


def showcase(timing: xr.Dataset) -> dict[str, str | int] | None:
    """Coordinates of the step that is shown in detail: the largest split network on the first showcase set."""
    for device_set in showcase_sets(timing):
        split, link = networks(timing, [device_set]), main_link(timing)
        if split:
            batch_size = main_batch_size(timing, split[-1], link, [device_set])
            return {"network": split[-1], "batch_size": batch_size, "device_set": device_set, "link": link}
    return None


def showcase_sets(timing: xr.Dataset) -> list[str]:
    """The set of equal devices and the one of unequal ones on which most strategies ran, of several the largest."""
    chosen: dict[bool, tuple[int, str]] = {}
    for device_set in device_sets(timing):
        labels = device_labels(timing, device_set)
        if len(labels) > 1 and networks(timing, [device_set]):
            ran = int((timing["status"].sel(device_set=device_set) == OK).any(["network", "batch_size", "link"]).sum())
            unequal = len(set(labels)) > 1
            if unequal not in chosen or ran >= chosen[unequal][0]:
                chosen[unequal] = ran, device_set
    return [chosen[unequal][1] for unequal in sorted(chosen)]


def links(grid: xr.Dataset) -> list[str]:
    """All links, slow to fast, of two of one rate the one of the longer delay first; the real one comes last."""

    def speed(text: str) -> tuple[float, float]:
        link = parse_link(text)
        return (np.inf, 0.0) if link is None else (link.bandwidth, -link.latency)

    return sorted(map(str, grid["link"].values), key=speed)


def shown_links(simulation: xr.Dataset, timing: xr.Dataset, most: int = 3) -> list[str]:
    """At most so many simulated links, slow to fast: those that were measured, and others of their delay if any."""
    every = links(simulation)
    measured = [link for link in dict.fromkeys([main_link(timing), *links(timing)]) if link in every]
    kept = measured[:most]
    delays = {one.latency for one in map(parse_link, kept) if one is not None}
    others = [link for link in every if link not in kept]
    alike = [link for link in others if (one := parse_link(link)) is not None and one.latency in delays]
    free = most - len(kept)
    chosen = alike if len(alike) >= free else others
    if len(chosen) > free:
        # Evenly around the middle: over the slowest nothing gains, over the fastest all as over the real link.
        step = max(1, len(chosen) // (free + 1))
        first = (len(chosen) - step * (free - 1)) // 2
        chosen = chosen[first::step][:free]
    return [link for link in every if link in kept or link in chosen]


def by_delay(names: list[str]) -> dict[str, list[str]]:
    """Links by their delay, the shortest first, each slow to fast; under '' those that share their delay with none."""
    groups: dict[float, list[str]] = {}
    for name in names:
        if (link := parse_link(name)) is not None:
            groups.setdefault(link.latency, []).append(name)
    several = {delay: group for delay, group in sorted(groups.items()) if len(group) > 1}
    found = {f"{1e3 * delay:g} ms": group for delay, group in several.items()}
    if alone := [name for name in names if all(name not in group for group in several.values())]:
        rated = [name for name in alone if parse_link(name) is not None]
        found |= {"": rated} if rated else {}
    return found


def linked(simulation: xr.Dataset, timing: xr.Dataset) -> list[dict[str, str | int]]:
    """Of each kind of device the `label`, `device_set`, `network` and `batch_size` whose speedup over links is told.

    The network is the largest of those measured over most links, else the largest simulated one.
    """
    found: list[dict[str, str | int]] = []
    for label, device_set in small_sets(simulation, timing).items():
        batch_size, names = simulated_batch_size(simulation, timing), networks(simulation, [device_set])
        place: dict[str, str | int] = {"device_set": device_set, "batch_size": batch_size}
        if names:
            over = [_links_of(timing, {**place, "network": name}) for name in names]
            network = names[max(range(len(names)), key=lambda one: (over[one], one))]
            found.append({"label": label, "network": network, **place})
    return found


def _links_of(timing: xr.Dataset, cell: dict[str, Any]) -> int:
    """Over how many links a cell was split."""
    if any(value not in timing[name].values for name, value in cell.items()):
        return 0
    status = timing["status"].sel(cell).drop_sel(strategy="single", errors="ignore")
    return int((status == OK).any("strategy").sum())


def simulated_families(simulation: xr.Dataset) -> dict[str, list[str]]:
    """As `families`; none where no `single` step was simulated, as there is nothing to compare with."""
    return families(simulation) if "single" in strategies(simulation) else {}


def scaling(simulation: xr.Dataset, timing: xr.Dataset) -> dict[str, str | int] | None:
    """`label`, `network` and `batch_size` of which the most sets of equal devices were measured and any simulated.

    Of several the first kind of device, the largest network and the largest batch; None where nothing was simulated.
    """
    measured = families(timing)
    found: list[tuple[Any, dict[str, str | int]]] = []
    for place, (label, sets) in enumerate(simulated_families(simulation).items()):
        for network in networks(simulation, sets):
            for batch_size in map(int, simulation["batch_size"].values):
                points = _split(timing, measured.get(label, []), network, batch_size)
                rank = (points, -place, network_size(network), batch_size)
                found.append((rank, {"label": label, "network": network, "batch_size": batch_size}))
    return max(found, key=lambda one: one[0])[1] if found else None


def _split(timing: xr.Dataset, sets: list[str], network: str, batch_size: int) -> int:
    """How many of the sets the network was split on at this batch size."""
    if network not in timing["network"].values or batch_size not in timing["batch_size"].values:
        return 0
    status = timing["status"].sel(network=network, batch_size=batch_size, device_set=sets)
    ok = status.drop_sel(strategy="single", errors="ignore") == OK
    return int(ok.any(["link", "strategy"]).sum())


def small_sets(simulation: xr.Dataset, timing: xr.Dataset) -> dict[str, str]:
    """By the label of its devices a small simulated set of equal ones: a measured one if any, of about four.

    What was measured comes before what is only described.
    """
    chosen, measured, count = {}, device_sets(timing), device_count(simulation)
    every = simulated_families(simulation).items()
    for label, sets in sorted(every, key=lambda family: not set(family[1]) & set(measured)):
        several = [s for s in sets if count.sel(device_set=s) > 1]
        apart = {s: abs(int(count.sel(device_set=s)) - _SMALL) for s in several}
        chosen[label] = min(several, key=lambda s: (s not in measured, apart[s]))
    return chosen


def simulated_batch_size(simulation: xr.Dataset, timing: xr.Dataset) -> int:
    """The simulated batch size with the most measured cells; the largest when several have as many."""
    ok = timing["status"] == OK

    def measured(size: int) -> int:
        return int(ok.sel(batch_size=size).sum()) if size in timing["batch_size"].values else 0

    return max(map(int, simulation["batch_size"].values), key=lambda size: (measured(size), size))

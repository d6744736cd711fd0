"""Which cells of a grid a figure or a sentence shows when the reader did not choose."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis.statistics import device_count
from pipeline.analysis.style import STRATEGIES
from pipeline.results.contracts import OK


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
        labels = device_labels(timing, device_set)
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
    """The largest set of equal devices and the largest of unequal ones, where there are such with several devices."""
    chosen: dict[bool, str] = {}
    for device_set in device_sets(timing):
        labels = device_labels(timing, device_set)
        if len(labels) > 1 and networks(timing, [device_set]):
            chosen[len(set(labels)) > 1] = device_set
    return [chosen[unequal] for unequal in sorted(chosen)]

"""Which cells of a grid a figure or a sentence shows when the reader did not choose."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis.statistics import device_count
from pipeline.results.contracts import OK


def network_size(network: str) -> tuple[float, str]:
    """Sort key: the product of the two kernel numbers; networks of other names come last, by name."""
    first, _, second = network.partition(":")
    return (float(first) * float(second), "") if first.isdigit() and second.isdigit() else (np.inf, network)


def networks(timing: xr.Dataset) -> list[str]:
    """Networks that were measured at all, small to large."""
    ok = (timing["status"] == OK).any([d for d in timing["status"].dims if d != "network"])
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
    """Strategies that were measured at all, in the order of the grid."""
    ok = (timing["status"] == OK).any([d for d in timing["status"].dims if d != "strategy"])
    return list(map(str, timing["strategy"].values[ok.values]))


def families(timing: xr.Dataset) -> dict[str, list[str]]:
    """Sets of equal devices by the label of their device, each by number of devices; only families of several sizes."""
    found: dict[str, list[str]] = {}
    for device_set in device_sets(timing):
        labels = device_labels(timing, device_set)
        if len(set(labels)) == 1:
            found.setdefault(labels[0], []).append(device_set)
    count = device_count(timing)
    return {label: sets for label, sets in found.items() if count.sel(device_set=sets).max() > 1}


def main_link(timing: xr.Dataset) -> str:
    """The link with the most measured cells; the first of them when several have as many."""
    ok = (timing["status"] == OK).sum([d for d in timing["status"].dims if d != "link"])
    return str(timing["link"].values[int(np.argmax(ok.values))])


def main_batch_size(timing: xr.Dataset, network: str, link: str, sets: list[str] | None = None) -> int:
    """The batch size with the most measured cells of a network; the largest of them when several have as many."""
    chosen = timing["status"].sel(network=network, link=link, device_set=sets or list(timing["device_set"].values))
    ok = (chosen == OK).sum(["device_set", "strategy"]).transpose("batch_size").values
    return int(timing["batch_size"].values[np.flatnonzero(ok == ok.max())[-1]])


def showcase_sets(timing: xr.Dataset) -> list[str]:
    """The largest set of equal devices and the largest of unequal ones, where there are such with several devices."""
    chosen: dict[bool, str] = {}
    for device_set in device_sets(timing):
        labels = device_labels(timing, device_set)
        if len(labels) > 1:
            chosen[len(set(labels)) > 1] = device_set
    return [chosen[unequal] for unequal in sorted(chosen)]

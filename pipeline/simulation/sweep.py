"""Simulate a whole grid: networks, batch sizes, mixes of devices, links and strategies, far beyond what is there.

Devices are drawn, with replacement, from those a calibration has measured, or described by their speed. Everything that
differs in the link alone is simulated at once; the rest is spread over processes with Dask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
import xarray as xr
from distributed import Client, as_completed
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.graph.operations import Graph
from pipeline.graph.trace import trace
from pipeline.links import Link, parse_link
from pipeline.networks import network as build
from pipeline.plan.checks import check_calibration, image_shape_of
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import Room, fits, is_scarce
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import Strategy
from pipeline.plan.planner import DOUBT, uniform_plan
from pipeline.plan.prediction import predict_step
from pipeline.plan.search import fastest_times
from pipeline.results.contracts import NOT_PLANNED, OK, OUT_OF_MEMORY, describe, validate_timing
from pipeline.results.provenance import provenance
from pipeline.results.stores import merged_attributes
from pipeline.simulation.mixes import memory_of, parse_mix


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What to simulate: every combination."""

    networks: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    device_sets: tuple[str, ...]
    """Such as ``64 x cpu@0.45`` or ``gpu + 8 x cpu``, of calibrated or described devices."""
    links: tuple[str, ...]
    strategies: tuple[Strategy, ...]
    described: Mapping[str, float]
    """GFLOP/s that a device of this name reaches in convolutions; in brackets, as in ``gpu[24GiB]``, what it may hold
    beyond its process."""

    @property
    def cells(self) -> int:
        """Number of cells."""
        sizes = (self.networks, self.batch_sizes, self.device_sets, self.links, self.strategies)
        return int(np.prod([len(one) for one in sizes]))


@dataclass(frozen=True, kw_only=True)
class _Group:
    """The cells that differ in strategy and link alone."""

    costs: Costs
    """Of the devices that were measured, one of each label."""
    rows: tuple[int, ...]
    """For each device of the mix, its row in ``costs``."""
    graph: Graph
    batch_size: int
    strategies: tuple[Strategy, ...]
    links: Links


def sweep(
    grid: Grid,
    calibrations: Mapping[str, Sequence[xr.Dataset]],
    client: Client,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> xr.Dataset:
    """Simulate every cell of ``grid`` with the calibrations of each network, on the workers of ``client``.

    Returns a timing grid of ``pipeline.results.contracts`` with one repetition, marked as simulated. A set with a
    device that was calibrated for other networks only is not planned for this one, and where no plan of a strategy fits
    the memory of the devices, that is the status.

    Raises ``InputError`` for a network without a calibration, a device neither calibrated nor described, a set of more
    than 1,024 devices, an unknown link, a speed that is not positive or a memory that is no size.
    """
    mixes = {text: parse_mix(text) for text in grid.device_sets}
    links = {text: parse_link(text) for text in grid.links}
    for name in grid.networks:
        if not calibrations.get(name):
            raise InputError(f"network {name} is not calibrated; there are calibrations of {', '.join(calibrations)}")
    catalogues = [_Catalogue(name, calibrations[name], grid.described) for name in grid.networks]
    _check_known(mixes, catalogues)
    groups, places = [], []
    for n, catalogue in enumerate(catalogues):
        uniform = _uniform(calibrations[grid.networks[n]], links)
        for (d, mix), (b, batch_size) in product(enumerate(mixes.values()), enumerate(grid.batch_sizes)):
            if set(mix) <= set(catalogue.labels):
                places.append((n, b, d))
                groups.append(
                    _Group(
                        costs=catalogue.costs, rows=catalogue.rows(mix), graph=catalogue.graph, batch_size=batch_size,
                        strategies=grid.strategies, links=uniform,
                    )
                )  # fmt: skip
    times = np.full(tuple(len(one) for one in (grid.networks, grid.batch_sizes, mixes, links, grid.strategies)), np.nan)
    # The heaviest first, so that no process ends long after the others.
    order = sorted(range(len(groups)), key=lambda index: -len(groups[index].rows))
    parts = [order[start :: _parts(len(order))] for start in range(_parts(len(order)))]
    futures = {client.submit(_simulated, [groups[i] for i in part], pure=False): part for part in parts if part}
    done = 0
    for future, found in as_completed(futures, with_results=True):
        for index, time_LS in zip(futures[future], found, strict=True):
            times[places[index]] = time_LS
        done += len(futures[future]) * len(links) * len(grid.strategies)
        if on_progress is not None:
            on_progress(done)
    return _dataset(grid, mixes, times, [one for name in grid.networks for one in calibrations[name]])


def _check_known(mixes: Mapping[str, Sequence[str]], catalogues: Sequence[_Catalogue]) -> None:
    known = dict.fromkeys(label for one in catalogues for label in one.labels)
    for mix in mixes.values():
        for name in mix:
            if name not in known:
                raise InputError(f"device {name} is neither calibrated nor described; there are {', '.join(known)}")


class _Catalogue:
    """The devices that can be drawn for one network: of each label the first that was calibrated."""

    def __init__(self, name: str, calibrations: Sequence[xr.Dataset], described: Mapping[str, float]) -> None:
        self.graph = _graph_of(name, calibrations[0])
        self.labels: list[str] = []
        rows = []
        for calibration in calibrations:
            measured = [str(label) for label in calibration.device_label.values]
            check_calibration(calibration, self.graph, measured)
            for index, label in enumerate(measured):
                if label not in self.labels:
                    self.labels.append(label)
                    rows.append(Costs.of(calibration).only([index]))
        flops = 3.0 * sum(one.flops_per_image for one in self.graph.operations)
        images = int(calibrations[0].images.max())
        fastest = max(rows, key=lambda one: float(one.throughputs(images)[0]))
        reached = flops * float(fastest.throughputs(images)[0]) / 1e9
        for device, gflops in described.items():
            if not gflops > 0:
                raise InputError(f"device {device} cannot reach {gflops} GFLOP/s: the speed must be positive")
            if device in self.labels:
                continue  # what was measured counts more than what was described
            self.labels.append(device)
            rows.append(replace(fastest.slowed(reached / gflops), memory=np.array([memory_of(device)])))
        self.costs = Costs.joined(rows)

    def rows(self, mix: Sequence[str]) -> tuple[int, ...]:
        """The row of each device of a mix."""
        return tuple(self.labels.index(name) for name in mix)


def _graph_of(name: str, calibration: xr.Dataset) -> Graph:
    channels, height, width = image_shape_of(calibration)
    classes = int(calibration.attrs.get("classes", 10))
    model = build(name, classes=classes, image_shape=(channels, height, width))
    return trace(model, torch.zeros(2, channels, height, width))


def _uniform(calibrations: Sequence[xr.Dataset], links: Mapping[str, Link | None]) -> Links:
    """The links as cases, each with what sending takes besides; loopback is the median of those that were measured."""
    measured: list[tuple[float, float]] = []
    for one in calibrations:
        apart = ~np.eye(one.sizes["source"], dtype=bool)
        pairs = zip(one.link_latency.values[apart], 1 / one.link_bandwidth.values[apart], strict=True)
        measured += [(float(latency), float(per_byte)) for latency, per_byte in pairs]
    if not measured and None in links.values():
        raise InputError("no link was measured, as each calibration is of one device: name links such as 1Gbit/s+0.1ms")
    own, fastest = (np.median(measured, axis=0), np.min(measured, axis=0)) if measured else (np.zeros(2), np.zeros(2))
    cases = []
    for link in links.values():
        case = Links(*own[:, None, None, None]) if link is None else Links.one(link).sent_by(*fastest)
        cases.append((case.latency, case.seconds_per_byte))
    latency, per_byte = (np.concatenate(one) for one in zip(*cases, strict=True))
    return Links(latency, per_byte, has_software=True)


def _parts(groups: int) -> int:
    """Into how many tasks the groups are cut: enough to balance, few enough not to drown in overhead."""
    return max(1, min(groups, 64))


def _simulated(groups: Sequence[_Group]) -> list[NDArray[np.float64]]:
    """Step times in s of each group, (link, strategy)."""
    return [np.stack([_times(group, strategy) for strategy in group.strategies], axis=1) for group in groups]


def _times(group: _Group, strategy: Strategy) -> NDArray[np.float64]:
    """Step time in s over the links, (link); infinite where the devices cannot hold the network."""
    costs, ranks = group.costs.only(group.rows), len(group.rows)
    labels = ["device"] * ranks
    if strategy == "auto" and ranks > 1:
        return fastest_times(
            group.graph, costs, batch_size=group.batch_size, labels=labels, links=group.links, doubt=DOUBT
        )
    one: Strategy = "single" if ranks == 1 else strategy
    plan, room = uniform_plan(group.graph, one, group.batch_size, labels, costs), Room.of(costs.memory_left)
    if is_scarce(group.graph, room, group.batch_size) and not fits(group.graph, plan, room):
        return np.full(group.links.cases, np.inf)
    chosen = costs.only(plan.devices)
    return predict_step(group.graph, plan, chosen, batch_size=group.batch_size, links=group.links)


def _dataset(
    grid: Grid, mixes: Mapping[str, tuple[str, ...]], times: NDArray[np.float64], calibrations: Sequence[xr.Dataset]
) -> xr.Dataset:
    most = max(len(mix) for mix in mixes.values())
    labels = np.full((len(mixes), most), "", object)
    for row, mix in zip(labels, mixes.values(), strict=True):
        row[: len(mix)] = mix
    dims = ("network", "batch_size", "device_set", "link", "strategy")
    measured = {str(label) for one in calibrations for label in one.device_label.values}
    described = {name: speed for name, speed in grid.described.items() if name not in measured}
    configuration = {
        "networks": grid.networks, "batch_sizes": grid.batch_sizes, "device_sets": grid.device_sets,
        "links": grid.links, "strategies": grid.strategies, "described": described,
    }  # fmt: skip
    merged = merged_attributes(calibrations)
    attributes = provenance(
        configuration,
        emulated=bool(merged.get("emulated", False)),
        data="none: simulated from calibrations",
        threads=str(merged.get("threads", "")),  # type: ignore[arg-type]
        hardware=str(merged.get("hardware", "")),
    )
    status = np.where(np.isnan(times), NOT_PLANNED, np.where(np.isinf(times), OUT_OF_MEMORY, OK))
    times = np.where(np.isfinite(times), times, np.nan)
    dataset = xr.Dataset(
        {
            "step_time": ((*dims, "repetition"), times[..., None]),
            "predicted_step_time": (dims, times),
            "status": (dims, status.astype(object)),
            "device_label": (("device_set", "device"), labels),
        },
        coords={
            "network": np.array(grid.networks, object),
            "batch_size": np.array(grid.batch_sizes),
            "device_set": np.array(grid.device_sets, object),
            "link": np.array(grid.links, object),
            "strategy": np.array(grid.strategies, object),
            "repetition": [0],
            "device": np.arange(most),
        },
        attrs={**attributes, "simulated": True},
    )
    validate_timing(dataset)
    return describe(dataset)

"""The devices a command runs on, what they can do, and how they train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import InputError
from pipeline.progress import Progress

if TYPE_CHECKING:
    import xarray as xr
    from distributed import Client
    from torch import nn

    from pipeline.cluster.devices import Member
    from pipeline.graph.operations import Graph
    from pipeline.plan.plan import Strategy
    from pipeline.stored_images import StoredImages


@contextmanager
def cluster(
    devices: str | None, scheduler: str | None, network: str | None = None
) -> Iterator[tuple[Client, tuple[Member, ...]]]:
    """A client, and the members to run on: the devices asked for, or all of the machine or the cluster.

    Raises:
        InputError: The devices are no device set or not there, the scheduler cannot be reached, or a worker cannot
            import the module of the network.
    """
    from pipeline.cluster.deployment import connect, local_cluster
    from pipeline.cluster.devices import discover, parse_device_set, select
    from pipeline.factories import check_workers

    wanted = parse_device_set(devices) if devices else None
    with connect(scheduler) if scheduler else local_cluster(wanted) as client:
        if client.dashboard_link:
            print(f"Dashboard: {client.dashboard_link}", flush=True)
        members = discover(client)
        chosen = select(members, wanted) if wanted else members
        if network is not None:
            check_workers(client, chosen, network)
        yield client, chosen


def checked_strategy(name: str) -> Strategy:
    """The strategy of that name; raises InputError, before anything has started, where there is none."""
    from pipeline.plan.plan import STRATEGIES

    found = next((strategy for strategy in STRATEGIES if strategy == name), None)
    if found is None:
        raise InputError(f"strategy '{name}' is unknown; the strategies are {', '.join(STRATEGIES)}")
    return found


def device_set_of(members: tuple[Member, ...]) -> str:
    """The canonical text of the members' devices."""
    from pipeline.cluster.devices import format_device_set

    return format_device_set([member.device for member in members])


def costs_of(
    path: Path | None,
    network: str,
    model: nn.Module,
    images: StoredImages,
    client: Client,
    members: tuple[Member, ...],
    batch_size: int,
    graph: Graph | None = None,
) -> xr.Dataset:
    """The calibration of the members, read or made; ``graph`` is that of the model, where it is known."""
    from pipeline.calibration.cache import cache_folder
    from pipeline.calibration.measure import calibrate
    from pipeline.calibration.subset import of_devices
    from pipeline.results.contracts import validate_calibration
    from pipeline.results.stores import open_zip
    from pipeline.run.launch import example_batch

    if path is not None:
        return of_devices(open_zip(path, validate_calibration), [member.device.label for member in members])
    example = example_batch(images)
    with Progress(f"calibrate {network}", None) as progress:
        found = calibrate(
            model, example, client, members=members, network=network, batch_size=batch_size, cache=cache_folder(),
            graph=graph, on_progress=progress,
        )  # fmt: skip
    say_if_cached(found)
    return found


def say_if_cached(calibration: xr.Dataset) -> None:
    """Tell the reader what was not measured just now."""
    if "cached" in calibration.attrs:
        print(f"Calibration of {calibration.attrs['created']} taken from the cache; `calibrate --force` measures anew.")
    elif known := int(calibration.attrs.get("known_segments", 0)):
        print(
            f"The curves of {known} of {calibration.sizes['segment']} segments are taken from other networks in the "
            "cache; `calibrate --force` measures all."
        )


def optimizer_of(learning_rate: float, momentum: float) -> Any:
    """A factory of gradient descent with momentum; travels to the workers."""
    from functools import partial

    import torch

    return partial(torch.optim.SGD, lr=learning_rate, momentum=momentum)

"""From a model, what its devices can do and a strategy to a plan."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import xarray as xr
from torch import nn

from pipeline.compiled import without_compiler
from pipeline.errors import InputError
from pipeline.graph.copies import model_dtype
from pipeline.graph.operations import Graph
from pipeline.graph.trace import trace
from pipeline.plan.checks import check_calibration, image_shape_of
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import Room, able_alone, check_memory, is_scarce, most_within_memory
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import STRATEGIES, Plan, Strategy
from pipeline.plan.prediction import predict_step
from pipeline.plan.search import fastest_plan
from pipeline.plan.strategies import Shares, plan_network

DOUBT = 0.05
"""About how much predictions err."""


def make_plan(model: nn.Module, calibration: xr.Dataset, *, batch_size: int, strategy: Strategy = "auto") -> Plan:
    """Plan ``model`` for the devices that ``calibration`` measured.

    Raises ``InputError`` for several calibrations or one of another network, an unknown strategy or a batch size below
    1.
    """
    model = without_compiler(model)
    graph = trace(model, torch.zeros(2, *image_shape_of(calibration)))
    labels = [str(label) for label in calibration.device_label.values]
    itemsize = model_dtype(model).itemsize
    return plan_graph(graph, calibration, batch_size=batch_size, strategy=strategy, labels=labels, itemsize=itemsize)


def plan_graph(
    graph: Graph,
    calibration: xr.Dataset | None,
    *,
    batch_size: int,
    strategy: Strategy,
    labels: Sequence[str],
    shares: Shares | None = None,
    links: Links | None = None,
    itemsize: int = 4,
    room: Room | None = None,
) -> Plan:
    """Plan a traced network for the devices called ``labels``, which ``calibration`` measured in this order.

    ``links`` (one case) stand for the measured ones. Without a calibration only ``ddp``, ``equal``, one device, or
    given ``shares`` are possible. With shares ``auto`` is ``kernel``, and on one device ``single``. The plan fits the
    ``room`` of the devices, which is what the calibration found, for gradient descent with momentum, unless given.
    Raises ``InputError`` as ``make_plan`` does.
    """
    if strategy not in STRATEGIES:
        raise InputError(f"strategy '{strategy}' is unknown; the strategies are {', '.join(STRATEGIES)}")
    costs = None
    if calibration is not None:
        check_calibration(calibration, graph, labels)
        costs = Costs.of(calibration)
        room = room or Room.of(costs.memory_left)
    if strategy == "auto" and costs is not None and len(labels) > 1 and shares is None:
        plan = fastest_plan(
            graph, costs, batch_size=batch_size, labels=labels, itemsize=itemsize, links=links, doubt=DOUBT, room=room
        )
    else:
        wanted = strategy
        if strategy == "auto":
            strategy = "single" if len(labels) == 1 else "kernel"
        plan = uniform_plan(graph, strategy, batch_size, labels, costs, shares, itemsize, room)
        if room is not None and is_scarce(graph, room, batch_size, itemsize=itemsize):

            def smaller(size: int) -> Plan:
                return uniform_plan(graph, strategy, size, labels, costs, shares, itemsize, room)

            # Only where shares are chosen here they can keep a distance; all else is as the user decided.
            decided = shares is not None or len(labels) == 1 or strategy not in ("kernel", "batch")
            check_memory(graph, plan, room, wanted=wanted, smaller=smaller, itemsize=itemsize, decided=decided)
    channels_last = costs is not None and costs.channels_last and plan.strategy != "ddp"
    return replace(plan, graph=graph, network_digest=graph.plan_digest, channels_last=channels_last)


def uniform_plan(
    graph: Graph,
    strategy: Strategy,
    batch_size: int,
    labels: Sequence[str],
    costs: Costs | None,
    shares: Shares | None = None,
    itemsize: int = 4,
    room: Room | None = None,
) -> Plan:
    """The plan of any strategy but ``auto``, for what the devices can hold where the strategy chooses.

    ``kernel`` and ``batch`` choose the shares, ``single`` the device, by the ``room`` there is, which ``costs`` tell
    unless given. Where nothing that may be chosen fits, the plan does not.
    """
    plan_with = functools.partial(plan_network, graph, strategy, batch_size=batch_size, labels=labels, costs=costs)
    chooses = strategy == "single" or (shares is None and strategy in ("kernel", "batch"))
    if costs is None or not chooses:
        return plan_with(shares=shares)
    room = room or Room.of(costs.memory_left)
    if not is_scarce(graph, room, batch_size, itemsize=itemsize):
        return plan_with(shares=shares)
    if strategy == "single":
        devices = able_alone(graph, room, batch_size, itemsize=itemsize)
        named = [labels[device] for device in devices]
        alone = plan_network(graph, strategy, batch_size=batch_size, labels=named, costs=costs.only(devices))
        return replace(alone, devices=tuple(devices[rank] for rank in alone.devices))
    return plan_with(most=most_within_memory(graph, plan_with, room, itemsize=itemsize))


def predicted_step_time(
    graph: Graph, plan: Plan, costs: Costs, *, itemsize: int = 4, links: Links | None = None
) -> float:
    """Predicted time of one step of ``plan`` in s, where ``costs`` are of all devices that it was made for."""
    chosen = costs.only(plan.devices)
    over = links and links.of(plan.devices)
    return float(predict_step(graph, plan, chosen, batch_size=plan.batch_size, itemsize=itemsize, links=over)[0])

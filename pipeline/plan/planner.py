"""From a model, what its devices can do and a strategy to a plan."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
import xarray as xr
from torch import nn

from pipeline.errors import InputError
from pipeline.graph.trace import Graph, trace
from pipeline.plan.costs import Costs
from pipeline.plan.plan import STRATEGIES, Plan, Strategy
from pipeline.plan.prediction import predict_step
from pipeline.plan.strategies import Shares, plan_network

CANDIDATES: tuple[Strategy, ...] = ("single", "paper", "kernel", "batch")
"""What ``auto`` chooses from, by predicted step time; all of them are exact."""


def make_plan(model: nn.Module, calibration: xr.Dataset, *, batch_size: int, strategy: Strategy = "auto") -> Plan:
    """Plan ``model`` for the devices that ``calibration`` measured.

    Raises ``InputError`` for a calibration of another network, an unknown strategy or a batch size below 1.
    """
    image_shape = json.loads(calibration.attrs["image_shape"])
    graph = trace(model, torch.zeros(2, *image_shape))
    labels = [str(label) for label in calibration.device_label.values]
    return plan_graph(graph, calibration, batch_size=batch_size, strategy=strategy, labels=labels)


def plan_graph(
    graph: Graph,
    calibration: xr.Dataset | None,
    *,
    batch_size: int,
    strategy: Strategy,
    labels: Sequence[str],
    shares: Shares | None = None,
    itemsize: int = 4,
) -> Plan:
    """Plan a traced network for the devices called ``labels``, which ``calibration`` measured in this order.

    Without a calibration only ``ddp``, ``equal``, one device, or given ``shares`` are possible; ``auto`` is then
    ``single`` on one device and ``kernel`` with shares. Raises ``InputError`` as ``make_plan`` does.
    """
    costs = None if calibration is None else Costs.of(calibration)
    if costs is not None:
        _check_fits(graph, costs, labels)
    if strategy not in STRATEGIES:
        raise InputError(f"strategy '{strategy}' is unknown; the strategies are {', '.join(STRATEGIES)}")

    def plan(one: Strategy) -> Plan:
        return plan_network(graph, one, batch_size=batch_size, labels=labels, costs=costs, shares=shares)

    if strategy != "auto":
        return plan(strategy)
    if costs is None or len(labels) == 1:
        return plan("single" if len(labels) == 1 else "kernel")
    plans = [plan(one) for one in CANDIDATES]
    return min(plans, key=lambda one: predicted_step_time(graph, one, costs, itemsize=itemsize))


def predicted_step_time(graph: Graph, plan: Plan, costs: Costs, *, itemsize: int = 4) -> float:
    """Predicted time of one step of ``plan`` in s, where ``costs`` are of all devices that it was made for."""
    return predict_step(graph, plan, costs.only(plan.devices), batch_size=plan.batch_size, itemsize=itemsize)


def _check_fits(graph: Graph, costs: Costs, labels: Sequence[str]) -> None:
    known = {name for segment in costs.segments for name in segment.split("+")}
    wanted = {operation.name for operation in graph.operations}
    if known != wanted:
        some = ", ".join(sorted(wanted ^ known)[:3])
        raise InputError(f"the calibration is of another network: the two differ in {some}")
    if costs.devices != len(labels):
        raise InputError(f"the calibration is of {costs.devices} devices, but there are {len(labels)}")

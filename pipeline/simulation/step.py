"""Simulate one training step of a plan: the timeline that a run would give, from a calibration alone."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr
from torch import nn

from pipeline.errors import InputError
from pipeline.graph.trace import trace
from pipeline.links import Link
from pipeline.plan.checks import check_calibration, check_plan, image_shape_of
from pipeline.plan.costs import Costs
from pipeline.plan.labels import DDP_LABELS, instruction_labels
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import Plan
from pipeline.plan.prediction import predict_step, predict_timeline
from pipeline.plan.program import compile_program
from pipeline.results.timeline import timeline_dataset


def simulate(
    plan: Plan,
    calibration: xr.Dataset,
    *,
    model: nn.Module | None = None,
    latency: float | None = None,
    bandwidth: float | None = None,
    itemsize: int = 4,
) -> xr.Dataset:
    """What one step of ``plan`` takes on the devices that ``calibration`` measured; the form is that of a run's timing.

    ``latency`` in s and ``bandwidth`` in bytes/s, given together, replace the measured links. A plan that was read from
    a file needs its ``model``. ``itemsize`` is the bytes per number. Returns ``step_time(step)`` of one step and its
    timeline, with the attribute ``simulated``; of ``ddp`` only the step is predicted, its timeline is NaN.

    Raises ``InputError`` for several calibrations or one of another network or of other devices, for a plan without its
    model or for another one, and for a negative latency or a bandwidth that is not positive.
    """
    graph = plan.graph
    if model is not None:
        graph = trace(model, torch.zeros(2, *image_shape_of(calibration)))
    if graph is None:
        raise InputError("the plan was read from a file and does not know its network: give simulate its model=")
    labels = [str(label) for label in calibration.device_label.values]
    check_calibration(calibration, graph, labels)
    check_plan(plan, graph, labels)
    links = None
    if latency is not None or bandwidth is not None:
        links = uniform_links(latency, bandwidth)
    chosen = Costs.of(calibration).only(plan.devices)
    words = instruction_labels(graph, plan, plan.batch_size)
    if plan.strategy == "ddp":
        end = predict_step(graph, plan, chosen, batch_size=plan.batch_size, itemsize=itemsize, links=links)
        # Its all-reduce runs within the backward pass, and only the whole is predicted.
        times, last = np.full((1, len(DDP_LABELS), plan.ranks, 2), np.nan), float(end[0])
    else:
        program = compile_program(graph, plan, plan.batch_size)
        times = predict_timeline(graph, plan, program, chosen, itemsize=itemsize, links=links)
        last = float(np.nanmax(times))
    dataset = timeline_dataset(words, plan.labels, np.array([[0.0, last]]), times, itemsize)
    return dataset.assign_attrs(simulated=True)


def uniform_links(latency: float | None, bandwidth: float | None) -> Links:
    """Links of one latency in s and bandwidth in bytes/s between all devices; raises ``InputError`` if impossible."""
    if latency is None or bandwidth is None:
        raise InputError("a link needs both a latency in s and a bandwidth in bytes/s")
    if not latency >= 0:
        raise InputError(f"latency {latency} s must not be negative")
    if not bandwidth > 0:
        raise InputError(f"bandwidth {bandwidth} bytes/s must be positive")
    return Links.one(Link(latency=latency, bandwidth=bandwidth))

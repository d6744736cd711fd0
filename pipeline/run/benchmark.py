"""Time one cell of the grid: warm-up, synchronised steps, raw repetitions, and where each device spent its time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from distributed import Client
from torch import nn
from torch.utils.data import Dataset

from pipeline.cluster.devices import Member
from pipeline.errors import InputError, RunError
from pipeline.graph.trace import Graph, trace
from pipeline.links import parse_link
from pipeline.plan.costs import Costs
from pipeline.plan.labels import instruction_labels
from pipeline.plan.link_cases import Links
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import plan_graph, predicted_step_time
from pipeline.plan.prediction import predict_timeline
from pipeline.plan.program import compile_program
from pipeline.results.contracts import FAILED, OK, OUT_OF_MEMORY, CellIndex, describe, unmeasured_cell, validate_cell
from pipeline.results.timeline import busy_times, label_variables
from pipeline.run.batches import batch_indices
from pipeline.run.launch import PLAIN, SGD, OnProgress, example_batch, run_plan
from pipeline.run.recipe import OptimizerFactory
from pipeline.run.timeline import merged_losses, stacked
from pipeline.run.worker import Account

MOST_STEPS = 40
"""Of one cell, unless more repetitions are asked for."""


def measure_cell(
    *,
    model: nn.Module,
    dataset: Dataset[Any],
    client: Client,
    members: Sequence[Member],
    network: str,
    batch_size: int,
    device_set: str,
    strategy: Strategy,
    calibration: xr.Dataset,
    believed: xr.Dataset | None = None,
    link: str = "loopback",
    repetitions: int = 5,
    seconds: float = 0.0,
    warmup: int = 2,
    seed: int = 0,
    optimizer: OptimizerFactory = SGD,
    on_progress: OnProgress | None = None,
) -> xr.Dataset:
    """Time ``repetitions`` training steps of ``model`` after ``warmup`` others, as one cell of the grid.

    Short steps are timed more often, up to ``MOST_STEPS`` times, until so many ``seconds`` are predicted to be timed:
    other work of a host comes in bursts, which a few short steps are either in or not. Of ``single`` the convolutions
    are timed in as many more steps as there are ``repetitions``.

    ``members`` are the devices of ``device_set``, which ``calibration`` measured in this order; a ``link`` other than
    loopback is emulated between them. A calibration ``believed`` in its place makes the plan, whose time is still
    predicted from ``calibration``. A run that fails or runs out of memory gives a cell whose status says so. Raises
    ``InputError`` for a batch larger than the data set, a calibration of something else, or repetitions below 1.
    """
    if repetitions < 1 or warmup < 0:
        raise InputError(f"repetitions {repetitions} must be at least 1, and warm-up steps {warmup} at least 0")
    if not 0 <= seconds < math.inf:
        raise InputError(f"seconds {seconds} must be at least 0 s, and finite")
    images = len(dataset)  # type: ignore[arg-type]
    if batch_size > images:
        raise InputError(f"batch size {batch_size} is larger than the data set, which has {images} images")
    graph = trace(model, example_batch(dataset))
    labels = [member.device.label for member in members]
    emulated = parse_link(link)
    if emulated is not None and (
        len({one.host for one in members}) > 1 or any(one.device.kind != "cpu" for one in members)
    ):
        raise InputError(
            f"link {link} can only be emulated between CPU devices of one host: use loopback, or only these"
        )
    links = None if emulated is None else Links.one(emulated)
    planned_from = calibration if believed is None else believed
    plan = plan_graph(graph, planned_from, batch_size=batch_size, strategy=strategy, labels=labels, links=links)
    index = CellIndex(network, batch_size, device_set, link, strategy)
    predicted = predicted_step_time(graph, plan, Costs.of(calibration), links=links)
    timed = max(repetitions, math.ceil(min(seconds / predicted, MOST_STEPS)) if predicted > 0 else 0)
    try:
        accounts = run_plan(
            client, members, plan, graph, model, dataset,
            recipe=replace(PLAIN, optimizer=optimizer),
            indices=_full_batches(images, batch_size, warmup + timed, seed), seed=seed,
            label=f"{strategy} {network}", link=emulated, synchronised=True,
            profiled=repetitions if strategy == "single" else 0, keep_weights=False, keep_steps=timed,
            on_progress=None if on_progress is None else partial(_of_total, on_progress, warmup + timed),
        )  # fmt: skip
    except (RunError, torch.OutOfMemoryError, MemoryError) as error:
        return unmeasured_cell(index, [labels[device] for device in plan.devices], _status(error))
    return _cell(index, graph, plan, Costs.of(calibration), links, accounts, timed)


def _of_total(on_progress: OnProgress, total: int, done: int, values: dict[str, float]) -> None:
    on_progress(done, {"total": total, **values})


def _full_batches(images: int, batch_size: int, steps: int, seed: int) -> list[list[list[int]]]:
    """One epoch of ``steps`` full batches, going through the data as often as need be."""
    full = images - images % batch_size
    epochs = -(-steps * batch_size // full)
    found = batch_indices(images, batch_size, epochs=epochs + 1, max_steps=None, shuffle=True, seed=seed)
    batches = [batch for epoch in found for batch in epoch if len(batch) == batch_size]
    return [batches[:steps]]


def _status(error: BaseException) -> str:
    """The status of a cell that gave no times; memory is told apart because it answers a question of its own."""
    reason = " ".join(str(error).split())
    words = reason.lower()
    memory = any(sign in words for sign in ("out of memory", "outofmemory", "can't allocate memory", "memoryerror"))
    return f"{OUT_OF_MEMORY if memory else FAILED}: {reason}"


def _cell(
    index: CellIndex,
    graph: Graph,
    plan: Plan,
    costs: Costs,
    links: Links | None,
    accounts: Sequence[Account],
    repetitions: int,
) -> xr.Dataset:
    labels = instruction_labels(graph, plan, plan.batch_size)
    steps, times = stacked(accounts)
    convolution = np.full(repetitions, np.nan)
    convolution[repetitions - len(accounts[0].convolutions) :] = accounts[0].convolutions
    relative = times[-1] - steps[-1, 0]
    predicted = np.full(relative.shape, np.nan)
    if plan.strategy != "ddp":
        program, over = compile_program(graph, plan, plan.batch_size), links and links.of(plan.devices)
        predicted = predict_timeline(graph, plan, program, costs.only(plan.devices), links=over)[0]
    throughput = costs.throughputs(plan.batch_size)[list(plan.devices)]
    cell = xr.Dataset(
        {
            "step_time": ("repetition", steps[:, 1] - steps[:, 0]),
            "loss": ("repetition", merged_losses(accounts)[-repetitions:]),
            "convolution_time": ("repetition", convolution),
            "predicted_step_time": predicted_step_time(graph, plan, costs, links=links),
            "status": OK,
            "device_label": ("device", np.array(plan.labels, dtype=object)),
            "device_throughput": ("device", throughput),
            "share": ("device", np.array(plan.convolution_shares(graph))),
            "peak_memory": ("device", np.array([float(account.peak_memory) for account in accounts])),
            **label_variables(labels, itemsize=4),
            "instruction_start": (("instruction", "device"), relative[..., 0]),
            "instruction_end": (("instruction", "device"), relative[..., 1]),
            "predicted_start": (("instruction", "device"), predicted[..., 0]),
            "predicted_end": (("instruction", "device"), predicted[..., 1]),
            "predicted_memory": ("device", predict_memory(graph, plan)),
        },
        coords={
            **index._asdict(),
            "device": np.arange(len(accounts)),
            "repetition": np.arange(repetitions),
            "instruction": np.arange(len(labels)),
        },
    )
    for name, time_DR in busy_times(labels, times, steps).items():
        cell[name] = (("device", "repetition"), time_DR)
    validate_cell(cell)
    return describe(cell)

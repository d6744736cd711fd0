"""From what the ranks measured to labelled data: step times, the timeline, and where each device spent its time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.graph.trace import Graph
from pipeline.plan.instructions import Compute, Exchange, Instruction
from pipeline.plan.plan import Plan
from pipeline.plan.program import compile_program
from pipeline.results.contracts import describe
from pipeline.run.ddp import INSTRUCTIONS
from pipeline.run.worker import Account


class InstructionLabel(NamedTuple):
    """An instruction in words."""

    name: str
    kind: str
    phase: str
    elements: int
    """Numbers that travel between ranks."""


def instruction_labels(graph: Graph, plan: Plan, batch_size: int) -> list[InstructionLabel]:
    """The instructions of one step of ``plan`` in order."""
    if plan.strategy == "ddp":
        return [InstructionLabel(*one, 0) for one in INSTRUCTIONS]
    return [_label(one) for one in compile_program(graph, plan, batch_size).instructions]


def _label(instruction: Instruction) -> InstructionLabel:
    if isinstance(instruction, Exchange):
        return InstructionLabel(instruction.name, "exchange", instruction.direction, instruction.elements)
    if isinstance(instruction, Compute):
        return InstructionLabel(instruction.name, "compute", instruction.direction, 0)
    return InstructionLabel(instruction.name, "update", "update", 0)


def stacked(accounts: Sequence[Account]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Start and end of the kept steps over all ranks, (step, 2), and of instructions, (step, instruction, rank, 2)."""
    times = np.stack([account.times for account in accounts], axis=2)
    kept = len(times)
    steps = np.stack([account.steps[-kept:] for account in accounts])
    return np.stack([steps[:, :, 0].min(axis=0), steps[:, :, 1].max(axis=0)], axis=-1), times


def merged_losses(accounts: Sequence[Account]) -> NDArray[np.float64]:
    """The loss of every step, (step); weighted by images where ranks have their own (``ddp``)."""
    told = [account for account in accounts if account.losses]
    losses, images = (np.array([getattr(account, name) for account in told]) for name in ("losses", "images"))
    merged: NDArray[np.float64] = (losses * images).sum(axis=0) / images.sum(axis=0)
    return merged


def busy_times(
    labels: Sequence[InstructionLabel], times: NDArray[np.float64], steps: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Seconds that each rank spent computing, exchanging and idle, each (rank, step).

    Within an exchange a rank is idle until the last of those that take part has come to it, and exchanges from then on;
    outside of instructions it is idle. An update counts as computing. ``times`` are (step, instruction, rank, 2) and
    ``steps`` (step, 2), as ``stacked`` gives them.
    """
    is_exchange = np.array([label.kind == "exchange" for label in labels])
    start, end = times[..., 0], times[..., 1]
    compute = np.nansum((end - start)[:, ~is_exchange], axis=1)
    begin = np.fmax.reduce(start, axis=2, keepdims=True)
    exchange = np.nansum(np.clip(end - np.maximum(start, begin), 0, None)[:, is_exchange], axis=1)
    idle = np.clip((steps[:, 1] - steps[:, 0])[:, None] - compute - exchange, 0, None)
    return {"compute_time": compute.T, "exchange_time": exchange.T, "idle_time": idle.T}


def timing_dataset(
    graph: Graph, plan: Plan, batch_size: int, accounts: Sequence[Account], itemsize: int = 4
) -> xr.Dataset:
    """``step_time(step)`` of all steps, and the timeline of the last ones by instruction and device.

    Steps are the master's: a rank that has little to do in a training may be ahead by more than a step.
    """
    labels = instruction_labels(graph, plan, batch_size)
    starts, ends = accounts[0].steps.T
    _, times = stacked(accounts)
    kept = np.arange(len(starts))[len(starts) - len(times) :]
    relative = times - starts[kept, None, None, None]
    dataset = xr.Dataset(
        {
            "step_time": ("step", ends - starts),
            **label_variables(labels, itemsize),
            "device_label": ("device", np.array(plan.labels, dtype=object)),
            "instruction_start": (("kept_step", "instruction", "device"), relative[..., 0]),
            "instruction_end": (("kept_step", "instruction", "device"), relative[..., 1]),
        },
        coords={
            "step": np.arange(len(starts)),
            "kept_step": kept,
            "device": np.arange(len(accounts)),
            "instruction": np.arange(len(labels)),
        },
    )
    return describe(dataset)


def label_variables(labels: Sequence[InstructionLabel], itemsize: int) -> dict[str, tuple[str, NDArray[Any]]]:
    """The words and bytes of each instruction as variables of a data set."""
    columns: dict[str, tuple[str, NDArray[Any]]] = {
        f"instruction_{field}": ("instruction", np.array([getattr(label, field) for label in labels], dtype=object))
        for field in ("name", "kind", "phase")
    }
    sizes = np.array([float(label.elements * itemsize) for label in labels])
    return {**columns, "instruction_bytes": ("instruction", sizes)}

"""From what the ranks measured to labelled data: step times, the timeline, and the losses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.graph.operations import Graph
from pipeline.plan.labels import instruction_labels
from pipeline.plan.plan import Plan
from pipeline.results.contracts import describe
from pipeline.results.timeline import timeline_dataset
from pipeline.run.worker import Account


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


def timing_dataset(
    graph: Graph, plan: Plan, batch_size: int, accounts: Sequence[Account], itemsize: int = 4
) -> xr.Dataset:
    """``step_time(step)`` of all steps, the timeline of the last by instruction and device, ``peak_memory(device)``.

    Steps are the master's: a rank that has little to do in a training may be ahead by more than a step.
    """
    labels = instruction_labels(graph, plan, batch_size)
    _, times = stacked(accounts)
    dataset = timeline_dataset(labels, plan.labels, accounts[0].steps, times, itemsize)
    peaks = ("device", np.array([float(account.peak_memory) for account in accounts]))
    return describe(dataset.assign(peak_memory=peaks))

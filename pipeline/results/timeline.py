"""Timelines as labelled data, measured and simulated ones alike: when each instruction ran on each device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.plan.labels import InstructionLabel
from pipeline.results.contracts import describe


def timeline_dataset(
    labels: Sequence[InstructionLabel],
    devices: Sequence[str],
    steps: NDArray[np.float64],
    times: NDArray[np.float64],
    itemsize: int,
) -> xr.Dataset:
    """``step_time(step)`` of all steps, and the timeline of the last ones by instruction and device.

    ``steps`` are the start and end of every step in s, (step, 2); ``times`` those of the instructions of the last,
    (step, instruction, device, 2), NaN where a device took no part.
    """
    starts, ends = steps.T
    kept = np.arange(len(starts))[len(starts) - len(times) :]
    relative = times - starts[kept, None, None, None]
    dataset = xr.Dataset(
        {
            "step_time": ("step", ends - starts),
            **label_variables(labels, itemsize),
            "device_label": ("device", np.array(devices, dtype=object)),
            "instruction_start": (("kept_step", "instruction", "device"), relative[..., 0]),
            "instruction_end": (("kept_step", "instruction", "device"), relative[..., 1]),
        },
        coords={
            "step": np.arange(len(starts)),
            "kept_step": kept,
            "device": np.arange(len(devices)),
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
    for name in ("elements", "master_elements"):
        sizes = np.array([float(getattr(label, name) * itemsize) for label in labels])
        columns[f"instruction_{name.replace('elements', 'bytes')}"] = ("instruction", sizes)
    return columns


def busy_times(
    labels: Sequence[InstructionLabel], times: NDArray[np.float64], steps: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Seconds that each rank spent computing, exchanging and idle, each (rank, step).

    Within an exchange a rank is idle until the last of those that take part has come to it, and exchanges from then on;
    outside of instructions it is idle. An update counts as computing. ``times`` are (step, instruction, rank, 2) and
    ``steps`` (step, 2) in s.
    """
    is_exchange = np.array([label.kind == "exchange" for label in labels])
    start, end = times[..., 0], times[..., 1]
    compute = np.nansum((end - start)[:, ~is_exchange], axis=1)
    begin = np.fmax.reduce(start, axis=2, keepdims=True)
    exchange = np.nansum(np.clip(end - np.maximum(start, begin), 0, None)[:, is_exchange], axis=1)
    idle = np.clip((steps[:, 1] - steps[:, 0])[:, None] - compute - exchange, 0, None)
    return {"compute_time": compute.T, "exchange_time": exchange.T, "idle_time": idle.T}

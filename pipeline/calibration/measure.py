"""Measure what devices and links can do: the time of each segment against its share, of messages against their size.

All devices measure the same thing at the same time, so what they take from each other (memory bandwidth, caches, turbo)
is in the numbers, as it will be in training.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from distributed import Client
from numpy.typing import NDArray
from torch import nn

from pipeline.calibration.worker import LINK_BYTES, Chain, Measurement, Task, measure_rank
from pipeline.cluster.devices import Member, discover
from pipeline.cluster.gang import run_gang
from pipeline.graph.effects import Effect
from pipeline.graph.trace import Graph, Operation, trace
from pipeline.plan.ties import bound
from pipeline.results.contracts import describe, validate_calibration
from pipeline.results.provenance import provenance

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
_FLOPS_PER_STEP = 6e10
"""A calibration uses as many images as make a step of about this much work (a third of a second on a CPU core)."""
_LEAST_IMAGES = 4


def calibrate(
    model: nn.Module,
    example_input: torch.Tensor,
    client: Client,
    *,
    members: Sequence[Member] | None = None,
    network: str = "",
    batch_size: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    repetitions: int = 3,
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
) -> xr.Dataset:
    """Measure every segment of ``model`` on every device at several shares, and every link.

    ``example_input`` is a batch ``x_BCHW``; it gives the shape of the images and, unless ``batch_size`` is given, the
    number for which the times are wanted. Networks with much work per image are measured with fewer images, and the
    data set says with how many. Returns the calibration data set of ``pipeline.results.contracts``.

    Raises ``InputError`` if the model does not take such images and ``RunError`` when a device is lost.
    """
    chosen = tuple(members or discover(client))
    graph = trace(model, example_input)
    images = calibration_images(graph, batch_size or len(example_input))
    chains = tuple(chains_of(graph))
    task = Task(
        model=copy.deepcopy(model).to("meta"),
        graph=graph,
        chains=chains,
        images=images,
        fractions=tuple(sorted(set(fractions) | {1.0})),
        repetitions=repetitions,
    )
    label = f"calibrate {network or type(model).__name__}"
    measured: list[Measurement] = run_gang(
        client, chosen, measure_rank, [(task,)] * len(chosen), label=label, on_progress=on_progress
    )
    dataset = _dataset(task, chosen, measured, network or type(model).__name__)
    validate_calibration(dataset)
    return dataset


def calibration_images(graph: Graph, batch_size: int) -> int:
    """How many images a calibration for ``batch_size`` uses."""
    work = 3 * sum(operation.flops_per_image for operation in graph.operations)
    return max(1, min(batch_size, max(_LEAST_IMAGES, int(_FLOPS_PER_STEP / max(work, 1)))))


def chains_of(graph: Graph) -> list[Chain]:
    """The segments to measure: every convolution and dense layer by itself, and what lies between them together.

    What gives or takes values that are no tensors of images, which cannot be made up, stays together.
    """
    place = {operation.name: index for index, operation in enumerate(graph.operations)}
    together = bound(graph)
    chains: list[list[Operation]] = []
    open_until = -1
    for index, operation in enumerate(graph.operations):
        begins = not chains or _is_alone(operation) or _is_alone(chains[-1][0])
        differs = bool(chains) and _is_splittable(operation) != _is_splittable(chains[-1][-1])
        if index > open_until and (begins or differs):
            chains.append([])
        chains[-1].append(operation)
        open_until = max(open_until, *(place[name] for name in together[operation.name]))
    return [_chain(graph, operations) for operations in chains]


def _is_alone(operation: Operation) -> bool:
    return operation.effect in (Effect.KERNEL, Effect.GROUPED)


def _is_splittable(operation: Operation) -> bool:
    return operation.effect not in (Effect.WHOLE, Effect.IMAGEWISE)


def _chain(graph: Graph, operations: Sequence[Operation]) -> Chain:
    inside = {operation.name for operation in operations}
    inputs = {value for operation in operations for value in operation.inputs if value not in inside}
    used = {value for operation in graph.operations if operation.name not in inside for value in operation.inputs}
    outputs = [name for name in (one.name for one in operations) if name in used | set(graph.outputs)]
    return Chain(
        operations=tuple(operation.name for operation in operations),
        inputs=tuple(sorted(inputs)),
        outputs=tuple(outputs),
        splittable=all(_is_splittable(operation) for operation in operations),
    )


@dataclass(frozen=True)
class _Link:
    """Latency in s and bandwidth in bytes/s of one link."""

    latency: float
    bandwidth: float


def link_of(time_MR: NDArray[np.float64], sizes: Sequence[int]) -> _Link:
    """Latency and bandwidth from the median times of messages of ``sizes`` bytes, (message, repetition) in s.

    The smallest message gives the latency, the largest what is left for its bytes.
    """
    median = np.median(time_MR, axis=1)
    moving = max(float(median[-1] - median[0]), 1e-9)
    return _Link(latency=float(median[0]), bandwidth=(sizes[-1] - sizes[0]) / moving)


def _dataset(task: Task, members: Sequence[Member], measured: Sequence[Measurement], network: str) -> xr.Dataset:
    ranks = len(members)
    link_time = np.full((ranks, ranks, len(LINK_BYTES), task.repetitions), np.nan)
    for rank, one in enumerate(measured):
        for other, time_MR in one.links.items():
            link_time[rank, other] = link_time[other, rank] = time_MR
    latency, bandwidth = np.zeros((ranks, ranks)), np.full((ranks, ranks), np.inf)
    for source, destination in zip(*np.nonzero(~np.eye(ranks, dtype=bool)), strict=True):
        link = link_of(link_time[source, destination], LINK_BYTES)
        latency[source, destination], bandwidth[source, destination] = link.latency, link.bandwidth
    segment_dims = ("device", "segment", "share", "repetition")
    dataset = xr.Dataset(
        {
            "forward_time": (segment_dims, np.stack([one.forward for one in measured])),
            "backward_time": (segment_dims, np.stack([one.backward for one in measured])),
            "kernels": (("segment", "share"), measured[0].kernels),
            "update_time": (("device", "repetition"), np.stack([one.update for one in measured])),
            "device_label": ("device", np.array([member.device.label for member in members], dtype=object)),
            "link_time": (("source", "destination", "message_bytes", "repetition"), link_time),
            "link_latency": (("source", "destination"), latency),
            "link_bandwidth": (("source", "destination"), bandwidth),
        },
        coords={
            "network": network,
            "batch_size": task.images,
            "device": np.arange(ranks),
            "segment": np.array([chain.name for chain in task.chains], dtype=object),
            "share": np.array(task.fractions),
            "repetition": np.arange(task.repetitions),
            "source": np.arange(ranks),
            "destination": np.arange(ranks),
            "message_bytes": np.array(LINK_BYTES),
        },
        attrs=provenance(
            {"fractions": task.fractions, "repetitions": task.repetitions, "images": task.images, "network": network},
            emulated=any(member.device.emulated for member in members),
            data="random numbers",
            threads={member.name: member.device.threads for member in members},
            hardware=[member.hardware for member in members],
        ),
    )
    dataset.attrs["image_shape"] = json.dumps(task.graph.input_shape)
    return describe(dataset)

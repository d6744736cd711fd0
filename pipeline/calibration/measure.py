"""Measure what devices and links can do: the time of each segment against its share, of messages against their size.

All devices measure the same thing at the same time, so what they take from each other (memory bandwidth, caches, turbo)
is in the numbers, as it will be in training.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from distributed import Client
from numpy.typing import NDArray
from torch import nn

from pipeline.calibration.attribution import fitted
from pipeline.calibration.cache import Curves, cached
from pipeline.calibration.links import LINK_BYTES, TURN_BYTES, link_of
from pipeline.calibration.probes import MOST_STEPS, PROBES, Probed, Probing, probe_rank, probing
from pipeline.calibration.segments import Chain, chains_of, geometry
from pipeline.calibration.skeletons import skeleton_of
from pipeline.calibration.worker import Measurement, Task, measure_rank, split_plan
from pipeline.cluster.devices import Member, discover
from pipeline.cluster.gang import run_gang
from pipeline.compiled import without_compiler
from pipeline.errors import InputError, LostDeviceError, RunError, first_line
from pipeline.graph.copies import Inputs
from pipeline.graph.operations import Graph
from pipeline.graph.trace import trace
from pipeline.plan.costs import LAYOUTS
from pipeline.plan.instructions import COMPANIES
from pipeline.plan.measurements import check_numbers
from pipeline.results.contracts import describe, validate_calibration
from pipeline.results.provenance import provenance
from pipeline.run.parts import check_portable

FRACTIONS = (1 / 32, 0.125, 0.25, 0.5, 1.0)
_FLOPS_PER_STEP = 3e10
"""A calibration uses as many images as make a step of about this much work (some 0.2 to 0.6 s on a CPU core)."""
_LEAST_IMAGES = 4
_OF_A_SEGMENT = (
    "forward_time", "backward_time", "input_gradient_time", "forward_time_alone", "backward_time_alone",
    "forward_time_by_images", "backward_time_by_images",
)  # fmt: skip
_PROBED = 0.5
"""Real steps take about so much of the time that everything before them took."""
_PASSES = 2
"""How many more times at most what is uncertain is measured."""


class CalibrationWarning(UserWarning):
    """A calibration that can be used, but tells less than it should."""


def calibrate(
    model: nn.Module,
    example_input: Any,
    client: Client,
    *,
    members: Sequence[Member] | None = None,
    network: str = "",
    batch_size: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    repetitions: int = 2,
    cache: str | Path | None = None,
    force: bool = False,
    graph: Graph | None = None,
    on_progress: Callable[[int, dict[str, float]], None] | None = None,
) -> xr.Dataset:
    """Measure every segment of ``model`` on every device at several shares, and every link.

    ``example_input`` is a batch ``x_BCHW``; it gives the shape of the images and, unless ``batch_size`` is given, the
    largest number for which the times are wanted. Everything is measured with two numbers of images, fewer than that
    for a network with much work per image, since time is a line over the images; a slow device does shares beyond its
    own of the whole with the smaller number only. Segments that do the same work are measured once; ``repetitions``
    hold for all, and what is uncertain by enough to matter gets more. ``cache`` is a folder in which calibrations are
    kept and looked for, also of other networks for segments that do the same work; ``force`` measures in any case, and
    everything. ``graph`` is that of the model for such images, where it is known. Returns the calibration data set of
    ``pipeline.results.contracts``.

    Raises ``InputError`` if the model does not take such images and ``RunError`` when a device is lost.
    """
    chosen = tuple(members or discover(client))
    model = without_compiler(model)
    graph = graph or trace(model, example_input)
    chains = chains_of(graph)
    plan = split_plan(graph, 0.5)
    works = [geometry(graph, plan, chain) for chain in chains]
    alike = [works.index(work) for work in works]
    first = list(dict.fromkeys(alike))
    kinds = [(member.device.label, member.host) for member in chosen]
    task = Task(
        model=skeleton_of(model),
        modules={part: _portable_skeleton(model, part) for part in graph.submodules},
        graph=graph,
        cuts=frozenset(chain.operations[0] for chain in chains),
        chains=tuple(chains[index] for index in first),
        weights=tuple(alike.count(index) for index in first),
        images=calibration_images(graph, batch_size or Inputs.of(example_input).images),
        fractions=tuple(sorted(set(fractions) | {1.0})),
        repetitions=repetitions,
        passes=_PASSES,
        alone=tuple(kinds.index(kind) for kind in dict.fromkeys(kinds)),
    )
    name = network or type(model).__name__

    def measure(curves: Curves) -> xr.Dataset:
        start = time.perf_counter()
        todo = replace(task, known={order: _known(curves, [works[one] for one in first], order) for order in (0, 1)})
        measured: list[Measurement] = run_gang(
            client, chosen, measure_rank, [(todo,)] * len(chosen), label=f"calibrate {name}", on_progress=on_progress
        )
        everywhere = [first.index(index) for index in alike]
        dataset = _dataset(task, chains, everywhere, chosen, measured, name)
        dataset = _with_curves(dataset.assign(work=("segment", np.array(works, dtype=object))), curves)
        probes = replace(
            probing(task.model, task.modules, graph, dataset), enough=_PROBED * (time.perf_counter() - start)
        )
        dataset = _with_probes(dataset, probes, client, chosen, name)
        dataset = describe(dataset.assign(calibration_time=time.perf_counter() - start))
        validate_calibration(dataset)
        return _usable(dataset, graph, name)

    if cache is None:
        found = measure({})
    else:
        names = [chain.name for chain in chains]
        found = cached(
            Path(cache), names, works, chosen, task.images, task.fractions, repetitions, measure, force=force
        )
    # Of a network that does the same work the cache may have a calibration, but not what this one is called.
    return found.assign_coords(network=name).assign_attrs(network_digest=graph.digest)


def _portable_skeleton(model: nn.Module, part: str) -> bytes:
    """The skeleton of a part that runs as it is; raises ``InputError`` where nothing can carry it."""
    module = model.get_submodule(part)
    check_portable(module, f"{part or 'the model'} ({type(module).__name__}) has to run as it is, and")
    found = skeleton_of(module)
    if found is None:
        raise InputError(f"{part or 'the model'} ({type(module).__name__}) cannot be copied without its weights")
    return found


def _known(curves: Curves, works: Sequence[str], order: int) -> frozenset[int]:
    """Which of the segments with these geometries are known with the channels in this order in memory."""
    return frozenset(
        index
        for index, work in enumerate(works)
        if work in curves and int(curves[work].attrs["channels_last"]) == order
    )


def _with_curves(dataset: xr.Dataset, curves: Curves) -> xr.Dataset:
    """The calibration with the curves of those segments that were not measured because they are known."""
    filled, order, reused = dataset.copy(deep=True), dataset.attrs["channels_last"], 0
    for place, work in enumerate(map(str, dataset.work.values)):
        if work not in curves or int(curves[work].attrs["channels_last"]) != order:
            continue
        reused += 1
        for name in _OF_A_SEGMENT:
            values = curves[work][name].transpose(*(dim for dim in dataset[name].dims if dim != "segment")).values
            made = _padded(values, dataset.sizes["repetition"], axis=values.ndim - 1)
            filled[name].loc[{"segment": dataset.segment[place]}] = made
    return filled.assign_attrs(known_segments=reused)


def _with_probes(
    dataset: xr.Dataset, probes: Probing, client: Client, members: Sequence[Member], name: str
) -> xr.Dataset:
    """The calibration with what real steps tell; as it is, with a warning, where they fail on devices still there."""
    try:
        found: list[Probed] = run_gang(client, members, probe_rank, [(probes,)] * len(members), label=f"probe {name}")
    except LostDeviceError:
        raise
    except RunError as error:
        warnings.warn(
            f"the real steps that end the calibration of {name} failed, so predictions do without them: "
            f"{first_line(error)}",
            CalibrationWarning,
            stacklevel=2,
        )
        return dataset.assign_attrs(incomplete=1)
    made = dataset.sizes["repetition"]
    dataset["probe_step_time"] = ("probe", "repetition"), _padded(found[0].steps, made, axis=1)
    busy = _padded(np.stack([one.busy for one in found], axis=1), made, axis=2)
    dataset["probe_busy_time"] = ("probe", "device", "repetition"), busy
    return fitted(dataset, probes)


def _usable(dataset: xr.Dataset, graph: Graph, name: str) -> xr.Dataset:
    """The calibration; where no plan would take its numbers, with a warning, and not to be kept for the next time."""
    try:
        check_numbers(dataset, graph)
    except InputError as error:
        warnings.warn(
            f"the calibration of {name} is not kept, as no plan can be made of it: {error}",
            CalibrationWarning,
            stacklevel=2,
        )
        return dataset.assign_attrs(incomplete=1)
    return dataset


def calibration_images(graph: Graph, batch_size: int) -> tuple[int, ...]:
    """With how many images a calibration for up to ``batch_size`` measures: a few, and several times as many."""
    work = 3 * sum(operation.flops_per_image for operation in graph.operations)
    most = max(1, min(batch_size, max(_LEAST_IMAGES, int(_FLOPS_PER_STEP / max(work, 1)))))
    return tuple(sorted({max(1, most // 4), most}))


def _dataset(
    task: Task,
    chains: Sequence[Chain],
    everywhere: Sequence[int],
    members: Sequence[Member],
    measured: Sequence[Measurement],
    network: str,
) -> xr.Dataset:
    ranks = len(members)
    one = measured[0].links
    repetitions = max(times.shape[-1] for times in one.values()) if one else 0
    link_time = np.full((ranks, ranks, len(LINK_BYTES), repetitions), np.nan)
    for rank, measurement in enumerate(measured):
        for other, times in measurement.links.items():
            link_time[rank, other], link_time[other, rank] = times
    latency, bandwidth = np.zeros((ranks, ranks)), np.full((ranks, ranks), np.inf)
    for source, destination in zip(*np.nonzero(~np.eye(ranks, dtype=bool)), strict=True):
        link = link_of(link_time[source, destination], LINK_BYTES)
        latency[source, destination], bandwidth[source, destination] = link.latency, link.bandwidth
    times = np.stack([measurement.times for measurement in measured])[:, everywhere]
    made = max(int(np.isfinite(times).any(axis=(0, 1, 2, 3, 5)).sum()), repetitions, MOST_STEPS)
    times = _padded(times, made, axis=4)
    alone = _padded(np.stack([one.alone for one in measured])[:, everywhere], made, axis=2)
    by_images = _padded(np.stack([one.by_images for one in measured])[:, everywhere], made, axis=2)
    calls = _padded(np.stack([one.calls for one in measured]), made, axis=1)
    resuming = _padded(np.stack([one.turns.resuming for one in measured]), made, axis=1)
    update = np.stack([one.update for one in measured])
    segment_dims = ("device", "segment", "share", "images", "repetition")
    dataset = xr.Dataset(
        {
            "forward_time": (segment_dims, times[..., 0]),
            "backward_time": (segment_dims, times[..., 1]),
            "input_gradient_time": (segment_dims, times[..., 2]),
            "forward_time_alone": (("device", "segment", "repetition"), alone[..., 0]),
            "backward_time_alone": (("device", "segment", "repetition"), alone[..., 1]),
            "forward_time_by_images": (("device", "segment", "repetition"), by_images[..., 0]),
            "backward_time_by_images": (("device", "segment", "repetition"), by_images[..., 1]),
            "forward_call_time": (("device", "repetition"), calls[..., 0]),
            "backward_call_time": (("device", "repetition"), calls[..., 1]),
            "forward_resuming_time": (("device", "repetition"), resuming[..., 0]),
            "backward_resuming_time": (("device", "repetition"), resuming[..., 1]),
            "kernels": (("segment", "share"), measured[0].kernels[everywhere]),
            "update_overhead": (("device", "repetition"), _padded(update[..., 0], made, axis=1)),
            "update_time": (("device", "repetition"), _padded(update[..., 1], made, axis=1)),
            "update_time_alone": (("device", "repetition"), _padded(update[..., 2], made, axis=1)),
            "device_label": ("device", np.array([member.device.label for member in members], dtype=object)),
            "link_time": (("source", "destination", "message_bytes", "repetition"), _padded(link_time, made, axis=3)),
            "turn_time": (("turn_bytes", "repetition"), _padded(measured[0].turns.waiting, made, axis=1)),
            "turn_growth": ("company", np.full(len(COMPANIES), measured[0].turns.growing)),
            "summing_time": 0.0,
            "reducing_time": 0.0,
            "beginning_time": 0.0,
            "probe_step_time": (("probe", "repetition"), np.full((len(PROBES), made), np.nan)),
            "probe_busy_time": (("probe", "device", "repetition"), np.full((len(PROBES), ranks, made), np.nan)),
            "stretch": (("device", "layout"), np.ones((ranks, len(LAYOUTS)))),
            "process_memory": ("device", [float(one.process_memory) for one in measured]),
            "memory_limit": ("device", [float(member.memory) for member in members]),
            "link_latency": (("source", "destination"), latency),
            "link_bandwidth": (("source", "destination"), bandwidth),
        },
        coords={
            "network": network,
            "device": np.arange(ranks),
            "segment": np.array([chain.name for chain in chains], dtype=object),
            "share": np.array(task.fractions),
            "images": np.array(task.images),
            "repetition": np.arange(made),
            "source": np.arange(ranks),
            "destination": np.arange(ranks),
            "message_bytes": np.array(LINK_BYTES),
            "turn_bytes": np.array(TURN_BYTES),
            "company": np.array(COMPANIES, dtype=object),
            "probe": np.array(PROBES, dtype=object),
            "layout": np.array(LAYOUTS, dtype=object),
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
    dataset.attrs["turn_ranks"] = ranks
    dataset.attrs["channels_last"] = int(measured[0].channels_last)
    dataset.attrs["classes"] = task.graph[task.graph.outputs[0]].channels
    return dataset


def _padded(array: NDArray[np.float64], size: int, *, axis: int) -> NDArray[np.float64]:
    """``array`` cut to ``size`` along ``axis``, or filled up with NaN."""
    cut = np.take(array, np.arange(min(size, array.shape[axis])), axis=axis)
    missing = [(0, size - cut.shape[axis] if place == axis else 0) for place in range(array.ndim)]
    return np.pad(cut, missing, constant_values=np.nan)

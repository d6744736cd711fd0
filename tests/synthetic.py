"""Synthetic grids for the tests of results and analysis: invented by a formula, never measured."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from pipeline.calibration.segments import chains_of
from pipeline.graph.trace import Graph
from pipeline.links import parse_link
from pipeline.plan.costs import LAYOUTS
from pipeline.plan.instructions import COMPANIES
from pipeline.results.contracts import CellIndex, describe, unmeasured_cell
from pipeline.results.stores import combine, combine_calibrations, combine_errors

STRATEGIES = ("single", "ddp", "equal", "paper", "kernel", "batch", "auto")
PROVENANCE = {
    "configuration": "{}",
    "versions": f"python 3, torch {torch.__version__}",
    "hardware": "synthetic machine, 2 cores",
    "threads": "1",
    "emulated": True,
    "data": "synthetic images",
    "code_version": "synthetic",
    "created": "2026-01-01T00:00:00+00:00",
}
_OVERHEAD = {"single": 1.0, "ddp": 1.06, "equal": 1.04, "paper": 1.3, "kernel": 1.02, "batch": 1.05, "auto": 1.02}
_SERIAL = {"single": 0.0, "ddp": 0.02, "equal": 0.05, "paper": 0.12, "kernel": 0.04, "batch": 0.05, "auto": 0.04}


def labels_of(device_set: str) -> list[str]:
    labels: list[str] = []
    for part in device_set.split(" + "):
        count, _, label = part.rpartition(" x ")
        labels += [label] * int(count or 1)
    return labels


def cell(index: CellIndex, *, repetitions: int = 5, seed: int = 0) -> xr.Dataset:
    """One synthetic cell: work in proportion to K1 * K2 * batch, split by speed, plus a serial part per strategy."""
    generator = np.random.default_rng([seed, *(ord(c) for c in str(index))])
    labels = labels_of(index.device_set)
    speeds = np.array([float(label.partition("@")[2] or (8.0 if label == "gpu" else 1.0)) for label in labels])
    k1, k2 = (int(k) for k in index.network.split(":"))
    work = index.batch_size * (k1 * k2 * 1.3e-7 + (k1 + k2) * 1.5e-5 + 1e-3)
    fastest = int(np.argmax(speeds))
    shares = np.zeros(len(labels))
    if index.strategy == "single":
        shares[fastest] = 1
    elif index.strategy in ("equal", "ddp"):
        shares[:] = 1 / len(labels)
    else:
        shares[:] = speeds / speeds.sum()
    noise = 1 + 0.02 * np.abs(generator.standard_normal((len(labels), repetitions)))
    compute = (shares / speeds * work)[:, None] * noise
    exchange = np.full_like(compute, _SERIAL[index.strategy] * work / speeds[fastest] if len(labels) > 1 else 0.0)
    step = (compute + exchange).max(axis=0) * _OVERHEAD[index.strategy]
    result = unmeasured_cell(index, labels, "ok").drop_dims(["repetition", "instruction"])
    result = result.assign_coords(repetition=np.arange(repetitions))
    devices = ("device", "repetition")
    result["step_time"] = ("repetition", step)
    result["round"] = ("repetition", np.arange(repetitions) % 2.0)
    result["chosen"] = "kernel" if index.strategy == "auto" else index.strategy
    result["stolen"] = ("device", np.full(len(labels), 0.01))
    result["compute_time"], result["exchange_time"] = (devices, compute), (devices, exchange)
    result["idle_time"] = (devices, step - compute - exchange)
    result["predicted_step_time"] = float(np.median(step)) * 0.97
    result["device_throughput"] = ("device", index.batch_size * speeds / work)
    result["share"] = ("device", shares)
    result["peak_memory"] = ("device", shares * 1e9 + 2e8)
    result["predicted_memory"] = ("device", shares * 9e8 + 2e8)
    convolution = step * (0.62 + 0.08 * np.log10(k1 * k2 / 25000 + 1)) if index.strategy == "single" else step * np.nan
    result["convolution_time"] = ("repetition", convolution)
    result["loss"] = ("repetition", np.linspace(2.3, 2.2, repetitions))
    result = _with_timeline(result, compute[:, -1], exchange[:, -1], float(step[-1]))
    result.attrs = {**PROVENANCE, "emulated": any("@" in label for label in labels)}
    return describe(result)


def _with_timeline(result: xr.Dataset, compute: np.ndarray, exchange: np.ndarray, step: float) -> xr.Dataset:
    parts = [("conv1", "compute", "forward", 0.08), ("conv1 output", "exchange", "forward", 0.25),
             ("conv2", "compute", "forward", 0.25), ("conv2 output", "exchange", "forward", 0.25),
             ("dense, loss", "compute", "forward", 0.04), ("conv2 output", "exchange", "backward", 0.25),
             ("conv2", "compute", "backward", 0.45), ("conv1 output", "exchange", "backward", 0.25),
             ("conv1", "compute", "backward", 0.14), ("update", "update", "update", 0.04)]  # fmt: skip
    start = np.full((len(parts), compute.size), np.nan)
    end = start.copy()
    now = np.zeros(compute.size)
    for i, (name, kind, _, fraction) in enumerate(parts):
        if kind == "exchange":
            now[:] = now.max()
        length = fraction * (exchange if kind == "exchange" else compute)
        took_part = length > 0 if name != "dense, loss" else np.arange(compute.size) == 0
        start[i], end[i] = np.where(took_part, now, np.nan), np.where(took_part, now + length, np.nan)
        now = np.where(took_part, now + length, now)
    scale = step / max(now.max(), step)
    result = result.assign_coords(instruction=np.arange(len(parts)))
    for column, name in enumerate(("instruction_name", "instruction_kind", "instruction_phase")):
        result[name] = ("instruction", np.array([part[column] for part in parts], object))
    result["instruction_master_bytes"] = ("instruction", [3e6 if part[1] == "exchange" else 0.0 for part in parts])
    result["instruction_bytes"] = ("instruction", [4e6 if part[1] == "exchange" else 0.0 for part in parts])
    result["instruction_start"] = (("instruction", "device"), start * scale)
    result["instruction_end"] = (("instruction", "device"), end * scale)
    foretold = result["predicted_step_time"].item() / now.max() if result["strategy"].item() != "ddp" else np.nan
    result["predicted_start"] = (("instruction", "device"), foretold * start)
    result["predicted_end"] = (("instruction", "device"), foretold * end)
    return result


def indices(
    networks: Sequence[str] = ("50:500", "150:800", "300:1000", "500:1500"),
    batch_sizes: Sequence[int] = (32, 64),
    device_sets: Sequence[str] = ("cpu@0.45", "2 x cpu@0.45", "3 x cpu@0.45", "4 x cpu@0.45", "cpu + cpu@0.5"),
    strategies: Sequence[str] = STRATEGIES,
    links: Sequence[str] = ("loopback",),
) -> list[CellIndex]:
    """The product of the axes, only `single` on sets of one device."""
    return [
        CellIndex(network, batch_size, device_set, link, strategy)
        for network in networks
        for batch_size in batch_sizes
        for device_set in device_sets
        for link in links
        for strategy in strategies
        if strategy == "single" or len(labels_of(device_set)) > 1
    ]


def timing(wanted: Sequence[CellIndex] | None = None) -> xr.Dataset:
    wanted = indices() if wanted is None else wanted
    return combine([cell(index) for index in wanted], wanted)


def accuracy(epochs: int = 6, steps: int = 120, seeds: int = 3) -> xr.Dataset:
    """Learning curves of several seeds that rounding, growing step by step, drives apart."""
    generator = np.random.default_rng(1)
    strategies = ("single", "paper", "kernel")
    step, epoch = np.arange(steps), np.arange(1, epochs + 1)
    learned_SE = 0.62 - 0.5 * np.exp(-epoch / 2.0) + 0.01 * np.arange(seeds)[:, None]
    single_SL = 1.2 + 1.1 * np.exp(-step / 25) + 0.05 * generator.standard_normal((seeds, steps))
    rounding_L = 1e-7 * (step + 1)
    apart_ST = np.array([0, 1.0, 1.6]) * generator.uniform(0.5, 1, (seeds, 3))
    dataset = xr.Dataset(
        {
            "accuracy": (
                ("seed", "strategy", "epoch"),
                np.stack([learned_SE, learned_SE, learned_SE + 0.0005], axis=1),
            ),
            "loss": (
                ("seed", "strategy", "step"),
                single_SL[:, None] * (1 + apart_ST[..., None] * rounding_L),
            ),
            "control_accuracy": (("seed", "epoch"), learned_SE - 0.0005),
            "control_loss": (("seed", "step"), single_SL * (1 + rounding_L)),
        },
        {"seed": np.arange(seeds), "strategy": np.array(strategies, object), "epoch": epoch, "step": step},
        {**PROVENANCE, "network": "50:500", "device_set": "4 x cpu@0.45", "batch_size": 32, "test_images": 2000},
    )
    return describe(dataset)


def calibration() -> xr.Dataset:
    segments, shares = ["conv1", "relu1", "conv2", "dense"], [0.25, 0.5, 1.0]
    work = np.array([0.1, 0.01, 1.0, 0.05])[:, None, None, None] * np.array(shares)[:, None, None]
    slowness = np.array([1.0, 2.0])[:, None, None, None, None]
    forward = work * slowness * np.array([0.25, 1.0])[:, None] * np.ones(3)
    sizes = np.array([1e3, 1e6])
    dataset = xr.Dataset(
        {
            "forward_time": (("device", "segment", "share", "images", "repetition"), forward),
            "backward_time": (("device", "segment", "share", "images", "repetition"), 2 * forward),
            "input_gradient_time": (("device", "segment", "share", "images", "repetition"), forward),
            "forward_time_alone": (("device", "segment", "repetition"), forward[:, :, -1, -1]),
            "backward_time_alone": (("device", "segment", "repetition"), 2 * forward[:, :, -1, -1]),
            "forward_time_by_images": (("device", "segment", "repetition"), forward[:, :, -1, -1]),
            "backward_time_by_images": (("device", "segment", "repetition"), 2 * forward[:, :, -1, -1]),
            "forward_call_time": (("device", "repetition"), np.zeros((2, 3))),
            "backward_call_time": (("device", "repetition"), np.zeros((2, 3))),
            "forward_resuming_time": (("device", "repetition"), np.zeros((2, 3))),
            "backward_resuming_time": (("device", "repetition"), np.zeros((2, 3))),
            "update_overhead": (("device", "repetition"), np.zeros((2, 3))),
            "turn_time": (("turn_bytes", "repetition"), np.zeros((2, 3))),
            "probe_step_time": (("probe", "repetition"), np.ones((1, 3))),
            "probe_busy_time": (("probe", "device", "repetition"), np.ones((1, 2, 3))),
            "stretch": (("device", "layout"), np.ones((2, len(LAYOUTS)))),
            "turn_growth": ("company", np.zeros(3)),
            "summing_time": 0.0,
            "reducing_time": 0.0,
            "beginning_time": 0.0,
            "update_time": (("device", "repetition"), np.full((2, 3), 1e-9)),
            "update_time_alone": (("device", "repetition"), np.full((2, 3), 1e-9)),
            "calibration_time": 6.0,
            "work": ("segment", np.array(segments, object)),
            "kernels": (("segment", "share"), np.outer([50, 50, 500, 10], shares).round()),
            "device_label": ("device", np.array(["cpu", "cpu@0.5"], object)),
            "process_memory": ("device", np.full(2, 3e8)),
            "memory_limit": ("device", np.full(2, 1e12)),
            "link_time": (
                ("source", "destination", "message_bytes", "repetition"),
                (1e-4 + sizes / 2e9)[None, None, :, None] * np.ones((2, 2, 1, 3)),
            ),
            "link_latency": (("source", "destination"), np.full((2, 2), 1e-4)),
            "link_bandwidth": (("source", "destination"), np.full((2, 2), 2e9)),
        },
        {
            "network": "50:500",
            "images": [8, 32],
            "device_set": "cpu + cpu@0.5",
            "segment": np.array(segments, object),
            "share": shares,
            "message_bytes": sizes,
            "turn_bytes": [64, 1048576],
            "company": np.array(COMPANIES, object),
            "layout": np.array(LAYOUTS, object),
        },
        PROVENANCE,
    )
    return describe(dataset)


def calibration_of(graph: Graph, labels: Sequence[str]) -> xr.Dataset:
    """A calibration of a real network: time in proportion to the work, a device ``cpu@0.5`` twice as slow."""
    chains = chains_of(graph)
    shares, images = np.array([0.25, 0.5, 1.0]), np.array([4, 16])
    flops = np.array([sum(graph[name].flops_per_image for name in chain.operations) + 1e4 for chain in chains])
    slowness = np.array([1 / float(label.partition("@")[2] or 1) for label in labels])
    forward = np.einsum("d,s,f,i->dsfi", slowness, flops / 1e11, shares, images)[..., None] + 1e-6
    kernels = np.array(
        [[max(round(share * graph[chain.operations[0]].channels), 1) for share in shares] for chain in chains]
    )
    ranks = len(labels)
    dataset = xr.Dataset(
        {
            "forward_time": (("device", "segment", "share", "images", "repetition"), forward),
            "backward_time": (("device", "segment", "share", "images", "repetition"), 2 * forward),
            "input_gradient_time": (("device", "segment", "share", "images", "repetition"), forward),
            "work": ("segment", np.array([chain.name for chain in chains], object)),
            "kernels": (("segment", "share"), kernels),
            "forward_time_alone": (("device", "segment", "repetition"), forward[:, :, -1, -1]),
            "backward_time_alone": (("device", "segment", "repetition"), 2 * forward[:, :, -1, -1]),
            "forward_time_by_images": (("device", "segment", "repetition"), forward[:, :, -1, -1]),
            "backward_time_by_images": (("device", "segment", "repetition"), 2 * forward[:, :, -1, -1]),
            "forward_call_time": (("device", "repetition"), np.zeros((ranks, 1))),
            "backward_call_time": (("device", "repetition"), np.zeros((ranks, 1))),
            "forward_resuming_time": (("device", "repetition"), np.zeros((ranks, 1))),
            "backward_resuming_time": (("device", "repetition"), np.zeros((ranks, 1))),
            "update_overhead": (("device", "repetition"), np.zeros((ranks, 1))),
            "turn_time": (("turn_bytes", "repetition"), np.zeros((2, 1))),
            "probe_step_time": (("probe", "repetition"), np.ones((1, 1))),
            "probe_busy_time": (("probe", "device", "repetition"), np.ones((1, ranks, 1))),
            "stretch": (("device", "layout"), np.ones((ranks, len(LAYOUTS)))),
            "turn_growth": ("company", np.zeros(3)),
            "summing_time": 0.0,
            "reducing_time": 0.0,
            "beginning_time": 0.0,
            "update_time": (("device", "repetition"), np.full((ranks, 1), 1e-9)),
            "update_time_alone": (("device", "repetition"), np.full((ranks, 1), 1e-9)),
            "calibration_time": 6.0,
            "device_label": ("device", np.array(labels, object)),
            "process_memory": ("device", np.full(ranks, 3e8)),
            "memory_limit": ("device", np.full(ranks, 1e12)),
            "link_time": (
                ("source", "destination", "message_bytes", "repetition"),
                np.full((ranks, ranks, 2, 1), 1e-3),
            ),
            "link_latency": (("source", "destination"), np.full((ranks, ranks), 1e-4)),
            "link_bandwidth": (("source", "destination"), np.full((ranks, ranks), 2e9)),
        },
        {
            "network": "of a test",
            "segment": np.array([chain.name for chain in chains], object),
            "share": shares,
            "images": images,
            "message_bytes": [1024, 1048576],
            "turn_bytes": [64, 1048576],
            "company": np.array(COMPANIES, object),
            "layout": np.array(LAYOUTS, object),
        },
        {**PROVENANCE, "image_shape": str(list(graph.input_shape)), "classes": 10},
    )
    return describe(dataset)


def miscalibration(
    errors: Sequence[float] = (-0.5, -0.1, 0.0, 0.5), strategies: Sequence[str] = ("paper", "kernel")
) -> xr.Dataset:
    """Cells of wrong calibrations: a step is longer by half the error, and was predicted to be longer by all of it."""
    cells = {}
    for error in errors:
        cells[error] = []
        for strategy in strategies:
            right = cell(CellIndex("50:500", 32, "cpu + cpu@0.5", "loopback", strategy))
            longer = right.assign(
                step_time=right["step_time"] * (1 + abs(error) / 2),
                predicted_step_time=right["predicted_step_time"] * (1 + abs(error)),
            )
            cells[error].append(longer)
    combined = combine_errors(cells)
    return combined.assign_attrs(PROVENANCE, misjudged_device=1)


SIMULATED_SETS = ("cpu@0.45", "2 x cpu@0.45", "4 x cpu@0.45", "16 x cpu@0.45", "64 x cpu@0.45")
SETS_WITH_GPUS = (
    *SIMULATED_SETS, "gpu", "2 x gpu", "3 x gpu", "gpu-1T",
    "gpu + 1 x cpu@0.45", "gpu + 4 x cpu@0.45", "gpu-1T + 1 x cpu@0.45", "gpu-1T + 4 x cpu@0.45",
)  # fmt: skip
_SIMULATED_SPEEDS = {"gpu-1T": 4.0, "gpu": 20.0}
SIMULATED_LINKS = ("loopback", "10Mbit/s+1ms", "1Gbit/s+100us", "100Gbit/s+10us")


def simulation(
    networks: Sequence[str] = ("50:500", "500:1500"),
    batch_sizes: Sequence[int] = (32, 256),
    device_sets: Sequence[str] = SIMULATED_SETS,
    links: Sequence[str] = SIMULATED_LINKS,
    strategies: Sequence[str] = ("single", "ddp", "paper", "kernel", "batch", "auto"),
) -> xr.Dataset:
    """A synthetic simulation: work over the devices, and a message to each of them over the link."""
    labels = [labels_of(device_set) for device_set in device_sets]
    times = np.full(tuple(map(len, (networks, batch_sizes, device_sets, links, strategies))), np.nan)
    for place in np.ndindex(times.shape):
        network, batch_size, link = networks[place[0]], batch_sizes[place[1]], parse_link(links[place[3]])
        k1, k2 = (int(k) for k in network.split(":"))
        speeds = [_SIMULATED_SPEEDS.get(label, 1.0) for label in labels[place[2]]]
        work, devices = batch_size * k1 * k2 * 1.3e-7, len(speeds)
        latency, bandwidth = (1e-5, 2e10) if link is None else link
        strategy = "kernel" if strategies[place[4]] == "auto" else strategies[place[4]]
        sent = (devices - 1) * (latency + 50 * _SERIAL[strategy] * batch_size * k1 * 100 / bandwidth)
        alone = strategy == "single" or devices == 1
        times[place] = work / max(speeds) if alone else work / sum(speeds) + sent
    if "auto" in strategies:
        times[..., strategies.index("auto")] = np.fmin.reduce(times, axis=-1)
    grid = xr.Dataset(
        {
            "step_time": ((*CellIndex._fields, "repetition"), times[..., None]),
            "predicted_step_time": (CellIndex._fields, times),
            "status": (CellIndex._fields, np.full(times.shape, "ok", object)),
            "device_label": (
                ("device_set", "device"),
                np.array([row + [""] * (max(map(len, labels)) - len(row)) for row in labels], object),
            ),
        },
        {
            "network": np.array(networks, object),
            "batch_size": np.array(batch_sizes),
            "device_set": np.array(device_sets, object),
            "link": np.array(links, object),
            "strategy": np.array(strategies, object),
        },
        {**PROVENANCE, "simulated": True, "configuration": '{"described": {"gpu": 5000.0}}'},
    )
    return describe(grid)


def study() -> dict[str, xr.Dataset]:
    """The stores of a small study that touches every question, by name; each call gives copies of its own."""
    return {name: dataset.copy(deep=True) for name, dataset in _study().items()}


@functools.cache
def _study() -> dict[str, xr.Dataset]:
    sets = ("cpu@0.45", "2 x cpu@0.45", "3 x cpu@0.45", "4 x cpu@0.45", "cpu", "2 x cpu", "cpu + cpu@0.5")
    return {
        "timing": timing(indices(("50:500", "500:1500"), (32,), sets)),
        "accuracy": accuracy(),
        "calibration": combine_calibrations([calibration()]),
        "miscalibration": miscalibration(),
        "simulation": simulation(device_sets=(*SIMULATED_SETS, "gpu", "3 x gpu", "4 x gpu", "gpu + 4 x cpu@0.45")),
    }

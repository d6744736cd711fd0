"""What a plan means: times and bytes per operation, the predicted step, what limits it, and what would help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.operations import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.data_parallel import part_seconds, parts_of
from pipeline.plan.fitting import SAFETY, Room, fits
from pipeline.plan.instructions import Compute, Direction, Exchange
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan
from pipeline.plan.planner import predicted_step_time, uniform_plan
from pipeline.plan.prediction import operation_seconds, predict_step, predict_timeline
from pipeline.plan.program import Program, compile_program
from pipeline.plan.what_ifs import Help, WhatIfs

_WAYS: tuple[Direction, Direction] = ("forward", "backward")
_NEARLY_ALL = 0.9
"""Of what the links take, for which the master's are to blame."""
_BALANCED = 0.9
"""Where all devices compute for so much of what the slowest does, none of them limits."""
_NEARLY_FULL, _LESS = 0.85, 0.9
"""Memory limits who has so much of it taken, and less than so much of the work that its throughput asks for."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation of a plan."""

    operation: str
    layouts: str
    """Layout it takes and layout it gives, such as ``R → K``."""
    shares: tuple[int, ...]
    """Kernels or images of each device; 1 and 0 where it has all or nothing."""
    seconds: tuple[float, ...]
    """Of each device, forward and backward."""
    exchanged_bytes: float
    """Sent between devices for its output and its parameters, forward and backward."""
    exchange_seconds: float
    """From when all that take part are there until the last has ended; of ``ddp``, which sums gradients beside the
    backward pass, how much longer the step is for that."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A plan with its predictions."""

    rows: tuple[Row, ...]
    step_seconds: float
    baseline: str
    """The fastest device that can hold the network, or the fastest where none can."""
    baseline_fits: bool
    baseline_seconds: float
    """Predicted time of a step on that device alone."""
    bound: float
    """The speedup over that device that the throughput of all devices together would allow."""
    limit: str
    """What the step waits for most."""
    memory: tuple[float, ...]
    """Most bytes that each rank needs beyond its process and the data set, with one number per weight for the
    optimiser's state."""
    limited_by_memory: tuple[int, ...]
    """The ranks that would have more of the work if they had more memory."""
    helps: tuple[Help, ...]
    """The best first."""

    @property
    def speedup(self) -> float:
        """Of the step, over the baseline."""
        return self.baseline_seconds / self.step_seconds


def summarise(graph: Graph, plan: Plan, costs: Costs, *, all_labels: Sequence[str], itemsize: int = 4) -> Summary:
    """The summary of ``plan``; ``costs`` and ``all_labels`` are of all devices that it was made for."""
    chosen, batch_size = costs.only(plan.devices), plan.batch_size
    what_ifs = WhatIfs(graph, plan, costs, all_labels, itemsize=itemsize)
    single = uniform_plan(graph, "single", batch_size, all_labels, costs, itemsize=itemsize)
    baseline, speeds = single.devices[0], costs.throughputs(batch_size)
    rows, busy, on_master = _rows(graph, plan, chosen, itemsize)
    memory = predict_memory(graph, plan, itemsize=itemsize)
    return Summary(
        rows=rows,
        step_seconds=what_ifs.step_seconds,
        baseline=f"device {baseline} ({all_labels[baseline]})",
        baseline_fits=fits(graph, single, Room.of(costs.memory_left), itemsize=itemsize),
        baseline_seconds=predicted_step_time(graph, single, costs, itemsize=itemsize),
        bound=float(speeds.sum() / speeds[baseline]),
        limit=_limit(plan, what_ifs, busy, on_master),
        memory=tuple(memory),
        limited_by_memory=_limited_by_memory(graph, plan, chosen, memory),
        helps=what_ifs.helps(busy),
    )


def _trained(graph: Graph) -> float:
    sizes = {one.name: float(np.prod(one.shape)) for op in graph.operations for one in op.parameters if one.trained}
    return sum(sizes.values())


def _rows(graph: Graph, plan: Plan, costs: Costs, itemsize: int) -> tuple[tuple[Row, ...], NDArray[np.float64], float]:
    """A row per operation; the seconds each rank computes; and for how long the master alone does."""
    if plan.strategy == "ddp":
        return _whole(graph, plan, costs, itemsize)
    program = compile_program(graph, plan, plan.batch_size)
    timeline = predict_timeline(graph, plan, program, costs, itemsize=itemsize)[0]
    moved, waited = _exchanged(graph, program, timeline, itemsize)
    rows, times = [], _times_of(program, plan, graph, costs)
    for operation in graph.operations:
        planned = plan[operation.name]
        kinds = dict.fromkeys((planned.input.kind, planned.output.kind))
        rows.append(
            Row(
                operation=operation.name,
                layouts=" → ".join(kinds),
                shares=planned.divided.shares,
                seconds=tuple(times[operation.name]),
                exchanged_bytes=moved.get(operation.name, 0.0),
                exchange_seconds=waited.get(operation.name, 0.0),
            )
        )
    computes = [place for place, one in enumerate(program.instructions) if not isinstance(one, Exchange)]
    spent = timeline[computes, :, 1] - timeline[computes, :, 0]
    alone = [place for place, one in zip(computes, spent, strict=True) if np.isfinite(one).sum() == 1]
    on_master = float(np.nansum(timeline[alone, 0, 1] - timeline[alone, 0, 0])) if plan.ranks > 1 else 0.0
    return tuple(rows), np.nansum(spent, axis=0), on_master


def _whole(graph: Graph, plan: Plan, costs: Costs, itemsize: int) -> tuple[tuple[Row, ...], NDArray[np.float64], float]:
    """As ``_rows``, of ``ddp``: its one row is the whole network."""
    each = part_seconds(costs, plan.batch_size).sum(axis=1)
    at_once = replace(
        costs, latency=costs.latency * 0, seconds_per_byte=costs.seconds_per_byte * 0, reducing=costs.reducing * 0
    )
    with_sums, without = (
        float(predict_step(graph, plan, one, batch_size=plan.batch_size, itemsize=itemsize)[0])
        for one in (costs, at_once)
    )
    row = Row(
        operation="the whole network",
        layouts="B",
        shares=tuple(int(one) for one in parts_of(plan.batch_size, plan.ranks)),
        seconds=tuple(each),
        exchanged_bytes=2.0 * (plan.ranks - 1) * _trained(graph) * itemsize,
        exchange_seconds=with_sums - without,
    )
    return (row,), each, 0.0


def _times_of(program: Program, plan: Plan, graph: Graph, costs: Costs) -> dict[str, NDArray[np.float64]]:
    """How long each rank computes for each operation in s, forward and backward, (rank)."""
    counting = [
        (step, one.ranks)
        for one in program.forward
        if isinstance(one, Compute)
        for step in one.steps
        if step.part in ("whole", "normalise")
    ]
    steps = [(step, way) for step, _ in counting for way in _WAYS]
    taking_part = [ranks for _, ranks in counting for _ in _WAYS]
    total = {operation.name: np.zeros(program.ranks) for operation in graph.operations}
    times = operation_seconds(graph, plan, steps, program.batch_size, costs)
    for (step, way), ranks, seconds in zip(steps, taking_part, times, strict=True):
        alone = costs.alone_part(step.operation, way)[ranks[0]] if len(ranks) == 1 else 1.0
        total[step.operation] += seconds * alone
    return total


def _exchanged(
    graph: Graph, program: Program, timeline: NDArray[np.float64], itemsize: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes and seconds of exchanges by the operation whose output or parameters travel."""
    owner = {one.name: operation.name for operation in graph.operations for one in operation.parameters}
    moved: dict[str, float] = {}
    waited: dict[str, float] = {}
    for place, one in enumerate(program.instructions):
        if not isinstance(one, Exchange):
            continue
        names = program.buckets.get(one.source.name, (one.source.name.removesuffix(" moments"),))
        name = owner.get(names[0], names[0])
        if name == graph.input:  # its images travel for the sake of the first operation
            name = graph.operations[0].name
        moved[name] = moved.get(name, 0.0) + one.elements * itemsize
        took = float(np.nanmax(timeline[place, :, 1]) - np.nanmax(timeline[place, :, 0]))
        waited[name] = waited.get(name, 0.0) + max(took, 0.0)
    return moved, waited


def _limit(plan: Plan, what_ifs: WhatIfs, busy: NDArray[np.float64], on_master: float) -> str:
    if plan.ranks == 1:
        return f"the one device, {plan.labels[0]}"
    seconds, master = what_ifs.step_seconds, f"device {plan.devices[0]} ({plan.labels[0]})"
    links, whose = seconds - what_ifs.without_time(), "the links"
    if plan.ranks > 2 and seconds - what_ifs.without_time(of_master=True) >= _NEARLY_ALL * links:
        whose = f"the links of {master}, the master"
    slowest = int(np.argmax(busy))
    parts = {
        f"{whose}: {links / seconds:.0%} of the step": links,
        f"what is not split: {on_master / seconds:.0%} of the step on {master} alone": on_master,
        f"{_computing(plan, busy / seconds)} of the step": float(busy[slowest]) - on_master * (slowest == 0),
    }
    return max(parts, key=lambda what: parts[what])


def _computing(plan: Plan, parts: NDArray[np.float64]) -> str:
    """Who computes for what part of the step, if computing limits it: all devices, or the one that does longest."""
    least, most = f"{parts.min():.0%}", f"{parts.max():.0%}"
    if parts.min() >= _BALANCED * parts.max():
        return f"the devices, which all compute for {most if least == most else f'{least} to {most}'}"
    slowest = int(np.argmax(parts))
    return f"device {plan.devices[slowest]} ({plan.labels[slowest]}), which computes for {most}"


def _limited_by_memory(graph: Graph, plan: Plan, costs: Costs, memory: NDArray[np.float64]) -> tuple[int, ...]:
    """The ranks whose memory is as full as the planner allows, with less of the work than by their throughput."""
    if plan.strategy not in ("kernel", "batch", "auto") or plan.ranks == 1:
        return ()
    speeds = costs.throughputs(plan.batch_size)
    full = SAFETY * memory > _NEARLY_FULL * costs.memory_left
    less = np.array(plan.convolution_shares(graph)) < _LESS * speeds / speeds.sum()
    return tuple(np.flatnonzero(full & less).tolist())

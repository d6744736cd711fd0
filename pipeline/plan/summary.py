"""What a plan means: times and bytes per operation, the predicted step, what limits it, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.trace import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.data_parallel import part_seconds, parts_of
from pipeline.plan.instructions import Compute, Direction, Exchange
from pipeline.plan.link_cases import Links
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan
from pipeline.plan.prediction import operation_seconds, predict_step, predict_timeline
from pipeline.plan.program import Program, compile_program
from pipeline.plan.strategies import plan_network

_DEVICES_TRIED = 8
_WORTH_SAYING = 1.03
_WAYS: tuple[Direction, Direction] = ("forward", "backward")


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
    """From when all that take part are there until the last has ended."""


@dataclass(frozen=True, kw_only=True)
class Help:
    """A change and what it would bring."""

    change: str
    speedup: float
    """Of the step, over the plan as it is."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A plan with its predictions. Speedups are over the fastest device alone."""

    rows: tuple[Row, ...]
    step_seconds: float
    baseline: str
    """The fastest device, alone."""
    speedup: float
    bound: float
    """The speedup that the throughput of all devices together would allow."""
    limit: str
    """What the step waits for most."""
    memory: tuple[float, ...]
    """Most bytes that each rank needs beyond its process and the data set, with one number per weight for the
    optimiser's state."""
    helps: tuple[Help, ...]
    """The best first."""


def summarise(
    graph: Graph, plan: Plan, costs: Costs, *, all_labels: Sequence[str], itemsize: int = 4, links: Links | None = None
) -> Summary:
    """The summary of ``plan``; ``costs`` and ``all_labels`` are of all devices that it was made for."""
    chosen, batch_size = costs.only(plan.devices), plan.batch_size
    used = (links or Links.measured(costs)).of(plan.devices)

    def step(one: Costs, over: Links) -> float:
        return float(predict_step(graph, plan, one, batch_size=batch_size, itemsize=itemsize, links=over)[0])

    seconds = step(chosen, used)
    speeds = costs.throughputs(batch_size)
    fastest = int(np.argmax(speeds))
    single = plan_network(graph, "single", batch_size=batch_size, labels=all_labels, costs=costs)
    alone = predict_step(graph, single, costs.only(single.devices), batch_size=batch_size, itemsize=itemsize)[0]
    rows, busy, on_master = _rows(graph, plan, chosen, itemsize, used)
    without_links = step(chosen, replace(used, latency=used.latency * 0, seconds_per_byte=used.seconds_per_byte * 0))
    return Summary(
        rows=rows,
        step_seconds=seconds,
        baseline=all_labels[fastest],
        speedup=float(alone) / seconds,
        bound=float(speeds.sum() / speeds.max()),
        limit=_limit(plan, seconds, without_links, busy, on_master),
        memory=tuple(predict_memory(graph, plan, itemsize=itemsize)),
        helps=_helps(plan, seconds, without_links, chosen, used, step),
    )


def _trained(graph: Graph) -> float:
    sizes = {one.name: float(np.prod(one.shape)) for op in graph.operations for one in op.parameters if one.trained}
    return sum(sizes.values())


def _rows(
    graph: Graph, plan: Plan, costs: Costs, itemsize: int, links: Links
) -> tuple[tuple[Row, ...], NDArray[np.float64], float]:
    """A row per operation; the seconds each rank computes; and for how long the master alone does."""
    if plan.strategy == "ddp":
        parts = tuple(int(one) for one in parts_of(plan.batch_size, plan.ranks))
        each = part_seconds(costs, plan.batch_size).sum(axis=1)
        row = Row(
            operation="the whole network", layouts="B", shares=parts, seconds=tuple(each),
            exchanged_bytes=2.0 * (plan.ranks - 1) * _trained(graph) * itemsize, exchange_seconds=float("nan"),
        )  # fmt: skip
        return (row,), each, 0.0
    program = compile_program(graph, plan, plan.batch_size)
    timeline = predict_timeline(graph, plan, program, costs, itemsize=itemsize, links=links)[0]
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


def _times_of(program: Program, plan: Plan, graph: Graph, costs: Costs) -> dict[str, NDArray[np.float64]]:
    """How long each rank computes for each operation in s, forward and backward, (rank)."""
    computes = (one for one in program.forward if isinstance(one, Compute))
    counting = [step for one in computes for step in one.steps if step.part in ("whole", "normalise")]
    steps = [(step, way) for step in counting for way in _WAYS]
    total = {operation.name: np.zeros(program.ranks) for operation in graph.operations}
    for (step, _), seconds in zip(steps, operation_seconds(graph, plan, steps, program.batch_size, costs), strict=True):
        total[step.operation] += seconds
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


def _limit(plan: Plan, seconds: float, without_links: float, busy: NDArray[np.float64], on_master: float) -> str:
    if plan.ranks == 1:
        return f"the one device, {plan.labels[0]}"
    links = seconds - without_links
    slowest = int(np.argmax(busy))
    parts = {
        f"the links: {links / seconds:.0%} of the step": links,
        f"what is not split: {on_master / seconds:.0%} of the step on {plan.labels[0]} alone": on_master,
        f"device {plan.devices[slowest]} ({plan.labels[slowest]}), which computes for {busy[slowest] / seconds:.0%} "
        "of the step": float(busy[slowest]) - on_master * (slowest == 0),
    }
    return max(parts, key=lambda what: parts[what])


def _helps(
    plan: Plan, seconds: float, without_links: float, costs: Costs, links: Links, step: Callable[[Costs, Links], float]
) -> tuple[Help, ...]:
    found = []
    if plan.ranks > 1:
        faster = replace(links, seconds_per_byte=links.seconds_per_byte / 10)
        found.append(Help(change="ten times the bandwidth", speedup=seconds / step(costs, faster)))
        quicker = replace(links, latency=links.latency / 10)
        found.append(Help(change="a tenth of the latency", speedup=seconds / step(costs, quicker)))
        found.append(Help(change="links that take no time", speedup=seconds / without_links))
    for rank in range(min(plan.ranks, _DEVICES_TRIED)):
        scale = np.ones(plan.ranks)
        scale[rank] = 0.5
        what = f"device {plan.devices[rank]} ({plan.labels[rank]}) twice as fast, with the same shares"
        found.append(Help(change=what, speedup=seconds / step(costs.slowed(scale), links)))
    worth = [one for one in found if one.speedup >= _WORTH_SAYING]
    return tuple(sorted(worth, key=lambda one: -one.speedup))

"""How long a step of a plan will take: the program's instructions on cost curves and link models instead of devices.

Many links can be tried at once: everything that depends on the link has an axis of *cases* in front, (case, rank).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph
from pipeline.plan.costs import CROWD, DIRECTIONS, LAYOUTS, Costs, Shared
from pipeline.plan.data_parallel import predict_data_parallel
from pipeline.plan.instructions import (
    COMPANIES,
    Compute,
    Direction,
    Exchange,
    Instruction,
    Step,
    Update,
    may_go_on,
)
from pipeline.plan.layouts import Layout
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import Plan
from pipeline.plan.program import Program, compile_program
from pipeline.plan.traffic import Traffic

Times = NDArray[np.float64]

_COPY_S_PER_BYTE = 1e-10
"""What packing or unpacking takes of a processor's time, when it is not in the cache."""
_HANDLING_S = 2e-4
"""What an exchange keeps a rank busy at most, however little it moves and however long its messages travel."""
_PAIRWISE_RANKS = 48
"""Up to so many ranks every message is followed; beyond, the sums of what each rank sends and receives."""
_KNOWN = 1024
"""So many layouts' parts are kept, as the same few come up all over a plan."""


def predict_step(
    graph: Graph,
    plan: Plan,
    costs: Costs,
    *,
    batch_size: int,
    itemsize: int = 4,
    links: Links | None = None,
    program: Program | None = None,
) -> Times:
    """Predicted time of one training step in s, (case); ``itemsize`` is the bytes per number of the model's type.

    ``costs`` are those of the plan's ranks; without ``links`` those of the calibration count. ``program`` is that of
    the plan, where it has been compiled already.
    """
    if plan.strategy == "ddp":
        over = links.with_software(costs) if links else Links.measured(costs)
        return predict_data_parallel(graph, costs, batch_size, itemsize, over)
    program = program or compile_program(graph, plan, batch_size)
    return _simulation(graph, plan, program, costs, itemsize, links).end()


def predict_timeline(
    graph: Graph, plan: Plan, program: Program, costs: Costs, *, itemsize: int = 4, links: Links | None = None
) -> Times:
    """Start and end of each instruction on each rank in s, (case, instruction, rank, 2).

    NaN where a rank takes no part.
    A rank begins an instruction when it has ended the one before, but goes on during a deferred exchange until what
    needs it begins. Who waits for a rank that has computed waits for its *turn* as well (``Costs.turn``).
    """
    return _simulation(graph, plan, program, costs, itemsize, links).timeline()


def _simulation(
    graph: Graph, plan: Plan, program: Program, costs: Costs, itemsize: int, links: Links | None
) -> _Simulation:
    over = links.with_software(costs) if links else Links.measured(costs)
    return _Simulation(graph, plan, program, costs, itemsize, over)


def busy_seconds(graph: Graph, plan: Plan, program: Program, costs: Costs) -> Times:
    """Time of each computation and of the update on each rank in s, (instruction, rank); 0 for an exchange."""
    instructions = program.instructions
    busy = np.zeros((len(instructions), program.ranks))
    steps: list[tuple[Step, Direction]] = []
    places: list[int] = []
    parts: list[float] = []
    for place, instruction in enumerate(instructions):
        if isinstance(instruction, Update):
            busy[place] = _update_seconds(program, costs)
        if not isinstance(instruction, Compute):
            continue
        way, ranks = instruction.direction, instruction.ranks
        busy[place] = costs.call[:, DIRECTIONS.index(way)]
        for step in instruction.steps:
            if step.part in ("whole", "normalise"):
                part = _part_of(instruction, costs.input_part_of(step.operation))
                alone = costs.alone_part(step.operation, way)[ranks[0]] if len(ranks) == 1 else 1.0
                steps.append((step, way))
                places.append(place)
                parts.append(part * float(alone))
    if steps:
        seconds = np.array(parts)[:, None] * operation_seconds(graph, plan, steps, program.batch_size, costs)
        computes, first = np.unique(places, return_index=True)  # they ascend
        busy[computes] += np.add.reduceat(seconds, first, axis=0)
    return busy


def _update_seconds(program: Program, costs: Costs) -> Times:
    updated = _updated(program)
    each = costs.update * (costs.update_alone if np.count_nonzero(updated) == 1 else 1.0)
    return np.where(updated > 0, costs.update_overhead + updated * each, 0.0)


def _part_of(instruction: Compute, input_part: float) -> float:
    return {"all": 1.0, "inputs": input_part, "parameters": 1 - input_part}[instruction.gradients]


def operation_seconds(
    graph: Graph, plan: Plan, steps: Sequence[tuple[Step, Direction]], batch_size: int, costs: Costs
) -> Times:
    """Time of each rank's part of operations in s, (step, rank)."""
    ways = [way for _, way in steps]
    work = [_work(plan, step, batch_size) for step, _ in steps]
    fractions, images = (np.array(one) for one in zip(*work, strict=True))
    stretch = costs.stretch.T[[LAYOUTS.index(layout_of(plan, step)) for step, _ in steps]]
    seconds = costs.seconds([step.operation for step, _ in steps], ways, fractions, images)
    first = [costs.segment_with(step.operation)[0] for step, _ in steps]
    beyond = np.array([_beyond(graph, step, way, costs) for step, way in steps])
    if beyond.any():
        seconds = seconds + beyond[:, None] * costs.seconds(first, ways, fractions, images)
    found: Times = seconds * stretch
    return found


def _beyond(graph: Graph, step: Step, way: Direction, costs: Costs) -> float:
    """What part of its whole segment batch normalisation over a part of the images takes besides."""
    if step.part != "normalise":
        return 0.0
    segment = costs.segment_with(step.operation)
    normalised = sum(graph[name].effect is Effect.BATCHNORM for name in segment)
    return (costs.by_images_part(segment[0], way) - 1) / normalised


class _Simulation:
    """The clocks of all ranks and the ports of their links, as the instructions go by."""

    def __init__(self, graph: Graph, plan: Plan, program: Program, costs: Costs, itemsize: int, links: Links) -> None:
        self._graph, self._plan, self._program, self._costs = graph, plan, program, costs
        self._itemsize, self._links = itemsize, links
        self._handling = np.minimum(self._links.latency.max(axis=(1, 2)), _HANDLING_S)[:, None]
        """What each exchange keeps its ranks busy in s, in sum, (case, 1)."""
        shape = (links.cases, program.ranks)
        self._free = np.tile(costs.beginning, (links.cases, 1))
        """When each rank has ended what it does itself."""
        self._egress, self._ingress = np.zeros(shape), np.zeros(shape)
        """When the ports of each rank are free again."""
        self._computed = np.zeros(program.ranks)
        """For how long each rank has computed beside others in s since it last sent something."""
        self._resumes = np.zeros(program.ranks, dtype=bool)
        """Whether an exchange was the last thing that each rank took part in."""
        self._pending: list[tuple[Exchange, Times]] = []
        self._latencies: dict[bytes, Times] = {}
        self._ports: dict[tuple[Traffic, int], _Ports] = {}
        self._sums: dict[tuple[Traffic, int], tuple[Times, Times]] = {}

    def timeline(self) -> Times:
        """Start and end, (case, instruction, rank, 2) in s."""
        shape = self._links.cases, len(self._program.instructions), self._program.ranks, 2
        found = np.full(shape, np.nan)
        for index, (ranks, start, end) in enumerate(self._run()):
            found[:, index, ranks, 0], found[:, index, ranks, 1] = start, end
        return found

    def end(self) -> Times:
        """When all have ended, (case) in s."""
        latest = np.zeros(self._links.cases)
        for _, _, end in self._run():
            latest = np.maximum(latest, end.max(axis=1, initial=0.0))
        return latest

    def _run(self) -> Iterator[tuple[slice | list[int], Times, Times]]:
        """Of each instruction the ranks that take part, and when they start and end, (case, rank of these) in s."""
        every = busy_seconds(self._graph, self._plan, self._program, self._costs)
        for index, instruction in enumerate(self._program.instructions):
            if self._pending:
                self._complete(instruction)
            everyone = len(instruction.ranks) == self._program.ranks
            ranks = slice(None) if everyone else list(instruction.ranks)  # a slice is far quicker
            start = self._free[:, ranks].copy()
            if isinstance(instruction, Exchange):
                self._resumes[ranks] = True
                end = self._exchange(instruction)
                if instruction.deferred:
                    self._free = self._free + self._copying(instruction)
                    self._pending.append((instruction, end))
                else:
                    self._free = np.maximum(self._free, end)
                end = end[:, ranks]
            else:
                busy = every[index, ranks]
                if isinstance(instruction, Compute):
                    resuming = self._costs.resuming[:, DIRECTIONS.index(instruction.direction)]
                    busy = busy + np.where(self._resumes, resuming, 0.0)[ranks]
                    self._resumes[ranks] = False
                end = start + busy
                self._free[:, ranks] = end
                if len(instruction.ranks) > 1:
                    self._computed[ranks] += busy
            yield ranks, start, end

    def _complete(self, following: Instruction) -> None:
        left = []
        for exchange, end in self._pending:
            if may_go_on(exchange, following):
                left.append((exchange, end))
            else:
                self._free = np.maximum(self._free, end)
        self._pending = left

    def _exchange(self, exchange: Exchange) -> Times:
        """When each rank has ended its part, (case, rank); a rank without one ends at once."""
        unit = exchange.spec.rest * self._itemsize
        moved = exchange.traffic
        sends = moved.sent[0] > 0
        if not sends.any():  # every rank copies what it has
            here = np.isin(np.arange(self._program.ranks), exchange.ranks)
            return self._free + np.where(here, self._handling / 2, 0.0)
        turns = self._turns(exchange, sends)
        if self._program.ranks > _PAIRWISE_RANKS:
            return self._in_sum(moved, unit, turns)
        return self._message_by_message(moved, unit, turns)

    def _copying(self, exchange: Exchange) -> Times:
        """What an exchange keeps each rank from computing in s, (case, rank): it copies its messages itself."""
        (sent, out_size), (_, in_size) = exchange.traffic.sent, exchange.traffic.received
        crowded = not self._links.alike and np.count_nonzero(sent) >= CROWD
        each = np.full(self._program.ranks, _COPY_S_PER_BYTE) * (self._costs.crowding if crowded else 1.0)
        if exchange.moves == "gradients":
            each = np.where(self._costs.summing > 0, self._costs.summing, each)
        moved = out_size + in_size
        found: Times = moved * exchange.spec.rest * self._itemsize * each + np.where(moved > 0, self._handling, 0.0)
        return found

    def _turns(self, exchange: Exchange, sends: NDArray[np.bool_]) -> Times:
        """How long others wait for each rank beside its messages, (rank), which now ``sends``.

        While an exchange is deferred, all have something else to do; who is late by then still is so afterwards.
        """
        waits = sends & (self._computed > 0)
        if exchange.deferred:
            return np.where(waits, self._costs.turn, 0.0)
        growth = self._costs.turn_growth[:, COMPANIES.index(exchange.company)]
        turns: Times = np.where(waits, self._costs.turn + growth * self._computed, 0.0)
        self._computed[sends] = 0.0
        return turns

    def _message_by_message(self, moved: Traffic, unit: int, turns: Times) -> Times:
        """Each port takes its messages one after the other, in the order of the other end's ranks."""
        ports = self._ports_of(moved, unit)
        latency = self._links.latency + turns[:, None]
        leaves = np.maximum(self._free, self._egress)[:, :, None] + ports.leaving
        left = leaves[:, :, -1]
        self._egress = np.where(ports.sends, left, self._egress)
        arrives = np.where(ports.travels, leaves + latency, -np.inf)
        # The port is busy for as long as each message takes: t = max(arrival, t before + duration), unrolled.
        ended = np.maximum((arrives - ports.arriving).max(axis=1), self._ingress) + ports.arriving[:, -1]
        self._ingress = np.where(ports.receives, ended, self._ingress)
        end = np.where(ports.sends, np.maximum(left, self._free) + self._handling / 2, self._free)
        return np.where(ports.receives, np.maximum(end, ended), end)

    def _ports_of(self, moved: Traffic, unit: int) -> _Ports:
        """The same for all exchanges that move as much between the same ranks, as those of equal layers do."""
        if (moved, unit) not in self._ports:
            travels = moved.matrix > 0
            sends, receives = np.any(travels, axis=1), np.any(travels, axis=0)
            duration = moved.matrix * unit * self._links.seconds_per_byte
            if not self._links.alike and np.count_nonzero(sends) >= CROWD:
                duration = duration * self._costs.crowding[:, None]
            leaving, arriving = np.cumsum(duration, axis=2), np.cumsum(duration, axis=1)
            self._ports[moved, unit] = _Ports(travels, sends, receives, leaving, arriving)
        return self._ports[moved, unit]

    def _in_sum(self, moved: Traffic, unit: int, turns: Times) -> Times:
        """Ports share their bandwidth fairly, so that what goes through one ends when all of it has.

        Where links differ, every message waits for the longest latency to its receiver.
        """
        sends, receives = moved.sent[0] > 0, moved.received[0] > 0
        latency = self._longest_latency(sends) + turns.max()
        leaving, arriving = self._port_seconds(moved, unit)
        begin = np.where(sends, np.maximum(self._free, self._egress), -np.inf)
        leaves = begin + leaving
        self._egress = np.where(sends, leaves, self._egress)
        if moved.pairs is None:
            last = leaves[:, sends].max(axis=1, keepdims=True)
            first = begin[:, sends].max(axis=1, keepdims=True)
        else:
            last, first = _latest(moved, leaves), _latest(moved, begin)
        ended = np.maximum(np.maximum(last, first + arriving) + latency, self._ingress + arriving)
        self._ingress = np.where(receives, ended, self._ingress)
        end = np.where(sends, leaves + self._handling / 2, self._free)
        return np.where(receives, np.maximum(end, ended), end)

    def _longest_latency(self, sends: NDArray[np.bool_]) -> Times:
        """To each rank from those that send, in s, (case, rank), or (case, 1); most exchanges have the same senders."""
        if self._links.alike:
            return self._links.latency[:, 0]
        known_as = sends.tobytes()
        if known_as not in self._latencies:
            self._latencies[known_as] = self._links.latency[:, sends].max(axis=1)
        return self._latencies[known_as]

    def _port_seconds(self, moved: Traffic, unit: int) -> tuple[Times, Times]:
        """For how long the messages occupy each sender's and each receiver's port in s, both (case, rank)."""
        if (moved, unit) not in self._sums:
            per_byte = self._links.seconds_per_byte
            if self._links.alike:
                rate = unit * per_byte[:, :, 0]
                self._sums[moved, unit] = moved.sent[1] * rate, moved.received[1] * rate
            else:
                crowded = np.count_nonzero(moved.sent[0]) >= CROWD
                of_sender = self._costs.crowding if crowded else np.ones(self._program.ranks)
                leaving, arriving = moved.over(per_byte, of_sender)
                self._sums[moved, unit] = leaving * unit, arriving * unit
        return self._sums[moved, unit]


@dataclass(frozen=True)
class _Ports:
    """What one exchange occupies the ports with, whenever it begins."""

    travels: NDArray[np.bool_]
    """(sender, receiver)."""
    sends: NDArray[np.bool_]
    """(rank)."""
    receives: NDArray[np.bool_]
    """(rank)."""
    leaving: Times
    """Until each message has left its sender's port, in s, (case, sender, receiver)."""
    arriving: Times
    """How long it and those before it occupy its receiver's port, in s, (case, sender, receiver)."""


def _latest(moved: Traffic, times: Times) -> Times:
    """Of each rank the latest of those that send to it."""
    assert moved.pairs is not None
    sender, receiver, _ = moved.pairs
    found = np.full_like(times, -np.inf)
    for case in range(len(times)):
        np.maximum.at(found[case], receiver, times[case, sender])
    return found


def _updated(program: Program) -> Times:
    """How many trained numbers live on each rank, (rank)."""
    elements = np.zeros(program.ranks)
    for one in program.parameters:
        if one.parameter.trained:
            elements += float(math.prod(one.parameter.shape)) * _parts(one.home)
    return elements


def _work(plan: Plan, step: Step, batch_size: int) -> tuple[Times, Times]:
    """Each rank's part of an operation: of its kernels or input channels, and for how many images; both (rank)."""
    if _is_by_images(step):
        assert step.output is not None
        return _some(step.output.layout), step.output.layout.numbers
    divided = plan[step.operation].divided
    return _parts(divided), _all(len(divided.shares), batch_size)


def layout_of(plan: Plan, step: Step) -> Shared:
    """Whether the devices share the kernels or the images of an operation, or the master does it alone."""
    planned = plan[step.operation]
    if planned.input.kind == planned.output.kind == "M":
        return "M"
    return "B" if _is_by_images(step) else "K"


def _is_by_images(step: Step) -> bool:
    return step.output is not None and step.output.layout.kind == "B"


@lru_cache(maxsize=_KNOWN)
def _parts(layout: Layout) -> Times:
    return layout.numbers / layout.numbers.sum() if layout.kind in ("K", "B") else _some(layout)


@lru_cache(maxsize=_KNOWN)
def _some(layout: Layout) -> Times:
    return (layout.numbers > 0).astype(float)


@lru_cache(maxsize=_KNOWN)
def _all(ranks: int, batch_size: int) -> Times:
    return np.full(ranks, float(batch_size))

"""Find the plan that is predicted fastest: which devices take part, and how each layer is split.

The prediction is that of the whole program, so what hides behind what, and which link is shared, is in it. Small
networks are searched exhaustively. For larger ones the search begins with plans of one kind and those that change once
from one kind to another, goes on with what dynamic programming makes of these, and then changes layer by layer for as
long as that helps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph, Operation
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import PlanWith, Room, able_alone, check_memory, fits, is_scarce, most_within_memory
from pipeline.plan.link_cases import Links
from pipeline.plan.plan import OperationPlan, Plan, Strategy
from pipeline.plan.prediction import predict_step, predict_timeline
from pipeline.plan.program import compile_program
from pipeline.plan.shares import Most
from pipeline.plan.strategies import (
    Kind,
    Mixed,
    Split,
    image_shares,
    kernel_split,
    layers_of,
    plan_network,
    structure_of,
)
from pipeline.plan.switching import changes_of, changing_once, cheapest_kinds, layer_seconds
from pipeline.plan.ties import Tie

UNIFORM: tuple[Strategy, ...] = ("single", "equal", "paper", "kernel", "batch")
"""The exact strategies, all of which are tried on all devices."""
_LIMITED: tuple[Strategy, ...] = ("kernel", "batch")
"""Those of them whose shares can be limited to what each device can hold."""
_KINDS: tuple[Kind, ...] = ("K", "B", "M")
"""Of every layer; a convolution whose input may be split can be split by that, too."""
_EXHAUSTIVE = 200
"""Up to so many combinations of kinds all are tried."""
_SETS_SEARCHED = 2
"""Of a small number of devices; of a large one the layers are searched for the best set alone."""
_WORK, _RANKS_AT_ONCE = 400_000, 8
"""The search predicts as many plans as make about this much work, in operations times ranks, beside so many that cost
next to nothing more."""
_LEAST_TRIES, _MOST_TRIES = 8, 200
_ENOUGH_TO_TELL = 40
"""If so few plans may be predicted, too few of them change once to tell where changes of kind pay."""
_SMALL_SET = 8
"""Up to so many devices, any one may be left out; of more the fastest 2, 4, 8, 16, ... are tried."""
_LEANINGS = (1.5, 1.2, 1.08)
"""By these factors shares of a small set lean to one device or away from it, for as long as that helps."""
_PART_OF_TRIES = 4
"""Of the plans that the search of the layers predicts, beside it one in so many for each kind of shares that lean."""
_BADLY_LINKED = 4.0
"""A device whose links take so many times what those of half of the devices do may be left out of any set."""


def fastest_plan(
    graph: Graph,
    costs: Costs,
    *,
    batch_size: int,
    labels: Sequence[str],
    itemsize: int = 4,
    links: Links | None = None,
    doubt: float = 0.0,
    room: Room | None = None,
) -> Plan:
    """The plan with the least predicted step time for the devices called ``labels``, which may leave some out.

    ``links`` (one case) replace the measured ones. Never predicted slower than any of ``UNIFORM``. What no calibration
    has run has to be faster by the fraction ``doubt``: a plan that mixes kinds of splits than these, and shares that
    lean than even ones. The plan fits the ``room`` of the devices, which ``costs`` tell unless given.
    """
    return _Search(graph, costs, batch_size, tuple(labels), itemsize, links, room, doubt=doubt).best()


def fastest_times(
    graph: Graph,
    costs: Costs,
    *,
    batch_size: int,
    labels: Sequence[str],
    links: Links,
    itemsize: int = 4,
    doubt: float = 0.0,
) -> NDArray[np.float64]:
    """The predicted step time in s in each case of ``links``, (case), of the plan that is fastest there.

    With ``doubt`` as in ``fastest_plan``, but all devices end computing at the same time: which shares should lean
    would be another question for each link. Infinite where no plan fits the memory of the devices.
    """
    search = _Search(graph, costs, batch_size, tuple(labels), itemsize, links, leaning=False)
    search.explore()
    return np.where(search.times > (1 - doubt) * search.unmixed_times, search.unmixed_times, search.times)


class _Splits(NamedTuple):
    """How a set of devices shares out what is split."""

    kernels: Split
    images: tuple[int, ...]


class _Search:
    def __init__(
        self,
        graph: Graph,
        costs: Costs,
        batch_size: int,
        labels: tuple[str, ...],
        itemsize: int,
        links: Links | None,
        room: Room | None = None,
        *,
        doubt: float = 0.0,
        leaning: bool = True,
    ) -> None:
        self._graph, self._costs, self._batch_size, self._labels = graph, costs, batch_size, labels
        self._itemsize, self._links, self._room = itemsize, links, room or Room.of(costs.memory_left)
        self._doubt = doubt
        self._layers = [one.name for one in layers_of(graph)]
        self._kinds = [_kinds_of(one, first=not place) for place, one in enumerate(layers_of(graph))]
        self._narrowing = [_narrows(graph, one) for one in layers_of(graph)]
        self._structure = structure_of(graph)
        self._scarce = is_scarce(graph, self._room, batch_size, itemsize=itemsize)
        self._may_lean = leaning
        self._splits: dict[tuple[int, ...], _Splits] = {}
        self._limits: dict[tuple[Strategy, tuple[int, ...]], Most | None] = {}
        self._known: dict[tuple[tuple[int, ...], tuple[OperationPlan, ...]], NDArray[np.float64]] = {}
        self._best: tuple[float, Plan] | None = None
        self._best_unmixed: tuple[float, Plan] | None = None
        self.times = np.full(1 if links is None else links.cases, np.inf)
        """The least predicted step time so far in each case of the links, (case) in s."""
        self.unmixed_times = self.times.copy()
        """The same of plans that do not mix kinds of splits."""

    def best(self) -> Plan:
        self.explore()
        if self._best is None:
            everyone = tuple(range(self._costs.devices))
            check_memory(
                self._graph,
                self._uniform("kernel", everyone),
                self._room,
                wanted="auto",
                smaller=self._smaller,
                itemsize=self._itemsize,
            )
        assert self._best is not None
        if self._best_unmixed is not None and self._best[0] > (1 - self._doubt) * self._best_unmixed[0]:
            return self._best_unmixed[1]
        return self._best[1]

    def _smaller(self, batch_size: int) -> Plan:
        """A plan for fewer images that fits, if one of all devices or of a single one does."""
        fewer = _Search(self._graph, self._costs, batch_size, self._labels, self._itemsize, self._links, self._room)
        everyone = tuple(range(self._costs.devices))
        plan = fewer._single()
        for strategy in _LIMITED:
            if not fits(self._graph, plan, self._room, itemsize=self._itemsize):
                plan = fewer._uniform(strategy, everyone)
        return plan

    def explore(self) -> None:
        """Try all that may be the fastest; nothing is found where no plan fits."""
        everyone = tuple(range(self._costs.devices))
        self._try(self._single())
        found = []
        for devices in _device_sets(self._costs, self._batch_size):
            strategies = UNIFORM[1:] if devices == everyone else _LIMITED
            found.append((min(self._try(self._uniform(one, devices)) for one in strategies), devices))
        for _, devices in sorted(found)[: _SETS_SEARCHED if len(everyone) <= _SMALL_SET else 1]:
            self._search_layers(devices)

    def _try(self, plan: Plan, *, mixed: bool = False) -> float:
        """Predicted step time of a plan in s; the best so far is kept, and the best that does not mix kinds."""
        times = self._predicted(plan)
        time = _mean(times)
        self.times = np.minimum(self.times, times)
        if time < (np.inf if self._best is None else self._best[0]):
            self._best = time, plan
        if not mixed:
            self.unmixed_times = np.minimum(self.unmixed_times, times)
            if time < (np.inf if self._best_unmixed is None else self._best_unmixed[0]):
                self._best_unmixed = time, plan
        return time

    def _predicted(self, plan: Plan) -> NDArray[np.float64]:
        """Predicted step time of a plan in each case of the links, (case) in s; infinite where it does not fit.

        Plans that come to the same, by whatever strategy, are predicted once.
        """
        same = plan.devices, plan.operations
        if same not in self._known:
            program = compile_program(self._graph, plan, self._batch_size)
            if self._scarce and not fits(self._graph, plan, self._room, itemsize=self._itemsize, program=program):
                self._known[same] = np.full_like(self.times, np.inf)
            else:
                links = self._links and self._links.of(plan.devices)
                self._known[same] = predict_step(
                    self._graph, plan, self._costs.only(plan.devices), batch_size=self._batch_size,
                    itemsize=self._itemsize, links=links, program=program,
                )  # fmt: skip
        return self._known[same]

    def _uniform(self, strategy: Strategy, devices: tuple[int, ...]) -> Plan:
        most = self._most(strategy, devices) if strategy in _LIMITED else None
        return self._plan_of(strategy, devices, most)

    def _plan_of(self, strategy: Strategy, devices: tuple[int, ...], most: Most | None) -> Plan:
        plan = self._plan_with(strategy, devices)(most=most)
        return replace(plan, devices=tuple(devices[rank] for rank in plan.devices))

    def _single(self) -> Plan:
        """The fastest device alone, of those that can hold the network where any can."""
        devices = tuple(range(self._costs.devices))
        if self._scarce:
            devices = able_alone(self._graph, self._room, self._batch_size, itemsize=self._itemsize)
        return self._uniform("single", devices)

    def _plan_with(self, strategy: Strategy, devices: tuple[int, ...]) -> PlanWith:
        return functools.partial(
            plan_network,
            self._graph,
            strategy,
            batch_size=self._batch_size,
            labels=[self._labels[device] for device in devices],
            costs=self._costs.only(devices),
        )

    def _most(self, strategy: Strategy, devices: tuple[int, ...]) -> Most | None:
        """The largest fraction each device can hold; worked out once."""
        if not self._scarce:
            return None
        if (strategy, devices) not in self._limits:
            free = np.isfinite(self._predicted(self._plan_of(strategy, devices, None))).all()
            self._limits[strategy, devices] = (
                None
                if free
                else most_within_memory(
                    self._graph, self._plan_with(strategy, devices), self._room.only(devices), itemsize=self._itemsize
                )
            )
        return self._limits[strategy, devices]

    def _mixed(self, kinds: Mapping[str, Kind], devices: tuple[int, ...], splits: _Splits | None = None) -> Plan:
        ranks = len(devices)
        split, of_images = splits or self._splits_of(devices)
        return Plan(
            strategy="auto",
            batch_size=self._batch_size,
            devices=devices,
            labels=tuple(self._labels[device] for device in devices),
            operations=Mixed(self._graph, ranks, kinds, split, of_images, self._structure).plans(),
            graph=self._graph,
        )

    def _splits_of(self, devices: tuple[int, ...]) -> _Splits:
        """How kernels and images are shared out over a set of devices; worked out once.

        All end computing at the same time; but of a small set, shares lean away from whoever keeps the others waiting,
        as who has a slow link or begins late, if the program as a whole takes less time then.
        """
        if devices not in self._splits:
            if self._may_lean and len(devices) <= _SMALL_SET:
                found = _Splits(self._leaning("K", devices).kernels, self._leaning("B", devices).images)
            else:
                found = self._shared_out(devices, np.ones(len(devices)))
            self._splits[devices] = found
        return self._splits[devices]

    def _leaning(self, kind: Kind, devices: tuple[int, ...]) -> _Splits:
        """The shares by which the network takes the least time where all its layers are of one kind."""
        alike = dict.fromkeys(self._layers, kind)

        def tried(factor: NDArray[np.float64]) -> tuple[float, _Splits]:
            splits = self._shared_out(devices, factor)
            return _mean(self._predicted(self._mixed(alike, devices, splits))), splits

        factor = np.ones(len(devices))
        best = even = tried(factor)
        last = len(self._known) + self._tries(devices) // _PART_OF_TRIES
        for step in _LEANINGS:
            improved = True
            while improved:
                improved = False
                for device, change in product(range(len(devices)), (step, 1 / step)):
                    if len(self._known) >= last:
                        break
                    other = factor.copy()
                    other[device] *= change
                    found = tried(other)
                    if found[0] < best[0]:
                        best, factor, improved = found, other, True
        return best[1] if best[0] < (1 - self._doubt) * even[0] else even[1]

    def _tries(self, devices: tuple[int, ...]) -> int:
        """How many plans for a set of devices may be predicted in the search of its layers."""
        work = len(self._graph.operations) * (len(devices) + _RANKS_AT_ONCE)
        return min(_MOST_TRIES, max(_LEAST_TRIES, _WORK // work))

    def _shared_out(self, devices: tuple[int, ...], factor: NDArray[np.float64]) -> _Splits:
        """So that all would end at the same time if each took ``factor``, (device), times as long to compute."""
        costs, ranks = self._costs.only(devices).slowed(factor), len(devices)
        by_kernels = kernel_split("kernel", ranks, self._batch_size, costs, None, self._most("kernel", devices))
        known: dict[str, tuple[int, ...]] = {}

        def split(tie: Tie) -> tuple[int, ...]:
            name = tie.operations[0].name
            if name not in known:
                known[name] = by_kernels(tie)
            return known[name]

        return _Splits(split, image_shares(self._batch_size, ranks, costs, None, self._most("batch", devices)))

    def _search_layers(self, devices: tuple[int, ...]) -> None:
        tried: dict[tuple[Kind, ...], float] = {}
        self._splits_of(devices)
        before = len(self._known)

        def time_of(kinds: tuple[Kind, ...]) -> float:
            if kinds not in tried:
                plan = self._mixed(dict(zip(self._layers, kinds, strict=True)), devices)
                tried[kinds] = self._try(plan, mixed=len(set(kinds)) > 1)
            return tried[kinds]

        if math.prod(len(one) for one in self._kinds) <= _EXHAUSTIVE:
            for kinds in product(*self._kinds):
                time_of(kinds)
            return
        tries = self._tries(devices)
        for kinds in _two_parts(len(self._layers), tries // 2):
            time_of(kinds)
        if tries >= _ENOUGH_TO_TELL:
            time_of(self._by_sums_over_layers(tried, devices))
        time_of(self._with_sums(min(tried, key=lambda kinds: tried[kinds])))
        time_of(self._with_sums(tuple(possible[0] for possible in self._kinds)))  # all by kernels
        current = min(tried, key=lambda kinds: tried[kinds])
        improved = True
        while improved:
            improved = False
            for kinds in self._neighbours(current):
                if len(self._known) - before >= tries:
                    return
                if time_of(kinds) < tried[current]:
                    current, improved = kinds, True

    def _by_sums_over_layers(
        self, tried: Mapping[tuple[Kind, ...], float], devices: tuple[int, ...]
    ) -> tuple[Kind, ...]:
        """What would be fastest if a step took the sum of what its layers and its changes of kind take."""
        spent = {}
        for kind in _KINDS:
            alike = (kind,) * len(self._layers)
            if math.isfinite(tried[alike]):
                plan = self._mixed(dict.fromkeys(self._layers, kind), devices)
                program = compile_program(self._graph, plan, self._batch_size, cuts=frozenset(self._layers))
                timeline_CIR2 = predict_timeline(
                    self._graph, plan, program, self._costs.only(devices), itemsize=self._itemsize,
                    links=self._links and self._links.of(devices),
                )  # fmt: skip
                spent[kind] = layer_seconds(
                    program.instructions, timeline_CIR2.mean(axis=0), self._layers, tried[alike]
                )
        if not spent:  # no plan of one kind fits into memory
            return min(tried, key=lambda kinds: tried[kinds])
        return cheapest_kinds(spent, changes_of(tried, spent))

    def _with_sums(self, kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
        """The same but for convolutions that give less than they take: sums of their outputs travel instead."""
        return tuple(
            "I" if kind == "K" and narrowing and "I" in possible else kind
            for kind, narrowing, possible in zip(kinds, self._narrowing, self._kinds, strict=True)
        )

    def _neighbours(self, kinds: tuple[Kind, ...]) -> Iterator[tuple[Kind, ...]]:
        """Another kind for one layer, the last first: there the weights are largest and the tensors smallest."""
        for place in reversed(range(len(kinds))):
            for kind in self._kinds[place]:
                if kind != kinds[place]:
                    yield (*kinds[:place], kind, *kinds[place + 1 :])


def _mean(times: NDArray[np.float64]) -> float:
    """Over the cases of the links; geometric, as no case is to outweigh another."""
    return float(np.exp(np.log(times).mean()))


def _kinds_of(layer: Operation, *, first: bool) -> tuple[Kind, ...]:
    by_input = layer.convolution and layer.effect is Effect.KERNEL and not first
    return (*_KINDS, "I") if by_input else _KINDS


def _narrows(graph: Graph, layer: Operation) -> bool:
    """Whether a layer gives fewer numbers than it takes."""
    return math.prod(layer.shape or ()) < math.prod(graph.shape_of(layer.inputs[0]) or ())


def _device_sets(costs: Costs, batch_size: int) -> Iterator[tuple[int, ...]]:
    """Sets of two devices and more: all, the fastest few, and, of a small number, all but one.

    The fastest few are taken from those with good links, too.
    """
    order = [int(device) for device in np.argsort(-costs.throughputs(batch_size), kind="stable")]
    everyone = tuple(range(costs.devices))
    found: set[tuple[int, ...]] = set()
    sizes = range(2, costs.devices) if costs.devices <= _SMALL_SET else [2**power for power in range(1, 10)]
    left_out = _badly_linked(costs)
    for chosen in (order, [one for one in order if one not in left_out]) if left_out else (order,):
        found.update(tuple(sorted(chosen[:size])) for size in (*sizes, len(chosen)) if 1 < size <= len(chosen))
    if 2 < costs.devices <= _SMALL_SET:
        found.update(tuple(one for one in everyone if one != left) for left in everyone)
    yield from sorted(found)


def _badly_linked(costs: Costs) -> frozenset[int]:
    """Devices whose links are far slower than those of most, in latency or in time per byte."""
    if costs.devices < 3 or costs.latency.shape == (1, 1):
        return frozenset()
    apart = ~np.eye(costs.devices, dtype=bool)
    found: set[int] = set()
    for cost in (costs.latency, costs.seconds_per_byte):
        typical = np.array([np.median(np.concatenate([row[here], column[here]])) for row, column, here
                            in zip(cost, cost.T, apart, strict=True)])  # fmt: skip
        found.update(np.flatnonzero(typical > _BADLY_LINKED * np.median(typical)).tolist())
    return frozenset(found)


def _two_parts(layers: int, tries: int) -> Iterator[tuple[Kind, ...]]:
    """All of one kind; then one kind for the first layers and another for the rest, at so many borders as allowed."""
    yield from ((kind,) * layers for kind in _KINDS)
    pairs = list(permutations(_KINDS, 2))
    borders = range(1, layers)
    stride = max(1, -(-len(borders) * len(pairs) // max(tries - len(_KINDS), 1)))
    for border in borders[::-stride]:
        for first, second in pairs:
            yield changing_once(first, second, border, layers)

"""A few real training steps, of all devices together and of one alone, at the end of a calibration.

Segments and messages that are measured apart do not tell everything: ranks that share cores keep each other from
computing while they exchange, and gradients that are summed beside the backward pass take memory bandwidth and cache
from it. What these steps take longer than predicted is laid to numbers in ``pipeline.calibration.attribution``.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline._torchvision import Importable
from pipeline.calibration.skeletons import module_of, parts_with_some_weights
from pipeline.cluster.gang import RankContext
from pipeline.graph.nodes import leaves
from pipeline.graph.operations import Graph
from pipeline.plan.costs import Costs, Shared
from pipeline.plan.data_parallel import part_seconds
from pipeline.plan.fitting import needed_memory
from pipeline.plan.instructions import Compute
from pipeline.plan.labels import DDP_LABELS
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.prediction import layout_of
from pipeline.plan.program import Program
from pipeline.plan.strategies import plan_network
from pipeline.run.batches import part_of
from pipeline.run.clock import Clock
from pipeline.run.ddp import DataParallel
from pipeline.run.execution import Execution
from pipeline.run.recipe import Recipe, Turn

if TYPE_CHECKING:  # a rank stays without, as its memory was measured
    import xarray as xr

_WITHOUT_SUMS = " without sums"
_PROBED: dict[Strategy, Shared] = {"kernel": "K", "batch": "B", "single": "M", "paper": "K", "ddp": "ddp"}
"""The strategies whose steps are taken, and what is timed of them."""
PROBES = tuple(name for one in _PROBED for name in ([one, one + _WITHOUT_SUMS] if one in ("batch", "ddp") else [one]))
"""None updates its weights. Some leave out the sums of gradients, as all but the last of several batches do."""
_MEASURED_S, _MOST, _LEAST = 0.25, 6, 2
"""In each round each strategy repeats its step until so much time is measured, at the most so often. So many steps at
least are taken of everything: the lower median counts, as what disturbs a step only makes it longer."""
_AGREE, _MOST_DISPUTED = 1.1, 4
"""Where the shortest two differ by more, there are up to so many: what was just set up may take a while to settle."""
_SHORT_S = 0.25
"""The first step of what was just set up does not count, nor the second of ranks that exchange if the first took less,
or if they sum all gradients: both set up memory for messages, of which two may be under way. Of what was kept from an
earlier round the first does not count if steps take less, as others have had the caches."""
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 6
_KEPT = 0.5
"""Of the memory of a device, what all strategies together may hold from one round to the next."""
MOST_STEPS = _MOST_ROUNDS * _MOST
_CLOSE = 1.3
"""A device alone mostly takes the longest. Only if it takes at most so many times as long as the fastest, so that the
plan may depend on it, it has more rounds than one."""
_LONG_STEP_S = 1.0
"""Where all devices together would take longer, few images do, and where a device would for its part under ``ddp``,
that is left out. Of steps that take longer one round is all, and the first counts if one device takes it."""


_Taken = Mapping[str, list[tuple[float, float]]]
"""By probe, the time of each step and in which this rank was busy, in s."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Which steps to take."""

    importable: Importable = field(default_factory=Importable)
    """Before the model, which may be torchvision's: fields are unpickled in order."""

    model: bytes | None
    """A skeleton of the model; None if it cannot travel."""
    modules: Mapping[str, bytes | None]
    """Those of the submodules that run as they are."""
    graph: Graph
    plans: Mapping[Strategy, Plan]
    """By strategy."""
    images: int
    itemsize: int
    """Bytes per number of the model's type."""
    keeps: bool = False
    """Whether what all strategies hold fits into memory at once, so that later rounds need not set it up again."""
    enough: float = 0.0
    """s after which only the first rounds begin."""


def probing(model: bytes | None, modules: Mapping[str, bytes | None], graph: Graph, calibration: xr.Dataset) -> Probing:
    """The steps that tell most: of the plans that the calibration as it is leads to, of those that fit into memory.

    With as many images as it measured, or with few where those would take long. No steps if nothing is trained; a
    device by itself has but one way.
    """
    costs, itemsize = Costs.of(calibration), graph.dtype.itemsize
    few, most = int(calibration.images[0]), int(calibration.images[-1])
    images = max(most if 1 / float((1 / costs.whole_steps(most)).sum()) < _LONG_STEP_S else few, costs.devices)
    labels = [str(label) for label in calibration.device_label.values]
    plans: dict[Strategy, Plan] = {}
    held = 0.0
    possible: tuple[Strategy, ...] = ("single",) if costs.devices == 1 else tuple(_PROBED)
    for strategy in possible if graph[graph.outputs[0]].differentiable else ():
        if strategy == "ddp" and (model is None or not _is_short(costs, images)):
            continue
        plan = plan_network(graph, strategy, batch_size=images, labels=labels, costs=costs)
        needed = needed_memory(graph, plan, itemsize=itemsize)
        if (needed <= costs.memory_left[list(plan.devices)]).all():
            plans[strategy] = replace(plan, channels_last=costs.channels_last and strategy != "ddp")
            held += float(needed.sum())
    # Devices may share the memory that each of them could have.
    keeps = held <= _KEPT * float(costs.memory_left.min())
    return Probing(
        model=model, modules=modules, graph=graph, plans=plans, images=images, itemsize=itemsize, keeps=keeps
    )


def _is_short(costs: Costs, images: int) -> bool:
    """Whether ``ddp``, on which no plan depends, takes little; and BatchNorm has more than one image everywhere."""
    return images >= 2 * costs.devices and bool(part_seconds(costs, images).sum(axis=1).max() < _LONG_STEP_S)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """How long the ``PROBES`` took, (probe, repetition) in s; NaN where nothing was measured."""

    steps: NDArray[np.float64]
    """Of the whole step, the same on all ranks."""
    busy: NDArray[np.float64]
    """In which this rank computed what the strategy shares out, or all alone; NaN for ``ddp`` with its sums."""


def strategy_of(probe: str) -> Strategy:
    """The strategy that a probe takes a step of."""
    return next(one for one in _PROBED if one == probe.removesuffix(_WITHOUT_SUMS))


def sums(probe: str) -> bool:
    """Whether the gradients are summed in a probe."""
    return not probe.endswith(_WITHOUT_SUMS)


def busy_in(plan: Plan, program: Program, timeline_IR2: NDArray[np.float64]) -> NDArray[np.float64]:
    """As ``Probed.busy``, from a timeline of (instruction, rank, 2); (rank) in s."""
    layout = _PROBED[plan.strategy]
    counts = [
        isinstance(one, Compute) and any(layout_of(plan, step) == layout for step in one.steps)
        for one in program.instructions
    ]
    found: NDArray[np.float64] = np.nansum(np.diff(timeline_IR2[counts], axis=-1), axis=(0, 2))
    return found


def probe_rank(context: RankContext, task: Probing) -> Probed:
    """Take the steps; every rank runs this."""
    torch.manual_seed(0)
    taken: _Taken = {probe: [] for probe in PROBES}
    _take(context, task, taken)
    found = np.full((len(PROBES), MOST_STEPS, 2), np.nan)
    for index, times in enumerate(taken.values()):
        found[index, : len(times)] = np.array(times).reshape(-1, 2)
    return Probed(steps=found[..., 0], busy=found[..., 1])


def _take(context: RankContext, task: Probing, taken: _Taken) -> None:
    """Add the times of all steps to what was ``taken`` of each probe."""
    # In rounds, as a processor may be slower for some seconds.
    start, parts = time.perf_counter(), dict[Strategy, _Part | None]()
    for following in range(_MOST_ROUNDS):
        if following >= _LEAST_ROUNDS and _slowest(context, time.perf_counter() - start) > task.enough:
            break
        for strategy in _again(task.plans, taken) if following else task.plans:
            known = strategy in parts
            part = parts.pop(strategy) if known else _part_in(context, task, task.plans[strategy])
            _take_round(context, task.plans[strategy], part, taken, known=known)
            if task.keeps and strategy != "ddp":  # which has one round only
                parts[strategy] = part
            del part
            gc.collect()  # what was traced is a cycle
    parts.clear()
    gc.collect()


def _again(strategies: Iterable[Strategy], taken: _Taken) -> list[Strategy]:
    """Whose steps are worth another round, the same on all ranks, as the times are; no plan depends on ``ddp``."""
    typical = {
        one: statistics.median_low(took for took, _ in taken[one]) for one in strategies if one != "ddp" and taken[one]
    }
    close = _CLOSE * min(typical.values(), default=0.0)
    return [
        one
        for one, took in typical.items()
        if min(len(taken[probe]) for probe in _probes_of(one)) < _LEAST
        or (took <= _LONG_STEP_S and (one != "single" or took <= close))
    ]


def _take_round(context: RankContext, plan: Plan, part: _Part | None, taken: _Taken, *, known: bool) -> None:
    """Add the times of a round of one strategy; ``known`` says that the part has taken steps in an earlier round."""
    strategy = plan.strategy
    if known:
        if taken[strategy][-1][0] < _SHORT_S:
            _step(context, part, last=True)
    else:
        first = _step(context, part, last=True)
        if not (part is None or part.repeatable()):
            return
        if plan.ranks == 1 and first[0] > _LONG_STEP_S:
            taken[strategy].append(first)
        if plan.ranks > 1 and (first[0] < _SHORT_S or strategy == "batch"):
            _step(context, part, last=True)
    for probe in _probes_of(strategy):
        _take_steps(context, part, taken[probe], last=sums(probe), once=strategy in ("single", "ddp"))


def _probes_of(strategy: Strategy) -> list[str]:
    return [probe for probe in PROBES if strategy_of(probe) == strategy]


def _take_steps(
    context: RankContext, part: _Part | None, taken: list[tuple[float, float]], *, last: bool, once: bool
) -> None:
    """Add the times of one step after the other to those ``taken``, each as by ``_step``.

    What takes long, or mostly has its steps in one round only (``once``), has as many as it needs then.
    """
    before = len(taken)
    while True:
        taken.append(_step(context, part, last=last))
        seconds = [took for took, _ in taken[before:]]
        lacking = (once or seconds[0] > _LONG_STEP_S) and not _agreed([took for took, _ in taken])
        if not lacking and (len(seconds) == _MOST or sum(seconds) >= _MEASURED_S):
            break


def _agreed(seconds: list[float]) -> bool:
    """Whether the shortest two steps of all rounds agree, or there are so many that they hardly will."""
    shortest = sorted(seconds)[:_LEAST]
    return len(seconds) >= _LEAST and (shortest[-1] <= _AGREE * shortest[0] or len(seconds) >= _MOST_DISPUTED)


def _step(context: RankContext, part: _Part | None, *, last: bool) -> tuple[float, float]:
    """How long one training step takes all ranks, and how long this one is busy as ``Probed.busy``, in s."""
    context.barrier()
    start = time.perf_counter()
    busy = math.nan if part is None else part.step(last=last)
    return _slowest(context, time.perf_counter() - start), busy


def _slowest(context: RankContext, seconds: float) -> float:
    """The longest of all ranks."""
    longest = torch.tensor(seconds, dtype=torch.float64)
    if context.group is not None:
        dist.all_reduce(longest, dist.ReduceOp.MAX, context.group)
    return longest.item()


class _Part(Protocol):
    """What a rank does in the steps of one strategy."""

    def step(self, *, last: bool) -> float:
        """Take a step, ``last`` with the sums of gradients; how long it was busy as ``Probed.busy``, in s."""
        ...

    def repeatable(self) -> bool:
        """Whether more steps may follow one; the same on all ranks."""
        ...


def _part_in(context: RankContext, task: Probing, plan: Plan) -> _Part | None:
    """The part of this rank; None if it has none."""
    if context.rank not in plan.devices:
        return None
    return _Replica(context, task) if plan.strategy == "ddp" else _Split(context, task, plan)


class _Split:
    """A rank's part of a program."""

    def __init__(self, context: RankContext, task: Probing, plan: Plan) -> None:
        here = replace(context, rank=0, size=1, group=None) if plan.ranks == 1 else context
        parts = parts_with_some_weights(task.graph, task.modules) if here.rank == 0 else None
        self._execution, self._images = Execution(here, parts, task.graph, plan), task.images
        self._execution.prepare(_RECIPE)
        self._inputs: Any = _inputs(task, task.images) if here.rank == 0 else None
        self._y_B = torch.zeros(task.images, dtype=torch.long) if here.rank == 0 else None

    def step(self, *, last: bool) -> float:
        execution, program = self._execution, self._execution.program(self._images)
        clock = Clock(len(program.instructions), offset=0.0, keep=1)
        with clock.step():
            execution.train_step(self._images, self._inputs, self._y_B, clock, Turn(last=last))
        execution.forget()
        return float(busy_in(execution.plan, program, clock.times[-1][:, None])[0])

    def repeatable(self) -> bool:
        return True


class _Replica:
    """A rank of DistributedDataParallel."""

    def __init__(self, context: RankContext, task: Probing) -> None:
        images = len(part_of(context.rank, context.size, range(task.images)))
        assert task.model is not None
        self._parallel, self._part = DataParallel(context, module_of(task.model), _RECIPE), images / task.images
        self._inputs, self._y_B = _inputs(task, images), torch.zeros(images, dtype=torch.long)

    def step(self, *, last: bool) -> float:
        clock = Clock(len(DDP_LABELS), offset=0.0, keep=1)
        with clock.step():
            self._parallel.train_step(self._part, self._inputs, self._y_B, clock, Turn(last=last))
        return math.nan if last else float(np.diff(clock.times[-1][:2]).sum())

    def repeatable(self) -> bool:
        """DistributedDataParallel takes a second step only if the first has given all parameters their gradients."""
        return all(one.grad is not None for one in self._parallel.model.parameters() if one.requires_grad)


def _inputs(task: Probing, images: int) -> Any:
    """What the model takes, of numbers that are made up."""
    return task.graph.inputs_of([
        torch.rand(images, *shape).to(dtype) for shape, dtype in task.graph.input_forms
    ])  # fmt: skip


def _sum(output: Any, _: torch.Tensor) -> torch.Tensor:
    """A loss for any output."""
    tensors = [one for one in leaves(output) if isinstance(one, torch.Tensor) and one.requires_grad]
    return torch.stack([one.float().sum() for one in tensors]).sum()


class _Standstill(torch.optim.SGD):
    """Leaves the weights, which mean nothing, as they are: updates are measured apart."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""


_RECIPE = Recipe(loss=_sum, optimizer=_Standstill)

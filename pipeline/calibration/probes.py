"""A few real training steps, of all devices together and of one alone, and what they take longer than predicted.

Segments and messages that are measured apart do not tell everything: ranks that share cores keep each other from
computing while they exchange, and gradients that are summed beside the backward pass take memory bandwidth and cache
from it. Each is laid to a number: how many times as long computations take, how much longer exchanges with the master,
of activations between all ranks, and of the moments of batch normalisation take for each second of computing before
them, what a byte of gradients costs, and what a step takes beside its instructions.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.optimize
import torch
import torch.distributed as dist
import xarray as xr
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from pipeline._torchvision import Importable
from pipeline.calibration.passes import initialise
from pipeline.cluster.gang import RankContext
from pipeline.graph.trace import Graph, model_dtype
from pipeline.plan.costs import Costs, Shared
from pipeline.plan.fitting import needed_memory
from pipeline.plan.instructions import COMPANIES, Company, Compute, Exchange
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.prediction import layout_of, predict_timeline
from pipeline.plan.program import Program, compile_program
from pipeline.plan.strategies import plan_network
from pipeline.run.clock import Clock
from pipeline.run.execution import Execution
from pipeline.run.recipe import Recipe, Turn

_WITHOUT_SUMS = " without sums"
_SUMMING: Strategy = "batch"
_PROBED: dict[Strategy, Shared] = {"kernel": "K", "batch": "B", "single": "M", "paper": "K"}
"""The strategies whose steps are taken, those first that shall have the memory, and what is timed of them."""
PROBES = (*_PROBED, _SUMMING + _WITHOUT_SUMS)
"""None updates its weights; the last leaves out the sums of gradients, as all but the last of several batches do."""
_TELLS: dict[str, Company] = {"paper": "master", "kernel": "everyone", _SUMMING + _WITHOUT_SUMS: "moments"}
"""Which waiting each tells of, in the order in which they are looked at."""
_STRETCHED: dict[Shared, str] = {"M": "single", "K": "kernel", "B": _SUMMING + _WITHOUT_SUMS}
"""Which tells how long computations take."""
_WARMUP, _MEASURED_S, _MOST = (2, 1), 0.4, 4
"""In each round each begins with so many steps that do not count, which set up memory or find in the cache what others
have left there. Then it is repeated until about so much time is measured, but so often at most."""
MOST_STEPS = len(_WARMUP) * _MOST
_LONG_STEP_S, _VERY_LONG_STEP_S = 0.4, 3.0
"""Where all devices together would take longer than the first, few images do; of longer steps than the second, a
single one is measured after a single one that does not count."""
_STRETCH = 0.5, 2.0
_MOST_GROWTH, _MOST_S_PER_BYTE, _LITTLE = 2.0, 1e-8, 1e-3
"""Between these, or a little of the most and the most, the values are looked for."""
_SAME_S = 1e-9
"""Times that differ by less do not depend on the value."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """Which steps to take."""

    importable: Importable = field(default_factory=Importable)
    """Before the model, which may be torchvision's: fields are unpickled in order."""

    model: nn.Module
    """A skeleton on the meta device."""
    graph: Graph
    plans: Mapping[Strategy, Plan]
    """By strategy."""
    images: int
    itemsize: int
    """Bytes per number of the model's type."""


def probing(model: nn.Module, graph: Graph, calibration: xr.Dataset) -> Probing:
    """The steps that tell most: of the plans that the calibration as it is leads to, as far as they fit into memory.

    With as many images as it measured, or with few where those would take long. No steps if nothing is trained.
    """
    costs, itemsize = Costs.of(calibration), model_dtype(model).itemsize
    few, most = int(calibration.images[0]), int(calibration.images[-1])
    images = max(most if 1 / float((1 / costs.whole_steps(most)).sum()) < _LONG_STEP_S else few, costs.devices)
    labels = [str(label) for label in calibration.device_label.values]
    plans: dict[Strategy, Plan] = {}
    left = costs.memory_left.copy()
    for strategy in _PROBED if graph[graph.outputs[0]].differentiable else ():
        plan = plan_network(graph, strategy, batch_size=images, labels=labels, costs=costs)
        needed = needed_memory(graph, plan, itemsize=itemsize)
        devices = list(plan.devices)
        if (needed <= left[devices]).all():
            left[devices] -= needed  # they are there at the same time
            plans[strategy] = replace(plan, channels_last=costs.channels_last)
    return Probing(model=model, graph=graph, plans=plans, images=images, itemsize=itemsize)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """How long the ``PROBES`` took, (probe, repetition) in s; NaN where nothing was measured."""

    steps: NDArray[np.float64]
    """Of the whole step, the same on all ranks."""
    busy: NDArray[np.float64]
    """In which this rank computed what the strategy shares out, or all alone."""


def probe_rank(context: RankContext, task: Probing) -> Probed:
    """Take the steps; every rank runs this."""
    torch.manual_seed(0)
    taken: dict[str, list[tuple[float, float]]] = {probe: [] for probe in PROBES}
    executions = {strategy: _execution(context, task, plan) for strategy, plan in task.plans.items()}
    # In rounds, as a processor may be slower for some seconds.
    for warmup in _WARMUP:
        for probe, times in taken.items():
            if _strategy_of(probe) not in executions or (times and times[-1][0] > _VERY_LONG_STEP_S):
                continue
            execution = executions[_strategy_of(probe)]
            step = functools.partial(_step, context, execution, task.images, last=_sums(probe))
            before, _ = step()
            for _ in range(warmup - 1 if before < _VERY_LONG_STEP_S else 0):
                before, _ = step()
            times += [step() for _ in range(min(max(int(_MEASURED_S / before), 1), _MOST))]
    found = np.full((len(PROBES), MOST_STEPS, 2), np.nan)
    for index, times in enumerate(taken.values()):
        found[index, : len(times)] = np.array(times).reshape(-1, 2)
    return Probed(steps=found[..., 0], busy=found[..., 1])


def _execution(context: RankContext, task: Probing, plan: Plan) -> Execution | None:
    """What takes the steps on this rank; None if it has no part in them."""
    if context.rank not in plan.devices:
        return None
    here, model = context, task.model
    if plan.ranks == 1:
        here = replace(context, rank=0, size=1, group=None)
    if here.rank == 0:
        model = copy.deepcopy(model).to_empty(device="cpu")
        initialise((*model.parameters(), *model.buffers()))
    execution = Execution(here, model, task.graph, plan)
    execution.prepare(Recipe(loss=_sum, optimizer=_Standstill), seed=0)
    return execution


def _strategy_of(probe: str) -> Strategy:
    return next(one for one in _PROBED if one == probe.removesuffix(_WITHOUT_SUMS))


def _sums(probe: str) -> bool:
    return not probe.endswith(_WITHOUT_SUMS)


def fitted(calibration: xr.Dataset, task: Probing) -> xr.Dataset:
    """``calibration`` with what makes its probes true: how much longer computations, exchanges, sums and steps take.

    What a probe says nothing of, as its plan has no such exchange, stays as it is.
    """
    steps, stretch = _Steps(task), calibration.stretch.copy(deep=True)
    before, busy = Costs.of(calibration), _lower_median(calibration.probe_busy_time)
    kinds = ["gpu" if str(label).startswith("gpu") else "cpu" for label in calibration.device_label.values]
    for layout, probe in _STRETCHED.items():
        if probe in steps.probes:
            stretch.loc[{"layout": layout}] = _stretch(steps, before, probe, busy.sel(probe=probe).values, kinds)
    costs = Costs.of(calibration.assign(stretch=stretch))
    typical = _lower_median(calibration.probe_step_time)
    took = {probe: float(typical.sel(probe=probe)) for probe in steps.probes}
    beginning = max(took["single"] - steps.seconds("single", costs), 0.0) if "single" in took else 0.0
    costs = replace(costs, beginning=np.full(costs.devices, beginning))
    growth = calibration.turn_growth.copy(deep=True)
    for probe, company in _TELLS.items():
        value = _growth(steps, costs, probe, company, took[probe]) if probe in steps.probes else None
        if value is not None:
            growth.loc[{"company": company}] = value
            costs = _growing(costs, company, value)
    summing = None
    if _SUMMING in steps.probes:
        # What the sums add to a step; whatever else was predicted wrong is in both.
        added = took[_SUMMING] - took[_SUMMING + _WITHOUT_SUMS]
        summing = _summing(steps, costs, steps.seconds(_SUMMING + _WITHOUT_SUMS, costs) + added)
    return calibration.assign(
        stretch=stretch, turn_growth=growth, summing_time=summing or 0.0, beginning_time=beginning
    )


def _stretch(
    steps: _Steps, costs: Costs, probe: str, busy: NDArray[np.float64], kinds: Sequence[str]
) -> NDArray[np.float64]:
    """How many times as long as by itself each device computes if they are so ``busy`` in a probe, (device) in s.

    One number for all devices of a kind: of one by itself, shares of a few kernels or images tell too little.
    """
    least, most = (np.full_like(costs.stretch, one) for one in _STRETCH)
    early, late = (steps.busy(probe, replace(costs, stretch=one)) for one in (least, most))
    known = (late - early > _SAME_S) & np.isfinite(busy)  # who computes nothing tells nothing
    found = np.ones(costs.devices)
    for kind in set(kinds):
        alike = np.array([one == kind for one in kinds])
        if (alike & known).any():
            before, after, was = (one[alike & known].sum() for one in (early, late, busy))
            found[alike] = np.interp((was - before) / (after - before), (0.0, 1.0), _STRETCH)
    return found


def _lower_median(repeated: xr.DataArray) -> xr.DataArray:
    """The median of the repetitions, of two the lower: what disturbs a step only makes it longer."""
    ascending = np.sort(repeated.transpose(..., "repetition").values, axis=-1)  # NaN at the end
    middle = np.maximum(np.isfinite(ascending).sum(axis=-1, keepdims=True) - 1, 0) // 2
    found = repeated.isel(repetition=0, drop=True)
    return found.copy(data=np.take_along_axis(ascending, middle, axis=-1)[..., 0])


def _growth(steps: _Steps, costs: Costs, probe: str, company: Company, took: float) -> float | None:
    """How much waiting of ``company`` makes ``probe`` take so long in s; None if it has nothing to do with it."""

    def late(value: float) -> float:
        return steps.seconds(probe, _growing(costs, company, value)) - took

    return _root(late, _MOST_GROWTH)


def _summing(steps: _Steps, costs: Costs, took: float) -> float | None:
    """How many s a byte of sums costs if a step with them takes so long in s; None if there are none."""

    def late(value: float) -> float:
        return steps.seconds(_SUMMING, replace(costs, summing=np.full(costs.devices, value))) - took

    return _root(late, _MOST_S_PER_BYTE)


def _root(late: Callable[[float], float], most: float) -> float | None:
    """Where ``late`` changes its sign between a little of ``most`` and it, or its nearer end; None if it is level."""
    least = _LITTLE * most
    early, latest = late(least), late(most)
    if latest - early <= _SAME_S:
        return None
    if early >= 0:
        return least
    return most if latest <= 0 else float(scipy.optimize.brentq(late, least, most, rtol=1e-2))


def _growing(costs: Costs, company: Company, value: float) -> Costs:
    growth = costs.turn_growth.copy()
    growth[:, COMPANIES.index(company)] = value
    return replace(costs, turn_growth=growth)


class _Steps:
    """What the steps of a probing should take."""

    def __init__(self, task: Probing) -> None:
        self._task = task
        self._programs = {name: compile_program(task.graph, plan, task.images) for name, plan in task.plans.items()}

    @property
    def probes(self) -> tuple[str, ...]:
        """Those of the ``PROBES`` that are taken."""
        return tuple(one for one in PROBES if _strategy_of(one) in self._programs)

    def plan(self, probe: str) -> Plan:
        """What is trained."""
        return self._task.plans[_strategy_of(probe)]

    def seconds(self, probe: str, costs: Costs) -> float:
        """The predicted time of one step in s."""
        return float(np.nanmax(self._timeline(probe, costs)[1]))

    def busy(self, probe: str, costs: Costs) -> NDArray[np.float64]:
        """How long each device should be busy with what the strategy shares out, (device) in s; NaN for no part."""
        program, timeline_IR2 = self._timeline(probe, costs)
        found = np.full(costs.devices, np.nan)
        found[list(self.plan(probe).devices)] = _busy(self.plan(probe), program, timeline_IR2)
        return found

    def _timeline(self, probe: str, costs: Costs) -> tuple[Program, NDArray[np.float64]]:
        graph, plan, program = self._task.graph, self.plan(probe), self._programs[_strategy_of(probe)]
        if _sums(probe):
            left = program.backward
        else:
            left = tuple(one for one in program.backward if not isinstance(one, Exchange) or one.moves != "gradients")
        standing = replace(costs, update=np.zeros(costs.devices), update_overhead=np.zeros(costs.devices))
        standing = standing.only(plan.devices)
        program = replace(program, backward=left)
        return program, predict_timeline(graph, plan, program, standing, itemsize=self._task.itemsize)[0]


def _busy(plan: Plan, program: Program, timeline_IR2: NDArray[np.float64]) -> NDArray[np.float64]:
    """As ``Probed.busy``, from a timeline of (instruction, rank, 2); (rank) in s."""
    layout = _PROBED[plan.strategy]
    counts = [
        isinstance(one, Compute) and any(layout_of(plan, step) == layout for step in one.steps)
        for one in program.instructions
    ]
    found: NDArray[np.float64] = np.nansum(np.diff(timeline_IR2[counts], axis=-1), axis=(0, 2))
    return found


def _step(context: RankContext, execution: Execution | None, images: int, *, last: bool) -> tuple[float, float]:
    """How long one training step takes all ranks, and how long this one is busy as ``Probed.busy``, in s."""
    x_BCHW = y_B = None
    if execution is not None and execution.context.rank == 0:
        x_BCHW, y_B = torch.rand(images, *execution.graph.input_shape), torch.zeros(images, dtype=torch.long)
    program = None if execution is None else execution.program(images)
    clock = Clock(0 if program is None else len(program.instructions), offset=0.0, keep=1)
    context.barrier()
    start = time.perf_counter()
    if execution is not None:
        with clock.step():
            execution.train_step(images, x_BCHW, y_B, clock, Turn(last=last))
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX, context.group)
    if execution is None or program is None:
        return took.item(), math.nan
    execution.forget()
    return took.item(), float(_busy(execution.plan, program, clock.times[-1][:, None])[0])


def _sum(output: Any, _: torch.Tensor) -> torch.Tensor:
    """A loss for any output."""
    tensors = [one for one in pytree.tree_leaves(output) if isinstance(one, torch.Tensor) and one.requires_grad]
    return torch.stack([one.float().sum() for one in tensors]).sum()


class _Standstill(torch.optim.SGD):
    """Leaves the weights, which mean nothing, as they are: updates are measured apart."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""

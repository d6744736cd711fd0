"""A few real training steps of all devices together, and what they take longer than predicted.

Segments and messages that are measured apart do not tell everything: ranks that share cores keep each other from
computing while they exchange, and gradients that are summed beside the backward pass take memory bandwidth and cache
from it. Each is laid to a number: how much longer exchanges of activations between all ranks, and of the moments of
batch normalisation, take for each second of computing before them, and what a byte of gradients costs.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
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
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import needed_memory
from pipeline.plan.instructions import COMPANIES, Exchange
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.prediction import predict_timeline
from pipeline.plan.program import Program, compile_program
from pipeline.plan.strategies import plan_network
from pipeline.run.clock import Clock
from pipeline.run.execution import Execution
from pipeline.run.recipe import Recipe, Turn

PROBES = ("kernel", "batch", "batch without sums")
"""None updates its weights; the last leaves out the sums of gradients, as all but the last of several batches do."""
_MEASURED_S, _LEAST, _MOST = 5.0, 3, 8
"""Each is repeated until so much time is measured, but so often at least and at most."""
_LONG_STEP_S, _SAME_S = 0.4, 1e-9
_MOST_GROWTH, _MOST_S_PER_BYTE, _LITTLE = 2.0, 1e-8, 1e-3
"""Between a little of the most and the most the values are looked for."""


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
    strategies: tuple[Strategy, ...] = ("kernel", "batch")
    plans: dict[Strategy, Plan] = {}
    left = costs.memory_left
    for strategy in strategies if graph[graph.outputs[0]].differentiable else ():
        plan = plan_network(graph, strategy, batch_size=images, labels=labels, costs=costs)
        needed = needed_memory(graph, plan, itemsize=itemsize)
        if (needed <= left).all():
            left = left - needed  # they are there at the same time
            plans[strategy] = replace(plan, channels_last=costs.channels_last)
    return Probing(model=model, graph=graph, plans=plans, images=images, itemsize=itemsize)


def probe_rank(context: RankContext, task: Probing) -> NDArray[np.float64]:
    """How long steps of the ``PROBES`` take, (probe, repetition) in s, the same on all ranks; every rank runs this.

    NaN where nothing was measured.
    """
    torch.manual_seed(0)
    found = np.full((len(PROBES), _MOST), np.nan)
    model = task.model
    if context.rank == 0:
        model = copy.deepcopy(model).to_empty(device="cpu")
        initialise((*model.parameters(), *model.buffers()))
    executions = {}
    for strategy, plan in task.plans.items():
        executions[strategy] = Execution(context, model, task.graph, plan)
        executions[strategy].prepare(Recipe(loss=_sum, optimizer=_Standstill), seed=0)
    # In turn, as a processor may be slower for some seconds.
    spent = 0.0
    for repetition in range(-1, _MOST):
        if repetition >= _LEAST and spent > _MEASURED_S:
            break
        for index, probe in enumerate(PROBES):
            if _strategy_of(probe) not in executions:
                continue
            execution = executions[_strategy_of(probe)]
            seconds = _step(context, execution, task.images, last="without" not in probe)
            if repetition >= 0:  # before, memory is set up
                found[index, repetition] = seconds
                spent += seconds
    return found


def _strategy_of(probe: str) -> Strategy:
    return "kernel" if probe == "kernel" else "batch"


def fitted(calibration: xr.Dataset, task: Probing) -> xr.Dataset:
    """``calibration`` with the ``turn_growth`` between all ranks and the ``summing_time`` that make its probes true.

    What a probe says nothing of, as its plan has no such exchange, stays as it is.
    """
    costs, took = Costs.of(calibration), calibration.probe_step_time.median("repetition")
    programs = {strategy: compile_program(task.graph, plan, task.images) for strategy, plan in task.plans.items()}

    def predicted(probe: str, costs: Costs) -> float:
        return _predicted(task, programs[_strategy_of(probe)], probe, costs)

    def solved(late: Callable[[float], float], most: float) -> float | None:
        least = _LITTLE * most
        early, latest = late(least), late(most)
        if latest - early <= _SAME_S:
            return None
        if early >= 0:
            return least
        return most if latest <= 0 else float(scipy.optimize.brentq(late, least, most, rtol=1e-2))

    growth = calibration.turn_growth.copy(deep=True)
    probes = (("kernel", "everyone"), ("batch without sums", "moments"))
    for probe, company in ((probe, company) for probe, company in probes if _strategy_of(probe) in programs):
        grown = functools.partial(_growing, costs, COMPANIES.index(company))
        value = solved(
            _difference(functools.partial(predicted, probe), grown, float(took.sel(probe=probe))), _MOST_GROWTH
        )
        if value is not None:
            growth.loc[{"company": company}] = value
            costs = grown(value)
    summing = None
    if "batch" in programs:
        # What the sums add to a step; whatever else was predicted wrong is in both.
        sums = float(took.sel(probe="batch") - took.sel(probe="batch without sums"))
        whole = sums + predicted("batch without sums", costs)
        late = _difference(functools.partial(predicted, "batch"), functools.partial(_summing, costs), whole)
        summing = solved(late, _MOST_S_PER_BYTE)
    return calibration.assign(turn_growth=growth, summing_time=summing or 0.0)


def _difference(
    predicted: Callable[[Costs], float], costs: Callable[[float], Costs], took: float
) -> Callable[[float], float]:
    """How much later than it took a step would end, by the value that ``costs`` are made of."""
    return lambda value: predicted(costs(value)) - took


def _growing(costs: Costs, company: int, value: float) -> Costs:
    growth = costs.turn_growth.copy()
    growth[:, company] = value
    return replace(costs, turn_growth=growth)


def _summing(costs: Costs, value: float) -> Costs:
    return replace(costs, summing=np.full(costs.devices, value))


def _predicted(task: Probing, program: Program, probe: str, costs: Costs) -> float:
    plan = task.plans[_strategy_of(probe)]
    if "without" in probe:
        sums = [one for one in program.backward if isinstance(one, Exchange) and one.moves == "gradients"]
        program = replace(program, backward=tuple(one for one in program.backward if one not in sums))
    standing = replace(costs, update=np.zeros(costs.devices), update_overhead=np.zeros(costs.devices))
    return float(np.nanmax(predict_timeline(task.graph, plan, program, standing, itemsize=task.itemsize)))


def _step(context: RankContext, execution: Execution, images: int, *, last: bool) -> float:
    """How long one training step takes all ranks, in s."""
    on_master = context.rank == 0
    x_BCHW = torch.rand(images, *execution.graph.input_shape) if on_master else None
    y_B = torch.zeros(images, dtype=torch.long) if on_master else None
    clock = Clock(len(execution.program(images).instructions), offset=0.0, keep=1)
    context.barrier()
    start = time.perf_counter()
    with clock.step():
        execution.train_step(images, x_BCHW, y_B, clock, Turn(last=last))
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX, context.group)
    execution.forget()
    return took.item()


def _sum(output: Any, _: torch.Tensor) -> torch.Tensor:
    """A loss for any output."""
    tensors = [one for one in pytree.tree_leaves(output) if isinstance(one, torch.Tensor) and one.requires_grad]
    return torch.stack([one.float().sum() for one in tensors]).sum()


class _Standstill(torch.optim.SGD):
    """Leaves the weights, which mean nothing, as they are: updates are measured apart."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""

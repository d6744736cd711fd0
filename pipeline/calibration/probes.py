"""A few real training steps of all devices together, and what they take longer than predicted.

Segments and messages that are measured apart do not tell everything: ranks that share cores keep each other from
computing while they exchange, and gradients that are summed beside the backward pass take memory bandwidth and cache
from it. Each is laid to a number: how much longer exchanges of activations between all ranks, and of the moments of
batch normalisation, take for each second of computing before them, and what a byte of gradients costs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.optimize
import torch
import torch.distributed as dist
import xarray as xr
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from pipeline.cluster.gang import RankContext
from pipeline.graph.trace import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.instructions import COMPANIES, Exchange
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.prediction import predict_timeline
from pipeline.plan.program import compile_program
from pipeline.plan.strategies import plan_network
from pipeline.run.clock import Clock
from pipeline.run.execution import Execution
from pipeline.run.recipe import Recipe, Turn

PROBES = ("kernel", "batch", "batch without sums")
"""None updates its weights; the last leaves out the sums of gradients, as all but the last of several batches do."""
_MEASURED_S, _LEAST, _MOST = 5.0, 3, 8
"""Each is repeated until so much time is measured, but so often at least and at most."""
_MOST_GROWTH, _MOST_S_PER_BYTE, _LITTLE = 2.0, 1e-8, 1e-3
"""Between a little of the most and the most the values are looked for."""


def probe_plan(graph: Graph, probe: str, images: int, fractions: Sequence[float]) -> Plan:
    """The plan of a probe for a batch of ``images``, in which each rank has its fraction of every layer."""
    labels = [f"rank {rank}" for rank in range(len(fractions))]
    strategy: Strategy = "kernel" if probe == "kernel" else "batch"
    return plan_network(graph, strategy, batch_size=images, labels=labels, shares=list(fractions))


def measure_probes(
    context: RankContext,
    model: nn.Module,
    graph: Graph,
    images: int,
    fractions: Sequence[float],
    *,
    channels_last: bool,
) -> NDArray[np.float64]:
    """How long steps of the ``PROBES`` take, (probe, repetition) in s, the same on all ranks; NaN for one rank.

    ``model`` is the real one on the master and a skeleton elsewhere.
    """
    found = np.full((len(PROBES), _MOST), np.nan)
    if context.group is None:
        return found
    if context.rank == 0:
        _initialise(model)
    executions = {}
    for kind in ("kernel", "batch"):
        plan = replace(probe_plan(graph, kind, images, fractions), channels_last=channels_last)
        executions[kind] = Execution(context, model, graph, plan)
        executions[kind].prepare(Recipe(loss=_sum, optimizer=_Standstill), seed=0)
    # In turn, as a processor may be slower for some seconds.
    spent = 0.0
    for repetition in range(-1, _MOST):
        if repetition >= _LEAST and spent > _MEASURED_S:
            break
        for index, probe in enumerate(PROBES):
            execution = executions["kernel" if probe == "kernel" else "batch"]
            seconds = _step(context, execution, images, last="without" not in probe)
            if repetition >= 0:  # before, memory is set up
                found[index, repetition] = seconds
                spent += seconds
    return found


def fitted(calibration: xr.Dataset, graph: Graph, images: int, fractions: Sequence[float]) -> xr.Dataset:
    """``calibration`` with the ``turn_growth`` between all ranks and the ``summing_time`` that make the probes true."""
    costs = Costs.of(calibration)
    measured = dict(zip(PROBES, np.nanmedian(calibration.probe_step_time.values, axis=1), strict=True))

    def solved(probe: str, with_value: Callable[[float], Costs], most: float) -> float:
        def late(value: float) -> float:
            return _predicted(graph, probe, with_value(value), images, fractions) - float(measured[probe])

        least = _LITTLE * most
        if late(least) >= 0:
            return least
        return most if late(most) <= 0 else float(scipy.optimize.brentq(late, least, most, rtol=1e-2))

    growth = calibration.turn_growth.copy(deep=True)
    for probe, company in (("kernel", "everyone"), ("batch without sums", "moments")):
        with_growth = functools.partial(_growing, costs, COMPANIES.index(company))
        growth.loc[{"company": company}] = value = solved(probe, with_growth, _MOST_GROWTH)
        costs = with_growth(value)
    summing = solved("batch", functools.partial(_summing, costs), _MOST_S_PER_BYTE)
    return calibration.assign(turn_growth=growth, summing_time=summing)


def _growing(costs: Costs, company: int, value: float) -> Costs:
    growth = costs.turn_growth.copy()
    growth[:, company] = value
    return replace(costs, turn_growth=growth)


def _summing(costs: Costs, value: float) -> Costs:
    return replace(costs, summing=np.full(costs.devices, value))


def _predicted(graph: Graph, probe: str, costs: Costs, images: int, fractions: Sequence[float]) -> float:
    plan = probe_plan(graph, probe, images, fractions)
    program = compile_program(graph, plan, images)
    if "without" in probe:
        sums = [one for one in program.backward if isinstance(one, Exchange) and one.moves == "gradients"]
        program = replace(program, backward=tuple(one for one in program.backward if one not in sums))
    standing = replace(costs, update=np.zeros(costs.devices), update_overhead=np.zeros(costs.devices))
    return float(np.nanmax(predict_timeline(graph, plan, program, standing)))


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
    return took.item()


@torch.no_grad()
def _initialise(model: nn.Module) -> None:
    """Weights with which values and gradients keep their size: processors take long for numbers next to zero."""
    for one in (*model.parameters(), *model.buffers()):
        if one.is_floating_point():
            one.normal_(0, (one.shape[0] / one.numel()) ** 0.5) if one.dim() > 1 else one.fill_(1.0)


def _sum(output: Any, _: torch.Tensor) -> torch.Tensor:
    """A loss for any output."""
    tensors = [one for one in pytree.tree_leaves(output) if isinstance(one, torch.Tensor) and one.requires_grad]
    return torch.stack([one.float().sum() for one in tensors]).sum()


class _Standstill(torch.optim.SGD):
    """Leaves the weights, which mean nothing, as they are: updates are measured apart."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""

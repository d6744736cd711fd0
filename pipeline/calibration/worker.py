"""What every rank of a calibration does."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from pipeline._torchvision import Importable
from pipeline.cluster.gang import RankContext
from pipeline.graph.trace import Graph
from pipeline.plan.instructions import Compute, Exchange, Placed, Step, TensorSpec
from pipeline.plan.layouts import Layout, kernels
from pipeline.plan.plan import Plan
from pipeline.plan.program import activation_spec
from pipeline.plan.strategies import plan_network
from pipeline.run.emulation import Throttle
from pipeline.run.execution import Execution
from pipeline.run.transport import Transport

LINK_BYTES = (1_024, 1_048_576, 8_388_608)
"""Sizes of the messages that measure a link, ascending."""
_UPDATED_PARAMETERS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Operations that are measured together: one segment of the calibration."""

    operations: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    splittable: bool
    """Whether a rank can do a part of it; if not, it is measured whole only."""

    @property
    def name(self) -> str:
        """Its operations, joined by ``+``."""
        return "+".join(self.operations)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure."""

    importable: Importable = field(default_factory=Importable)
    """Before the model, which may be torchvision's: fields are unpickled in order."""

    model: nn.Module
    """A skeleton on the meta device: times do not depend on the weights."""
    graph: Graph
    chains: tuple[Chain, ...]
    images: int
    fractions: tuple[float, ...]
    repetitions: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a rank measured; times in s."""

    forward: NDArray[np.float64]
    """(segment, share, repetition); NaN where a segment was not measured."""
    backward: NDArray[np.float64]
    kernels: NDArray[np.float64]
    """(segment, share): channels at that share; of input features for a dense layer."""
    update: NDArray[np.float64]
    """(repetition) of the optimiser per parameter."""
    links: dict[int, NDArray[np.float64]]
    """By other rank, (message, repetition) one way; each pair is measured by its lower rank."""


def measure_rank(context: RankContext, task: Task) -> Measurement:
    """Measure this rank's device and its links; every rank of the gang runs this."""
    torch.manual_seed(0)
    model = task.model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.01).abs_()  # running variances must not be negative
            else:
                tensor.zero_()
    shape = (len(task.chains), len(task.fractions))
    forward = np.full((*shape, task.repetitions), np.nan)
    backward = forward.copy()
    kernels = np.full(shape, np.nan)
    undivided = _execution_of(context, model, task.graph, None)
    for share, fraction in enumerate(task.fractions):
        split = _execution_of(context, model, task.graph, fraction)
        for segment, chain in enumerate(task.chains):
            if fraction < 1 and not chain.splittable:
                continue
            execution = split if chain.splittable else undivided
            kernels[segment, share] = _kernels(task.graph, execution.plan, chain)
            times = _measure_chain(context, execution, chain, task)
            forward[segment, share], backward[segment, share] = times.T
            context.report(share * len(task.chains) + segment + 1, total=len(task.chains) * len(task.fractions))
    return Measurement(
        forward=forward,
        backward=backward,
        kernels=kernels,
        update=_measure_update(context, task.repetitions),
        links=_measure_links(context, task.repetitions),
    )


def _execution_of(context: RankContext, model: nn.Module, graph: Graph, fraction: float | None) -> Execution:
    """An execution in which this device plays the first of two ranks and has ``fraction`` of every layer.

    Without a fraction it is the only rank and has everything, undivided.
    """
    label = context.device.label
    if fraction is None:
        plan = plan_network(graph, "single", batch_size=1, labels=(label,))
    else:
        shares = (fraction, 1 - fraction)
        plan = plan_network(graph, "kernel", batch_size=1, labels=(label, "elsewhere"), shares=shares)
    execution = Execution(replace(context, rank=0, size=plan.ranks, group=None), model, graph, plan)
    with torch.no_grad():
        for tensor in execution.parameters.work.values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.01).abs_()
    return execution


def _kernels(graph: Graph, plan: Plan, chain: Chain) -> int:
    first = plan[chain.operations[0]]
    layout = first.input if first.input.kind == "K" else first.output
    return layout.shares[0] if layout.kind == "K" else graph[chain.operations[0]].channels or 1


def _measure_chain(context: RankContext, execution: Execution, chain: Chain, task: Task) -> NDArray[np.float64]:
    """Forward and backward time in s, (repetition, 2); one more repetition before them warms up."""
    graph, plan = task.graph, execution.plan
    inputs = tuple(dict.fromkeys(
        Placed(value, plan[name].input)
        for name in chain.operations
        for value in graph[name].inputs
        if value in chain.inputs or plan[value].output != plan[name].input
    ))  # fmt: skip
    outputs = tuple(Placed(name, plan[name].output) for name in chain.outputs)
    trained = {one.name for name in chain.operations for one in graph[name].parameters if one.trained}
    differentiable = frozenset(one for one in inputs if one.name != graph.input)
    steps = tuple(
        Step(
            operation=name,
            part="whole",
            inputs=tuple(Placed(value, plan[name].input) for value in graph[name].inputs),
            output=Placed(name, plan[name].output),
        )
        for name in chain.operations
    )
    gradients = differentiable | (frozenset(outputs) if trained or differentiable else frozenset())
    instruction = Compute(
        name=chain.name,
        direction="forward",
        segment=0,
        steps=steps,
        inputs=inputs,
        outputs=outputs,
        ranks=(0,),
    )
    values = {placed: _made_up(execution, placed, task).requires_grad_(placed in gradients) for placed in inputs}
    incoming: dict[Placed, torch.Tensor] = {}

    def once() -> tuple[float, float]:
        execution.begin(task.images, None, training=True)
        execution.parameters.clear_gradients()
        for placed, value in values.items():
            value.grad = None
            execution.values[placed] = value
        ahead = _timed(context, functools.partial(execution.compute, instruction, gradients))
        for placed in outputs:
            incoming.setdefault(placed, torch.rand_like(execution.values[placed]))
            execution.values[placed].grad = incoming[placed]
        backward = replace(instruction, direction="backward")
        return ahead, _timed(context, functools.partial(execution.compute, backward, gradients))

    context.barrier()
    times = [once() for _ in range(1 + task.repetitions)]
    _keep_busy(context, once)
    return np.array(times[1:])


def _keep_busy(context: RankContext, work: Callable[[], object]) -> None:
    """Go on working until every rank has measured, so that the slower ones are measured beside busy devices too."""
    if context.group is None:
        return
    others = dist.barrier(context.group, async_op=True)
    while not others.is_completed():
        work()
    others.wait()


def _made_up(execution: Execution, placed: Placed, task: Task) -> torch.Tensor:
    spec = activation_spec(task.graph, placed.name, task.images)
    shape = spec.local_shape(spec.boxes(placed.layout)[0])
    return torch.rand(shape, dtype=execution.dtype, device=execution.transport.device)


def _timed(context: RankContext, work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if context.torch_device.type == "cuda":
        torch.cuda.synchronize(context.torch_device)
    return time.perf_counter() - start


def _measure_update(context: RankContext, repetitions: int) -> NDArray[np.float64]:
    """Time of SGD with momentum per parameter in s."""
    throttle = Throttle(context.device)
    parameter = nn.Parameter(torch.zeros(_UPDATED_PARAMETERS, device=context.torch_device))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD([parameter], lr=0.01, momentum=0.9)

    def work() -> None:
        with throttle.work():
            optimizer.step()

    work()
    return np.array([_timed(context, work) for _ in range(repetitions)]) / _UPDATED_PARAMETERS


def _measure_links(context: RankContext, repetitions: int) -> dict[int, NDArray[np.float64]]:
    """Half of each round trip of every message size, from this rank to every higher one, one pair at a time."""
    links = {}
    transport = Transport(context)  # what a training's messages go through: shared memory on one host, else sockets
    for lower in range(context.size):
        for higher in range(lower + 1, context.size):
            context.barrier()
            if context.rank in (lower, higher):
                times = _round_trips(context, transport, lower, higher, repetitions) / 2
                if context.rank == lower:
                    links[higher] = times
    return links


def _round_trips(
    context: RankContext, transport: Transport, lower: int, higher: int, repetitions: int
) -> NDArray[np.float64]:
    times = np.empty((len(LINK_BYTES), repetitions))
    for index, size in enumerate(LINK_BYTES):
        elements = size // 4
        here, there = (_all_on(end, elements, context.size) for end in (lower, higher))
        out = Exchange(
            name=f"{size} bytes {lower}→{higher}",
            direction="forward",
            source=Placed("message", here),
            target=Placed("message", there),
            spec=TensorSpec(shape=(1, elements), channel_axis=1, images_axis=0),
        )
        back = replace(out, direction="backward")
        message = torch.zeros(1, elements, device=context.torch_device)
        starts = context.rank == lower
        for repetition in range(-1, repetitions):
            start = time.perf_counter()
            for one in (out, back):
                sends = starts == (one is out)
                transport.exchange(one, message if sends else None, None if sends else message)
            if repetition >= 0:
                times[index, repetition] = time.perf_counter() - start
    return times


def _all_on(rank: int, elements: int, ranks: int) -> Layout:
    return kernels(tuple(elements if other == rank else 0 for other in range(ranks)))

"""What every rank of a calibration does.

All ranks measure the same segment at the same time, and who is ready first goes on working until all are: what devices
take from each other is in the numbers. A first pass measures everything; further passes repeat only what still is
uncertain by enough to matter for the step.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from pipeline._torchvision import Importable
from pipeline.calibration.links import measure_links, measure_turns
from pipeline.calibration.segments import Chain
from pipeline.cluster.gang import RankContext
from pipeline.graph.trace import Graph
from pipeline.plan.instructions import Compute, Placed, Step
from pipeline.plan.plan import Plan
from pipeline.plan.program import activation_spec, is_divided
from pipeline.plan.strategies import Kind, Mixed, layers_of, plan_network
from pipeline.plan.ties import Tie
from pipeline.run.emulation import Throttle
from pipeline.run.execution import Execution
from pipeline.run.memory import current_memory
from pipeline.run.memory_format import arranged, may_have_channels_last
from pipeline.run.transport import Transport

_LEAST_UPDATED, _MOST_UPDATED = 1_000_000, 16_000_000
"""Trained parameters that the update is measured with, between these as many as the network has."""
_LINK_REPETITIONS = 5
_LEAST_REPETITIONS = 3
"""Of what is not measured again where it is uncertain."""
_CERTAIN = 0.02
"""What is uncertain by less than this part of a whole step is not measured again."""
_DIRECTIONS, _PARTS = 2, 3
_CLEARLY = 0.95
"""Another order in memory has to save more than measurements err."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure."""

    importable: Importable = field(default_factory=Importable)
    """Before the model, which may be torchvision's: fields are unpickled in order."""

    model: nn.Module
    """A skeleton on the meta device: times do not depend on the weights."""
    graph: Graph
    chains: tuple[Chain, ...]
    """Segments of different geometry."""
    weights: tuple[int, ...]
    """For each of them, how often its like is in the network."""
    images: tuple[int, ...]
    """Ascending numbers of images that each is measured with."""
    fractions: tuple[float, ...]
    repetitions: int
    """Of everything, in the first pass."""
    passes: int
    """How many passes at most follow, each with one more repetition of what still is uncertain."""
    alone: tuple[int, ...]
    """Ranks that measure once more, one after the other, while all others wait."""

    def kernels(self) -> NDArray[np.float64]:
        """How many channels are measured, (segment, share); of input features for a dense layer.

        NaN where nothing is: of a segment that cannot be split all but the whole, and of a narrow one the fractions
        that come to the same number as a larger one.
        """
        found = np.full((len(self.chains), len(self.fractions)), np.nan)
        for share, fraction in enumerate(self.fractions):
            plan = split_plan(self.graph, fraction)
            for segment, chain in enumerate(self.chains):
                if chain.splittable:
                    found[segment, share] = _channels(self.graph, plan, chain)
                elif fraction == 1:
                    found[segment, share] = self.graph[chain.operations[0]].channels or 1
        found[:, :-1][found[:, :-1] == found[:, 1:]] = np.nan  # the fractions ascend
        return found


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a rank measured; times in s."""

    times: NDArray[np.float64]
    """(segment, share, images, repetition, part): forward, backward, and of that until the gradient of the input is
    there, where these two are computed one after the other. NaN where nothing was measured."""
    alone: NDArray[np.float64]
    """(segment, repetition, direction) of whole segments with the most images, while the other ranks wait."""
    kernels: NDArray[np.float64]
    """(segment, share): channels at that share; of input features for a dense layer."""
    update: NDArray[np.float64]
    """(repetition, 2) of the optimiser: whatever its parameters, and per parameter."""
    process_memory: int
    """Bytes that the process holds without any network, when it has done all kinds of work."""
    channels_last: bool
    """Whether all ranks measured with the channels last in memory, because that was faster."""
    links: dict[int, NDArray[np.float64]]
    """By other rank, (message, repetition) one way; each pair is measured by its lower rank."""
    turns: NDArray[np.float64]
    """(message, repetition) of an exchange between all ranks at once, which compute before it; the same on all."""


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
    channels_last = _is_faster_with_channels_last(context, model, task)
    segments = _Segments(context, model, task, channels_last=channels_last)
    for _ in range(1 + task.passes):
        todo = segments.uncertain()
        if not todo:
            break
        segments.measure(todo)
    alone = segments.measure_alone()
    times, kernels = segments.times, segments.kernels
    update = _measure_update(context, task)
    transport = Transport(context)  # what a training's messages go through: shared memory on one host, else sockets
    links = measure_links(context, transport, max(task.repetitions, _LINK_REPETITIONS))
    turns = measure_turns(context, transport, max(task.repetitions, _LEAST_REPETITIONS))
    # What torch has set up for its operations by now stays in the process, as it will in training.
    del segments, model
    return Measurement(
        times=times,
        alone=alone,
        kernels=kernels,
        update=update,
        process_memory=current_memory(context.torch_device),
        channels_last=channels_last,
        links=links,
        turns=turns,
    )


class _Segments:
    """The times of one rank so far."""

    def __init__(self, context: RankContext, model: nn.Module, task: Task, *, channels_last: bool) -> None:
        self._context, self._model, self._task, self._channels_last = context, model, task, channels_last
        self._done = 0
        shape = (len(task.chains), len(task.fractions))
        self.times = np.full((*shape, len(task.images), task.repetitions + task.passes, _PARTS), np.nan)
        self.kernels = task.kernels()
        self._undivided = _execution_of(context, model, task.graph, None, channels_last=channels_last)

    def uncertain(self) -> list[tuple[int, int]]:
        """The (share, segment) pairs that any rank has to measure (again), the same on all ranks."""
        task = self._task
        every = [(int(share), int(segment)) for share, segment in np.argwhere(np.isfinite(self.kernels.T))]
        if not self._done:
            return every
        least = np.sort(
            self.times[:, :, -1, :, :_DIRECTIONS].sum(axis=-1), axis=-1
        )  # (segment, share, repetition), NaN last
        step = float(np.nansum(least[:, -1, 0] * np.array(task.weights)))
        # The median counts; noise only adds to a time, so it is in doubt as far as it lies above the least.
        doubt = 2 * (np.nanmedian(least, axis=-1) - least[..., 0])
        # As if the rest of the step were done at the same share.
        relative = doubt * np.array(task.weights)[:, None] / (step * np.array(task.fractions))
        relative = np.nan_to_num(relative, nan=np.inf)
        if self._context.group is not None:
            agreed = torch.from_numpy(relative)
            dist.all_reduce(agreed, dist.ReduceOp.MAX, self._context.group)
        return [(share, segment) for share, segment in every if relative[segment, share] > _CERTAIN]

    def measure(self, todo: list[tuple[int, int]]) -> None:
        """One pass over what is to be measured, one share after the other.

        Within a share the segments run in turn, as they do in training: one that is repeated on its own finds its
        weights in the cache.
        """
        task = self._task
        repetitions = 1 if self._done else task.repetitions
        for share in sorted({share for share, _ in todo}):
            segments = [segment for at, segment in todo if at == share]
            split = self._split(task.fractions[share]) if any(task.chains[one].splittable for one in segments) else None
            runs = {}
            for segment in segments:
                chain = task.chains[segment]
                execution = split if chain.splittable and split is not None else self._undivided
                runs[segment] = [
                    _step_of(self._context, execution, chain, task.graph, images) for images in task.images
                ]
            times = _in_turn(self._context, list(runs.values()), repetitions)
            self.times[segments, share, :, self._done : self._done + repetitions] = times
            self._context.report(sum(at <= share for at, _ in todo), total=len(todo))
        self._done += repetitions

    def measure_alone(self) -> NDArray[np.float64]:
        """What ``Measurement.alone`` says; every rank has to call it."""
        task, context = self._task, self._context
        times = np.full((len(task.chains), task.repetitions, _DIRECTIONS), np.nan)
        for rank in task.alone if context.group is not None else ():
            context.barrier()
            if rank == context.rank:
                runs = [_step_of(context, self._undivided, chain, task.graph, task.images[-1]) for chain in task.chains]
                for repetition in range(-1, task.repetitions):
                    for segment, run in enumerate(runs):
                        found = run()
                        if repetition >= 0:
                            times[segment, repetition] = found[:_DIRECTIONS]
        context.barrier()
        return times

    def _split(self, fraction: float) -> Execution:
        return _execution_of(self._context, self._model, self._task.graph, fraction, channels_last=self._channels_last)


def _is_faster_with_channels_last(context: RankContext, model: nn.Module, task: Task) -> bool:
    """Whether the whole network takes clearly less time with the channels last in memory, over all ranks."""
    if not may_have_channels_last(model):
        return False
    seconds = []
    for channels_last in (False, True):
        execution = _execution_of(context, model, task.graph, None, channels_last=channels_last)
        try:
            seconds.append(_whole_seconds(context, execution, task))
        except RuntimeError:
            if not channels_last:
                raise
            seconds.append(float("inf"))  # a model's own code may need its images as torch has them
    total = torch.tensor(seconds, dtype=torch.float64)
    if context.group is not None:
        dist.all_reduce(total, group=context.group)
    return bool(total[1] < _CLEARLY * total[0])


def _whole_seconds(context: RankContext, execution: Execution, task: Task) -> float:
    """Time of all segments, each as often as the network has its like, in s."""
    total = 0.0
    for chain, times in zip(task.chains, task.weights, strict=True):
        few, many = (
            _step_of(context, execution, chain, task.graph, images) for images in (task.images[0], task.images[-1])
        )
        few()
        total += times * sum(many()[:_DIRECTIONS])
    return total


def _execution_of(
    context: RankContext, model: nn.Module, graph: Graph, fraction: float | None, *, channels_last: bool
) -> Execution:
    """An execution in which this device plays the first of two ranks and has ``fraction`` of every layer.

    Without a fraction it is the only rank and has everything, undivided.
    """
    label = context.device.label
    if fraction is None:
        plan = plan_network(graph, "single", batch_size=1, labels=(label,))
    else:
        plan = split_plan(graph, fraction, label)
    plan = replace(plan, channels_last=channels_last)
    execution = Execution(replace(context, rank=0, size=plan.ranks, group=None), model, graph, plan)
    with torch.no_grad():
        for tensor in execution.parameters.work.values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.01).abs_()
    return execution


def split_plan(graph: Graph, fraction: float, label: str = "here") -> Plan:
    """The plan in which the first of two ranks has ``fraction`` of every layer, one kernel at least."""

    def split(tie: Tie) -> tuple[int, int]:
        units = tie.channels // tie.unit
        here = min(units, max(1, round(fraction * units)))
        return here * tie.unit, (units - here) * tie.unit

    kinds: dict[str, Kind] = dict.fromkeys((one.name for one in layers_of(graph)), "K")
    return Plan(
        strategy="kernel",
        batch_size=1,
        devices=(0, 1),
        labels=(label, "elsewhere"),
        operations=Mixed(graph, 2, kinds, split, None).plans(),
    )


def _channels(graph: Graph, plan: Plan, chain: Chain) -> int:
    """The first rank's channels of a segment."""
    first = plan[chain.operations[0]]
    layout = first.input if first.input.kind == "K" else first.output
    return layout.shares[0] if layout.kind == "K" else graph[chain.operations[0]].channels or 1


def _in_turn(
    context: RankContext, runs: list[list[Callable[[], tuple[float, ...]]]], repetitions: int
) -> NDArray[np.float64]:
    """Times of each of ``runs``, by its numbers of images, in s: (run, images, repetition, part)."""
    context.barrier()
    for steps in runs:
        steps[-1]()  # the first time torch sets up its operations, and the system gives it memory
    times = np.array([[[once() for once in steps] for steps in runs] for _ in range(repetitions)])
    turns = itertools.cycle([steps[0] for steps in runs])

    def go_on() -> None:
        next(turns)()

    _keep_busy(context, go_on)
    return times.transpose(1, 2, 0, 3)


def _step_of(
    context: RankContext, execution: Execution, chain: Chain, graph: Graph, images: int
) -> Callable[[], tuple[float, ...]]:
    """What runs a segment forward and backward on made-up values, and tells the times of its parts in s."""
    plan = execution.plan
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
    forward = Compute(
        name=chain.name, direction="forward", segment=0, steps=steps, inputs=inputs, outputs=outputs, ranks=(0,)
    )
    backward = replace(forward, direction="backward")
    first = graph[chain.operations[0]]
    divided = is_divided(graph, first, plan[first.name]) and plan[first.name].output.shares[-1] > 0
    values = {one: _made_up(execution, one, graph, images).requires_grad_(one in gradients) for one in inputs}
    incoming: dict[Placed, torch.Tensor] = {}

    def timed(instruction: Compute) -> float:
        work = functools.partial(execution.compute, instruction, gradients)
        return execution.throttle.busy_time(work, context.torch_device)

    def once() -> tuple[float, ...]:
        execution.begin(images, None, training=True)
        execution.parameters.clear_gradients()
        for placed, value in values.items():
            value.grad = None
            execution.values[placed] = value
        ahead = timed(forward)
        for placed in outputs:
            incoming.setdefault(placed, torch.rand_like(execution.values[placed]))
            execution.values[placed].grad = incoming[placed]
        if not divided:
            return ahead, timed(backward), math.nan
        until_input = timed(replace(backward, gradients="inputs"))
        return ahead, until_input + timed(replace(backward, gradients="parameters")), until_input

    return once


def _keep_busy(context: RankContext, work: Callable[[], object]) -> None:
    """Go on working until every rank has measured, so that the slower ones are measured beside busy devices too."""
    if context.group is None:
        return
    others = dist.barrier(context.group, async_op=True)
    while not others.is_completed():
        work()
    others.wait()


def _made_up(execution: Execution, placed: Placed, graph: Graph, images: int) -> torch.Tensor:
    spec = activation_spec(graph, placed.name, images)
    shape = spec.local_shape(spec.boxes(placed.layout)[0])
    made_up = torch.rand(shape, dtype=execution.dtype, device=execution.transport.device)
    return arranged(made_up, channels_last=execution.plan.channels_last)


def _measure_update(context: RankContext, task: Task) -> NDArray[np.float64]:
    """Time of SGD with momentum in s, (repetition, 2): for parameters without a number in them, and per number."""
    trained = {one.name: one.shape for op in task.graph.operations for one in op.parameters if one.trained}
    sizes = [math.prod(shape) for shape in trained.values()]
    total = max(sum(sizes), 1)
    scale = min(max(total, _LEAST_UPDATED), _MOST_UPDATED) / total
    full = _update_of(context, [max(1, round(scale * size)) for size in sizes])
    empty = _update_of(context, [1] * len(sizes))
    overheads = [empty() for _ in range(max(task.repetitions, _LEAST_REPETITIONS))]
    least = min(overheads)  # what disturbed one of them is no work on parameters
    return np.array([(overhead, max(full() - least, 0.0) / (scale * total)) for overhead in overheads])


def _update_of(context: RankContext, sizes: Sequence[int]) -> Callable[[], float]:
    """What updates parameters of so many numbers each, and tells the time in s."""
    throttle = Throttle(context.device)
    parameters = [nn.Parameter(torch.zeros(size, device=context.torch_device)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(parameters or [torch.zeros(1)], lr=0.01, momentum=0.9)

    def work() -> None:
        with throttle.work():
            optimizer.step()

    work()
    return functools.partial(throttle.busy_time, work, context.torch_device)

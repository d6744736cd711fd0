"""What every rank of a calibration does.

All ranks measure the same segment at the same time, and who is ready first goes on working until all are: what devices
take from each other is in the numbers. A first pass measures everything; further passes repeat only what still is
uncertain by enough to matter for the step.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from pipeline._torchvision import Importable
from pipeline.calibration.links import Turns, measure_links, measure_turns
from pipeline.calibration.passes import PARTS, Pass, call_seconds, initialise
from pipeline.calibration.segments import Chain
from pipeline.calibration.skeletons import parts_with_some_weights
from pipeline.cluster.gang import RankContext
from pipeline.graph.effects import Effect
from pipeline.graph.operations import Graph
from pipeline.plan.plan import Plan
from pipeline.plan.strategies import Kind, Mixed, layers_of, plan_network
from pipeline.plan.ties import Tie
from pipeline.run.emulation import Throttle
from pipeline.run.execution import Execution
from pipeline.run.memory import current_memory
from pipeline.run.memory_format import may_have_channels_last
from pipeline.run.parts import Parts
from pipeline.run.transport import Transport

_LEAST_UPDATED, _MOST_UPDATED = 1_000_000, 4_000_000
"""Trained parameters that the update is measured with, between these as many as the network has."""
_LINK_REPETITIONS = 5
_LEAST_REPETITIONS = 3
"""Of what is not measured again where it is uncertain."""
_MEASURED_S, _MOST_REPETITIONS = 0.5, 8
"""Short steps are repeated until so much time is measured, or so often."""
_LONG_S = 0.4
"""What setting up operations adds to a step as long as this is little. A device that takes longer for the whole network
does with few images what is more than it would have of it."""
_PART = 0.25
"""Of the kernels, which tell the order in memory where all of them take long even for few images."""
_NEAR = 0.7
"""A measured share may be by so much smaller than what a device would have, to be taken for that."""
_CERTAIN, _ENOUGH_S = 0.02, 6.0
"""What is uncertain by less than this part of a whole step, or has taken so long already, is not measured again."""
_DIRECTIONS = 2
_CLEARLY = 0.95
"""Another order in memory has to save more than measurements err."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What to measure."""

    importable: Importable = field(default_factory=Importable)
    """Before the model, which may be torchvision's: fields are unpickled in order."""

    model: bytes | None
    """A skeleton of the model, as times do not depend on the weights; None if it cannot travel."""
    modules: Mapping[str, bytes | None]
    """Those of the submodules that run as they are."""
    graph: Graph
    cuts: frozenset[str]
    """The operations that segments begin with."""
    chains: tuple[Chain, ...]
    """Segments of different geometry."""
    weights: tuple[int, ...]
    """For each of them, how often its like is in the network."""
    images: tuple[int, ...]
    """Ascending numbers of images that each is measured with."""
    fractions: tuple[float, ...]
    repetitions: int
    """Of everything, in the first pass; more of short steps."""
    passes: int
    """How many passes at most follow, each with one more repetition of what still is uncertain."""
    alone: tuple[int, ...]
    """Ranks that measure once more, one after the other, while all others wait."""
    known: Mapping[int, frozenset[int]] = field(default_factory=dict)
    """By order in memory (1 with the channels last), chains that need not be measured."""

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
    """What a rank measured; times in s, of segments beyond what a call of nothing takes."""

    times: NDArray[np.float64]
    """(segment, share, images, repetition, part): forward, backward, and of that until the gradient of the input is
    there, where these two are computed one after the other. NaN where nothing was measured, as with the most images at
    large shares of a slow device; each segment was measured at one share at least with all numbers of images."""
    alone: NDArray[np.float64]
    """(segment, repetition, direction) of whole segments while the other ranks wait, with the most images that these
    were measured with; NaN for some that take long."""
    by_images: NDArray[np.float64]
    """As ``alone``, but beside the others and with batch normalisation that works on a part of the batch; NaN for
    segments without it."""
    calls: NDArray[np.float64]
    """(repetition, direction) of a computation of nothing."""
    kernels: NDArray[np.float64]
    """(segment, share): channels at that share; of input features for a dense layer."""
    update: NDArray[np.float64]
    """(repetition, 3) of the optimiser: whatever its parameters, per parameter, and that while the other ranks wait,
    NaN where it was not measured."""
    process_memory: int
    """Bytes that the process holds without any network, when it has done all kinds of work."""
    channels_last: bool
    """Whether all ranks measured with the channels last in memory, because that was faster."""
    links: dict[int, NDArray[np.float64]]
    """By other rank, (2, message, repetition) to it and from it; each pair is measured by its lower rank."""
    turns: Turns
    """What they wait for each other."""


def measure_rank(context: RankContext, task: Task) -> Measurement:
    """Measure this rank's device and its links; every rank of the gang runs this."""
    torch.manual_seed(0)
    parts = parts_with_some_weights(task.graph, task.modules)
    channels_last, expected = _faster_order(context, parts, task)
    whole = _execution_of(context, parts, task.graph, None, channels_last=channels_last)
    calls = np.array([call_seconds(whole) for _ in range(max(task.repetitions, _LEAST_REPETITIONS))])
    forward, backward = (float(one) for one in np.median(calls, axis=0))
    segments = _Segments(context, parts, task, whole, (forward, backward), expected)
    for _ in range(1 + task.passes):
        todo = segments.uncertain()
        if not todo:
            break
        segments.measure(todo)
    alone = segments.measure_alone()
    by_images = segments.measure_by_images()
    times, kernels = segments.times, segments.kernels
    update = _measure_update(context, task)
    transport = Transport(context)  # what a training's messages go through: shared memory on one host, else sockets
    links = measure_links(context, transport, max(task.repetitions, _LINK_REPETITIONS))
    turns = segments.measure_turns(transport)
    # What torch has set up for its operations by now stays in the process, as it will in training.
    del segments, whole, parts, transport
    return Measurement(
        times=times,
        alone=alone,
        by_images=by_images,
        calls=calls,
        kernels=kernels,
        update=update,
        process_memory=current_memory(context.torch_device),
        channels_last=channels_last,
        links=links,
        turns=turns,
    )


class _Segments:
    """The times of one rank so far."""

    def __init__(
        self,
        context: RankContext,
        parts: Parts,
        task: Task,
        whole: Execution,
        call: tuple[float, float],
        expected: NDArray[np.float64],
    ) -> None:
        """``whole`` is an execution of this rank alone; ``call`` what a computation of nothing takes, both ways.

        ``expected`` is about what each rank takes for all segments with the most images.
        """
        self._context, self._parts, self._task, self._whole, self._call = context, parts, task, whole, call
        self._done, self._spent = 0, 0.0
        known = task.known.get(int(whole.plan.channels_last), frozenset())
        self._chains = {index: one for index, one in enumerate(task.chains) if index not in known}
        self._is_long, self._is_long_for_any = (bool(one > _LONG_S) for one in (expected[context.rank], expected.max()))
        self._part = float(1 / (expected[context.rank] * (1 / expected).sum()))
        enough = math.ceil(_MEASURED_S / expected.max())
        self._repetitions = max(task.repetitions, min(enough, _MOST_REPETITIONS))
        shape = (len(task.chains), len(task.fractions))
        self.times = np.full((*shape, len(task.images), self._repetitions + task.passes, len(PARTS)), np.nan)
        self.kernels = task.kernels()
        self._by_few = self._shares_by_few()

    def _shares_by_few(self) -> NDArray[np.bool_]:
        """(segment, share) what this rank measures with few images only, if it is slow: large shares.

        What it would have of the network, as far as its time tells, and the smallest of each segment, it measures with
        the most, too.
        """
        fractions, measured = np.array(self._task.fractions), np.isfinite(self.kernels)
        if not self._is_long or len(self._task.images) == 1:
            return np.zeros_like(measured)
        enough = fractions[fractions >= _NEAR * self._part][0]
        found: NDArray[np.bool_] = measured & (fractions > enough) & (np.cumsum(measured, axis=1) > 1)
        return found

    def uncertain(self) -> list[int]:
        """The shares that any rank has to measure (again), the same on all ranks."""
        task = self._task
        every = np.flatnonzero(np.isfinite(self.kernels[list(self._chains)]).any(axis=0))
        if not self._done:
            return [int(share) for share in every]
        both = np.ma.masked_invalid(self._with_most(self.times)[..., :_DIRECTIONS].sum(axis=-1))  # and (repetition)
        least = both.min(axis=-1).filled(0.0)
        # The median counts; noise only adds to a time, so it is in doubt as far as it lies above the least.
        doubt = 2 * (np.ma.median(both, axis=-1).filled(0.0) - least)  # type: ignore[no-untyped-call]
        images = np.where(self._by_few, task.images[0], task.images[-1])
        step_per_image = float((least[:, -1] / images[:, -1]) @ np.array(task.weights))
        # As if the rest of the step were done at the same share.
        step = step_per_image * images * np.array(task.fractions)
        relative = doubt * np.array(task.weights)[:, None] / step
        agreed = torch.tensor([*relative.max(axis=0), self._spent])
        if self._context.group is not None:
            dist.all_reduce(agreed, dist.ReduceOp.MAX, self._context.group)
        *most, spent = agreed.tolist()
        return [int(share) for share in every if most[share] > _CERTAIN and spent < _ENOUGH_S]

    def measure(self, shares: list[int]) -> None:
        """Measure at these shares, all segments of each: uncertain ones by themselves would find another cache."""
        repetitions, start = 1 if self._done else self._repetitions, time.perf_counter()
        for place, share in enumerate(shares):
            self._measure_share(share, repetitions)
            self._context.report(place + 1, total=len(shares))
        self._done += repetitions
        self._spent += time.perf_counter() - start

    def _measure_share(self, share: int, repetitions: int) -> None:
        """Whoever has all of a segment, as with a part of the images, does not divide its backward computation."""
        task, fraction = self._task, self._task.fractions[share]
        there = {index: one for index, one in self._chains.items() if np.isfinite(self.kernels[index, share])}
        execution = self._whole if fraction == 1 else self._execution(split_plan(task.graph, fraction))
        last = len(task.images) - 1
        chosen = {
            place: {index: one for index, one in there.items() if place < last or not self._by_few[index, share]}
            for place in range(last + 1)
        }
        passes = [self._pass(execution, some, task.images[place]) for place, some in chosen.items() if some]
        made = range(self._done, self._done + repetitions)
        for (place, some), found in zip(chosen.items(), self._times(passes, repetitions), strict=False):
            self.times[np.ix_(list(some), [share], [place], made)] = found.transpose(1, 0, 2)[:, None, None]

    def _with_most(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of ``values`` (segment, share, images, ...) those with the most images with which each was measured."""
        few = self._by_few.reshape(*self._by_few.shape, *[1] * (values.ndim - 3))
        found: NDArray[np.float64] = np.where(few, values[:, :, 0], values[:, :, -1])
        return found

    def _wholes(self) -> tuple[dict[int, Chain], int]:
        """Whole segments to compare with those measured beside others, and the number of images of both.

        Of a slow device the ones that it did with few images, nearly all; else all.
        """
        by_few = {index: one for index, one in self._chains.items() if self._by_few[index, -1]}
        return (by_few, self._task.images[0]) if by_few else (self._chains, self._task.images[-1])

    def measure_alone(self) -> NDArray[np.float64]:
        """What ``Measurement.alone`` says; every rank has to call it."""
        task, context = self._task, self._context
        times = np.full((len(task.chains), self._repetitions, _DIRECTIONS), np.nan)
        chains, images = self._wholes()
        for rank in task.alone if context.group is not None else ():
            context.barrier()
            if rank == context.rank:
                run = self._pass(self._whole, chains, images).run
                if not self._is_long:
                    run()
                for repetition in range(1 if self._is_long else self._repetitions):
                    times[list(chains), repetition] = run()[:, :_DIRECTIONS]
        context.barrier()
        return times

    def measure_by_images(self) -> NDArray[np.float64]:
        """What ``Measurement.by_images`` says."""
        task, (chains, images) = self._task, self._wholes()
        times = np.full((len(task.chains), self._repetitions, _DIRECTIONS), np.nan)
        divided = {
            index
            for index, one in self._chains.items()
            if any(task.graph[name].effect is Effect.BATCHNORM for name in one.operations)
        }
        if divided:
            # All of them run, as in a step.
            work = self._pass(self._execution(_images_plan(task.graph, images)), self._chains, images)
            (found,) = self._times([work], self._repetitions)
            for place, index in enumerate(self._chains):
                if index in divided and index in chains:
                    times[index] = found[:, place, :_DIRECTIONS]
        return times

    def measure_turns(self, transport: Transport) -> Turns:
        """With few images, and where these take long with each rank's part of the kernels: as it would compute them."""
        task, execution = self._task, self._whole
        repetitions = max(self._repetitions, _LEAST_REPETITIONS)
        if self._is_long_for_any:
            execution, repetitions = self._execution(split_plan(task.graph, self._part)), self._repetitions
        work = self._pass(execution, dict(enumerate(task.chains)), task.images[0])
        return measure_turns(self._context, transport, work, repetitions)

    def _times(self, passes: Sequence[Pass], repetitions: int) -> list[NDArray[np.float64]]:
        """Of each pass, measured beside the other ranks, (repetition, segment, part) in s."""
        self._context.barrier()
        # The first time torch sets up its operations, and the system gives it memory.
        for one in passes[:1] if self._is_long else reversed(passes):
            one.run()
        found = [[one.run() for one in passes] for _ in range(repetitions)]
        _keep_busy(self._context, max(reversed(passes), key=lambda one: one.computations))
        return [np.array(one) for one in zip(*found, strict=True)]

    def _pass(self, execution: Execution, segments: Mapping[int, Chain], images: int) -> Pass:
        return Pass(execution, self._task.graph, segments, self._task.cuts, images, self._call)

    def _execution(self, plan: Plan) -> Execution:
        last = self._whole.plan.channels_last
        return _execution_of(self._context, self._parts, self._task.graph, plan, channels_last=last)


def _faster_order(context: RankContext, parts: Parts, task: Task) -> tuple[bool, NDArray[np.float64]]:
    """Whether all ranks together do clearly more with the channels last in memory.

    And about how long each rank takes for all segments with the most images then, (rank) in s. Where the most would
    take long, few images tell, and where these would, too, a part of the kernels.
    """
    few, most = task.images[0], task.images[-1]

    def measured(images: int, fraction: float, *, channels_last: bool) -> NDArray[np.float64]:
        return _order_times(context, parts, task, images, fraction, channels_last=channels_last)

    images, fraction = few, _PART
    times = [measured(few, _PART, channels_last=False)]
    by_few = _of_ranks(context, times[0].sum() / _PART).max()
    if by_few <= _LONG_S:
        images, fraction = most if by_few * most / few <= _LONG_S else few, 1.0
        times = [measured(images, 1.0, channels_last=False)]
    if may_have_channels_last(task.graph):
        times.append(measured(images, fraction, channels_last=True))
    done = [float((1 / _of_ranks(context, one @ np.array(task.weights))).sum()) for one in times]
    last = len(times) > 1 and _CLEARLY * done[1] > done[0]
    return last, _of_ranks(context, times[int(last)].sum() / fraction * most / images)


def _of_ranks(context: RankContext, seconds: float) -> NDArray[np.float64]:
    """The ``seconds`` of every rank, at least some."""
    found = torch.zeros(context.size, dtype=torch.float64)
    found[context.rank] = max(seconds, 1e-6)
    if context.group is not None:
        dist.all_reduce(found, group=context.group)
    return found.numpy()


def _order_times(
    context: RankContext, parts: Parts, task: Task, images: int, fraction: float, *, channels_last: bool
) -> NDArray[np.float64]:
    """How long a part of each segment takes in this order in memory, in s; infinite if the model cannot be run so."""
    plan = None if fraction == 1 else split_plan(task.graph, fraction)
    execution = _execution_of(context, parts, task.graph, plan, channels_last=channels_last)
    work = Pass(execution, task.graph, dict(enumerate(task.chains)), task.cuts, images)
    try:
        work.run()  # which also sets up operations and memory
        times = work.run()[:, :_DIRECTIONS]
        for _ in range(min(int(_LONG_S / max(times.sum(), 1e-6)), _MOST_REPETITIONS)):
            times = np.minimum(times, work.run()[:, :_DIRECTIONS])
    except RuntimeError:
        if not channels_last:
            raise
        return np.full(len(task.chains), np.inf)  # a model's own code may need its images as torch has them
    both: NDArray[np.float64] = times.sum(axis=1)
    return both


def _execution_of(
    context: RankContext, parts: Parts, graph: Graph, plan: Plan | None, *, channels_last: bool
) -> Execution:
    """An execution in which this device plays the first rank of ``plan``; without one it has everything."""
    plan = plan or plan_network(graph, "single", batch_size=1, labels=("here",))
    plan = replace(plan, channels_last=channels_last)
    execution = Execution(replace(context, rank=0, size=plan.ranks, group=None), parts, graph, plan)
    initialise(execution.parameters.work.values())
    return execution


def split_plan(graph: Graph, fraction: float) -> Plan:
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
        labels=("here", "elsewhere"),
        operations=Mixed(graph, 2, kinds, split, None).plans(),
    )


def _images_plan(graph: Graph, images: int) -> Plan:
    """The plan in which the first of two ranks has all the images, as its part of the batch."""
    return plan_network(graph, "batch", batch_size=images, labels=("here", "elsewhere"), shares=(1, 0))


def _channels(graph: Graph, plan: Plan, chain: Chain) -> int:
    """The first rank's channels of a segment."""
    first, of_input = plan[chain.operations[0]], graph[chain.operations[0]].effect is Effect.KERNEL
    layout = first.input if of_input and first.input.kind == "K" else first.output
    return layout.shares[0] if layout.kind == "K" else graph[chain.operations[0]].channels or 1


def _keep_busy(context: RankContext, work: Pass) -> None:
    """Go on working until every rank has measured, so that the slower ones are measured beside busy devices too."""
    if context.group is None:
        return
    others = dist.barrier(context.group, async_op=True)
    while not others.is_completed():
        for _ in work.steps():
            if others.is_completed():
                break
    others.wait()


def _measure_update(context: RankContext, task: Task) -> NDArray[np.float64]:
    """Time of SGD with momentum in s, (repetition, 3): as ``Measurement.update``; every rank has to call it."""
    trained = {one.name: one.shape for op in task.graph.operations for one in op.parameters if one.trained}
    sizes = [math.prod(shape) for shape in trained.values()]
    total = max(sum(sizes), 1)
    scale = min(max(total, _LEAST_UPDATED), _MOST_UPDATED) / total
    full = _update_of(context, [max(1, round(scale * size)) for size in sizes])
    empty = _update_of(context, [1] * len(sizes))
    times = np.full((max(task.repetitions, _LEAST_REPETITIONS), 3), np.nan)
    times[:, 0] = [empty() for _ in times]
    least = times[:, 0].min()  # what disturbed one of them is no work on parameters
    context.barrier()
    times[:, 1] = [max(full() - least, 0.0) / (scale * total) for _ in times]
    for rank in task.alone if context.group is not None else ():
        context.barrier()
        if rank == context.rank:
            times[:, 2] = [max(full() - least, 0.0) / (scale * total) for _ in times]
    context.barrier()
    return times


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

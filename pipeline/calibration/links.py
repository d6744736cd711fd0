"""Measure the links: messages there and back between every pair of ranks, one pair at a time, then turns of all ranks.

A message of some size is answered by a small one, so that each direction is measured by itself, with one clock. Only
how the latency is divided between the two directions nobody can tell: it is taken to be the same.

In a *turn* every rank computes for a while and then sends a message to every other. Beside the message, a turn takes
the time until the last rank has a core again and until the others see that it is ready, which is more where ranks have
to share cores; and who has waited is slower at first (*resuming*).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.calibration.passes import Pass
from pipeline.cluster.gang import RankContext
from pipeline.links import Link
from pipeline.plan.instructions import Exchange, Placed, TensorSpec
from pipeline.plan.layouts import kernels, replicated
from pipeline.run.transport import Transport

LINK_BYTES = (1_024, 1_048_576, 8_388_608)
"""Sizes of the messages that measure a link, ascending."""
TURN_BYTES = (64, 1_048_576)
"""What each rank sends to every other in a turn, little and much."""
_ITEMSIZE = 4
_WAYS = 2
_TURNS = 24
"""How many turns with much to send are measured at once."""
_LEAST_TURNS = 4
"""Of fewer nobody can tell how they grow."""
_ENOUGH_S, _LEAST_REPETITIONS = 2.0, 2
"""Over slow links all is repeated for about so long, but so often at least."""
_MOST_RESUMING_S = 1e-3
"""What is longer than that is noise of long computations."""


class Turns(NamedTuple):
    """What ranks wait for each other in a training step."""

    waiting: NDArray[np.float64]
    """(message, repetition) s of an exchange after hardly any computing; the same on all ranks. NaN for one rank."""
    growing: float
    """s more of an exchange for each s of the computing before it; 0 for one rank."""
    resuming: NDArray[np.float64]
    """(repetition, direction) s that a computation takes longer after an exchange, on this rank. 0 for one rank."""


def link_of(time_MR: NDArray[np.float64], sizes: Sequence[int]) -> Link:
    """Latency and bandwidth from the median times of messages of ``sizes`` bytes, (message, repetition) in s.

    The smallest message gives the latency, the largest what is left for its bytes.
    """
    median = np.nanmedian(time_MR, axis=1)
    moving = max(float(median[-1] - median[0]), 1e-9)
    return Link(latency=float(median[0]), bandwidth=(sizes[-1] - sizes[0]) / moving)


def measure_links(context: RankContext, transport: Transport, repetitions: int) -> dict[int, NDArray[np.float64]]:
    """The time of every message size in s, (2, message, repetition), to every higher rank and from it."""
    links = {}
    for lower in range(context.size):
        for higher in range(lower + 1, context.size):
            context.barrier()
            if context.rank in (lower, higher):
                times = _both_ways(context, transport, lower, higher, repetitions)
                if context.rank == lower:
                    links[higher] = times
    return links


def measure_turns(context: RankContext, transport: Transport, work: Pass, repetitions: int) -> Turns:
    """Run the computations of ``work`` with and without messages between them, each of ``TURN_BYTES`` to every rank."""
    if context.group is None:
        return Turns(np.full((len(TURN_BYTES), repetitions), np.nan), 0.0, np.zeros((repetitions, 2)))
    little, much = (_turn_of(context, transport, size) for size in TURN_BYTES)
    seldom = -(-work.computations // _TURNS)
    alone = [_through(context, work) for _ in range(repetitions)]
    small, large = (
        _repeated(context, functools.partial(_through, context, work, turn, every), repetitions)
        for turn, every in ((little, 1), (much, seldom))
    )
    before, waits = _waits(context, small)
    lines = np.array([_line(before, one) for one in waits])
    growing = float(np.median(lines[:, 1]))
    seldom_before, seldom_waits = _waits(context, large)
    waiting = np.full((len(TURN_BYTES), repetitions), np.nan)
    waiting[0, : len(lines)] = lines[:, 0]
    rest = np.median(seldom_waits - growing * seldom_before, axis=1) if len(seldom_before) else lines[:, 0]
    waiting[1, : len(rest)] = np.maximum(rest, 0.0)
    return Turns(
        waiting=waiting,
        growing=growing,
        resuming=_resuming(alone, small, _MOST_RESUMING_S / context.device.speed),
    )


def _repeated(context: RankContext, walk: Callable[[], _Walk], repetitions: int) -> list[_Walk]:
    """``walk`` so often, or as often as there is time for; the same on all ranks. The first sets up the messages."""
    start = time.perf_counter()
    walk()
    took = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX, context.group)
    return [walk() for _ in range(_possible(repetitions, took.item()))]


def _possible(repetitions: int, seconds: float) -> int:
    """How often to repeat what takes so long."""
    return min(repetitions, max(_LEAST_REPETITIONS, int(_ENOUGH_S / max(seconds, 1e-6))))


class _Walk(NamedTuple):
    """Once through all computations."""

    seconds: NDArray[np.float64]
    """(computation)."""
    backward: NDArray[np.bool_]
    """(computation)."""
    computed: NDArray[np.float64]
    """(turn) s of the computations before it."""
    exchanged: NDArray[np.float64]
    """(turn) s."""


def _through(context: RankContext, work: Pass, turn: Callable[[], None] | None = None, every: int = 1) -> _Walk:
    """Run all computations, with a ``turn`` after each ``every`` of them."""
    seconds, backward, computed, exchanged = [], [], [0.0], []
    context.barrier()
    for place, one in enumerate(work.steps(), start=1):
        seconds.append(one.seconds)
        backward.append(one.part != "forward")
        computed[-1] += one.seconds
        if turn is not None and place % every == 0:
            start = time.perf_counter()
            turn()
            exchanged.append(time.perf_counter() - start)
            computed.append(0.0)
    return _Walk(np.array(seconds), np.array(backward), np.array(computed[:-1]), np.array(exchanged))


def _waits(context: RankContext, walks: Sequence[_Walk]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the slowest rank typically computes before each turn, and how much later all go on, (repetition, turn) in s.

    A round of computing and waiting takes all ranks the same time. The first is left out: nobody knows when the others
    began.
    """
    rounds = torch.from_numpy(np.array([one.computed + one.exchanged for one in walks])[:, 1:].copy())
    typical = torch.from_numpy(np.median([one.computed for one in walks], axis=0)[1:].copy())
    dist.all_reduce(rounds, dist.ReduceOp.SUM, context.group)
    dist.all_reduce(typical, dist.ReduceOp.MAX, context.group)
    return typical.numpy(), (rounds / context.size - typical).numpy()


def _line(before: NDArray[np.float64], waits: NDArray[np.float64]) -> tuple[float, float]:
    """Where ``waits`` begin and how they grow with the computing ``before``, neither negative; (turn) in s.

    By the median slope between two of them (Theil and Sen), without scipy, which would count as a rank's memory.
    """
    if len(before) < _LEAST_TURNS:
        return float(np.median(waits)) if len(waits) else 0.0, 0.0
    one, other = np.triu_indices(len(before), 1)
    apart, longer = before[other] - before[one], waits[other] - waits[one]
    growing = max(float(np.median(longer[apart != 0] / apart[apart != 0])), 0.0) if apart.any() else 0.0
    return max(float(np.median(waits - growing * before)), 0.0), growing


def _resuming(alone: Sequence[_Walk], turns: Sequence[_Walk], most: float) -> NDArray[np.float64]:
    """How much longer computations take between turns, (repetition, direction) in s: the median, up to ``most``."""
    usual = np.median([one.seconds for one in alone], axis=0)
    longer = np.clip(np.array([one.seconds for one in turns]) - usual, 0.0, most)
    backward = alone[0].backward
    found = np.zeros((len(turns), 2))
    for way in {bool(one) for one in backward}:
        found[:, int(way)] = np.median(longer[:, backward == way], axis=1)
    return found


def _turn_of(context: RankContext, transport: Transport, size: int) -> Callable[[], None]:
    """An exchange in which every rank sends ``size`` bytes to every other."""
    elements = size // _ITEMSIZE
    together = Exchange(
        name=f"turn of {size} bytes",
        direction="forward",
        source=Placed("turn", kernels((elements,) * context.size)),
        target=Placed("turn", replicated((1,) * context.size)),
        spec=TensorSpec(shape=(1, elements * context.size), channel_axis=1, images_axis=0),
    )
    message = torch.zeros(1, elements, device=context.torch_device)
    everything = torch.zeros(1, elements * context.size, device=context.torch_device)
    return functools.partial(transport.exchange, together, message, everything)


def _both_ways(
    context: RankContext, transport: Transport, lower: int, higher: int, repetitions: int
) -> NDArray[np.float64]:
    """What ``measure_links`` says of one pair: the first message, the smallest, takes half of the way there and back.

    A larger one takes what it and its small answer take, without that of the answer.
    """
    times = np.full((_WAYS, len(LINK_BYTES), repetitions), np.nan)
    starts = context.rank == lower
    for index, way in product(range(len(LINK_BYTES)), range(_WAYS)):
        if way and not index:
            times[way, index] = times[0, index]
            continue
        there, back = (LINK_BYTES[index], LINK_BYTES[0])[:: -1 if way else 1]
        messages = _message(there, lower, higher, context.size), _message(back, higher, lower, context.size)
        bodies = [torch.zeros(one.spec.shape, device=context.torch_device) for one in messages]
        trip = functools.partial(_trip, transport, messages, bodies, starts=starts)
        possible = torch.tensor(_possible(repetitions, trip()))  # which sets up the messages
        (dist.send if starts else dist.recv)(possible, higher if starts else lower, context.group)
        for repetition in range(int(possible)):
            times[way, index, repetition] = trip()
    times[:, 0] /= 2
    answer = float(np.nanmedian(times[0, 0]))
    times[:, 1:] = np.maximum(times[:, 1:] - answer, answer)
    return times


def _message(size: int, source: int, destination: int, ranks: int) -> Exchange:
    """An exchange of one message of ``size`` bytes."""
    elements = size // _ITEMSIZE
    here, there = (
        kernels(tuple(elements if rank == end else 0 for rank in range(ranks))) for end in (source, destination)
    )
    return Exchange(
        name=f"{size} bytes {source}→{destination}",
        direction="forward",
        source=Placed("message", here),
        target=Placed("message", there),
        spec=TensorSpec(shape=(1, elements), channel_axis=1, images_axis=0),
    )


def _trip(transport: Transport, messages: Sequence[Exchange], bodies: Sequence[torch.Tensor], *, starts: bool) -> float:
    """How long the one message there and the other back take, in s; whoever ``starts`` sends the first."""
    start = time.perf_counter()
    for place, (one, body) in enumerate(zip(messages, bodies, strict=True)):
        sends = starts == (place == 0)
        transport.exchange(one, body if sends else None, None if sends else body)
    return time.perf_counter() - start

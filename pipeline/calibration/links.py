"""Measure the links: round trips between every pair of ranks, one pair at a time, then turns of all ranks at once.

In a *turn* every rank computes for a while and then sends a message to every other. Beside the message, a turn takes
the time until the last rank has a core again and until the others see that it is ready, which is more where ranks have
to share cores; and who has waited is slower at first (*resuming*).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.calibration.passes import Pass
from pipeline.cluster.gang import RankContext
from pipeline.links import Link
from pipeline.plan.instructions import Exchange, Placed, TensorSpec
from pipeline.plan.layouts import Layout, kernels, replicated
from pipeline.run.transport import Transport

LINK_BYTES = (1_024, 1_048_576, 8_388_608)
"""Sizes of the messages that measure a link, ascending."""
TURN_BYTES = (64, 1_048_576)
"""What each rank sends to every other in a turn, little and much."""
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
    """Half of each round trip of every message size in s, (message, repetition), from this rank to every higher one."""
    links = {}
    for lower in range(context.size):
        for higher in range(lower + 1, context.size):
            context.barrier()
            if context.rank in (lower, higher):
                times = _round_trips(context, transport, lower, higher, repetitions) / 2
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
    elements = size // 4
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


def _round_trips(
    context: RankContext, transport: Transport, lower: int, higher: int, repetitions: int
) -> NDArray[np.float64]:
    times = np.full((len(LINK_BYTES), repetitions), np.nan)
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
        trip = functools.partial(_trip, transport, out, back, message, starts=starts)
        possible = torch.tensor(_possible(repetitions, trip()))  # which sets up the messages
        (dist.send if starts else dist.recv)(possible, higher if starts else lower, context.group)
        for repetition in range(int(possible)):
            times[index, repetition] = trip()
    return times


def _trip(transport: Transport, out: Exchange, back: Exchange, message: torch.Tensor, *, starts: bool) -> float:
    """How long ``message`` takes there and back, in s; whoever ``starts`` has it."""
    start = time.perf_counter()
    for one in (out, back):
        sends = starts == (one is out)
        transport.exchange(one, message if sends else None, None if sends else message)
    return time.perf_counter() - start


def _all_on(rank: int, elements: int, ranks: int) -> Layout:
    return kernels(tuple(elements if other == rank else 0 for other in range(ranks)))

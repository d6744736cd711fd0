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
"""About how many turns a measurement is of."""
_MOST_RESUMING_S = 1e-3
"""What is longer than that is noise of long computations."""


class Turns(NamedTuple):
    """What ranks wait for each other in a training step, in s."""

    waiting: NDArray[np.float64]
    """(message, repetition) what an exchange takes; the same on all ranks. NaN for one rank."""
    resuming: NDArray[np.float64]
    """(repetition, direction) what a computation takes longer after an exchange, on this rank. 0 for one rank."""


def link_of(time_MR: NDArray[np.float64], sizes: Sequence[int]) -> Link:
    """Latency and bandwidth from the median times of messages of ``sizes`` bytes, (message, repetition) in s.

    The smallest message gives the latency, the largest what is left for its bytes.
    """
    median = np.median(time_MR, axis=1)
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
    found = Turns(np.full((len(TURN_BYTES), repetitions), np.nan), np.zeros((repetitions, 2)))
    if context.group is None:
        return found
    turns = [_turn_of(context, transport, size) for size in TURN_BYTES]
    for repetition in range(-1, repetitions):  # the first time sets up the messages
        alone = _through(context, work, None)
        for index, turn in enumerate(turns):
            together = _through(context, work, turn)
            if repetition < 0:
                continue
            after = together.after_turn
            found.waiting[index, repetition] = max(together.beside - alone.beside, 0.0) / max(after.sum(), 1)
            if index == 0:
                longer = np.clip(together.seconds - alone.seconds, 0.0, _MOST_RESUMING_S / context.device.speed)
                for way in range(2):
                    ones = longer[after & (together.backward == way)]
                    found.resuming[repetition, way] = np.median(ones) if ones.size else 0.0
    return found


class _Walk(NamedTuple):
    """Once through all computations."""

    seconds: NDArray[np.float64]
    """(computation)."""
    backward: NDArray[np.bool_]
    after_turn: NDArray[np.bool_]
    beside: float
    """How much longer it took all ranks than the computations of the slowest, in s."""


def _through(context: RankContext, work: Pass, turn: Callable[[], None] | None) -> _Walk:
    """Run all computations, with a turn before as many of them as ``_TURNS`` allows."""
    assert context.group is not None
    every = max(1, work.computations // _TURNS)
    seconds, backward, after = [], [], []
    context.barrier()
    start = time.perf_counter()
    for place, one in enumerate(work.steps()):
        seconds.append(one.seconds)
        backward.append(one.part != "forward")
        after.append(turn is not None and place % every == 0 and place > 0)
        if turn is not None and (place + 1) % every == 0:
            turn()
    took = torch.tensor([time.perf_counter() - start, sum(seconds)], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX, context.group)
    whole, busy = took.tolist()
    return _Walk(np.array(seconds), np.array(backward), np.array(after), whole - busy)


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

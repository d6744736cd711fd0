"""Measure the links: round trips between every pair of ranks, one pair at a time, then turns of all ranks at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.cluster.gang import RankContext
from pipeline.links import Link
from pipeline.plan.instructions import Exchange, Placed, TensorSpec
from pipeline.plan.layouts import Layout, kernels, replicated
from pipeline.run.emulation import Throttle
from pipeline.run.transport import Transport

LINK_BYTES = (1_024, 1_048_576, 8_388_608)
"""Sizes of the messages that measure a link, ascending."""
TURN_BYTES = (64, 1_048_576)
"""What each rank sends to every other in a turn, little and much."""
_TURN_S = 0.01
"""How long a rank computes between two exchanges."""
_TURNS, _LEAST_TURNS, _MOST_S = 20, 2, 0.5


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


def measure_turns(context: RankContext, transport: Transport, repetitions: int) -> NDArray[np.float64]:
    """What a turn takes beyond the computing of the slowest rank, in s, (message, repetition); NaN for one rank.

    In a turn every rank computes for a while and then sends a message of ``TURN_BYTES`` to every other. Beside the
    message, a turn takes the time until the last rank has a core again and until the others see that it is ready, which
    is more where ranks have to share cores.
    """
    times = np.full((len(TURN_BYTES), repetitions), np.nan)
    if context.group is None:
        return times
    for index, size in enumerate(TURN_BYTES):
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
        turns = _LEAST_TURNS
        for repetition in range(-1, repetitions):
            context.barrier()
            computed, start = 0.0, time.perf_counter()
            throttle = Throttle(context.device)
            for _ in range(turns):
                computed += _compute(context, throttle)
                transport.exchange(together, message, everything)
            measured = torch.tensor([time.perf_counter() - start, computed], dtype=torch.float64) / turns
            dist.all_reduce(measured, dist.ReduceOp.MAX, context.group)
            whole, busy = measured.tolist()
            if repetition < 0:  # the first time sets up the messages, and tells how many turns there is time for
                turns = int(np.clip(_MOST_S / whole, _LEAST_TURNS, _TURNS))
            else:
                times[index, repetition] = max(whole - busy, 0.0)
    return times


def _compute(context: RankContext, throttle: Throttle) -> float:
    """Multiply matrices for ``_TURN_S`` of the device's time; returns how long it was busy in s."""
    matrix_NN = torch.rand(192, 192, device=context.torch_device)
    on_cpu = context.torch_device.type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter

    def multiply() -> None:
        with throttle.work():
            start = clock()
            while clock() - start < _TURN_S * context.device.speed:
                matrix_NN @ matrix_NN
                if not on_cpu:
                    torch.cuda.synchronize(context.torch_device)

    return throttle.busy_time(multiply, context.torch_device)


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

"""Measure the links: round trips of messages of several sizes between every pair of ranks, one pair at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.cluster.gang import RankContext
from pipeline.links import Link
from pipeline.plan.instructions import Exchange, Placed, TensorSpec
from pipeline.plan.layouts import Layout, kernels
from pipeline.run.transport import Transport

LINK_BYTES = (1_024, 1_048_576, 8_388_608)
"""Sizes of the messages that measure a link, ascending."""


def link_of(time_MR: NDArray[np.float64], sizes: Sequence[int]) -> Link:
    """Latency and bandwidth from the median times of messages of ``sizes`` bytes, (message, repetition) in s.

    The smallest message gives the latency, the largest what is left for its bytes.
    """
    median = np.median(time_MR, axis=1)
    moving = max(float(median[-1] - median[0]), 1e-9)
    return Link(latency=float(median[0]), bandwidth=(sizes[-1] - sizes[0]) / moving)


def measure_links(context: RankContext, repetitions: int) -> dict[int, NDArray[np.float64]]:
    """Half of each round trip of every message size in s, (message, repetition), from this rank to every higher one."""
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

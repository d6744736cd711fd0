"""When each instruction ran on this rank, on a clock that all ranks share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from pipeline.cluster.gang import RankContext

_PINGS = 20


def clock_offset(context: RankContext) -> float:
    """Seconds to add to this rank's ``perf_counter`` to get the master's.

    Each rank in turn asks the master for its time; the answer with the shortest round trip counts, its error being at
    most half of that trip. Every rank must call this at the same point.
    """
    offset = 0.0
    if context.group is None:
        return offset
    stamp = torch.zeros(1, dtype=torch.float64)
    for rank in range(1, context.size):
        best = float("inf")
        for _ in range(_PINGS):
            if context.rank == 0:
                dist.recv(stamp, rank, context.group)
                stamp[0] = time.perf_counter()
                dist.send(stamp, rank, context.group)
            elif context.rank == rank:
                sent = time.perf_counter()
                dist.send(stamp, 0, context.group)
                dist.recv(stamp, 0, context.group)
                trip = time.perf_counter() - sent
                if trip < best:
                    best, offset = trip, float(stamp[0]) - (sent + trip / 2)
    return offset


class Clock:
    """Start and end of every instruction of the last steps.

    ``times`` has the shape (step, instruction, 2) in seconds of the master's ``perf_counter``; NaN where the rank took
    no part. Only the last ``keep`` steps are held; ``steps`` has (start, end) of every step.
    """

    def __init__(self, instructions: int, *, offset: float, keep: int) -> None:
        self._offset, self._keep = offset, keep
        self._instructions = instructions
        self._current: list[tuple[float, float] | None] = [None] * instructions
        self._kept: list[list[tuple[float, float] | None]] = []
        self.steps: list[tuple[float, float]] = []

    @property
    def times(self) -> NDArray[np.float64]:
        """The timeline of the kept steps, (step, instruction, 2) in seconds."""
        nothing = (np.nan, np.nan)
        kept = [[one or nothing for one in step] for step in self._kept]
        return np.array(kept, dtype=float).reshape(len(kept), self._instructions, 2)

    def now(self) -> float:
        """The time on the shared clock in seconds."""
        return time.perf_counter() + self._offset

    @contextmanager
    def step(self, *, recorded: bool = True) -> Iterator[None]:
        """Time one step; one that is not recorded leaves no trace."""
        self._current = [None] * self._instructions
        start = self.now()
        yield
        if recorded:
            self.steps.append((start, self.now()))
            self._kept.append(self._current)
            del self._kept[: -self._keep]

    def instruction(self, index: int | None) -> _Stopwatch:
        """Time the body as one instruction of the current step; None for one that is not to be timed.

        The time of one that is resumed later counts as one piece, which ends where the last part ends.
        """
        return _Stopwatch(self._current, index, self._offset)


class _Stopwatch:
    """Times one instruction; there are hundreds in a step, so this is no generator."""

    __slots__ = ("_before", "_index", "_offset", "_start", "_times")

    def __init__(self, times: list[tuple[float, float] | None], index: int | None, offset: float) -> None:
        self._times, self._index, self._offset = times, index, offset

    def __enter__(self) -> None:
        begun = None if self._index is None else self._times[self._index]
        self._before = 0.0 if begun is None else begun[1] - begun[0]
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._index is not None:
            end = time.perf_counter() + self._offset
            self._times[self._index] = self._start + self._offset - self._before, end

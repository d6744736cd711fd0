"""Make the links between devices of one host as slow as those of a network.

Each device has one port that sends and one that receives, each of the link's bandwidth. A message leaves when those
before it have left, is under way for the latency, and takes the receiving port from then on when it is free, in
whatever order the rank takes them up: the model that ``pipeline.plan.prediction`` predicts with. The bytes themselves
travel at once; what is late is the moment at which they count as there. All ranks of one host read the same clock.
"""

from __future__ import annotations

import bisect
import operator
import time

from pipeline.links import Link

_REMEMBERED_S = 10.0
"""What a port received before that is forgotten."""


class Ports:
    """The two ports of one rank; times in s of ``time.perf_counter``."""

    def __init__(self, link: Link | None) -> None:
        """Without a link, messages count as there when they are."""
        self._link = link
        self._sends_until = 0.0
        self._received: list[tuple[float, float]] = []
        """When the receiving port is or was busy, in order."""

    def leave(self, size: int) -> float:
        """Take a message of ``size`` bytes up for sending; when its last byte leaves, 0 without a link."""
        if self._link is None:
            return 0.0
        self._sends_until = max(self._sends_until, time.perf_counter()) + size / self._link.bandwidth
        return self._sends_until

    def arrive(self, left: float, size: int) -> None:
        """Wait until a message of ``size`` bytes, whose last byte left at ``left``, has been received."""
        if self._link is None:
            return
        duration = size / self._link.bandwidth
        sleep_until(self._booked(left + self._link.latency - duration, duration))

    def _booked(self, start: float, duration: float) -> float:
        """Take the receiving port for as long as a message takes, not before ``start``; when it has been received."""
        ends = operator.itemgetter(1)
        del self._received[: bisect.bisect_right(self._received, time.perf_counter() - _REMEMBERED_S, key=ends)]
        place = bisect.bisect_right(self._received, start, key=ends)
        while place < len(self._received) and start + duration > self._received[place][0]:
            start = max(start, self._received[place][1])
            place += 1
        self._received.insert(place, (start, start + duration))
        return start + duration

    def drain(self) -> None:
        """Wait until all that was taken up for sending has left."""
        if self._link is not None:
            sleep_until(self._sends_until)


def sleep_until(moment: float) -> None:
    """Sleep until ``time.perf_counter`` shows ``moment``, in s; not at all if that is past."""
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)

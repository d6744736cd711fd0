"""Make the links between devices of one host as slow as those of a network.

Each device has one port that sends and one that receives, each of the link's bandwidth. A message leaves when those
before it have left, is under way for the latency, and arrives when those before it have been received: the model that
``pipeline.plan.prediction`` predicts with. The bytes themselves travel at once; what is late is the moment at which
they count as there. All ranks of one host read the same clock.
"""

from __future__ import annotations

import time

from pipeline.links import Link


class Ports:
    """The two ports of one rank; times in s of ``time.perf_counter``."""

    def __init__(self, link: Link | None) -> None:
        """Without a link, messages count as there when they are."""
        self._link = link
        self._sends_until = self._receives_until = 0.0

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
        done = max(left + self._link.latency, self._receives_until + size / self._link.bandwidth)
        self._receives_until = done
        sleep_until(done)

    def drain(self) -> None:
        """Wait until all that was taken up for sending has left."""
        if self._link is not None:
            sleep_until(self._sends_until)


def sleep_until(moment: float) -> None:
    """Sleep until ``time.perf_counter`` shows ``moment``, in s; not at all if that is past."""
    left = moment - time.perf_counter()
    if left > 0:
        time.sleep(left)

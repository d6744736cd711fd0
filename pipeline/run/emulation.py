"""Make a device slower than it is, in proportion to the work it does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pipeline.cluster.devices import Device


class Throttle:
    """Stretches work to ``1 / speed`` of its processor time by sleeping after it.

    Processor time, not wall time, is what a device of full speed would need if it had its core to itself; so several
    emulated devices can share one core as long as their speeds add up to no more than the cores. A sleep that ends
    late, or a core that was taken away for longer than the slower device would have needed, is carried over as a debt
    (in seconds, bounded, so that waiting for others never pays for later work).
    """

    _BOUND_S = 0.05

    def __init__(self, device: Device) -> None:
        self._slowdown = 1 / device.speed
        self._threads = device.threads
        self._debt = 0.0
        self.charged = 0.0
        """How long an emulated device has worked so far in s, as far as that was caught up with."""
        self._since: tuple[float, float] | None = None
        """Wall and processor time when the work that is not yet paid for began; None outside of work."""

    @property
    def slows(self) -> bool:
        """Whether the device is an emulated one."""
        return self._slowdown > 1

    def busy_time(self, work: Callable[[], object], device: torch.device) -> float:
        """For how long ``work``, which goes on within ``work()``, keeps ``device`` busy, in s.

        An emulated processor sleeps longer or shorter than it should, and makes up for it later: what counts is what it
        is to be busy for.
        """
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was asked of it before is not this work
        start, charged = time.perf_counter(), self.charged
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        told = self.slows and device.type == "cpu"
        return self.charged - charged if told else time.perf_counter() - start

    @contextmanager
    def work(self) -> Iterator[None]:
        """Run the body and then sleep for what a device of the emulated speed would still be busy."""
        if not self.slows:
            yield
            return
        self._since = time.perf_counter(), self._processor_time()
        yield
        self.catch_up()
        self._since = None

    def catch_up(self) -> None:
        """Within the work, sleep for what a device of the emulated speed would need for all that was done so far."""
        if self._since is None:
            return
        wall, busy = self._since
        spent = time.perf_counter() - wall
        charge = (self._processor_time() - busy) * self._slowdown
        self.charged += charge
        self._debt += charge - spent
        if self._debt > 0:
            before = time.perf_counter()
            time.sleep(self._debt)
            self._debt -= time.perf_counter() - before
        self._debt = max(-self._BOUND_S, min(self._debt, self._BOUND_S))
        self._since = time.perf_counter(), self._processor_time()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within the work, a time that does not count: the body waits for something else than this device."""
        if self._since is None:
            yield
            return
        before = time.perf_counter()
        yield
        wall, busy = self._since
        self._since = wall + time.perf_counter() - before, busy

    def _processor_time(self) -> float:
        # With one thread the operators run in the caller; with more, their share of the whole process is the best
        # measure.
        return time.thread_time() if self._threads == 1 else time.process_time() / self._threads

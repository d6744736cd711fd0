"""Run one function as a gang of ranks: on every device at once, exclusively, ending in results or in one clear error.

Dask places the ranks and sees them die; torch.distributed (gloo) connects them. A gang ends when each rank has
returned, or as soon as one of them fails, its worker is lost, the launch takes too long, or the driver is interrupted.
In the latter cases the other ranks are told to end, and those that cannot hear it lose their process.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pickle
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, NoReturn

from distributed import Client, Future, Lock, Nanny
from distributed.scheduler import KilledWorker

from pipeline.cluster.devices import Member, scheduler_workers
from pipeline.cluster.rank import Assignment, Failure, Outcome, RankContext, Stopped, describe_failure, run_rank
from pipeline.cluster.rendezvous import Host, meeting_host
from pipeline.errors import LostDeviceError, PipelineError, RunError

__all__ = ["RankContext", "Stopped", "run_gang"]

_POLL_S = 0.5  # Each look costs processor time that a rank on this machine may want; an ended task wakes it at once.
_CENSUS_S = 2.0
_GRACE_S = 3.0
_ANSWER_S = 5.0
_SILENCE_S = 60.0
_BUSY_S = 60.0  # Longer than the 30 s after which Dask takes a lock back from a driver that died.

Progress = Callable[[int, dict[str, float]], None]


def run_gang(
    client: Client,
    members: Sequence[Member],
    function: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    *,
    label: str,
    timeout_s: float = 600.0,
    launch_timeout_s: float = 30.0,
    on_progress: Progress | None = None,
) -> list[Any]:
    """Call `function(context, *arguments[rank])` on every member at once, and return the results by rank.

    `context` is a RankContext. Large arguments are best given as scattered Dask futures. `label` names the tasks on the
    dashboard and the run in errors. `timeout_s` bounds one gloo operation, `launch_timeout_s` the start of all ranks.
    `on_progress(step, values)` is called in this thread with the latest report of rank 0.

    Raises RunError for a lost worker, a rank that raised (its exception is the cause), or a timeout; a PipelineError
    that a rank raised is raised again as it is. Nothing of the gang is left afterwards, and the cluster can be used
    again: call `discover` anew, since restarted workers have new addresses.
    """
    if len(arguments) != len(members) or not members:
        raise ValueError(f"a gang needs one tuple of arguments per member: {len(arguments)} for {len(members)}")
    with _exclusive(client, members, label):
        gang = _Gang(client, _relocated(client, members), label, on_progress)
        try:
            gang.submit(function, arguments, timeout_s)
            return gang.supervise(launch_timeout_s)
        finally:
            gang.close()


@contextlib.contextmanager
def _exclusive(client: Client, members: Sequence[Member], label: str) -> Iterator[None]:
    """Hold every member for this gang alone.

    One lock per worker name, always taken in the same order so that two gangs cannot wait for each other. Unlike a
    MultiLock these are leases: the scheduler takes them back when the driver that holds them dies.
    """
    with contextlib.ExitStack() as stack:
        for name in sorted(member.name for member in members):
            lock = Lock(f"pipeline device {name}", scheduler_rpc=client.scheduler, loop=client.loop)
            try:
                taken = lock.acquire(timeout=_BUSY_S)
            except OSError as error:
                raise RunError(f"the scheduler of the cluster was lost before {label} began.") from error
            if not taken:
                raise RunError(
                    f"worker {name} was still busy with another run after {_BUSY_S:g} s, so {label} gave up."
                )
            stack.callback(_release, client, lock)
        yield


def _relocated(client: Client, members: Sequence[Member]) -> tuple[Member, ...]:
    """The members at their present addresses, which change when a worker restarts while its lock is waited for."""
    workers = {
        str(worker["name"]): (address, worker) for address, worker in scheduler_workers(client, _SILENCE_S).items()
    }
    located = []
    for member in members:
        address, worker = workers.get(member.name, (member.address, {"host": member.host}))
        located.append(dataclasses.replace(member, address=address, host=str(worker["host"])))
    return tuple(located)


def _release(client: Client, lock: Lock) -> None:
    lock.refresh_callback.stop()

    async def release() -> None:
        await asyncio.wait_for(lock.release(), _ANSWER_S)

    if client.status == "running":  # Otherwise the scheduler is lost, and the lock with it.
        with contextlib.suppress(OSError):
            client.sync(release)


class _Gang:
    """The driver's view of the ranks: which still run, how the others ended, which workers are gone."""

    def __init__(self, client: Client, members: Sequence[Member], label: str, on_progress: Progress | None) -> None:
        self._client = client
        self._members = members
        self._label = label
        self._on_progress = on_progress
        self._generation = uuid.uuid4().hex[:8]
        self._host = Host(meeting_host(client, members), self._generation)
        self._futures: dict[int, Future[Outcome]] = {}
        self._running: set[int] = set()
        self._outcomes: dict[int, Outcome] = {}
        self._lost: list[int] = []
        self._changed = threading.Event()
        self._reported: tuple[int, dict[str, float]] | None = None
        self._last_census = time.monotonic()
        self._fetch_s = _ANSWER_S

    def submit(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], timeout_s: float) -> None:
        """Hand every rank to its worker."""
        for rank, member in enumerate(self._members):
            assignment = Assignment(
                rank=rank,
                size=len(self._members),
                device=member.device,
                host=member.host,
                meeting=self._host.meeting,
                timeout_s=timeout_s,
            )
            future = self._client.submit(
                run_rank,
                assignment,
                function,
                *arguments[rank],
                key=f"{self._label} {member.name}-{self._generation}",
                workers=[member.address],
                allow_other_workers=False,
                resources={member.device.resource: 1},
                pure=False,
                retries=0,
            )
            self._futures[rank] = future
            self._running.add(rank)
            future.add_done_callback(self._wake)

    def supervise(self, launch_timeout_s: float) -> list[Any]:
        """Wait until all ranks have returned, or raise the cause of the first failure."""
        deadline = time.monotonic() + launch_timeout_s
        launched = False
        while self._running:
            self._look()
            if self._failed():
                self._raise_cause()
            self._pass_progress_on()
            if not launched and self._host.visit.all_arrived(len(self._members)):
                self._host.visit.start()
                launched = True
            if not launched and time.monotonic() > deadline:
                self._raise_late(launch_timeout_s)
        if self._failed():
            self._raise_cause()
        self._pass_progress_on()
        return [self._outcomes[rank].value for rank in range(len(self._members))]

    def close(self) -> None:
        """End whatever still runs and give the port back; harmless after a good end."""
        try:
            self._end()
        finally:
            self._futures.clear()
            self._host.close()

    def _wake(self, _: Future[Outcome]) -> None:
        self._changed.set()

    def _look(self) -> None:
        """Wait a moment for news, then note which ranks have ended and which workers are gone."""
        self._changed.wait(_POLL_S if self._running else 0)
        self._changed.clear()
        for rank in sorted(self._running):
            if self._futures[rank].done():
                self._note_end(rank)
        if time.monotonic() - self._last_census > _CENSUS_S:
            self._take_census()

    def _take_census(self) -> None:
        """Note which workers are gone; a scheduler that is only slow, on a machine full of work, gets more time."""
        try:
            alive = scheduler_workers(self._client, _ANSWER_S)
        except RunError:
            if self._client.status != "running" or time.monotonic() - self._last_census > _SILENCE_S:
                raise
            return
        for rank in sorted(self._running):
            if self._members[rank].address not in alive:
                self._note_loss(rank)
        self._last_census = time.monotonic()

    def _note_end(self, rank: int) -> None:
        try:
            outcome = self._futures[rank].result(timeout=self._fetch_s)
        except TimeoutError:  # Its worker is lost with the result, which the census will tell, or the result is large.
            self._fetch_s *= 2
            return
        except KilledWorker:
            self._note_loss(rank)
            return
        except CancelledError as error:
            raise RunError(f"the scheduler of the cluster was lost during {self._label}.") from error
        except Exception as error:  # noqa: BLE001 - the task could not be read on the worker, or its result here
            outcome = Outcome(failure=describe_failure(error))
        self._running.discard(rank)
        self._outcomes[rank] = outcome

    def _note_loss(self, rank: int) -> None:
        self._running.discard(rank)
        self._lost.append(rank)

    def _failed(self) -> bool:
        return bool(self._lost) or any(outcome.failure for outcome in self._outcomes.values())

    def _pass_progress_on(self) -> None:
        if self._on_progress is None:
            return
        report = self._host.visit.progress()
        if report is not None and report != self._reported:
            self._reported = report
            self._on_progress(*report)

    def _end(self) -> list[int]:
        """Make every rank end, and return those that had to lose their process."""
        if not self._running:
            return []
        stuck: list[int] = []
        try:
            # A rank that comes later sees the order as it arrives. Until then its worker may be busy with something
            # of another user, so it must not be killed.
            absent = self._host.visit.missing(len(self._members))
            self._host.visit.stop()
            deadline = time.monotonic() + _GRACE_S
            with contextlib.suppress(RunError):  # Without a scheduler only the stop order is left.
                while self._running and time.monotonic() < deadline:
                    self._look()
                stuck = sorted(self._running.difference(absent))
                self._kill(stuck)
        finally:
            self._running.clear()
            with contextlib.suppress(OSError):  # The scheduler is lost, and the tasks with it.
                self._client.cancel(list(self._futures.values()), force=True)
        return stuck

    def _kill(self, ranks: Sequence[int]) -> None:
        """Kill the worker processes of `ranks`; their nannies start new ones."""
        workers = scheduler_workers(self._client, _ANSWER_S) if ranks else {}
        addresses = [self._members[rank].address for rank in ranks]
        doomed = [address for address in addresses if address in workers and workers[address]["nanny"]]
        if not doomed:
            return

        async def kill() -> None:
            run = self._client.run(_kill_worker, workers=doomed, nanny=True, on_error="ignore")
            await asyncio.wait_for(run, _ANSWER_S)

        with contextlib.suppress(OSError):  # A nanny that is gone as well cannot be asked.
            self._client.sync(kill)
        deadline = time.monotonic() + _ANSWER_S
        while time.monotonic() < deadline and set(doomed) & set(scheduler_workers(self._client, _ANSWER_S)):
            time.sleep(_POLL_S / 4)

    def _raise_cause(self) -> NoReturn:
        """End the gang, then raise the first real cause among all that the ranks tell while they end."""
        stuck = self._end()
        if self._lost:
            names = ", ".join(self._name(rank) for rank in self._lost)
            raise LostDeviceError(
                f"{names} was lost during {self._label}: its process was killed, or its machine is gone."
            )
        failures = {rank: outcome.failure for rank, outcome in self._outcomes.items() if outcome.failure}
        primary = [rank for rank, failure in failures.items() if not failure.secondary]
        if not primary and stuck:
            names = ", ".join(self._name(rank) for rank in stuck)
            raise RunError(f"{names} stopped answering during {self._label}, and was restarted.")
        rank = (primary or list(failures))[0]
        self._raise_failure(rank, failures[rank])

    def _raise_failure(self, rank: int, failure: Failure) -> NoReturn:
        error = _unpickled(failure)
        if error is not None:
            error.add_note(f"raised by {self._name(rank)}:\n{failure.trace}")
            if isinstance(error, PipelineError) and not isinstance(error, Stopped):
                raise error
        reason = " ".join(failure.message.split()) or "no message"
        raise RunError(
            f"rank {rank} on {self._name(rank)} failed during {self._label}: {failure.name}: {reason}"
        ) from error

    def _raise_late(self, launch_timeout_s: float) -> NoReturn:
        names = ", ".join(self._name(rank) for rank in self._host.visit.missing(len(self._members)))
        raise RunError(
            f"{self._label} could not begin within {launch_timeout_s:g} s: {names} did not start its rank; "
            "it is busy or stopped."
        )

    def _name(self, rank: int) -> str:
        member = self._members[rank]
        return f"worker {member.name} ({member.device.label} at {member.address})"


def _kill_worker(dask_worker: Nanny) -> None:
    """Runs on a nanny: kill the process it watches, which also ends one that is stopped."""
    if dask_worker.pid is not None:
        os.kill(dask_worker.pid, signal.SIGKILL)


def _unpickled(failure: Failure) -> BaseException | None:
    if failure.pickled is None:
        return None
    try:
        error = pickle.loads(failure.pickled)
    except Exception:  # noqa: BLE001 - its class may not exist here, or not be readable
        return None
    return error if isinstance(error, BaseException) else None

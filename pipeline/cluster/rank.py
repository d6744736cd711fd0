"""One rank of a gang, on its worker: what a rank function is given, and how the rank ends whatever happens."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from distributed import get_worker
from distributed.comm.addressing import get_address_host_port

from pipeline.cluster.devices import Device
from pipeline.cluster.rendezvous import Meeting
from pipeline.errors import RunError

_SOCKET_NAME = b"\0pipeline-rank-"
_WATCH_S = 0.5
_ARRIVE_POLL_S = 0.005
_LAST_RESORT_S = 6.0  # Longer than the driver needs to do the same, where it is still there.


class Stopped(RunError):  # noqa: N818 - an order that was obeyed, not an error of its own
    """The gang is over, or its driver is gone: the rank ends here."""


class RankLost(RunError):  # noqa: N818 - says what happened, as the errors of gloo do
    """Another rank of this host is gone or silent."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What one rank has to know before it can begin; travels with the task."""

    rank: int
    size: int
    device: Device
    host: str
    """Address of the worker's network interface, which gloo is to use."""
    meeting: Meeting
    timeout_s: float
    """Bound of one gloo operation."""


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """What a rank function knows of its place in the gang."""

    rank: int
    size: int
    device: Device
    torch_device: torch.device
    """Where its tensors live."""
    group: dist.ProcessGroup | None
    """The gloo group of the gang, also torch's default group; None in a gang of one."""
    generation: str
    """Unique name of this run of a gang."""
    timeout_s: float = 60.0
    """How long a rank waits for another before it gives up."""
    _watch: Watch | None = field(default=None, repr=False, compare=False)

    def report(self, step: int, **values: float) -> None:
        """Say how far the rank is; only what rank 0 says reaches the driver, a few times a second.

        Costs no message in the calling thread. Raises Stopped when the gang is over or the driver is gone.
        """
        if self._watch is not None:
            self._watch.check()
            if self.rank == 0:
                self._watch.latest = (step, values)

    def barrier(self) -> None:
        """Wait until every rank is here; ends with an error after the timeout of the gang."""
        if self.group is not None:
            dist.barrier(self.group)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended early, in a form that survives any exception class."""

    name: str
    message: str
    trace: str
    pickled: bytes | None
    """The exception itself where it can be pickled and read back."""
    secondary: bool
    """Whether it only follows from the end of another rank or of the gang."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a rank ended. A rank always returns one: a task that raises would be logged by Dask, traceback and all."""

    value: Any = None
    failure: Failure | None = None


def run_rank(assignment: Assignment, function: Callable[..., Any], *arguments: Any) -> Outcome:
    """The task of one rank: meet the others, call `function(context, *arguments)`, leave nothing behind."""
    torch.set_num_threads(assignment.device.threads)
    torch.set_flush_denormal(True)
    gc.collect()
    gc.freeze()  # what torch has loaded takes long to look through, and only what comes now can be left behind
    try:
        with Watch(assignment.meeting) as watch, _process_group(assignment) as group:
            context = RankContext(
                rank=assignment.rank,
                size=assignment.size,
                device=assignment.device,
                torch_device=_torch_device(assignment.device),
                group=group,
                generation=assignment.meeting.generation,
                timeout_s=assignment.timeout_s,
                _watch=watch,
            )
            return Outcome(value=function(context, *arguments))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the driver tells the user
        return Outcome(failure=describe_failure(error))
    finally:
        torch.set_flush_denormal(False)
        gc.collect()  # traced models are cycles, and would keep their weights until Python happens to look
        gc.unfreeze()


class Watch:
    """A thread that carries reports to the driver, and ends the rank's communication when the gang is over.

    A rank that waits for a peer cannot look at the store, and nothing in torch ends its wait from outside. Closing the
    connections that were opened since the rank began does, within milliseconds. Now and then gloo misses even that, and
    a long computation hears nothing at all: then the process ends itself, and its nanny starts a new one.
    """

    def __init__(self, meeting: Meeting) -> None:
        self.latest: tuple[int, dict[str, float]] | None = None
        self._meeting = meeting
        self._visit = meeting.join()
        self._sent: tuple[int, dict[str, float]] | None = None
        self._over = threading.Event()
        self._done = threading.Event()
        self._sockets_before = set(_open_sockets())
        self._thread = threading.Thread(target=self._run, name="gang-watch", daemon=True)

    def __enter__(self) -> Watch:
        worker = get_worker()
        self._dask_addresses = {get_address_host_port(peer) for peer in (worker.address, worker.scheduler.address)}
        self._has_nanny = worker.nanny is not None
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if not self._over.is_set():
            with contextlib.suppress(RuntimeError):  # The driver is gone: nobody wants the last report.
                self._send()

    def check(self) -> None:
        """Raise Stopped when the gang is over."""
        if self._over.is_set():
            raise Stopped("the run was stopped.")

    def _run(self) -> None:
        while not self._done.wait(_WATCH_S):
            try:
                self._send()
                over = self._visit.stopped()
            except RuntimeError:  # The store is gone, and the driver with it.
                over = True
            if over:
                self._over.set()
                self._disconnect()
                if not self._done.wait(_LAST_RESORT_S) and self._has_nanny:
                    os.kill(os.getpid(), signal.SIGKILL)
                return

    def _send(self) -> None:
        report = self.latest
        if report is not None and report is not self._sent:
            self._visit.report(*report)
            self._sent = report

    def _disconnect(self) -> None:
        for inode, descriptor in _open_sockets().items():
            if inode not in self._sockets_before:
                _shut_down(descriptor, inode, self._dask_addresses)


@contextlib.contextmanager
def _process_group(assignment: Assignment) -> Iterator[dist.ProcessGroup | None]:
    visit = assignment.meeting.join()
    if not visit.arrive(assignment.rank):
        raise Stopped("this rank has run before and was repeated by Dask.")
    while not visit.started():
        if visit.stopped():
            raise Stopped("the run was stopped.")
        time.sleep(_ARRIVE_POLL_S)
    if assignment.size == 1:
        yield None
        return
    _choose_interface(assignment.host)
    try:
        dist.init_process_group(
            "gloo",
            store=visit.store,
            rank=assignment.rank,
            world_size=assignment.size,
            timeout=timedelta(seconds=assignment.timeout_s),
        )
        yield dist.group.WORLD
    finally:
        # Peers further along a chain stay blocked until their neighbour takes the group down.
        if dist.is_initialized():
            dist.destroy_process_group()


def _choose_interface(host: str) -> None:
    """Make gloo use the interface that Dask uses: looking up the host name often gives 127.0.1.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _torch_device(device: Device) -> torch.device:
    if device.kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError("the worker carries a GPU resource, but torch sees no usable CUDA device there.")
    # Each GPU worker sees only its own GPU, whatever the ordinal is in the driver.
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def describe_failure(error: BaseException) -> Failure:
    """Put an exception into a form that reaches the driver whatever its class is."""
    return Failure(
        name=type(error).__name__,
        message=str(error),
        trace="".join(traceback.format_exception(error)),
        pickled=_pickled(error),
        secondary=_follows_from_another(error),
    )


def _pickled(error: BaseException) -> bytes | None:
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - a class may break pickle in any way it likes
        return None
    return pickled


def _follows_from_another(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, Stopped | RankLost | dist.DistError) or "gloo/transport" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def rank_socket_name(generation: str, rank: int) -> bytes:
    """Abstract name of the Unix socket on which a rank expects the other ranks of its host."""
    return _SOCKET_NAME + f"{generation}-{rank}".encode("ascii")


def _open_sockets() -> dict[int, int]:
    """The sockets of this process: descriptor by inode, which unlike a descriptor is not used twice."""
    sockets = {}
    for entry in Path("/dev/fd").iterdir():
        with contextlib.suppress(OSError):  # Closed in the meantime.
            status = os.fstat(int(entry.name))
            if stat.S_ISSOCK(status.st_mode):
                sockets[status.st_ino] = int(entry.name)
    return sockets


def _shut_down(descriptor: int, inode: int, spared: set[tuple[str, int]]) -> None:
    """End both directions of a connection between ranks or to the store; whoever uses it sees an error at once."""
    with contextlib.suppress(OSError):  # Listening or closed in the meantime.
        connection = socket.socket(fileno=os.dup(descriptor))
        with connection:
            if os.fstat(connection.fileno()).st_ino != inode:
                return
            ends = connection.getsockname(), connection.getpeername()
            if connection.family == socket.AF_UNIX:
                ours = any(bytes(end).startswith(_SOCKET_NAME) for end in ends if isinstance(end, bytes))
            else:
                ours = not {end[:2] for end in ends} & spared
            if ours:
                connection.shutdown(socket.SHUT_RDWR)

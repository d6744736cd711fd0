"""The meeting point of one gang: a store in the driver, where ranks arrive, report, and learn that they must stop.

Keys, all under the prefix of the gang's generation:
`arrived/RANK`  how often a rank has come; a second time is a task that Dask repeated, which must not take part
`go`            every rank has come: they may connect to each other
`stop`          the gang is over: every rank must end
`progress`      the latest report of rank 0, as JSON
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from distributed import Client
from distributed.comm.addressing import get_address_host
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch re-exports them silently

from pipeline.cluster.devices import Member

_DRIVER_ANSWERS_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """How a rank finds its gang; travels with the task."""

    host: str
    """Address of the driver's network interface."""
    port: int
    """TCP port of the store."""
    generation: str
    """Prefix of every key, different for every gang."""

    def join(self) -> Visit:
        """Connect to the store; OSError or RuntimeError (torch's DistError) where the driver does not answer."""
        # Torch would knock at a closed port again and again until its timeout.
        socket.create_connection((self.host, self.port), timeout=_DRIVER_ANSWERS_S).close()
        store = TCPStore(
            self.host, self.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_DRIVER_ANSWERS_S)
        )
        return Visit(PrefixStore(self.generation, store))


class Visit:
    """One connection to the store. Every method raises RuntimeError (torch's DistError) once the store is gone."""

    def __init__(self, store: PrefixStore) -> None:
        self.store = store

    def arrive(self, rank: int) -> bool:
        """Say that a rank is there; False where it has been before."""
        return self.store.add(f"arrived/{rank}", 1) == 1

    def all_arrived(self, size: int) -> bool:
        """Whether each of `size` ranks is there."""
        return self.store.check([f"arrived/{rank}" for rank in range(size)])

    def missing(self, size: int) -> list[int]:
        """The ranks that are not there."""
        return [rank for rank in range(size) if not self.store.check([f"arrived/{rank}"])]

    def start(self) -> None:
        """Let the ranks connect to each other."""
        self.store.set("go", "1")

    def started(self) -> bool:
        """Whether the ranks may connect to each other."""
        return self.store.check(["go"])

    def stop(self) -> None:
        """Tell every rank to end."""
        self.store.set("stop", "1")

    def stopped(self) -> bool:
        """Whether every rank has to end."""
        return self.store.check(["stop"])

    def report(self, step: int, values: dict[str, float]) -> None:
        """Replace the latest report."""
        self.store.set("progress", json.dumps([step, values]))

    def progress(self) -> tuple[int, dict[str, float]] | None:
        """The latest report, None before the first."""
        if not self.store.check(["progress"]):
            return None
        step, values = json.loads(self.store.get("progress"))
        return step, values


class Host:
    """The driver's side: owns the store and its listening port until `close`."""

    def __init__(self, host: str, generation: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as listener:
            # Left to itself the store would listen on every interface of the machine.
            listener.bind((host, 0))
            listener.listen()
            port = listener.getsockname()[1]
            store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
        self.meeting = Meeting(host=host, port=port, generation=generation)
        self._visit: Visit | None = Visit(PrefixStore(generation, store))

    @property
    def visit(self) -> Visit:
        """The driver's own connection."""
        if self._visit is None:
            raise RuntimeError("the rendezvous is closed")
        return self._visit

    def close(self) -> None:
        """Give the port back. Ranks that still look at the store take this as an order to end."""
        self._visit = None


def meeting_host(client: Client, members: Sequence[Member]) -> str:
    """The address under which all members can reach this process: loopback only where everything is on loopback."""
    scheduler = client.scheduler_info(n_workers=0)["address"]
    peers = [*(member.host for member in members), get_address_host(scheduler)]
    remote = next((host for host in peers if not _is_loopback(host)), None)
    if remote is None:
        return "127.0.0.1"
    family, kind, protocol, _, target = socket.getaddrinfo(remote, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # A datagram socket sends nothing here; it only picks the interface.
        return str(probe.getsockname()[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

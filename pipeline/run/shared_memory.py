"""Boxes between ranks on one host: through memory that both see, instead of twice through a socket.

The sender packs a box into an anonymous memory file and says so over a Unix socket that joins the two ranks; the first
time it hands over the file, too. The receiver maps it and copies the box out. A counter at the head of the file says
which box has been copied, and keeps the sender from overwriting one that has not.

A rank that waits looks for itself, again and again with short sleeps. gloo answers by way of a thread of its own, which
has to wait for a core where all of them are computing, up to some milliseconds for the smallest message; and a rank
that is woken by another tends to be put on the core of the other, where the two share it for a while.

The memory belongs to the processes alone: nothing is left behind when one is killed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.cluster.rank import RankContext, RankLost, rank_socket_name
from pipeline.errors import RunError

_HEAD_BYTES, _COUNTER_BYTES = 64, 8
_LETTER = struct.Struct("qqqd")
"""What announces a box: tag of the message, number of the file, which box it is (or the file's bytes), and when an
emulated link lets go of it."""
_CREDENTIALS = struct.Struct("iII")
"""What the kernel says of a peer: process, user, group."""
_HANDSHAKE_S = 30.0
_LEAST_SLEEP_S, _MOST_SLEEP_S = 2e-5, 1e-3


class Outbox:
    """The sender's end: one memory file for the boxes of one message, step after step."""

    def __init__(self, neighbour: Neighbour, tag: int, like: torch.Tensor, *, once: bool = False) -> None:
        """For boxes like ``like``; with ``once`` for a single one, after which the neighbour forgets it."""
        self._neighbour, self._tag = neighbour, tag
        size = _HEAD_BYTES + like.numel() * like.element_size()
        with _memory_file(size) as file:
            memory = _mapped(file, size)
            self._copied = memory[:_COUNTER_BYTES].view(torch.int64)
            self._box = memory[_HEAD_BYTES:].view(like.dtype).view(like.shape)
            self._count = 0
            self._number = neighbour.send_file(file, size, once=once)

    def post(self, part: torch.Tensor, left: float = 0.0) -> None:
        """Put ``part`` into the box and tell the neighbour; waits until it has copied the one before.

        ``left`` is when it leaves an emulated link, in s of the clock that all ranks of the host read.

        Raises ``RankLost`` if the neighbour is gone, or does not copy the last box in the time of the gang.
        """
        self._await_copy()
        self._box.copy_(part)
        self._count += 1
        self._neighbour.send_letter(self._tag, self._number, self._count, left)

    def _await_copy(self) -> None:
        for _ in self._neighbour.patience():
            if int(self._copied[0]) == self._count:
                return
            self._neighbour.check()


class Neighbour:
    """Another rank of this host: what is sent to it and what comes from it, in the order of the program."""

    def __init__(self, rank: int, connection: socket.socket, timeout_s: float) -> None:
        self.rank, self.timeout_s = rank, timeout_s
        self._connection = connection
        connection.setblocking(False)
        self._sent_files = 0
        self._maps: dict[int, torch.Tensor] = {}
        self._letters: dict[int, deque[tuple[int, int, float]]] = {}
        """By tag, what has been announced and not yet been taken: number of the file, which box it is, when it left."""

    def send_file(self, file: int, size: int, *, once: bool) -> int:
        """Hand over a memory file of ``size`` bytes; returns the number by which letters name it, below 0 for once."""
        self._sent_files += 1
        number = -self._sent_files if once else self._sent_files
        self._send(_LETTER.pack(0, number, size, 0.0), [file])
        return number

    def send_letter(self, tag: int, number: int, count: int, left: float) -> None:
        """Say that a file holds its ``count``-th box. Raises ``RankLost`` if the neighbour is gone."""
        self._send(_LETTER.pack(tag, number, count, left), [])

    def _send(self, letter: bytes, files: list[int]) -> None:
        for _ in self.patience():  # once, unless a very long queue of letters has filled the socket
            with self._errors():
                socket.send_fds(self._connection, [letter], files)
                return

    def receive(self, tag: int, like: torch.Tensor) -> tuple[torch.Tensor, Receipt, float]:
        """Wait for the next box with ``tag``, shaped and typed as ``like``; sign the receipt when it has been copied.

        The last of what it returns is when an emulated link let go of it.

        Boxes of exchanges that end later are left for them. Raises ``RankLost`` if the neighbour is gone or sends
        nothing in the time of the gang.
        """
        for _ in self.patience():
            while not self._letters.get(tag) and self._open_next():
                pass
            if self._letters.get(tag):
                break
        number, count, left = self._letters[tag].popleft()
        memory = self._maps.pop(number) if number < 0 else self._maps[number]
        box = memory[_HEAD_BYTES:].view(like.dtype).view(like.shape)
        return box, Receipt(memory[:_COUNTER_BYTES].view(torch.int64), count), left

    def _open_next(self) -> bool:
        """Read a letter, if there is one."""
        found = False
        with self._errors():
            letter, files, _, _ = socket.recv_fds(self._connection, _LETTER.size, 1)
            if not letter:
                raise RankLost(f"rank {self.rank} closed its connection")
            tag, number, count, left = _LETTER.unpack(letter)
            if not files:
                self._letters.setdefault(tag, deque()).append((number, count, left))
            for file in files:  # a new one, whose size comes in place of the count
                self._maps[number] = _mapped(file, count)
                os.close(file)
            found = True
        return found  # noqa: RET504 - what is not there yet ends the block above

    def patience(self) -> Iterator[None]:
        """Look again and again, with sleeps that grow with the time waited.

        Raises ``RankLost`` when the time of the gang is over.
        """
        start = time.monotonic()
        while True:
            yield
            waited = time.monotonic() - start
            if waited > self.timeout_s:
                raise RankLost(f"rank {self.rank} did not answer within {self.timeout_s:g} s")
            time.sleep(min(max(waited / 16, _LEAST_SLEEP_S), _MOST_SLEEP_S))

    def check(self) -> None:
        """Raise ``RankLost`` if the neighbour is gone; letters it sent before are kept."""
        while self._open_next():
            pass

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            pass  # nothing there yet, or no room: to be tried again
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise RunError("the limit of open files is too low for this network: raise it (ulimit -n)") from error
            raise RankLost(f"the connection to rank {self.rank} broke: {error}") from error


class Receipt:
    """Tells the sender that its box may be filled again."""

    def __init__(self, copied: torch.Tensor, count: int) -> None:
        self._copied, self._count = copied, count

    def sign(self) -> None:
        """Say that the box has been copied."""
        self._copied[0] = self._count


def neighbours(context: RankContext) -> dict[int, Neighbour]:
    """The ranks with which this one can share memory: CPU ranks of one user on one host, in one network namespace.

    Every rank of the gang must call this at the same point. Raises ``RankLost`` if one is gone.
    """
    if context.group is None or context.size == 1:
        return {}
    place = _place(context)
    with contextlib.ExitStack() as stack:
        listener = None
        if place:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            listener.bind(rank_socket_name(context.generation, context.rank))
            listener.listen(context.size)
            listener.settimeout(_HANDSHAKE_S)
        # Every listener is there before anybody calls on it.
        mine = torch.tensor([place])
        places = [torch.zeros_like(mine) for _ in range(context.size)]
        dist.all_gather(places, mine, group=context.group)
        here = [rank for rank, other in enumerate(places) if place and int(other) == place]
        found = {}
        for rank in here:
            if listener is None or rank == context.rank:
                continue
            caller, connection = _call(context, rank) if rank < context.rank else _answer(listener)
            found[caller] = Neighbour(caller, connection, context.timeout_s)
    return found


def _call(context: RankContext, rank: int) -> tuple[int, socket.socket]:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_HANDSHAKE_S)
        connection.connect(rank_socket_name(context.generation, rank))
        connection.send(bytes([context.rank & 255, context.rank >> 8]))
    except OSError as error:
        connection.close()
        raise RankLost(f"rank {rank} could not be reached: {error}") from error
    return rank, connection


def _answer(listener: socket.socket) -> tuple[int, socket.socket]:
    while True:
        try:
            connection, _ = listener.accept()
            connection.settimeout(_HANDSHAKE_S)
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            if _CREDENTIALS.unpack(credentials)[1] == os.getuid():
                return int.from_bytes(connection.recv(2), "little"), connection
            connection.close()  # another user of this host has no business here
        except OSError as error:
            raise RankLost(f"a rank of this host did not call: {error}") from error


@contextlib.contextmanager
def _memory_file(size: int) -> Iterator[int]:
    file = os.memfd_create("pipeline exchange")
    try:
        os.ftruncate(file, size)
        yield file
    finally:
        os.close(file)  # the mappings live on


def _mapped(file: int, size: int) -> torch.Tensor:
    """The bytes of a memory file, which no longer needs its descriptor then."""
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=torch.uint8)


def _place(context: RankContext) -> int:
    """A number that is equal on ranks that can share memory; 0 where that is impossible."""
    if context.torch_device.type != "cpu" or not hasattr(os, "memfd_create"):
        return 0
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        network = str(Path("/proc/self/ns/net").readlink())
    except OSError:
        return 0
    return zlib.crc32(f"{boot} {network} {os.getuid()}".encode()) + 1

"""Boxes between ranks on one host: through memory that both see, instead of twice through a socket.

The sender packs a box into an anonymous memory file and tells the receiver, by a small gloo message, where it is; the
receiver maps the file through ``/proc`` and copies the box out. A counter at the head of the file says which box has
been copied, and keeps the sender from overwriting one that has not. The memory belongs to the processes alone: nothing
is left behind when one is killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.cluster.gang import RankContext

LEAST_BYTES = 1 << 15
"""A smaller box goes through the socket: telling where it is would cost as much as sending it."""
LETTER = 3
"""Numbers in the message that announces a box: process, file descriptor, count."""
_HEAD_BYTES = 64
_PATIENCE_S = 60.0
_POLL_S = 5e-5


class Outbox:
    """The sender's end: one memory file for the boxes of one message, step after step."""

    def __init__(self, like: torch.Tensor) -> None:
        size = _HEAD_BYTES + like.numel() * like.element_size()
        self._file = os.memfd_create("pipeline exchange")
        os.ftruncate(self._file, size)
        self._map = mmap.mmap(self._file, size)
        self._copied = torch.frombuffer(self._map, dtype=torch.int64, count=1)
        self._box = torch.frombuffer(self._map, dtype=like.dtype, offset=_HEAD_BYTES).view(like.shape)
        self._count = 0

    def post(self, part: torch.Tensor) -> torch.Tensor:
        """Put ``part`` into the box, and return the letter to send.

        Raises ``RuntimeError`` if the receiver has not copied the last one within a minute.
        """
        self._await_copy()
        self._box.copy_(part)
        self._count += 1
        return torch.tensor([os.getpid(), self._file, self._count])

    def await_first_copy(self) -> None:
        """Wait until the receiver has mapped the file; from then on it no longer needs this process.

        Raises ``RuntimeError`` as ``post`` does.
        """
        if self._count == 1:
            self._await_copy()

    def _await_copy(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while int(self._copied[0]) != self._count:
            if time.monotonic() > deadline:
                raise RuntimeError("the receiver of a box in shared memory does not answer")
            time.sleep(_POLL_S)

    def __del__(self) -> None:
        # The mapping lives on in the tensors; the receiver, if it ever asked, has its own.
        with contextlib.suppress(OSError):
            os.close(self._file)


class Inbox:
    """The receiver's end: maps what letters point to, and keeps it mapped for the next letter."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, int], mmap.mmap] = {}

    def open(self, letter: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, Receipt]:
        """The box that ``letter`` announces, shaped and typed as ``like``; sign the receipt when it has been copied."""
        process, file, count = letter.tolist()
        size = _HEAD_BYTES + like.numel() * like.element_size()
        if (process, file) not in self._maps:
            with Path(f"/proc/{process}/fd/{file}").open("r+b") as opened:
                self._maps[process, file] = mmap.mmap(opened.fileno(), size)
        mapped = self._maps[process, file]
        box = torch.frombuffer(mapped, dtype=like.dtype, offset=_HEAD_BYTES, count=like.numel()).view(like.shape)
        return box, Receipt(torch.frombuffer(mapped, dtype=torch.int64, count=1), count)


class Receipt:
    """Tells the sender that its box may be filled again."""

    def __init__(self, copied: torch.Tensor, count: int) -> None:
        self._copied, self._count = copied, count

    def sign(self) -> None:
        """Say that the box has been copied."""
        self._copied[0] = self._count


def neighbours(context: RankContext) -> frozenset[int]:
    """The ranks with which this one can share memory: CPU ranks of one user on one host, in one space of processes.

    Every rank of the gang must call this at the same point.
    """
    if context.group is None or context.size == 1:
        return frozenset()
    mine = torch.tensor([_place(context)])
    places = [torch.zeros_like(mine) for _ in range(context.size)]
    dist.all_gather(places, mine, group=context.group)
    here = int(mine)
    return frozenset(rank for rank, place in enumerate(places) if here and int(place) == here and rank != context.rank)


def _place(context: RankContext) -> int:
    """A number that is equal on ranks that can share memory; 0 where that is impossible."""
    if context.torch_device.type != "cpu" or not hasattr(os, "memfd_create"):
        return 0
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        spaces = [str(Path("/proc/self/ns", name).readlink()) for name in ("pid", "user")]
    except OSError:
        return 0
    text = " ".join([boot, *spaces, str(os.getuid())])
    return zlib.crc32(text.encode()) + 1

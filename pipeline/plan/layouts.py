"""Layouts and the messages between them: the one mechanism behind every exchange.

A *layout* gives every rank a *box* of a tensor, a range of images times a range of channels, possibly empty. Tensors
are seen as ``(images, channels, rest)``: an activation ``x_BCHW`` is ``(B, C, H*W)``, and a weight ``w_KCRS`` whose
kernels are split is ``(1, K, C*R*S)``. All sizes in this module are global, and all of it is arithmetic on integers: no
tensor is touched, nothing is sent.

====  =========================================================  ==============
kind  what a rank with share ``s`` holds                         its adjoint
====  =========================================================  ==============
M     everything, rank 0 only                                    M
R     everything, on every rank whose flag is 1 (copies)         P, same flags
P     a summand of everything, on every rank whose flag is 1     R, same flags
K     ``s`` channels, in the order of the ranks                  K
B     ``s`` images, in the order of the ranks                    B
====  =========================================================  ==============

An exchange is linear, so its adjoint is the same list of messages with senders and receivers swapped: where a forward
message copied a box, the backward one adds a gradient. Broadcast and reduce, gather and scatter, all-gather and
reduce-scatter are pairs of this kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

Kind = Literal["M", "R", "P", "K", "B"]


@dataclass(frozen=True)
class Range:
    """A half-open range of indices."""

    start: int
    stop: int

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __and__(self, other: Range) -> Range:
        start = max(self.start, other.start)
        return Range(start, max(start, min(self.stop, other.stop)))

    def within(self, outer: Range) -> slice:
        """This range as a slice of something that begins at ``outer.start``."""
        return slice(self.start - outer.start, self.stop - outer.start)


@dataclass(frozen=True)
class Box:
    """A range of images times a range of channels, in global indices."""

    images: Range
    channels: Range

    def __bool__(self) -> bool:
        return bool(self.images) and bool(self.channels)

    def __and__(self, other: Box) -> Box:
        return Box(self.images & other.images, self.channels & other.channels)

    @property
    def size(self) -> int:
        """Number of (image, channel) pairs."""
        return len(self.images) * len(self.channels)


@dataclass(frozen=True)
class Message:
    """``box`` travels from rank ``source`` to rank ``target`` (a rank may send to itself: a local copy)."""

    source: int
    target: int
    box: Box


_KNOWN = 1024
"""So many layouts are kept, as the same few come up all over a plan, with an entry for each of a thousand ranks."""


@dataclass(frozen=True)
class Layout:
    """Which box of a tensor each rank holds.

    ``shares`` has one entry per rank: channels for K, images for B, and 1 or 0 (holds it or not) for M, R and P.
    """

    kind: Kind
    shares: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.shares, default=0) < 0:
            raise InputError(f"layout {self.kind}: shares {list(self.shares)} must not be negative")
        if not any(self.shares):
            raise InputError(f"layout {self.kind}: shares {list(self.shares)} leave nothing on any rank")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.shares))

    def __reduce__(self) -> tuple[type[Layout], tuple[Kind, tuple[int, ...]]]:
        return Layout, (self.kind, self.shares)  # the hash of a text is another in another process

    def __str__(self) -> str:
        return self.kind if self.kind == "M" else f"{self.kind}({','.join(map(str, self.shares))})"

    @cached_property
    def holders(self) -> tuple[int, ...]:
        """The ranks that hold something."""
        return tuple(rank for rank, share in enumerate(self.shares) if share)

    @cached_property
    def numbers(self) -> NDArray[np.float64]:
        """The shares as an array, (rank)."""
        return np.array(self.shares, dtype=float)

    @property
    def adjoint(self) -> Layout:
        """The layout of the gradient of a tensor in this layout."""
        return Layout({"R": "P", "P": "R"}.get(self.kind, self.kind), self.shares)  # type: ignore[arg-type]

    def scaled(self, factor: int) -> Layout:
        """The same split after every channel has become ``factor`` channels (flatten)."""
        return Layout(self.kind, tuple(share * factor for share in self.shares)) if self.kind == "K" else self

    def sizes(self, images: int, channels: int) -> NDArray[np.float64]:
        """Size of the box of each rank, (rank), without a list of boxes, of which a thousand ranks have a thousand."""
        other = {"K": images, "B": channels}.get(self.kind)
        return (self.numbers > 0) * np.float64(images * channels) if other is None else self.numbers * np.float64(other)

    def boxes(self, images: int, channels: int) -> tuple[Box, ...]:
        """The box of each rank in a tensor of ``images`` times ``channels``.

        Raises ``InputError`` if the shares do not add up to what is split.
        """
        whole = Box(Range(0, images), Range(0, channels))
        if self.kind in ("M", "R", "P"):
            return tuple(whole if share else Box(Range(0, 0), Range(0, 0)) for share in self.shares)
        extent, noun = (channels, "channels") if self.kind == "K" else (images, "images")
        if sum(self.shares) != extent:
            equation = " + ".join(map(str, self.shares))
            raise InputError(
                f"shares {equation} = {sum(self.shares)} do not add up to the {extent} {noun} of the layer"
            )
        stops = tuple(accumulate(self.shares))
        ranges = [Range(stop - share, stop) for share, stop in zip(self.shares, stops, strict=True)]
        if self.kind == "K":
            return tuple(Box(whole.images, part) for part in ranges)
        return tuple(Box(part, whole.channels) for part in ranges)


@lru_cache(maxsize=_KNOWN)
def master(ranks: int) -> Layout:
    """M: everything on rank 0."""
    return Layout("M", (1,) + (0,) * (ranks - 1))


@lru_cache(maxsize=_KNOWN)
def replicated(flags: tuple[int, ...]) -> Layout:
    """R on the ranks whose entry is not zero; M where that is rank 0 alone."""
    holders = tuple(int(flag > 0) for flag in flags)
    return Layout("M" if holders[0] and sum(holders) == 1 else "R", holders)


@lru_cache(maxsize=_KNOWN)
def partial(flags: tuple[int, ...]) -> Layout:
    """P on the ranks whose entry is not zero; M where that is rank 0 alone, as a single summand is the sum."""
    holders = tuple(int(flag > 0) for flag in flags)
    return Layout("M" if holders[0] and sum(holders) == 1 else "P", holders)


def kernels(shares: tuple[int, ...]) -> Layout:
    """K: channels split by ``shares``."""
    return Layout("K", shares)


def images(shares: tuple[int, ...]) -> Layout:
    """B: images split by ``shares``."""
    return Layout("B", shares)


def messages(source: Layout, target: Layout, images: int, channels: int) -> tuple[Message, ...]:
    """All messages of the exchange ``source`` -> ``target`` of a tensor of ``images`` times ``channels``.

    A receiver adds up what arrives, which for anything but a P source is one value per element. The list for the
    adjoint layouts is the transpose of this one, as the tests check for every pair.
    """
    if source.kind == "P" and target.kind == "R":
        return _everyone_to_everyone(source, target, images, channels)
    if source.kind == "P":
        return transposed(messages(target.adjoint, source.adjoint, images, channels))
    if target.kind == "P" and source.kind == "R":
        return _one_copy_becomes_the_only_summand(source, target, images, channels)
    if target.kind == "P":
        return transposed(messages(target.adjoint, source.adjoint, images, channels))
    return _copies(source, target, images, channels)


def transposed(forward: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages of the adjoint: the same boxes the other way."""
    return tuple(Message(message.target, message.source, message.box) for message in forward)


def _copies(source: Layout, target: Layout, images: int, channels: int) -> tuple[Message, ...]:
    held, wanted = source.boxes(images, channels), target.boxes(images, channels)
    found = []
    for receiver, want in enumerate(wanted):
        if not want:
            continue
        if source.kind == "R":
            # A rank that has a copy uses it; the others ask the first that has one.
            found.append(Message(receiver if held[receiver] else source.holders[0], receiver, want))
            continue
        for sender, have in enumerate(held):
            if overlap := have & want:
                found.append(Message(sender, receiver, overlap))
    return tuple(found)


def _everyone_to_everyone(source: Layout, target: Layout, images: int, channels: int) -> tuple[Message, ...]:
    box = Box(Range(0, images), Range(0, channels))
    if not box:
        return ()
    return tuple(Message(sender, receiver, box) for receiver in target.holders for sender in source.holders)


def _one_copy_becomes_the_only_summand(
    source: Layout, target: Layout, images: int, channels: int
) -> tuple[Message, ...]:
    box = Box(Range(0, images), Range(0, channels))
    if not box:
        return ()
    common = [rank for rank in source.holders if target.shares[rank]]
    pair = (common[0], common[0]) if common else (source.holders[0], target.holders[0])
    return (Message(*pair, box),)

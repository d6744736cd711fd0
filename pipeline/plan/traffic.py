"""How much an exchange moves between which ranks, without a list of its messages, a million for a thousand ranks.

The sizes follow from the layouts alone, as those of ``pipeline.plan.layouts.messages`` do; the tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.layouts import Layout

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Traffic:
    """Sizes of the messages between ranks in (image, channel) pairs: those of each pair, or factors of them."""

    given: Numbers
    """(rank): with ``taken``, rank i sends rank j a message of ``given[i] * taken[j]``, unless it is itself."""
    taken: Numbers
    pairs: tuple[NDArray[np.int_], NDArray[np.int_], Numbers] | None = None
    """Where the factors do not say it: sender, receiver and size of every message."""

    @cached_property
    def matrix(self) -> Numbers:
        """(sender, receiver); 0 where no message travels."""
        if self.pairs is None:
            sizes = np.outer(self.given, self.taken)
            np.fill_diagonal(sizes, 0)
            return sizes
        sizes = np.zeros((len(self.given), len(self.taken)))
        np.add.at(sizes, self.pairs[:2], self.pairs[2])
        return sizes

    @cached_property
    def sent(self) -> tuple[Numbers, Numbers]:
        """Number of messages and size of all that each rank sends, both (rank)."""
        if self.pairs is not None:
            return self._of_pairs(self.pairs[0])
        return _others(self.given > 0, self.taken > 0), _others(self.given, self.taken)

    @cached_property
    def received(self) -> tuple[Numbers, Numbers]:
        """Number of messages and size of all that each rank receives, both (rank)."""
        if self.pairs is not None:
            return self._of_pairs(self.pairs[1])
        return _others(self.taken > 0, self.given > 0), _others(self.taken, self.given)

    @cached_property
    def transposed(self) -> Traffic:
        """The same messages the other way."""
        pairs = None if self.pairs is None else (self.pairs[1], self.pairs[0], self.pairs[2])
        return Traffic(self.taken, self.given, pairs)

    def over(self, per_pair: Numbers, of_sender: Numbers) -> tuple[Numbers, Numbers]:
        """What all that each rank sends, and receives, sums up to, where it counts ``per_pair`` times ``of_sender``.

        Both are (case, rank); ``per_pair`` is (case, sender, receiver), ``of_sender`` (sender).
        """
        if self.pairs is None:
            given, same = of_sender * self.given, np.diagonal(per_pair, axis1=1, axis2=2)
            return given * (per_pair @ self.taken - same * self.taken), self.taken * (given @ per_pair - same * given)
        sender, receiver, sizes = self.pairs
        sent, received = np.zeros(per_pair.shape[:2]), np.zeros(per_pair.shape[:2])
        for case, one in enumerate(per_pair[:, sender, receiver] * sizes * of_sender[sender]):
            np.add.at(sent[case], sender, one)
            np.add.at(received[case], receiver, one)
        return sent, received

    def _of_pairs(self, ranks: NDArray[np.int_]) -> tuple[Numbers, Numbers]:
        assert self.pairs is not None
        count, size = np.zeros(len(self.given)), np.zeros(len(self.given))
        np.add.at(count, ranks, 1.0)
        np.add.at(size, ranks, self.pairs[2])
        return count, size


def _others(own: NDArray[np.generic], other: NDArray[np.generic]) -> Numbers:
    """Of each rank its own factor times the sum of the other's over all ranks but itself."""
    mine, theirs = np.asarray(own, dtype=float), np.asarray(other, dtype=float)
    product: Numbers = mine * (theirs.sum() - theirs)
    return product


@lru_cache(maxsize=4096)
def traffic(source: Layout, target: Layout, images: int, channels: int) -> Traffic:
    """What travels in the exchange ``source`` -> ``target`` of a tensor of ``images`` times ``channels``."""
    ranks, whole = len(source.shares), float(images * channels)
    from_summands, to_summands = source.kind == "P", target.kind == "P"
    if not whole:
        return Traffic(np.zeros(ranks), np.zeros(ranks))
    if from_summands and target.kind == "R":
        return Traffic(_flags(source), _flags(target) * whole)
    if to_summands and source.kind == "R":
        common = [rank for rank in source.holders if target.shares[rank]]
        end = source.holders[0] if common else target.holders[0]
        return Traffic(_only(source.holders[0], ranks), _only(end, ranks) * whole)
    if from_summands or to_summands:
        return traffic(target.adjoint, source.adjoint, images, channels).transposed
    if source.kind in ("M", "R"):
        first = source.holders[0]
        wanted = target.sizes(images, channels) * (_flags(source) == 0)
        return Traffic(_only(first, ranks), wanted)
    if target.kind in ("M", "R"):
        return Traffic(source.sizes(images, channels), _flags(target))
    if source.kind != target.kind:
        return Traffic(source.numbers, target.numbers)
    return _reshared(source, target, channels if source.kind == "B" else images)


def _reshared(source: Layout, target: Layout, other_extent: int) -> Traffic:
    """From one split of an axis to another: every stretch between two borders of either has one owner in each."""
    bounds = [np.cumsum(layout.shares) for layout in (source, target)]
    stops = np.unique(np.concatenate(bounds))
    stops = stops[stops > 0]
    sizes = np.diff(stops, prepend=0) * float(other_extent)
    sender, receiver = (np.searchsorted(one, stops - 1, side="right") for one in bounds)
    moves = sender != receiver
    nothing = np.zeros(len(source.shares))
    return Traffic(nothing, nothing, (sender[moves], receiver[moves], sizes[moves]))


def _flags(layout: Layout) -> Numbers:
    return (layout.numbers > 0).astype(float)


def _only(rank: int, ranks: int) -> Numbers:
    flags = np.zeros(ranks)
    flags[rank] = 1
    return flags


@lru_cache(maxsize=4096)
def taking_part(source: Layout, target: Layout, images: int, channels: int) -> tuple[int, ...]:
    """The ranks that send, receive or keep something in the exchange ``source`` -> ``target``."""
    if not images * channels:
        return ()
    if target.kind == "P" and source.kind == "R":
        common = [rank for rank in source.holders if target.shares[rank]]
        return (common[0],) if common else tuple(sorted({source.holders[0], target.holders[0]}))
    if (source.kind == "P") != (target.kind == "P"):
        if source.kind == "P" and target.kind == "R":
            return tuple(sorted({*source.holders, *target.holders}))
        return taking_part(target.adjoint, source.adjoint, images, channels)
    senders = source.holders
    if source.kind in ("M", "R"):
        senders = senders[:1] if set(target.holders) - set(senders) else ()
    return tuple(sorted({*senders, *target.holders}))

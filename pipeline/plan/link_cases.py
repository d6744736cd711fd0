"""What messages cost over the links between ranks, for many links at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pipeline.links import Link
from pipeline.plan.costs import Costs

Times = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Links:
    """What messages cost, in several cases at once.

    The arrays have the shape (case, sender, receiver), or (case, 1, 1) where all pairs are alike.
    """

    latency: Times
    """In s, from the last byte's leaving the sender to its reaching the receiver, whom it does not occupy."""
    seconds_per_byte: Times
    """How long a byte occupies the sender's and the receiver's port."""
    has_software: bool = False
    """Whether these are times that messages were seen to take, with all that sending takes besides the link itself."""

    @classmethod
    def measured(cls, costs: Costs) -> Links:
        """The one case that the calibration has measured."""
        return cls(costs.latency[None], costs.seconds_per_byte[None], has_software=True)

    @classmethod
    def uniform(cls, latency: Times, bandwidth: Times) -> Links:
        """Links of the same latency in s and bandwidth in bytes/s between all ranks, one case per entry, (case)."""
        return cls(np.asarray(latency)[:, None, None], 1 / np.asarray(bandwidth)[:, None, None])

    @classmethod
    def one(cls, link: Link) -> Links:
        """The one case of a link that is the same between all ranks."""
        return cls.uniform(np.array([link.latency]), np.array([link.bandwidth]))

    def of(self, devices: Sequence[int]) -> Links:
        """The links between ``devices`` alone."""
        if self.alike:
            return self
        chosen = np.ix_(range(self.cases), list(devices), list(devices))
        return replace(self, latency=self.latency[chosen], seconds_per_byte=self.seconds_per_byte[chosen])

    def with_software(self, costs: Costs) -> Links:
        """The links with what sending takes besides, as the calibration found it over the fastest of its own links.

        That is its latency, and half its time for each byte: one end copies while the message is under way. Measured
        links have it in them already and stay as they are; so do those of a what-if that changes measured ones, whose
        rate is thus one that messages get, software and all.
        """
        pairs = ~np.eye(len(costs.latency), dtype=bool)
        if self.has_software or not pairs.any():
            return self
        return self.sent_by(float(costs.latency[pairs].min()), float(costs.seconds_per_byte[pairs].min()))

    def sent_by(self, latency: float, seconds_per_byte: float) -> Links:
        """The links with what sending takes besides, where that is so over the fastest link (``with_software``)."""
        return Links(self.latency + latency, self.seconds_per_byte + seconds_per_byte / 2, has_software=True)

    @property
    def cases(self) -> int:
        """Number of cases."""
        return len(self.latency)

    @property
    def alike(self) -> bool:
        """Whether all pairs of ranks are alike."""
        return self.latency.shape[1:] == (1, 1)

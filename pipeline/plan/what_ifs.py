"""What would make the step of a plan shorter: faster links or devices, one more or one less, another strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.graph.operations import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.fitting import Room, fits, is_scarce
from pipeline.plan.link_cases import Links, Times
from pipeline.plan.plan import Plan, Strategy
from pipeline.plan.planner import predicted_step_time, uniform_plan
from pipeline.plan.prediction import predict_step

_GBIT_PER_S = (1.0, 10.0, 100.0)
"""Rates of links that one can buy."""
_ANOTHER_RATE = 1.5
"""A link has a rate already if it is measured to be slower by less than this factor."""
_DEVICES = 32
"""One device of more than these is a gain too small to mention."""
_RANKS_TRIED = 4
"""So many ranks, those that compute longest, are tried with a faster device."""
_WORTH_SAYING = 1.03
_MOST_SAID = 5
_SPLITTING: tuple[Strategy, ...] = ("kernel", "batch")


@dataclass(frozen=True, kw_only=True)
class Help:
    """A change and what it would bring."""

    change: str
    step_seconds: float
    """Predicted time of a step after the change."""


class _Case(NamedTuple):
    """Other links, and what they are called."""

    change: str
    latency: Times
    """In s, (sender, receiver)."""
    per_byte: Times
    """In s, (sender, receiver)."""


class WhatIfs:
    """Predictions of a plan's step if something were different.

    ``costs`` and ``labels`` are of all devices that the plan was made for. Changes of links leave the plan as it is.
    For changes of devices the shares are chosen anew by the plan's strategy; ``auto`` is taken to use the better of
    ``kernel`` and ``batch`` then, as its search takes long, and so may gain more than is said here. A plan on one of
    several devices is compared with these two on all of them.
    """

    def __init__(self, graph: Graph, plan: Plan, costs: Costs, labels: Sequence[str], *, itemsize: int = 4) -> None:
        self._graph, self._plan, self._itemsize = graph, plan, itemsize
        self._devices = tuple(range(costs.devices)) if plan.ranks == 1 else plan.devices
        """Those of the plan, or all of them where a single one does everything."""
        self._all_costs, self._all_labels = costs, tuple(labels)
        self._costs = costs.only(self._devices)
        self._labels = tuple(labels[device] for device in self._devices)
        self.step_seconds = predicted_step_time(graph, plan, costs, itemsize=itemsize)
        """Predicted time of a step as things are."""

    def helps(self, busy: NDArray[np.float64]) -> tuple[Help, ...]:
        """The changes that are worth it, the best first; ``busy`` is for how long each rank computes, (rank) in s."""
        found = [*self._links()]
        if len(self._devices) <= _DEVICES:
            found += [*self._faster(busy), *self._more(), *self._fewer(), *self._strategies(), *self._memory()]
        worth = [one for one in found if one.step_seconds * _WORTH_SAYING <= self.step_seconds]
        return tuple(sorted(worth, key=lambda one: one.step_seconds)[:_MOST_SAID])

    def without_time(self, *, of_master: bool = False) -> float:
        """The step in s if all links, or those of the master alone, took no time."""
        latency, per_byte = self._measured
        none = self._of_master if of_master else np.ones_like(self._of_master)
        return float(self._over(np.where(none, 0.0, latency)[None], np.where(none, 0.0, per_byte)[None])[0])

    @cached_property
    def _measured(self) -> tuple[Times, Times]:
        """Latency and time per byte of the measured links, both (sender, receiver) in s."""
        shape = (len(self._devices),) * 2
        return np.broadcast_to(self._costs.latency, shape), np.broadcast_to(self._costs.seconds_per_byte, shape)

    @cached_property
    def _of_master(self) -> NDArray[np.bool_]:
        """Which links are the master's, (sender, receiver)."""
        is_master = np.arange(len(self._devices)) == 0
        of_master: NDArray[np.bool_] = is_master[:, None] | is_master
        return of_master

    @cached_property
    def _split_plans(self) -> list[Plan]:
        """What is tried over other links: the plan, or, where it splits nothing, what would split over all devices."""
        if self._plan.ranks > 1:
            return [self._plan]
        plans = (self._planned(one, self._costs, self._labels) for one in _SPLITTING)
        return [one for one in plans if one is not None]

    @property
    def _all_used(self) -> str:
        """What changes besides where a single one of several devices does everything."""
        return ", with all devices used" if self._plan.ranks < len(self._devices) else ""

    def _over(self, latency: Times, per_byte: Times) -> Times:
        """The step over links of that latency and time per byte, (case, sender, receiver) in s; (case) in s."""
        links = Links(latency, per_byte, has_software=True)
        best = np.full(links.cases, self.step_seconds)
        for plan in self._split_plans:
            steps = predict_step(
                self._graph, plan, self._costs, batch_size=plan.batch_size, itemsize=self._itemsize, links=links
            )
            best = np.minimum(best, steps)
        return best

    def _links(self) -> Iterator[Help]:
        """Faster links, from the least change to the greatest; what is hardly better than a lesser one is left out.

        So is what a split over all devices gains over the links as they are.
        """
        if len(self._devices) == 1:
            return
        latency, per_byte = self._measured
        several = len(self._devices) > 2
        cases = [_Case("a tenth of the latency of all links", latency / 10, per_byte)]
        rate = _next_rate(per_byte[self._of_master])
        if several and rate is not None:
            change = f"the master's links (device {self._devices[0]}, {self._labels[0]}) at {rate:g} Gbit/s"
            cases.append(_Case(change, latency, np.where(self._of_master, _at(rate, per_byte), per_byte)))
        rate = _next_rate(per_byte)
        if rate is not None:
            change = f"{'all links' if several else 'the link'} at {rate:g} Gbit/s"
            cases.append(_Case(change, latency, _at(rate, per_byte)))
        cases.append(_Case("links that take no time at all", np.zeros_like(latency), np.zeros_like(per_byte)))
        steps = self._over(np.stack([one.latency for one in cases]), np.stack([one.per_byte for one in cases]))
        least = float(self._over(latency[None], per_byte[None])[0])
        for case, seconds in zip(cases, steps, strict=True):
            if seconds * _WORTH_SAYING <= least:
                yield Help(change=case.change + self._all_used, step_seconds=float(seconds))
            least = min(least, float(seconds))

    def _faster(self, busy: NDArray[np.float64]) -> Iterator[Help]:
        """Devices that are twice as fast, those that compute longest."""
        if self._plan.ranks == 1:
            return
        for rank in np.argsort(-busy, kind="stable")[:_RANKS_TRIED]:
            costs = self._costs.slowed(np.where(np.arange(len(self._devices)) == rank, 0.5, 1.0))
            same = predict_step(
                self._graph, self._plan, costs, batch_size=self._plan.batch_size, itemsize=self._itemsize
            )
            seconds = min(float(same[0]), self._best(costs, self._labels))
            yield Help(change=f"{self._named(int(rank))} twice as fast", step_seconds=seconds)

    def _more(self) -> Iterator[Help]:
        """One more device like the fastest."""
        if len(self._devices) > 1:  # of one device alone no link is known
            fastest = self._costs.fastest(self._plan.batch_size)
            seconds = self._best(_with_twin(self._costs, fastest), (*self._labels, self._labels[fastest]))
            yield Help(change=f"one more device like {self._named(fastest)}{self._all_used}", step_seconds=seconds)

    def _fewer(self) -> Iterator[Help]:
        """The slowest device left out; one of two is so by the strategy ``single``."""
        if self._plan.ranks > 2:
            slowest = int(np.argmin(self._costs.throughputs(self._plan.batch_size)))
            left = [rank for rank in range(self._plan.ranks) if rank != slowest]
            seconds = self._best(self._costs.only(left), [self._labels[rank] for rank in left])
            yield Help(change=f"to leave out {self._named(slowest)}", step_seconds=seconds)

    def _strategies(self) -> Iterator[Help]:
        """Another strategy with all devices."""
        for strategy in ("single", *_SPLITTING):
            if self._all_costs.devices > 1 and strategy != self._plan.strategy:
                seconds = self._step(strategy, self._all_costs, self._all_labels)
                yield Help(change=f"the strategy {strategy}", step_seconds=seconds)

    def _memory(self) -> Iterator[Help]:
        """Enough memory on all devices, where that changes what they get."""
        if is_scarce(self._graph, Room.of(self._costs.memory_left), self._plan.batch_size, itemsize=self._itemsize):
            seconds = self._best(replace(self._costs, memory=None), self._labels)
            if seconds * _WORTH_SAYING <= self._best(self._costs, self._labels):
                yield Help(change=f"enough memory on all devices{self._all_used}", step_seconds=seconds)

    def _named(self, rank: int) -> str:
        return f"device {self._devices[rank]} ({self._labels[rank]})"

    def _best(self, costs: Costs, labels: Sequence[str]) -> float:
        """The least step in s over the devices of ``costs``; infinite where none is possible."""
        own = self._plan.strategy
        return min(self._step(one, costs, labels) for one in (_SPLITTING if own in ("auto", "single") else (own,)))

    def _step(self, strategy: Strategy, costs: Costs, labels: Sequence[str]) -> float:
        plan = self._planned(strategy, costs, labels)
        if plan is None:
            return np.inf
        return predicted_step_time(self._graph, plan, costs, itemsize=self._itemsize)

    def _planned(self, strategy: Strategy, costs: Costs, labels: Sequence[str]) -> Plan | None:
        """The plan of ``strategy`` over the devices of ``costs``; None where they cannot hold it."""
        try:
            plan = uniform_plan(self._graph, strategy, self._plan.batch_size, labels, costs, None, self._itemsize)
        except InputError:
            return None
        return plan if fits(self._graph, plan, Room.of(costs.memory_left), itemsize=self._itemsize) else None


def _next_rate(per_byte: Times) -> float | None:
    """The next rate in Gbit/s above that of the slowest of some links; None where there is none."""
    slowest = float(per_byte.max()) * 1e9 / 8  # in s per Gbit
    return next((rate for rate in _GBIT_PER_S if rate * slowest > _ANOTHER_RATE), None)


def _at(rate: float, per_byte: Times) -> Times:
    """Links of ``rate`` in Gbit/s, but for those that are faster already."""
    faster: Times = np.minimum(per_byte, 8e-9 / rate)
    return faster


def _with_twin(costs: Costs, device: int) -> Costs:
    """With one more of ``device`` behind the others; between the two the link is as bad as the worst of ``device``."""
    more = costs.only([*range(costs.devices), device])
    shape = (more.devices,) * 2
    latency, per_byte = (np.broadcast_to(one, shape).copy() for one in (more.latency, more.seconds_per_byte))
    for links in (latency, per_byte):
        apart = np.arange(costs.devices) != device
        links[device, -1] = links[device, :-1][apart].max()
        links[-1, device] = links[:-1, device][apart].max()
    return replace(more, latency=latency, seconds_per_byte=per_byte)

"""Plans that fit the memory of their devices: the share of one that has too little is cut down to what it can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.graph.trace import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.memory import predict_memory
from pipeline.plan.plan import Plan
from pipeline.plan.program import Program
from pipeline.plan.shares import Most
from pipeline.plan.strategies import Shares, plan_network


class PlanWith(Protocol):
    """Plans by one strategy for some devices: freely, with given shares, or with the largest fraction of each."""

    def __call__(self, *, shares: Shares | None = None, most: Most | None = None) -> Plan:
        """The plan; ``InputError`` if ``most`` leaves too little for all of the network."""
        ...


SAFETY = 1.15
"""A prediction of memory may be too low by about as much."""
_AMPLE = 4
"""No strategy makes a device hold as many times what the network takes alone."""
_HALVINGS = 8
_MIB = 2**20


def needed_memory(
    graph: Graph, plan: Plan, *, itemsize: int = 4, program: Program | None = None
) -> NDArray[np.float64]:
    """What each rank has to have beyond its process in bytes, (rank), to be on the safe side."""
    return SAFETY * predict_memory(graph, plan, itemsize=itemsize, program=program)


def is_scarce(graph: Graph, costs: Costs, batch_size: int, *, itemsize: int = 4) -> bool:
    """Whether some device could not hold several times the whole network, so that plans have to be checked."""
    if not np.isfinite(costs.memory_left).any():
        return False
    alone = plan_network(graph, "single", batch_size=batch_size, labels=("alone",))
    return bool((costs.memory_left < _AMPLE * needed_memory(graph, alone, itemsize=itemsize)).any())


def fits(graph: Graph, plan: Plan, costs: Costs, *, itemsize: int = 4, program: Program | None = None) -> bool:
    """Whether every rank can hold its part of ``plan``; ``costs`` are of all devices that it was made for."""
    limits = costs.memory_left[list(plan.devices)]
    return bool((needed_memory(graph, plan, itemsize=itemsize, program=program) <= limits).all())


def able_alone(graph: Graph, costs: Costs, batch_size: int, *, itemsize: int = 4) -> tuple[int, ...]:
    """The devices that can hold the whole network; all of them where none can."""
    alone = plan_network(graph, "single", batch_size=batch_size, labels=("alone",))
    need = needed_memory(graph, alone, itemsize=itemsize)[0]
    return tuple(np.flatnonzero(costs.memory_left >= need).tolist()) or tuple(range(costs.devices))


def most_within_memory(graph: Graph, plan_with: PlanWith, costs: Costs, *, itemsize: int = 4) -> Most | None:
    """What fraction each rank can hold, found by bisection for one rank at a time, while the others share the rest.

    ``costs`` are of the ranks that ``plan_with`` plans for. None where no rank has to be limited, or no limits help.
    """
    if fits(graph, plan_with(), costs, itemsize=itemsize):
        return None
    limits = costs.memory_left
    most = np.ones(len(limits))
    known: dict[tuple[bool, float], float] = {}  # but for the master, all with equal limits can hold the same

    def can_hold(rank: int, fraction: float) -> bool:
        shares = np.full(len(limits), (1 - fraction) / max(len(limits) - 1, 1))
        shares[rank] = fraction
        need = needed_memory(graph, plan_with(shares=[float(one) for one in shares]), itemsize=itemsize)
        return bool(need[rank] <= limits[rank])

    def largest(rank: int) -> float:
        if can_hold(rank, 1.0):
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if can_hold(rank, middle) else (low, middle)
        return low

    for rank, limit in enumerate(limits):
        kind = rank == 0, float(limit)
        if kind not in known:
            known[kind] = largest(rank)
        most[rank] = known[kind]
    try:
        return most if fits(graph, plan_with(most=most), costs, itemsize=itemsize) else None
    except InputError:  # all of them together cannot hold the network
        return None


def check_memory(
    graph: Graph,
    plan: Plan,
    costs: Costs,
    *,
    smaller: Callable[[int], Plan] | None = None,
    itemsize: int = 4,
) -> None:
    """Raise ``InputError`` if a rank cannot hold its part of ``plan``, and say what would do.

    ``costs`` are of all devices that the plan was made for; ``smaller`` plans for another batch size.
    """
    limits = costs.memory_left[list(plan.devices)]
    need = needed_memory(graph, plan, itemsize=itemsize)
    over = np.flatnonzero(need > limits)
    if not over.size:
        return
    rank = int(over[np.argmax(need[over] - limits[over])])
    helps = "give it more, or add devices"
    batch_size = plan.batch_size // 2
    while smaller is not None and batch_size:
        try:
            other = smaller(batch_size)
        except InputError:
            break
        if fits(graph, other, costs, itemsize=itemsize):
            helps = f"a batch of {batch_size} images would fit"
            break
        batch_size //= 2
    raise InputError(
        f"device {plan.devices[rank]} ({plan.labels[rank]}) needs about {need[rank] / _MIB:.0f} MiB for its part at "
        f"batch size {plan.batch_size}, but has {limits[rank] / _MIB:.0f} MiB beside its process: "
        f"{helps}"
    )

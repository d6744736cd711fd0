"""Plans that fit the memory of their devices: the share of one that has too little is cut down to what it can hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.graph.trace import Graph
from pipeline.plan.costs import Costs
from pipeline.plan.memory import SGD_STATES, predict_memory
from pipeline.plan.plan import Plan
from pipeline.plan.shares import Most
from pipeline.plan.strategies import plan_network

SAFETY = 1.15
"""A prediction of memory may be too low by about as much."""
_AMPLE = 4
"""No strategy makes a device hold as many times what the network takes alone."""
_HALVINGS = 8
_MIB = 2**20


def needed_memory(graph: Graph, plan: Plan, *, itemsize: int = 4, states: int = SGD_STATES) -> NDArray[np.float64]:
    """What each rank has to have beyond its process in bytes, (rank), to be on the safe side."""
    return SAFETY * predict_memory(graph, plan, itemsize=itemsize, states=states)


def is_scarce(graph: Graph, costs: Costs, batch_size: int, *, itemsize: int = 4) -> bool:
    """Whether some device could not hold several times the whole network, so that plans have to be checked."""
    if not np.isfinite(costs.memory_left).any():
        return False
    alone = plan_network(graph, "single", batch_size=batch_size, labels=("alone",))
    return bool((costs.memory_left < _AMPLE * needed_memory(graph, alone, itemsize=itemsize)).any())


def fits(graph: Graph, plan: Plan, costs: Costs, *, itemsize: int = 4) -> bool:
    """Whether every rank can hold its part of ``plan``; ``costs`` are of all devices that it was made for."""
    limits = costs.memory_left[list(plan.devices)]
    return bool((needed_memory(graph, plan, itemsize=itemsize) <= limits).all())


def most_within_memory(
    graph: Graph, make: Callable[[Most | None], Plan], costs: Costs, *, itemsize: int = 4
) -> Most | None:
    """What fraction each rank may have at most so that the plan which ``make`` gives with it fits; None for anything.

    ``costs`` are of the ranks that ``make`` plans for. The fractions are found by bisection; where nothing fits, they
    are None as well.
    """
    limits = costs.memory_left
    limited = needed_memory(graph, make(None), itemsize=itemsize) > limits
    if not limited.any():
        return None
    low, high = np.zeros(len(limits)), np.ones(len(limits))
    found = None
    for _ in range(_HALVINGS):
        middle = np.where(limited, (low + high) / 2, 1.0)
        try:
            plan = make(middle)
        except InputError:  # the others cannot take what is left
            within = limited & (high >= 1)  # those that never had too much, if there are any
            low = np.where(within if within.any() else limited, middle, low)
            continue
        over = needed_memory(graph, plan, itemsize=itemsize) > limits
        if not over.any():
            found = middle
        high = np.where(over & limited, middle, high)
        low = np.where(limited & ~over, middle, low)
        limited |= over
    return found


def check_memory(
    graph: Graph,
    plan: Plan,
    costs: Costs,
    *,
    smaller: Callable[[int], Plan] | None = None,
    itemsize: int = 4,
    states: int = SGD_STATES,
) -> None:
    """Raise ``InputError`` if a rank cannot hold its part of ``plan``, and say what would do.

    ``costs`` are of all devices that the plan was made for; ``smaller`` plans for another batch size.
    """
    limits = costs.memory_left[list(plan.devices)]
    need = needed_memory(graph, plan, itemsize=itemsize, states=states)
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
        f"batch size {plan.batch_size}, but has {max(limits[rank], 0) / _MIB:.0f} MiB beside its process: "
        f"{helps}"
    )

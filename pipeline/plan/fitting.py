"""Plans that fit the memory of their devices: the share of one that has too little is cut down to what it can hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from pipeline.errors import InputError, TooLittleMemoryError
from pipeline.graph.operations import Graph
from pipeline.plan.memory import SGD_STATES, Bytes, predict_memory
from pipeline.plan.plan import Plan, Strategy
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
NO_SAFETY = 1.0
"""For what the user decided: no other plan would be made instead, and refusing what would have run helps nobody."""
_AMPLE = 4
"""No strategy makes a device hold as many times what the network takes alone."""
_HALVINGS = 8
_MIB = 2**20
_MOST_DEVICES = 64
"""Up to so many devices are proposed to whoever has too few."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """The memory that devices have for a training, and what of it is taken whatever the plan."""

    left: Bytes
    """(device) bytes that each may hold beyond its process, without end where nothing is known."""
    images: Bytes
    """(device) bytes of the data set in its memory if it is the master, and under ``ddp`` in any case."""
    validation: Bytes
    """(device) bytes of the images to validate with in its memory if it is the master."""
    states: int = SGD_STATES
    """Numbers that the optimiser keeps per weight."""

    @classmethod
    def of(
        cls, left: Bytes, *, images: Bytes | float = 0.0, validation: Bytes | float = 0.0, states: int = SGD_STATES
    ) -> Room:
        """Beyond the processes there is so much ``left``; of images there are none in memory unless given."""
        none = np.zeros(len(left))
        return cls(left=left, images=images + none, validation=validation + none, states=states)

    def beside(self, held: Bytes | float) -> Room:
        """The room that is left where the processes hold so much, (device) in bytes."""
        return replace(self, left=self.left - held)

    def only(self, devices: Sequence[int]) -> Room:
        """The room of ``devices`` alone, in that order."""
        chosen = list(devices)
        return replace(self, left=self.left[chosen], images=self.images[chosen], validation=self.validation[chosen])

    def limits(self, plan: Plan) -> Bytes:
        """(rank) bytes that each may hold for its part of ``plan``; negative where the images alone are too much."""
        devices = list(plan.devices)
        found: Bytes = self.left[devices] - self.images_of(plan)
        return found

    def images_of(self, plan: Plan) -> Bytes:
        """(rank) bytes of images in the memory of each."""
        devices = list(plan.devices)
        master = np.arange(len(devices)) == 0
        found: Bytes = np.where(master | (plan.strategy == "ddp"), self.images[devices], 0.0)
        return found + np.where(master, self.validation[devices], 0.0)


def needed_memory(
    graph: Graph,
    plan: Plan,
    *,
    itemsize: int = 4,
    states: int = SGD_STATES,
    program: Program | None = None,
    safety: float = SAFETY,
) -> Bytes:
    """What each rank has to have beyond its process and images in bytes, (rank), to be on the safe side."""
    return safety * predict_memory(graph, plan, itemsize=itemsize, states=states, program=program)


def is_scarce(graph: Graph, room: Room, batch_size: int, *, itemsize: int = 4) -> bool:
    """Whether some device could not hold several times the whole network, so that plans have to be checked."""
    if not np.isfinite(room.left).any():
        return False
    least = room.left - room.images - room.validation
    return bool((least < _AMPLE * _alone(graph, room, batch_size, itemsize)).any())


def fits(
    graph: Graph,
    plan: Plan,
    room: Room,
    *,
    itemsize: int = 4,
    program: Program | None = None,
    safety: float = SAFETY,
) -> bool:
    """Whether every rank can hold its part of ``plan``; ``room`` is that of all devices that it was made for."""
    need = needed_memory(graph, plan, itemsize=itemsize, states=room.states, program=program, safety=safety)
    return bool((need <= room.limits(plan)).all())


def able_alone(graph: Graph, room: Room, batch_size: int, *, itemsize: int = 4) -> tuple[int, ...]:
    """The devices that can hold the whole network, or can only just hold it; all of them where none can."""
    left = room.left - room.images - room.validation
    for safety in (SAFETY, NO_SAFETY):
        able = np.flatnonzero(left >= _alone(graph, room, batch_size, itemsize, safety))
        if able.size:
            return tuple(able.tolist())
    return tuple(range(len(left)))


def _alone(graph: Graph, room: Room, batch_size: int, itemsize: int, safety: float = SAFETY) -> float:
    """What a device that holds the whole network has to have."""
    plan = plan_network(graph, "single", batch_size=batch_size, labels=("alone",))
    return float(needed_memory(graph, plan, itemsize=itemsize, states=room.states, safety=safety)[0])


def most_within_memory(graph: Graph, plan_with: PlanWith, room: Room, *, itemsize: int = 4) -> Most | None:
    """What fraction each rank can hold, found by bisection for one rank at a time, while the others share the rest.

    ``room`` is of the ranks that ``plan_with`` plans for. None where no rank has to be limited, or no limits help, as
    they cannot help a single rank.
    """
    free = plan_with()
    if free.ranks == 1 or fits(graph, free, room, itemsize=itemsize):
        return None
    limits = room.limits(free)
    most = np.ones(len(limits))
    known: dict[tuple[bool, float], float] = {}  # but for the master, all with equal limits can hold the same

    def can_hold(rank: int, fraction: float) -> bool:
        shares = np.full(len(limits), (1 - fraction) / (len(limits) - 1))
        shares[rank] = fraction
        plan = plan_with(shares=[float(one) for one in shares])
        need = needed_memory(graph, plan, itemsize=itemsize, states=room.states)
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
        return most if fits(graph, plan_with(most=most), room, itemsize=itemsize) else None
    except InputError:  # all of them together cannot hold the network
        return None


def check_memory(
    graph: Graph,
    plan: Plan,
    room: Room,
    *,
    wanted: Strategy | None = None,
    smaller: Callable[[int], Plan] | None = None,
    itemsize: int = 4,
    decided: bool = False,
) -> None:
    """Raise ``TooLittleMemoryError`` if a rank cannot hold its part of ``plan``, and say what would do.

    ``room`` is that of all devices that the plan was made for. ``wanted`` is the strategy that was asked for, where it
    is another than the plan's; ``smaller`` plans for another batch size. What the user has ``decided`` is only refused
    if it does not fit by the prediction itself.
    """
    limits = room.limits(plan)
    safety = NO_SAFETY if decided else SAFETY
    need = needed_memory(graph, plan, itemsize=itemsize, states=room.states, safety=safety)
    over = np.flatnonzero(need > limits)
    if not over.size:
        return
    rank = int(over[np.argmax(need[over] - limits[over])])
    images = room.images_of(plan)[rank]
    beside = f"its process and {images / _MIB:.0f} MiB of images" if images else "its process"
    raise TooLittleMemoryError(
        f"device {plan.devices[rank]} ({plan.labels[rank]}) needs about {need[rank] / _MIB:.0f} MiB for its part at "
        f"batch size {plan.batch_size}, but has {max(limits[rank], 0.0) / _MIB:.0f} MiB beside {beside}: "
        f"{_what_helps(graph, plan, room, wanted or plan.strategy, smaller, itemsize, safety)}"
    )


def _what_helps(
    graph: Graph,
    plan: Plan,
    room: Room,
    wanted: Strategy,
    smaller: Callable[[int], Plan] | None,
    itemsize: int,
    safety: float,
) -> str:
    found = []
    images = 0 if smaller is None else _largest_batch(graph, room, plan.batch_size, smaller, itemsize, safety)
    if images:
        found.append(f"a batch of {images} image{'s' if images > 1 else ''} would fit")
    # What these divide becomes less on each device with every further one; `single` takes one whatever there are, and
    # others keep all weights in one place or everywhere.
    divides: dict[Strategy, Strategy] = {"kernel": "kernel", "batch": "batch", "auto": "kernel"}
    if wanted in divides:
        largest = int(np.argmax(room.limits(plan)))
        count = _enough_alike(graph, plan, room.only([plan.devices[largest]]), divides[wanted], itemsize)
        if count:
            which = f"device {plan.devices[largest]} ({plan.labels[largest]})"
            found.append(f"{count} devices like {which} would hold it with equal shares")
    if not found and smaller is not None:
        found = ["not even one image would fit, so give it more memory"]
    return ", and ".join(found) or "give it more memory, or plan for a smaller batch"


def _largest_batch(
    graph: Graph, room: Room, batch_size: int, smaller: Callable[[int], Plan], itemsize: int, safety: float
) -> int:
    """The largest number of images below ``batch_size`` that fits, by bisection; 0 if none does."""

    def fit(images: int) -> bool:
        try:
            return fits(graph, smaller(images), room, itemsize=itemsize, safety=safety)
        except InputError:  # too few for the strategy
            return False

    low, high = 0, batch_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


def _enough_alike(graph: Graph, plan: Plan, room: Room, strategy: Strategy, itemsize: int) -> int:
    """How many devices with the ``room`` of one hold equal shares of the network; 0 if a good many do not."""

    def enough(count: int) -> bool:
        shares, labels = [1 / count] * count, ["alike"] * count
        alike = plan_network(graph, strategy, batch_size=plan.batch_size, labels=labels, shares=shares)
        return fits(graph, alike, room.only([0] * count), itemsize=itemsize)

    low, high = 1, _MOST_DEVICES
    if not enough(high):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high

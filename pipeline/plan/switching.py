"""Which layers should be split in which way, by dynamic programming: where does one kind of split give way to another?

The time of a plan is taken for a sum, of what each layer takes under its kind and of what each change of kind adds.
Both are read off predictions of whole programs: of plans of one kind, and of plans that change once. What hides behind
what is only in these, so a plan that changes more often has to be predicted itself before anybody relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.plan.instructions import Compute, Instruction
from pipeline.plan.strategies import Kind

Changes = Mapping[tuple[Kind, Kind], Mapping[int, float]]
"""By the kinds before and after, and the first layer after, what a change adds in s; not of every layer."""


def changing_once(first: Kind, last: Kind, border: int, layers: int) -> tuple[Kind, ...]:
    """One kind for so many layers, and another for the rest."""
    return (first,) * border + (last,) * (layers - border)


def layer_seconds(
    instructions: Sequence[Instruction], timeline_IR2: NDArray[np.float64], layers: Sequence[str], total: float
) -> NDArray[np.float64]:
    """What each layer adds to a step of ``total`` s, forward and backward, (layer).

    ``timeline_IR2`` is that of (instruction, rank, 2) of a program with no computation across the beginning of a layer.
    """
    place = {name: index for index, name in enumerate(layers)}
    computes = [
        (one, times_R2)
        for one, times_R2 in zip(instructions, timeline_IR2, strict=True)
        if isinstance(one, Compute) and np.isfinite(times_R2).any()
    ]
    # Where the step turns from forward to backward.
    turn = min((np.nanmin(times_R2) for one, times_R2 in computes if one.direction == "backward"), default=total)
    begins, ends = np.full((2, len(layers) + 1), turn)
    for one, times_R2 in computes:
        for index in (place[name] for name in one.operations if name in place):
            if one.direction == "forward":
                begins[index] = min(begins[index], np.nanmin(times_R2))
            else:
                ends[index] = max(ends[index], np.nanmax(times_R2))
    # Of parallel branches one may begin before the other has ended.
    forward = np.diff(np.maximum.accumulate(begins))
    backward = -np.diff(np.maximum.accumulate(ends[::-1])[::-1])
    spent: NDArray[np.float64] = forward + backward
    return spent * (total / (spent.sum() or 1.0))


def changes_of(times: Mapping[tuple[Kind, ...], float], spent: Mapping[Kind, NDArray[np.float64]]) -> Changes:
    """What a change of kind adds, as far as the ``times`` of plans in s tell that change once."""
    found: dict[tuple[Kind, Kind], dict[int, float]] = {}
    for kinds, seconds in times.items():
        first, last = kinds[0], kinds[-1]
        border = kinds.count(first)
        changes = first != last and kinds == changing_once(first, last, border, len(kinds))
        if changes and first in spent and last in spent:
            added = seconds - spent[first][:border].sum() - spent[last][border:].sum()
            found.setdefault((first, last), {})[border] = max(added, 0.0)
    return found


def cheapest_kinds(spent: Mapping[Kind, NDArray[np.float64]], changes: Changes) -> tuple[Kind, ...]:
    """The kind of each layer for which the sum is least.

    ``spent`` is by kind what each layer takes in s, (layer). A change whose layer is not in ``changes`` adds what the
    next one does that is; kinds that are not there never follow each other.
    """
    kinds = list(spent)
    by_kind = np.array([spent[kind] for kind in kinds])
    total, came = by_kind[:, 0], []
    for layer in range(1, by_kind.shape[1]):
        added = [[0.0 if before == kind else _near(changes.get((before, kind), {}), layer) for kind in kinds]
                 for before in kinds]  # fmt: skip
        through = total[:, None] + np.array(added)
        came.append(through.argmin(axis=0))
        total = through.min(axis=0) + by_kind[:, layer]
    path = [int(total.argmin())]
    for before in reversed(came):
        path.append(int(before[path[-1]]))
    return tuple(kinds[place] for place in reversed(path))


def _near(known: Mapping[int, float], layer: int) -> float:
    return known[min(known, key=lambda one: abs(one - layer))] if known else np.inf

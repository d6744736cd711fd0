"""Cells whose step was predicted far off, and why, as far as the store can tell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr

from pipeline.analysis.choice import repeatability
from pipeline.analysis.instruction_findings import WORDS
from pipeline.analysis.instruction_times import KINDS, TIMELINES, has_instructions, kinds_of, times_by_rank
from pipeline.analysis.statistics import copied, prediction_error
from pipeline.analysis.wording import rank_in_words
from pipeline.results.contracts import INDEX, CellIndex

FAR = 0.15
"""A prediction that is off by more than this part of the measured step is far off."""
ROUNDS = "rounds"
"""The cause where the rounds of the very cell differ by at least the error."""
UNTOLD = "untold"
"""The cause where the store cannot tell."""


class FarOff(NamedTuple):
    """A cell whose prediction is far off."""

    network: str
    batch_size: int
    device_set: str
    link: str
    strategy: str
    predicted_s: float
    measured_s: float
    error: float
    between_rounds: float
    """Highest less lowest median of a round over the cell's median; NaN where there is one round."""
    cause: str
    """ROUNDS, UNTOLD, or the one of KINDS on the slowest rank that differs most in the direction of the error."""
    why: str
    """The cause in words, with its numbers."""


def far_off(timing: xr.Dataset) -> list[FarOff]:
    """Every cell whose prediction is off by more than FAR, the largest error first; one timed for two counts once."""
    error = prediction_error(timing).where(~copied(timing)).transpose(*INDEX)
    between, told = repeatability(timing)["between_rounds"], has_instructions(timing)
    places = sorted(map(tuple, np.argwhere(abs(error.values) > FAR)), key=lambda place: -abs(error.values[place]))
    found = []
    for place in places:
        cell = timing.isel(dict(zip(INDEX, place, strict=True)))
        off, apart = float(error.values[place]), float(between.values[place])
        if apart >= abs(off):
            cause, why = ROUNDS, "rounds of this very cell differ by as much"
        elif told.values[place]:
            cause, why = _cause(cell, off)
        else:
            cause, why = UNTOLD, "only the step is predicted, not its instructions"
        index = CellIndex(*(cell[name].item() for name in INDEX))
        predicted, measured = cell["predicted_step_time"].item(), cell["step_time"].median("repetition").item()
        found.append(FarOff(*index, predicted, measured, off, apart, cause, why))
    return found


def kind_words(kind: str) -> str:
    """What a single device does in instructions of a kind, in words: while it is idle it waits."""
    return "waiting" if kind == "idle" else WORDS[kind]


def _cause(cell: xr.Dataset, error: float) -> tuple[str, str]:
    """The kind that errs most on the rank which waits least, in the step whose instructions were kept."""
    cell = cell.transpose("instruction", "device", ...)
    kinds = kinds_of(cell["instruction_kind"].values, cell["instruction_phase"].values)
    predicted_RK, measured_RK = (times_by_rank(cell[a].values, cell[b].values, kinds) for a, b in TIMELINES.values())
    slowest = int(np.argmax(np.delete(measured_RK, KINDS.index("idle"), axis=1).sum(axis=1)))
    off_K = predicted_RK[slowest] - measured_RK[slowest]
    kind = int(np.argmax(np.sign(error) * off_K))
    if off_K[kind] * error <= 0:
        return UNTOLD, "the one step whose instructions were kept does not show it"
    where = f"on {rank_in_words(cell, slowest)}"
    times = f"predicted {predicted_RK[slowest, kind]:.3g} s, measured {measured_RK[slowest, kind]:.3g} s"
    of_step = off_K[kind] / cell["step_time"].median("repetition").item()
    return KINDS[kind], f"{kind_words(KINDS[kind])} {where}: {times} ({of_step:+.1%} of the step)"

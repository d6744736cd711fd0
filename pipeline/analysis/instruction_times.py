"""Predicted and measured time of a step by kind of instruction: where does a prediction err?

The times of all devices added up would count a device that waits for a late one as an error of its own, and those of
one device would hide what the others were misjudged by. So a step's time is told apart moment by moment: each moment
belongs to what the devices do that do not wait, to several of them in equal parts. The kinds then add up to the step,
and what a device computes longer than predicted while others wait for it counts as computing.

Predicted and measured timelines are read in the same way. A device is busy with an exchange from when the last of those
that take part has come to it; before, it waits. What it computes meanwhile comes first. Moments in which no device is
busy, at the beginning of a step and between instructions, are `idle`.

One difference is left: that devices are late by chance is predicted as a part of the exchanges in which others wait for
them, while a measured device that is late computes. So an exchange may seem too long by what a computation seems too
short.

Of a cell the instructions of one step are kept, while its measured time is the median of all. What that step took
longer than the median is no error of the prediction and has a kind of its own, `spread`. Of ``ddp`` only the step is
predicted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import xarray as xr

from pipeline.results.contracts import INDEX, OK

KINDS = ("forward", "backward", "exchange", "update", "idle")
SPREAD = "spread"
TIMELINES = {
    "predicted_time": ("predicted_start", "predicted_end"),
    "measured_time": ("instruction_start", "instruction_end"),
}
"""The two timelines of a cell, by the name of their times by kind."""

Times = npt.NDArray[np.float64]


def has_instructions(timing: xr.Dataset) -> xr.DataArray:
    """Whether the instructions of a cell were both predicted and measured, over the cells of the grid."""
    told = (timing["status"] == OK).transpose(*INDEX)
    for name in (name for names in TIMELINES.values() for name in names):
        there = timing[name].notnull().any(["instruction", "device"]) if name in timing else False
        told = told & there
    return told.transpose(*INDEX).rename("has_instructions")


def kind_times(timing: xr.Dataset) -> xr.Dataset:
    """`predicted_time` and `measured_time` of a step in s over the cells of the grid and `kind`, one of KINDS.

    NaN where the instructions were not both predicted and measured.
    """
    told = has_instructions(timing)
    dims, places = (*INDEX, "kind"), list(map(tuple, np.argwhere(told.values)))
    found = {name: np.full((*told.shape, len(KINDS)), np.nan) for name in TIMELINES}
    if places:
        phases, are = (
            timing[f"instruction_{name}"].transpose(*INDEX, "instruction").values for name in ("phase", "kind")
        )
        for name, ends in TIMELINES.items():
            start, end = (timing[one].transpose(*INDEX, "instruction", "device").values for one in ends)
            for place in places:
                kinds = kinds_of(are[place], phases[place])
                found[name][place] = times_by_kind(start[place], end[place], kinds)
    result = xr.Dataset(
        {name: (dims, values) for name, values in found.items()},
        {**{name: told[name] for name in INDEX}, "kind": np.array(KINDS, object)},
    )
    for name in TIMELINES:
        words = name.replace("_", " ")
        result[name].attrs = {"units": "s", "long_name": f"{words} of the instructions of a kind within one step"}
    return result


def kind_errors(timing: xr.Dataset, times: xr.Dataset | None = None) -> xr.DataArray:
    """Predicted less measured time of each kind over the measured median step, and last that of `spread`.

    Over the cells of the grid and `kind`; of a cell they add up to its `prediction_error`. ``times`` are its
    `kind_times`, where they are known already.
    """
    times = kind_times(timing) if times is None else times
    step = timing["step_time"].where(timing["status"] == OK).median("repetition")
    recorded = times["measured_time"].sum("kind", skipna=False)
    each = (times["predicted_time"] - times["measured_time"]) / step
    errors = xr.concat([each, (recorded / step - 1).expand_dims(kind=np.array([SPREAD], object))], "kind")
    errors.attrs = {"units": "1", "long_name": "error of a kind of instruction over the measured step"}
    return errors.transpose(*INDEX, "kind").rename("kind_error")


def parts(errors: xr.DataArray) -> xr.DataArray:
    """What part of all that is off, whichever its sign, lies in each kind, (kind); NaN where nothing was told."""
    size = abs(errors).sum(set(errors.dims) - {"kind"})
    return (size / size.sum("kind")).where(size.sum("kind") > 0).rename("part")


def kinds_of(are: npt.NDArray[np.object_], phases: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """The kind, one of KINDS, of instructions by their `instruction_kind` and `instruction_phase`."""
    found: npt.NDArray[np.object_] = np.where(are == "exchange", "exchange", phases)
    return found


def times_by_kind(start_IR: Times, end_IR: Times, kinds_I: npt.NDArray[np.object_]) -> Times:
    """Time of a step in s by KINDS, from the start and end of its instructions, (instruction, rank)."""
    doing_RM, length_M = _moments(start_IR, end_IR, kinds_I)
    idle = KINDS.index("idle")
    busy_M = (doing_RM != idle).sum(axis=0)
    parts_KM = np.array([(doing_RM == kind).sum(axis=0) for kind in range(len(KINDS))]) / np.maximum(busy_M, 1)
    parts_KM[idle] = busy_M == 0
    found: Times = parts_KM @ length_M
    return found


def times_by_rank(start_IR: Times, end_IR: Times, kinds_I: npt.NDArray[np.object_]) -> Times:
    """What each rank does within a step in s, (rank, kind) by KINDS: it is `idle` also while others are busy."""
    doing_RM, length_M = _moments(start_IR, end_IR, kinds_I)
    found: Times = np.stack([(doing_RM == kind) @ length_M for kind in range(len(KINDS))], axis=1)
    return found


def _moments(start_IR: Times, end_IR: Times, kinds_I: npt.NDArray[np.object_]) -> tuple[npt.NDArray[np.int_], Times]:
    """The place in KINDS of what each rank does in each moment of a step, (rank, moment), and their lengths in s."""
    from_PIR, until_PIR = busy(start_IR, end_IR, kinds_I == "exchange")
    busy_PIR = from_PIR < until_PIR
    edges = np.unique(np.concatenate([[0.0], from_PIR[busy_PIR], until_PIR[busy_PIR], end_IR[np.isfinite(end_IR)]]))
    doing_RM = np.full((start_IR.shape[1], edges.size - 1), KINDS.index("idle"))
    first_PIR, last_PIR = np.searchsorted(edges, from_PIR), np.searchsorted(edges, until_PIR)
    for instruction in np.argsort(kinds_I != "exchange", kind="stable"):  # computing over exchanging
        for piece, rank in np.argwhere(busy_PIR[:, instruction]):
            moments = slice(first_PIR[piece, instruction, rank], last_PIR[piece, instruction, rank])
            doing_RM[rank, moments] = KINDS.index(kinds_I[instruction])
    return doing_RM, np.diff(edges)


def busy(start_IR: Times, end_IR: Times, is_exchange_I: npt.NDArray[np.bool_]) -> tuple[Times, Times]:
    """From when until when each instruction keeps its rank busy in s, both (piece, instruction, rank).

    There are two pieces at most, which may overlap; one that does not end after it begins is none. The second is what
    an exchange takes of its rank before the next instruction: to put it under way where others run beside it, or to sum
    what it got. The clock of a run moves that to the exchange's end; a prediction leaves a gap after it.
    """
    nothing = np.full((1, start_IR.shape[1]), np.nan)
    next_IR = np.concatenate([np.fmin.accumulate(start_IR[::-1], axis=0)[::-1][1:], nothing])
    is_moved_IR = is_exchange_I[:, None] & (start_IR > next_IR)
    ended_IR = np.fmax.accumulate(np.where(is_moved_IR, np.nan, end_IR), axis=0)
    begun_IR = np.where(is_moved_IR, np.fmin(start_IR, np.concatenate([nothing, ended_IR[:-1]])), start_IR)
    all_come_I1 = np.fmax.reduce(begun_IR, axis=1, keepdims=True)
    from_IR = np.where(is_exchange_I[:, None], np.maximum(begun_IR, all_come_I1), begun_IR)
    handled_IR = np.where(is_exchange_I[:, None], np.where(end_IR > next_IR, begun_IR, end_IR), np.nan)
    return np.stack([from_IR, handled_IR]), np.stack([end_IR, next_IR])

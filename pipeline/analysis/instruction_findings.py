"""Where predictions err, in sentences with numbers from the store."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pipeline.analysis import selection
from pipeline.analysis.instruction_figures import shown_cell
from pipeline.analysis.instruction_times import KINDS, SPREAD, has_instructions, kind_errors, kind_times, parts
from pipeline.analysis.statistics import copied, prediction_error
from pipeline.analysis.wording import counted, listed, named, rank_in_words

WORDS = {
    "forward": "forward computation",
    "backward": "backward computation",
    "exchange": "exchanges",
    "update": "the update",
    "idle": "moments in which no device is busy",
}


def where_it_errs(errors: xr.DataArray, most: int = len(KINDS)) -> str:
    """At `most` so many kinds in which most of all that is off lies, such as "51% lies in exchanges, 30% in ...".

    Nothing where no instruction was predicted.
    """
    part = parts(errors.sel(kind=list(KINDS)))
    found = {kind: part.sel(kind=kind).item() for kind in KINDS if part.notnull().all()}
    order = sorted(found, key=lambda kind: -found[kind])[:most]
    told = [f"{found[kind]:.0%} in {WORDS[kind]}" for kind in order]
    return ", ".join(told).replace(" in ", " lies in ", 1)


def instructions_finding(timing: xr.Dataset) -> str:
    """In which kinds of instructions predictions err, over all cells and by strategy, and what cannot be told."""
    told = has_instructions(timing)
    if not told.any():
        return "Of no cell were the instructions both measured and predicted.\n"
    once = ~copied(timing)
    every = kind_times(timing)
    each = kind_errors(timing, every)
    times, errors = every.where(once), each.where(once)
    cells = counted((told & once).sum().item(), "cell")
    answer = (
        f"Of what the predicted instructions of {cells} are off, {where_it_errs(errors)} "
        "(errors count whichever their sign)."
    )
    sentences = [answer]
    ratio = times["predicted_time"] / times["measured_time"].where(times["measured_time"] > 0) - 1
    own = ", ".join(
        f"{WORDS[kind]} {ratio.sel(kind=kind).median().item():+.1%}"
        for kind in KINDS
        if kind != "idle" and ratio.sel(kind=kind).notnull().any()
    )
    sentences.append(f"Predicted over measured time, less one, in the median: {own}.")
    sentences.append(f"By strategy most lies in: {', '.join(_by_strategy(each))}.")
    spread = abs(errors.sel(kind=SPREAD)).median().item()
    sentences.append(
        f"Only one step of a cell has its instructions kept; it is off the median of all by {spread:.1%} in the "
        "median, which no prediction can tell."
    )
    error = prediction_error(timing).notnull()
    without = {name: (error & ~told).sel(strategy=name).sum().item() for name in selection.strategies(timing)}
    untold = ", ".join(f"``{name}`` ({counted(count, 'cell')})" for name, count in without.items() if count)
    if untold:
        sentences.append(f"Only the step is predicted, not its instructions, of {untold}.")
    return listed(sentences, "")


def _by_strategy(errors: xr.DataArray) -> list[str]:
    found = []
    for name in map(str, errors["strategy"].values):
        some = errors.sel(strategy=name, kind=list(KINDS))
        part = parts(some)
        if part.notnull().any():
            most = str(part["kind"].values[int(np.nanargmax(part.values))])
            median = some.sel(kind=most).median().item()
            here = f"{part.sel(kind=most).item():.0%}, median {median:+.1%} of the step"
            found.append(f"``{name}`` {WORDS[most]} ({here})")
    return found


def timeline_error_finding(timing: xr.Dataset) -> str:
    """How far the shown step is off, and the instruction that is furthest off on one of its devices."""
    place = shown_cell(timing)
    if place is None:
        return "Of no cell of several devices were the instructions both measured and predicted.\n"
    cell = timing.sel(place).transpose("instruction", "device", ...)
    predicted, measured = cell["predicted_end"].max().item(), cell["instruction_end"].max().item()
    computes = cell["instruction_kind"] != "exchange"  # an exchange also takes what others are late
    lengths = [(cell[f"{name}_end"] - cell[f"{name}_start"]).where(computes) for name in ("predicted", "instruction")]
    off = abs(lengths[0] - lengths[1]).values
    instruction, device = map(int, np.unravel_index(int(np.nanargmax(off)), off.shape))
    at = {"instruction": instruction, "device": device}
    phase, what = (cell[f"instruction_{name}"].isel(instruction=instruction).item() for name in ("phase", "name"))
    here, there = (length.isel(at).item() for length in lengths)
    step = (
        f"A step of {place['network']}, batch {place['batch_size']}, on {named(str(place['device_set']))} by "
        f"``{place['strategy']}`` was predicted to take {predicted:.3g} s, and the one whose instructions were kept "
        f"took {measured:.3g} s ({predicted / measured - 1:+.1%})."
    )
    furthest = (
        f"Of what is computed in it, ``{what}`` ({phase}) on {rank_in_words(cell, device, named)}, is furthest off: "
        f"predicted {here:.3g} s, measured {there:.3g} s."
    )
    return listed([step, furthest], "")

"""What the figures of calibration, prediction and single steps show, in sentences with numbers from the stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xarray as xr

from pipeline.analysis import selection
from pipeline.analysis.calibration_figure import largest, with_most_images
from pipeline.analysis.choice import TOLERATED, auto_against_fastest, repeatability
from pipeline.analysis.far_off import FAR, ROUNDS, UNTOLD, FarOff, far_off, kind_words
from pipeline.analysis.instruction_findings import where_it_errs
from pipeline.analysis.instruction_times import kind_errors
from pipeline.analysis.statistics import copied, memory_error, prediction_error
from pipeline.analysis.wording import counted, listed, named
from pipeline.results.contracts import OK


def prediction_finding(timing: xr.Dataset) -> str:
    """How far predictions are off, over all cells, then by strategy."""
    error, once = abs(prediction_error(timing)), ~copied(timing)
    every = _finite(error.where(once))
    twice = _finite(error).size - every.size
    if not every.size:
        return "No cell was both measured and predicted.\n"
    answer = (
        f"The step time predicted before a cell was measured is off by {np.median(every):.1%} in the median and "
        f"{np.quantile(every, 0.95):.1%} at the 95th percentile of {counted(every.size, 'cell')}"
    )
    timed = "was timed once with that" if twice == 1 else "were timed once with those"
    answer += f" ({twice} more of ``auto`` {timed} of another strategy, the plan being the same)" if twice else ""
    where = where_it_errs(kind_errors(timing).where(once), most=2)
    answer += f"; of what their instructions are off, {where}." if where else "."
    each = {name: _finite(error.sel(strategy=name)) for name in selection.strategies(timing)}
    told = ", ".join(
        f"``{name}`` {np.median(one):.1%} and {np.quantile(one, 0.95):.1%}" for name, one in each.items() if one.size
    )
    sentences = [answer, f"By strategy, in the median and at the 95th percentile: {told}."]
    again = _finite(repeatability(timing)["forecast_error"].where(error.notnull() & once))
    if again.size:
        tail = f" in the median and {np.quantile(again, 0.95):.1%} at the 95th percentile of the {again.size} cells"
        sentences.append(
            "Measurements differ, too: a forecast by the other rounds, of each round of a cell by the median of the "
            f"others, would be off by {np.median(again):.1%}{tail if again.size > 1 else ' in the one cell'} of "
            "several rounds; a round has fewer steps than the cell that a prediction is held against, which may thus "
            "be off by less."
        )
    sentences.append(_far_off(far_off(timing), every.size))
    if "stolen" in timing and timing["stolen"].notnull().any():
        stolen = _finite(timing["stolen"].where((timing["status"] == OK) & once))
        sentences.append(
            f"The host gave {stolen.mean():.1%} of the cores' time to other machines on average, and up to "
            f"{stolen.max():.1%} in a cell."
        )
    if "predicted_memory" in timing and (memory := _finite(abs(memory_error(timing)).where(once))).size:
        sentences.append(
            f"The peak memory of a rank is off by {np.median(memory):.1%} in the median and by {memory.max():.1%} at "
            f"most, of {counted(memory.size, 'rank')}."
        )
    return listed(sentences, "")


def _far_off(found: Sequence[FarOff], cells: int) -> str:
    """How many cells are far off, and how often for which cause."""
    if not found:
        return f"None of {counted(cells, 'prediction')} is off by more than {FAR:.0%}."
    causes = Counter(one.cause for one in found)
    told = [f"the rounds of the very cell differ by as much in {causes[ROUNDS]}"] if causes[ROUNDS] else []
    kinds = {kind: count for kind, count in causes.most_common() if kind not in (ROUNDS, UNTOLD)}
    if kinds:
        most = ", ".join(f"{kind_words(kind)} in {count}" for kind, count in kinds.items())
        told.append(f"what errs most on the slowest device is {most}")
    told += [f"the store does not tell why in {causes[UNTOLD]}"] if causes[UNTOLD] else []
    of_all = f"{len(found)} of {counted(cells, 'prediction')} {'is' if len(found) == 1 else 'are'}"
    return f"{of_all} off by more than {FAR:.0%}: {'; '.join(told)}."


def choice_finding(timing: xr.Dataset) -> str:
    """What ``auto`` takes beside the fastest other strategy, and where it takes more than it may."""
    rows = auto_against_fastest(timing)
    if not rows:
        return "No step of ``auto`` was measured beside another strategy.\n"
    ratios, over = [row.ratio for row in rows], [row for row in rows if row.exceeds]
    same, once = sum(row.same for row in rows), sum(row.rounds < 2 for row in rows)
    above = sum(ratio > TOLERATED for ratio in ratios)
    answer = (
        f"``auto`` takes {min(ratios):.2f} to {max(ratios):.2f} times the step of the fastest other strategy, "
        f"{np.median(ratios):.2f} in the median; in {above or 'none'} of {len(rows)} places more than {TOLERATED:g} "
        f"times, in {len(over) or 'none'} beyond the spread of the repetitions. "
        + (f"In {same} it took the very plan of the fastest, which was timed once for both. " if same else "")
        + f"{once or 'None'} had one round, whose interval holds nothing of what differs between launches."
    )
    each = (
        f"On {named(row.device_set)} it takes {row.ratio:.2f} times (95 % interval {row.low:.2f} to {row.high:.2f}) as "
        f"long as ``{row.fastest}``{_having_chosen(row.chosen)}: "
        f"{row.network}, batch {row.batch_size}, {row.link}."
        for row in over
    )
    return listed([answer, *each], "")


def _having_chosen(plan: str) -> str:
    """In words; older stores do not tell."""
    return {"": "", "auto": ", having chosen a mix"}.get(plan, f", having chosen ``{plan}``")


def _finite(values: xr.DataArray) -> npt.NDArray[np.float64]:
    flat = np.asarray(values.values, float).ravel()
    return np.asarray(flat[np.isfinite(flat)])


def calibration_finding(calibration: xr.Dataset) -> str:
    """The time of the whole network on every kind of device, and the links."""
    chosen = largest(calibration)
    times = with_most_images(chosen)
    whole = times.min("repetition").max("share").sum("segment")
    labels = [str(label) for label in chosen["device_label"].values if label]
    by_label = {one: [whole.values[r] for r, label in enumerate(labels) if label == one] for one in labels}
    each = ", ".join(f"{_range(some)} s on {named(label)}" for label, some in by_label.items())
    images = counted(times["images"].item(), "image")
    sentences = [f"Forward and backward of {chosen['network'].item()}, {images}: {each}."]
    apart = xr.DataArray(np.arange(chosen.sizes["source"]), dims="source") != xr.DataArray(
        np.arange(chosen.sizes["destination"]), dims="destination"
    )
    latency, bandwidth = (chosen[name].where(apart).median().item() for name in ("link_latency", "link_bandwidth"))
    if np.isfinite(latency) and np.isfinite(bandwidth):
        sentences.append(
            f"The median link has {latency * 1e3:.3g} ms latency and {bandwidth / 1e9:.3g} GB/s bandwidth."
        )
    return listed(sentences, "")


def _range(values: Sequence[float]) -> str:
    least, most = f"{min(values):.3g}", f"{max(values):.3g}"
    return least if least == most else f"{least} to {most}"


def activity_finding(timing: xr.Dataset) -> str:
    """Mean fractions of compute, exchange and idle time over the devices, for the largest network on each set."""
    link, sentences = selection.main_link(timing), []
    for device_set in selection.showcase_sets(timing):
        names = selection.networks(timing, [device_set])
        batch_size = selection.main_batch_size(timing, names[-1], link, [device_set])
        place = {"network": names[-1], "batch_size": batch_size, "device_set": device_set, "link": link}
        cells, told = timing.where(timing["status"] == OK).sel(place), []
        for strategy in selection.strategies(timing):
            cell = cells.sel(strategy=strategy)
            if strategy == "single" or not cell["step_time"].notnull().any():
                continue
            part = {n: (cell[f"{n}_time"] / cell["step_time"]).mean().item() for n in ("compute", "exchange", "idle")}
            exchange = f"exchange {part['exchange']:.0%}" if part["exchange"] else "exchange within that time"
            told.append(f"``{strategy}`` compute {part['compute']:.0%}, {exchange}, idle {part['idle']:.0%}")
        if told:
            sentences.append(
                f"The mean device of {named(device_set)} spends its step so ({names[-1]}, batch {batch_size}): "
                f"{'; '.join(told)}."
            )
    return listed(sentences, "No set of several devices was measured.")


def timeline_finding(timing: xr.Dataset) -> str:
    """The longest instruction of every strategy in the shown step."""
    place, told = selection.showcase(timing), []
    if place is None or "instruction_start" not in timing:
        return "No timeline of several devices was recorded.\n"
    cells, where = timing.sel(place), f"{place['network']} on {named(str(place['device_set']))}"
    for strategy in selection.strategies(timing):
        cell = cells.sel(strategy=strategy)
        length = (cell["instruction_end"] - cell["instruction_start"]).max("device")
        if strategy != "single" and length.notnull().any():
            longest = cell.isel(instruction=int(np.nanargmax(length.values)))
            told.append(
                f"``{strategy}`` {longest['instruction_name'].item()} ({longest['instruction_phase'].item()}), "
                f"{length.max().item():.3g} s"
            )
    sentences = [f"The longest instruction of a step of {where} is, by strategy: {'; '.join(told)}."] if told else []
    return listed(sentences, f"No timeline was recorded for {where}.")

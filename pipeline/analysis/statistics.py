"""Medians, spreads, speedups and bounds of a timing grid, measured or simulated.

The baseline of a cell is `single` on the fastest device of its set: the same network, batch size and set. Where the set
itself has no `single` cell, the set of that one device alone serves, and since `single` sends nothing, any link does.
Efficiency is the speedup over the aggregate bound (the sum of the calibrated throughputs of the set's devices over the
baseline device's), never over the number of devices.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from pipeline.results.contracts import INDEX, NOISY, OK

FEWEST = 5
"""A cell with fewer repetitions says how many it has."""

SATURATED = 1.05
"""Devices beyond which the speedup rises by no more than this factor bring nothing."""

PAYS = 1.005
"""A speedup from here on shows as more than 1.00: less is a strategy that leaves all the work to one device."""

Samples = npt.NDArray[np.float64]
_QUARTILES = (0.25, 0.5, 0.75)
_PLACE = ("network", "batch_size", "device_set")


def summary(samples: xr.DataArray, dim: str = "repetition") -> xr.Dataset:
    """`median`, `lower` and `upper` quartile, `count` and `noisy` (IQR / median > 0.1) of the samples along `dim`.

    NaN counts as absent; the three numbers are NaN where nothing was measured. Units are those of the samples.
    """
    if samples.sizes[dim]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
            lower, median, upper = (samples.quantile(q, dim, skipna=True).drop_vars("quantile") for q in _QUARTILES)
    else:
        lower = median = upper = xr.full_like(samples.sum(dim), np.nan)
    units = {"units": samples.attrs.get("units", "1")}
    what = samples.attrs.get("long_name", str(samples.name))
    result = xr.Dataset({"median": median, "lower": lower, "upper": upper})
    for name, long_name in (("median", "median of"), ("lower", "lower quartile of"), ("upper", "upper quartile of")):
        result[name].attrs = {**units, "long_name": f"{long_name} {what}"}
    result["count"] = samples.notnull().sum(dim)
    result["count"].attrs = {"units": "1", "long_name": "repetitions made"}
    result["noisy"] = (result["upper"] - result["lower"]) > NOISY * result["median"]
    result["noisy"].attrs = {"units": "1", "long_name": f"whether IQR / median exceeds {NOISY}"}
    return result


def flags(noisy: bool, repetitions: int) -> str:
    """What is set behind a number that should be trusted less: an asterisk where it is noisy, n where it is of few."""
    return (" *" if noisy else "") + (f" n={int(repetitions)}" if repetitions < FEWEST else "")


def bootstrap_ratio(
    numerator: Samples, denominator: Samples, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of median(numerator) / median(denominator), both resampled with replacement, repeatable by the seed.

    Both are one-dimensional, without NaN and not empty.
    """
    generator = np.random.default_rng(seed)
    medians = [
        np.median(samples[generator.integers(0, samples.size, (resamples, samples.size))], axis=1)
        for samples in (numerator, denominator)
    ]
    tail = (1 - level) / 2
    low, high = np.quantile(medians[0] / medians[1], [tail, 1 - tail])
    return float(low), float(high)


def device_count(timing: xr.Dataset) -> xr.DataArray:
    """Number of devices of each set, (device_set)."""
    count = (timing["device_label"] != "").sum("device")
    count.attrs = {"units": "1", "long_name": "number of devices"}
    return count.rename("device_count")


def device_throughput(timing: xr.Dataset) -> xr.DataArray:
    """Calibrated throughput of each device on its own in images/s, (network, batch_size, device_set, device).

    A cell has it by the ranks of its plan, so those of all devices count, where there are any.
    """
    each = timing["device_throughput"]
    of_all = each.notnull().sum("device") == device_count(timing)
    return each.where(of_all | ~of_all.any(["link", "strategy"])).median(["link", "strategy"], keep_attrs=True)


def prediction_error(timing: xr.Dataset) -> xr.DataArray:
    """Predicted over measured median step time, less one, for every cell of the grid that has both."""
    error = timing["predicted_step_time"] / timing["step_time"].median("repetition") - 1
    error = error.where(timing["status"] == OK)
    error.attrs = {"units": "1", "long_name": "relative error of the predicted step time"}
    return error.rename("prediction_error")


def copied(timing: xr.Dataset) -> xr.DataArray:
    """Whether a cell of `auto` holds the very steps of another strategy: their plans were one, and it was timed once.

    Such a cell stays in the row of `auto`; a number over all strategies leaves it out, or its steps would count twice.
    """
    steps = timing["step_time"].where(timing["status"] == OK).transpose(*INDEX, "repetition")
    others = steps.drop_sel(strategy="auto", errors="ignore").values
    found = xr.zeros_like(timing["status"].transpose(*INDEX), bool)
    if "auto" in steps["strategy"].values:
        own = steps.sel(strategy="auto").values[..., None, :]
        same = ((own == others) | (np.isnan(own) & np.isnan(others))).all(axis=-1) & np.isfinite(own).any(axis=-1)
        found.loc[{"strategy": "auto"}] = same.any(axis=-1)
    found.attrs = {"units": "1", "long_name": "whether the steps are those of another strategy"}
    return found.rename("copied")


def memory_error(timing: xr.Dataset) -> xr.DataArray:
    """Predicted over measured peak memory, less one, of every rank of every cell that has both."""
    error = (timing["predicted_memory"] / timing["peak_memory"] - 1).where(timing["status"] == OK)
    error.attrs = {"units": "1", "long_name": "relative error of the predicted peak memory"}
    return error.rename("memory_error")


def aggregate_bound(timing: xr.Dataset) -> xr.DataArray:
    """Largest speedup that the set's throughput allows, (network, batch_size, device_set).

    The sum of all device throughputs over that of the fastest, the baseline; NaN where a device was not calibrated.
    """
    throughput = device_throughput(timing)
    known = throughput.notnull().sum("device") == device_count(timing)
    bound = (throughput.sum("device") / throughput.max("device")).where(known)
    bound.attrs = {"units": "1", "long_name": "aggregate calibrated throughput over the baseline device's"}
    return bound.transpose(*_PLACE).rename("aggregate_bound")


def baseline(timing: xr.Dataset) -> xr.Dataset:
    """`baseline_time(network, batch_size, device_set, link, repetition)` in s and the label of its device.

    `baseline_device(network, batch_size, device_set)` is '' where the calibration does not say which is the fastest.
    """
    dims = (*_PLACE, "link", "repetition")
    times = np.full(tuple(timing.sizes[d] for d in dims), np.nan)
    devices = np.full(times.shape[:3], "", object)
    throughput = device_throughput(timing).transpose(*_PLACE, "device").values
    labels = timing["device_label"].transpose("device_set", "device").values
    single = _single_times(timing)
    alone = {row[0]: place for place, row in enumerate(labels) if row[0] and not any(row[1:])}
    for n, b, s in np.ndindex(devices.shape):
        devices[n, b, s] = _fastest(labels[s], throughput[n, b, s])
        sets = [s] + ([alone[devices[n, b, s]]] if devices[n, b, s] in alone else [])
        for link in range(times.shape[3]):
            links = [link, *(other for other in range(times.shape[3]) if other != link)]
            candidates = (single[n, b, place, other] for place in sets for other in links)
            times[n, b, s, link] = next((c for c in candidates if np.isfinite(c).any()), np.nan)
    result = xr.Dataset({"baseline_time": (dims, times), "baseline_device": (_PLACE, devices)}, _axes(timing, dims))
    result["baseline_time"].attrs = {"units": "s", "long_name": "step time of single on the baseline device"}
    result["baseline_device"].attrs = {"units": "1", "long_name": "fastest device of the set"}
    return result


def speedup(timing: xr.Dataset, *, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> xr.Dataset:
    """Speedup of every cell over its baseline with a bootstrap interval, its bound and its efficiency.

    Variables over (network, batch_size, device_set, link, strategy): `speedup`, `speedup_low`, `speedup_high`,
    `efficiency`, `noisy` (of the cell or of its baseline), `repetitions` (the fewer of both). Besides:
    `aggregate_bound`, `baseline_device`, `device_count`. NaN where the cell or its baseline was not measured.
    """
    base = baseline(timing)
    steps = timing["step_time"].where(timing["status"] == OK).transpose(*INDEX, "repetition")
    ratio = np.full((3, *steps.shape[:-1]), np.nan)
    for place in np.ndindex(steps.shape[:-1]):
        times = _finite(steps.values[place])
        reference = _finite(base["baseline_time"].values[place[:-1]])
        if times.size and reference.size:
            low, high = bootstrap_ratio(reference, times, level=level, resamples=resamples, seed=seed)
            ratio[(slice(None), *place)] = np.median(reference) / np.median(times), low, high
    names = {"speedup": "speedup", "speedup_low": "lower end of", "speedup_high": "upper end of"}
    result = xr.Dataset(
        {name: (INDEX, values) for name, values in zip(names, ratio, strict=True)}, _axes(timing, INDEX)
    )
    for name, text in names.items():
        long_name = "speedup over the baseline device" if name == "speedup" else f"{text} the {level:.0%} interval"
        result[name].attrs = {"units": "1", "long_name": long_name}
    result["aggregate_bound"] = aggregate_bound(timing)
    result["baseline_device"] = base["baseline_device"]
    result["device_count"] = device_count(timing)
    result["efficiency"] = (result["speedup"] / result["aggregate_bound"]).transpose(*INDEX)
    result["efficiency"].attrs = {"units": "1", "long_name": "speedup over the aggregate bound"}
    cells, bases = summary(steps), summary(base["baseline_time"])
    result["noisy"] = (cells["noisy"] | bases["noisy"]).transpose(*INDEX).where(result["speedup"].notnull(), False)
    result["noisy"].attrs = {"units": "1", "long_name": f"whether IQR / median exceeds {NOISY} in the cell or baseline"}
    result["repetitions"] = cells["count"].where(cells["count"] < bases["count"], bases["count"]).transpose(*INDEX)
    result["repetitions"].attrs = {"units": "1", "long_name": "repetitions of the cell or its baseline"}
    return result


def simulated_speedup(simulation: xr.Dataset) -> xr.DataArray:
    """Speedup of every simulated cell over `single` on the same set, its fastest device alone, (dims of the grid).

    NaN where the cell or its `single` was not simulated.
    """
    times = simulation["predicted_step_time"].where(simulation["status"] == OK).transpose(*INDEX)
    alone = times.sel(strategy="single", drop=True) if "single" in simulation["strategy"].values else np.nan
    ratio = (alone / times).transpose(*INDEX)
    ratio.attrs = {"units": "1", "long_name": "simulated speedup over the fastest device"}
    return ratio.rename("simulated_speedup")


def saturation(counts: npt.NDArray[np.int_], ratios: Samples) -> int | None:
    """Place of the first number of devices that no larger one passes by more than 5 %; None where the last does.

    `counts` are numbers of devices in rising order, `ratios` the speedups there, without NaN.
    """
    for place in range(len(counts) - 1):
        if ratios[place + 1 :].max() < SATURATED * ratios[place]:
            return place
    return None


def best_split(ratios: xr.DataArray) -> xr.DataArray:
    """Largest speedup of the exact strategies that split a step, `ratios` less the dimension `strategy`.

    Neither `ddp`, which is not exact with BatchNorm, nor `auto`, which leaves the work to one device where that is
    best, and so never loses.
    """
    return ratios.drop_sel(strategy=["single", "ddp", "auto"], errors="ignore").max("strategy")


def convolution_share(timing: xr.Dataset) -> xr.DataArray:
    """Fraction of a `single` step spent in convolutions, (network, batch_size, device_set, link, repetition)."""
    single = timing.sel(strategy="single")
    share = (single["convolution_time"] / single["step_time"]).where(single["status"] == OK).drop_vars("strategy")
    share.attrs = {"units": "1", "long_name": "share of convolutions in the step"}
    return share.rename("convolution_share")


def _single_times(timing: xr.Dataset) -> Samples:
    dims = (*_PLACE, "link", "repetition")
    if "single" not in timing["strategy"].values:
        return np.full(tuple(timing.sizes[d] for d in dims), np.nan)
    single = timing.sel(strategy="single")
    return np.asarray(single["step_time"].where(single["status"] == OK).transpose(*dims).values, np.float64)


def _fastest(labels: npt.NDArray[Any], throughput: Samples) -> str:
    present = labels != ""
    if present.any() and np.isfinite(throughput[present]).all():
        return str(labels[np.argmax(np.where(present, throughput, -np.inf))])
    distinct = set(labels[present])
    return str(distinct.pop()) if len(distinct) == 1 else ""


def _finite(values: Samples) -> Samples:
    return values[np.isfinite(values)]


def _axes(timing: xr.Dataset, dims: tuple[str, ...]) -> dict[str, xr.DataArray]:
    return {d: timing[d] for d in dims if d in timing.coords}

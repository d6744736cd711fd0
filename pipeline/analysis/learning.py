"""How far split training is from that on one device, beside what seeds and rounding do to it.

All of it is `single` against the others, seed by seed; a store without `single` gives no difference.
"""

from __future__ import annotations

import math

import xarray as xr

FIRST_STEPS = 100
"""Steps over which losses are held against rounding: training amplifies it, and later losses lie as far apart as those
of neighbouring seeds."""


def shown_strategies(accuracy: xr.Dataset) -> list[str]:
    """The strategies that have any accuracy, in their order."""
    return [str(s) for s in accuracy["strategy"].values if accuracy["accuracy"].sel(strategy=s).notnull().any()]


def has_single(accuracy: xr.Dataset) -> bool:
    """Whether there is something to compare with."""
    return "single" in accuracy["strategy"].values and accuracy.sizes["strategy"] > 1


def accuracy_difference(accuracy: xr.Dataset) -> xr.DataArray:
    """Accuracy less that of `single`, as a fraction, (seed, strategy, epoch) without `single`."""
    return _apart(accuracy, "accuracy")


def seed_spread(accuracy: xr.Dataset) -> xr.DataArray:
    """Largest less smallest accuracy of `single` over the seeds, as a fraction, (epoch)."""
    single = accuracy["accuracy"].sel(strategy="single", drop=True)
    spread = single.max("seed") - single.min("seed")
    spread.attrs = {"units": "1", "long_name": "range of the accuracy of single over the seeds"}
    return spread.rename("seed_spread")


def loss_difference(accuracy: xr.Dataset) -> xr.DataArray:
    """Absolute difference of the loss to that of `single`, relative to it, (seed, strategy, step) without `single`."""
    single = accuracy["loss"].sel(strategy="single", drop=True)
    difference = abs(_apart(accuracy, "loss")) / abs(single)
    difference.attrs = {"units": "1", "long_name": "relative difference of the loss to that of single"}
    return difference.rename("loss_difference")


def control_loss_difference(accuracy: xr.Dataset) -> xr.DataArray:
    """What one rounding of the initial weights does to the loss of `single`, relative to it, (seed, step)."""
    single = accuracy["loss"].sel(strategy="single", drop=True)
    difference = abs(accuracy["control_loss"] - single) / abs(single)
    difference.attrs = {"units": "1", "long_name": "relative difference of the control's loss to that of single"}
    return difference.rename("control_loss_difference")


def rounding_bound(accuracy: xr.Dataset, steps: int = FIRST_STEPS) -> float:
    """The largest relative difference of losses over the first `steps` that float32 rounding explains.

    The control is rounded once, before the first step. A split run is rounded differently in every step: each adds at
    most about one rounding of every weight, as weights are stored in float32 and a step changes them by far less than
    themselves. Independent errors add up in quadrature, so that n steps make the square root of n of one rounding.
    """
    first = control_loss_difference(accuracy).isel(step=slice(steps))
    return math.sqrt(first.sizes["step"]) * float(first.max())


def _apart(accuracy: xr.Dataset, name: str) -> xr.DataArray:
    single = accuracy[name].sel(strategy="single", drop=True)
    apart = accuracy[name].drop_sel(strategy="single") - single
    apart.attrs = {"units": "1", "long_name": f"{name} less that of single"}
    return apart.rename(f"{name}_difference").transpose("seed", "strategy", ...)

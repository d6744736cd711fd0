"""A calibration that is wrong on purpose: one device judged slower or faster than it is."""

from __future__ import annotations

import xarray as xr

from pipeline.errors import InputError

_OF_THE_DEVICE = (
    "forward_time",
    "backward_time",
    "input_gradient_time",
    "forward_time_alone",
    "backward_time_alone",
    "forward_time_by_images",
    "backward_time_by_images",
    "forward_call_time",
    "backward_call_time",
    "forward_resuming_time",
    "backward_resuming_time",
    "update_overhead",
    "update_time",
    "update_time_alone",
)


def misjudged(calibration: xr.Dataset, device: int, error: float) -> xr.Dataset:
    """The calibration if all times of one device had been measured too long by ``error``, a fraction of them.

    With 0.5 the device of rank ``device`` is judged to take half as long again, with -0.5 half as long. Links stay.

    Raises:
        InputError: The calibration has no such device, or an error of -1 or less would leave it no time.
    """
    ranks = calibration.sizes["device"]
    if not 0 <= device < ranks:
        raise InputError(f"device {device} cannot be misjudged: the calibration is of devices 0 to {ranks - 1}")
    if not error > -1:
        raise InputError(f"an error of {error:g} leaves device {device} no time: it must be above -1, such as -0.5")
    wrong = xr.DataArray([1.0 + error * (rank == device) for rank in range(ranks)], dims="device")
    return calibration.assign({
        name: (calibration[name] * wrong).transpose(*calibration[name].dims).assign_attrs(calibration[name].attrs)
        for name in _OF_THE_DEVICE
    })  # fmt: skip

"""One calibration serves every smaller set of its devices."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr

from pipeline.errors import InputError
from pipeline.plan.checks import check_single


def of_devices(calibration: xr.Dataset, labels: Sequence[str]) -> xr.Dataset:
    """The part of a calibration that is about the devices called `labels`, in that order.

    Raises:
        InputError: The calibration is several, or has fewer devices of some label.
    """
    check_single(calibration)
    measured = [str(label) for label in calibration.device_label.values]
    free = list(range(len(measured)))
    chosen = []
    for label in labels:
        place = next((rank for rank in free if measured[rank] == label), None)
        if place is None:
            raise InputError(
                f"The calibration is of {', '.join(measured)}, not of {', '.join(labels)}: calibrate these devices."
            )
        free.remove(place)
        chosen.append(place)
    part = calibration.isel(dict.fromkeys(("device", "source", "destination"), chosen))
    return part.assign_coords({dim: range(len(chosen)) for dim in ("device", "source", "destination")})

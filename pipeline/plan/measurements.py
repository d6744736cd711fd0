"""Whether the numbers of a calibration can be measurements; one clear sentence where not."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from pipeline.errors import InputError
from pipeline.graph.operations import Graph
from pipeline.results.contracts import CALIBRATION

_CURVES = ("forward_time", "backward_time")
_FALLS = 2.0
"""A curve that falls by more than this factor, to the whole share from a smaller one, is no measurement: by less it may
do so by noise, or as a few kernels are done less well, and is made monotone."""
_NOISE_S = 0.02
"""A processor that is taken away for a while makes so much of any time."""
_MATTERS = 0.1
"""Of what takes less than this part of a step nobody's plan depends, and noise makes more of it."""


def check_numbers(calibration: xr.Dataset, graph: Graph) -> None:
    """Raise ``InputError`` for links, times or sizes that cannot be, and for curves that are empty or fall.

    NaN is right where nothing was measured, such as small shares of what cannot be split; but the whole of each segment
    has to be there, on each device, with few images, and some share with few and many.
    """
    _check_links(calibration)
    for name, variable in CALIBRATION.items():
        if variable.text:
            continue
        values = calibration[name].values
        _refuse_any(calibration[name], values < 0, "it must not be negative")
        if variable.units == "s":
            _refuse_any(calibration[name], np.isinf(values), "it must be finite")
    segments = [str(segment).split("+") for segment in calibration.segment.values]
    trained = np.array([any(graph[one].differentiable for one in operations) for operations in segments])
    for name, takes_time in zip(_CURVES, (np.ones_like(trained), trained), strict=True):
        times = calibration[name].max("repetition").transpose("segment", "device", "share", "images")
        whole, there = times.isel(share=-1), np.isfinite(times.values)
        few, many = (int(one(calibration.images.values)) for one in (np.argmin, np.argmax))
        missing = np.zeros(whole.shape, dtype=bool)
        missing[..., few] = ~there[..., -1, few]
        missing[..., many] |= ~(there[..., few] & there[..., many]).any(axis=-1)
        _refuse_any(
            whole, missing, "the whole segment must be measured with few images, and some share with few and many"
        )
        # What no gradient flows through takes no time backward, and what takes next to none may not be seen.
        nothing = (np.nanmax(whole.values, axis=2, keepdims=True) <= 0) & takes_time[:, None, None]
        _refuse_any(whole, np.broadcast_to(nothing, whole.shape), "it must be positive")
    _check_rising(calibration)


def _check_links(calibration: xr.Dataset) -> None:
    apart = ~np.eye(calibration.sizes["source"], dtype=bool)
    bandwidth, latency = (
        calibration[name].transpose("source", "destination").values for name in ("link_bandwidth", "link_latency")
    )
    for name, values, right, fine in (
        ("link_bandwidth", bandwidth, "positive", bandwidth > 0),
        ("link_latency", latency, "at least 0", (latency >= 0) & np.isfinite(latency)),
    ):
        if (wrong := np.argwhere(apart & ~fine)).size:
            source, destination = wrong[0]
            raise InputError(
                f"the calibration's {name} from device {source} to {destination} is {values[source, destination]:g}: "
                f"it must be {right}"
            )


def _refuse_any(array: xr.DataArray, bad: NDArray[np.bool_], right: str) -> None:
    """Raise ``InputError`` that names the first ``bad`` value of ``array``, and says what would be ``right``."""
    if not bad.any():
        return
    first = dict(zip(map(str, array.dims), np.argwhere(bad)[0].tolist(), strict=True))
    place = ", ".join(
        f"{dim} {array[dim].values[index] if dim in array.coords else index}" for dim, index in first.items()
    )
    unit = CALIBRATION[str(array.name)].units
    value = f"{array.isel(first).item():g}{'' if unit == '1' else f' {unit}'}"
    raise InputError(f"the calibration's {array.name}{f' at {place}' if place else ''} is {value}: {right}")


def _check_rising(calibration: xr.Dataset) -> None:
    """Raise ``InputError`` for a curve that falls beyond noise.

    Noise only adds to a time, so the least repetition at each smaller share counts, and the median at the whole.
    """
    dims = ("device", "segment", "share", "repetition")
    by_images = calibration.sortby("images")
    few, many = (
        np.stack([by_images[name].isel(images=place).transpose(*dims).values for name in _CURVES], axis=1)
        for place in (0, -1)
    )
    # With as many as the whole was measured with.
    times = np.where(np.isfinite(many[..., -1:, :]).any(axis=-1, keepdims=True), many, few)
    whole = np.nanmedian(times[..., -1, :], axis=-1)  # (device, direction, segment)
    smaller = np.where(np.isfinite(times[..., :-1, :]), times[..., :-1, :], np.inf).min(axis=-1)
    before = np.where(np.isfinite(smaller), smaller, 0.0).max(axis=-1, initial=0.0)
    size = np.maximum(whole, before)
    matters = size >= _MATTERS * size.sum(axis=(1, 2), keepdims=True)
    _refuse_fall(calibration, before, whole, (before > _FALLS * whole + _NOISE_S) & matters)
    together = np.where(before > 0, before, whole).sum(axis=2, keepdims=True), whole.sum(axis=2, keepdims=True)
    _refuse_fall(calibration, *together, together[0] > _FALLS * together[1] + _NOISE_S)


def _refuse_fall(
    calibration: xr.Dataset, before: NDArray[np.float64], whole: NDArray[np.float64], bad: NDArray[np.bool_]
) -> None:
    """Raise ``InputError`` for the first ``bad`` curve, (device, direction, segment or all of them)."""
    if not bad.any():
        return
    device, direction, segment = np.argwhere(bad)[0]
    of_all = whole.shape[2] < calibration.sizes["segment"]
    what = "the whole network" if of_all else str(calibration.segment.values[segment])
    place = device, direction, segment
    raise InputError(
        f"the calibration's {_CURVES[direction]} of {what} on device {device} falls from {before[place]:.3g} s at a "
        f"smaller share to {whole[place]:.3g} s at the whole one, which is more than noise: calibrate again"
    )

"""How many kernels (or images) of one layer each device gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError

Most = NDArray[np.float64]
"""(rank) the largest fraction of any layer, or of the images, that a rank may have."""


def proportional(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Split ``total`` in proportion to ``weights``, by largest remainder (ties go to the lower rank).

    Raises ``InputError`` for negative or all-zero weights.
    """
    weight = np.asarray(weights, dtype=float)
    if not np.all(np.isfinite(weight)) or np.any(weight < 0) or weight.sum() <= 0:
        raise InputError(
            f"weights {list(weights)} cannot share out {total}: they must be finite, >= 0 and not all zero"
        )
    exact = total * weight / weight.sum()
    share = np.floor(exact).astype(int)
    by_remainder = np.argsort(-(exact - share), kind="stable")
    share[by_remainder[: total - int(share.sum())]] += 1
    return tuple(share.tolist())


def equal(total: int, ranks: int) -> tuple[int, ...]:
    """Split ``total`` evenly; the lower ranks take the remainder."""
    return proportional(total, [1.0] * ranks)


def balanced(
    total: int,
    points: Sequence[NDArray[np.float64]],
    times: Sequence[NDArray[np.float64]],
    *,
    caps: Sequence[int] | None = None,
    latency: Sequence[float] | None = None,
    link: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """The integer shares that minimise the time of the slowest device.

    ``points[i]`` (ascending, positive) and ``times[i]`` (seconds) are device i's measured cost curve: the time of
    ``points[i][j]`` kernels. Between the points the curve is linear, before the
    first it is flat at the first time (a few kernels cost what the smallest measured share costs, unless there are
    none), beyond the last it goes on with the last slope; it is made monotone first. A device that has any kernels
    takes ``latency[i]`` longer, and ``link[i]`` for each of them (s); it gets at most ``caps[i]``.

    Bisection on the finish time T gives k_i(T), the most kernels device i ends by T; the least T with
    sum k_i(T) >= total is optimal, as every k_i is monotone in T. A few that are over are taken from the devices that
    finish last, so that one that would only run for a handful may end with none; many from all in proportion.

    Raises ``InputError`` for curves that are empty, unordered or not positive, and for caps that leave kernels over.
    """
    devices = len(points)
    curves = _Curves.of(points, times, latency or [0.0] * devices, link or [0.0] * devices)
    most = np.minimum(total, np.array([total] * devices if caps is None else caps))
    if most.sum() < total:
        raise InputError(
            f"{total} kernels do not fit: the devices can hold {' + '.join(map(str, most))} = {most.sum()} of them"
        )
    # A little later than that, as the time of so many and how many end by that time are rounded in different ways.
    low, high = 0.0, (1 + 1e-12) * float(curves.seconds(most).max())
    for _ in range(100):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        over = int(np.minimum(curves.most_kernels(middle), most).sum()) - total
        low, high = (low, middle) if over >= 0 else (middle, high)
        if over == 0:  # an earlier finish could but take from these shares
            break
    share = np.minimum(curves.most_kernels(high), most)
    if share.sum() > total + devices:  # many on the flat beginning of their curves: none of them needs so many
        return proportional(total, list(share))
    finish = curves.seconds(share)
    for _ in range(int(share.sum()) - total):
        last = int(np.argmax(np.where(share > 0, finish, -1.0)))
        share[last] -= 1
        finish[last] = curves.only(last).seconds(share[last : last + 1])[0]
    return tuple(share.tolist())


@dataclass(frozen=True, eq=False)
class _Curves:
    """Monotone cost curves of all devices: (device, point), beginning at one kernel."""

    points: NDArray[np.float64]
    times: NDArray[np.float64]
    slopes: NDArray[np.float64]
    """(device) in s per kernel beyond the last point; the mean cost where the curve ends flat or has one point."""

    @classmethod
    def of(
        cls,
        points: Sequence[NDArray[np.float64]],
        times: Sequence[NDArray[np.float64]],
        latency: Sequence[float],
        link: Sequence[float],
    ) -> _Curves:
        point, time, slopes = _same_size(points, times)
        # The flat beginning as a point of its own, so that what a link adds per kernel keeps the curve in pieces.
        first = np.minimum(1.0, point[:, :1] / 2)
        point, time = np.hstack([first, point]), np.hstack([time[:, :1], time])
        per_kernel, once = np.array(link, dtype=float)[:, None], np.array(latency, dtype=float)[:, None]
        if (per_kernel < 0).any() or (once < 0).any():
            raise InputError(f"latencies {list(latency)} and link times {list(link)} must not be negative")
        return cls(point, time + once + per_kernel * point, slopes + per_kernel[:, 0])

    def only(self, device: int) -> _Curves:
        """The curve of one device."""
        chosen = slice(device, device + 1)
        return _Curves(self.points[chosen], self.times[chosen], self.slopes[chosen])

    def seconds(self, kernels: NDArray[np.int_]) -> NDArray[np.float64]:
        """Time of so many kernels on each device, 0 for none."""
        rows, last = np.arange(len(self.points)), self.points.shape[1] - 1
        after = np.clip((self.points < kernels[:, None]).sum(axis=1), 1, last)
        start, stop = self.points[rows, after - 1], self.points[rows, after]
        along = np.clip((kernels - start) / (stop - start), 0, 1)
        within = (1 - along) * self.times[rows, after - 1] + along * self.times[rows, after]
        beyond = np.clip(kernels - self.points[:, -1], 0, None)
        return np.where(kernels > 0, within + beyond * self.slopes, 0.0)

    def most_kernels(self, finish: float) -> NDArray[np.int_]:
        """How many kernels each device ends by ``finish``."""
        rows, last = np.arange(len(self.points)), self.points.shape[1] - 1
        done = (self.times <= finish).sum(axis=1)
        index = np.clip(done, 1, last)
        before, after = self.times[rows, index - 1], self.times[rows, index]
        start, width = self.points[rows, index - 1], self.points[rows, index] - self.points[rows, index - 1]
        rise = after - before
        within = start + np.divide((finish - before) * width, rise, out=np.zeros_like(rise), where=rise > 0)
        beyond = self.points[:, -1] + (finish - self.times[:, -1]) / self.slopes
        found = np.where(done > last, beyond, np.where(done == 0, 0.0, within))
        return np.floor(found + 1e-9).astype(int)


def _same_size(
    points: Sequence[NDArray[np.float64]], times: Sequence[NDArray[np.float64]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Curves as (device, point), made monotone and, by going on with the last slope, equally long; and these slopes."""
    sizes = np.array([len(one) for one in points])
    if not sizes.all():
        raise InputError(f"cost curve {int(np.argmin(sizes))} is empty: it needs at least one point")
    shape = (len(sizes), int(sizes.max()))
    point, time = np.full(shape, np.nan), np.full(shape, np.nan)
    there = np.arange(shape[1]) < sizes[:, None]
    point[there], time[there] = np.concatenate(points), np.concatenate(times)
    steps = np.diff(point, axis=1)
    bad = ((there & ~((time > 0) & np.isfinite(time))).any(axis=1)) | (steps <= 0).any(axis=1) | (point[:, 0] <= 0)
    if bad.any():
        first = int(np.argmax(bad))
        raise InputError(f"the cost curve {list(points[first])}: {list(times[first])} is not rising or not positive")
    time = np.where(there, np.maximum.accumulate(np.where(there, time, 0), axis=1), np.nan)
    rows, last = np.arange(len(sizes)), sizes - 1
    before = np.maximum(last - 1, 0)
    end, end_time = point[rows, last], time[rows, last]
    width, rise = end - point[rows, before], end_time - time[rows, before]
    slopes = np.where(rise > 0, np.divide(rise, width, out=np.zeros_like(rise), where=width > 0), end_time / end)
    more = np.clip(np.arange(shape[1]) - last[:, None], 0, None)
    point = np.where(there, point, end[:, None] + more)
    return point, np.where(there, time, end_time[:, None] + slopes[:, None] * more), slopes

"""How many kernels (or images) of one layer each device gets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputError


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
    return tuple(int(one) for one in share)


def equal(total: int, ranks: int) -> tuple[int, ...]:
    """Split ``total`` evenly; the lower ranks take the remainder."""
    return proportional(total, [1.0] * ranks)


def balanced(
    total: int, points: Sequence[NDArray[np.float64]], times: Sequence[NDArray[np.float64]]
) -> tuple[int, ...]:
    """The integer shares that minimise the time of the slowest device.

    ``points[i]`` (ascending, positive) and ``times[i]`` (seconds) are device i's measured cost curve: the time of
    ``points[i][j]`` kernels. Between the points the curve is linear, before the first it is flat at the first time (a
    few kernels cost what the smallest measured share costs, unless there are none), beyond the last it goes on with the
    last slope; it is made monotone first. Bisection on the finish time T gives k_i(T), the most kernels device i ends
    by T; the least T with sum k_i(T) >= total is optimal, as every k_i is monotone in T. What is over is taken from the
    devices that finish last, so one that would only run for a handful may end with none.
    """
    curves = [_monotone(point, time) for point, time in zip(points, times, strict=True)]

    def capacity(finish: float) -> list[int]:
        return [min(total, _most_kernels(*curve, finish)) for curve in curves]

    low, high = 0.0, min(_time_of(*curve, total) for curve in curves)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(capacity(middle)) >= total:
            high = middle
        else:
            low = middle
    share = capacity(high)
    for _ in range(sum(share) - total):
        last = max((rank for rank, s in enumerate(share) if s), key=lambda rank: _time_of(*curves[rank], share[rank]))
        share[last] -= 1
    return tuple(share)


def _monotone(
    points: NDArray[np.float64], times: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if len(points) == 0 or np.any(~np.isfinite(times)) or np.any(np.diff(points) <= 0) or np.any(times <= 0):
        raise InputError(
            f"a cost curve with points {list(points)} and times {list(times)} is empty, unordered or not positive"
        )
    return np.asarray(points, dtype=float), np.maximum.accumulate(np.asarray(times, dtype=float))


def _last_slope(points: NDArray[np.float64], times: NDArray[np.float64]) -> float:
    """Seconds per kernel beyond the last point; the mean cost where the curve ends flat or has one point."""
    slope = (times[-1] - times[-2]) / (points[-1] - points[-2]) if len(points) > 1 else 0.0
    return float(slope) if slope > 0 else float(times[-1] / points[-1])


def _time_of(points: NDArray[np.float64], times: NDArray[np.float64], kernels: int) -> float:
    if kernels <= 0:
        return 0.0
    if kernels > points[-1]:
        return float(times[-1] + (kernels - points[-1]) * _last_slope(points, times))
    return float(np.interp(kernels, points, times))


def _most_kernels(points: NDArray[np.float64], times: NDArray[np.float64], finish: float) -> int:
    if finish < times[0]:
        return 0
    if finish >= times[-1]:
        return int(points[-1] + (finish - times[-1]) / _last_slope(points, times) + 1e-9)
    # The last segment of the curve that begins by ``finish`` and ends after it.
    index = int(np.searchsorted(times, finish, side="right"))
    rise = times[index] - times[index - 1]
    return int(points[index - 1] + (finish - times[index - 1]) / rise * (points[index] - points[index - 1]) + 1e-9)

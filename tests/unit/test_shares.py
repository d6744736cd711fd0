"""Shares add up, follow the weights, and are the best there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.plan.shares import balanced, equal, proportional


@given(st.integers(0, 2000), st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3))
def test_proportional_shares_add_up_and_are_within_one_of_exact(total: int, weights: list[float]) -> None:
    shares = proportional(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_equal_shares_differ_by_at_most_one() -> None:
    assert equal(10, 4) == (3, 3, 2, 2)


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [float("nan"), 1]], ids=["all zero", "negative", "not a number"])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="weights"):
        proportional(10, weights)


@st.composite
def curves(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    points = np.array(sorted(draw(st.sets(st.integers(1, 12), min_size=1, max_size=4))), dtype=float)
    steps = draw(st.lists(st.floats(0.01, 5), min_size=len(points), max_size=len(points)))
    return points, np.cumsum(steps)


def _time(points: np.ndarray, times: np.ndarray, kernels: int) -> float:
    """The cost curve, written down a second time from its description."""
    if kernels == 0:
        return 0.0
    if kernels <= points[0]:
        return float(times[0])
    for left in range(len(points) - 1):
        if kernels <= points[left + 1]:
            part = (kernels - points[left]) / (points[left + 1] - points[left])
            return float(times[left] + part * (times[left + 1] - times[left]))
    slope = (times[-1] - times[-2]) / (points[-1] - points[-2]) if len(points) > 1 else 0
    return float(times[-1] + (kernels - points[-1]) * (slope or times[-1] / points[-1]))


@st.composite
def devices(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, float, int]:
    """Points and times of a curve, latency, link time per kernel and cap of one device."""
    cap = draw(st.one_of(st.just(12), st.integers(0, 12)))
    return *draw(curves()), draw(st.floats(0, 3)), draw(st.floats(0, 3)), cap


@given(st.integers(1, 12), st.lists(devices(), min_size=1, max_size=3))
@example(5, [(np.array([6.0]), np.array([1.0]), 2.823349484537577, 0.0, 12)])  # rounding once left all kernels over
def test_balanced_shares_are_as_good_as_brute_force(
    total: int, cluster: list[tuple[np.ndarray, np.ndarray, float, float, int]]
) -> None:
    points, times, latency, link, caps = zip(*cluster, strict=True)
    if sum(min(cap, total) for cap in caps) < total:
        with pytest.raises(InputError, match="do not fit"):
            balanced(total, points, times, caps=caps, latency=latency, link=link)
        return
    shares = balanced(total, points, times, caps=caps, latency=latency, link=link)
    assert sum(shares) == total
    assert all(share <= cap for share, cap in zip(shares, caps, strict=True))

    def finish(device: tuple[np.ndarray, np.ndarray, float, float, int], kernels: int) -> float:
        curve, once, each = device[:2], device[2], device[3]
        return _time(*curve, kernels) + once + each * kernels if kernels else 0.0

    def slowest(candidate: tuple[int, ...]) -> float:
        return max(finish(device, kernels) for device, kernels in zip(cluster, candidate, strict=True))

    everything = product(*(range(min(cap, total) + 1) for cap in caps))
    best = min(slowest(candidate) for candidate in everything if sum(candidate) == total)
    assert slowest(shares) == pytest.approx(best, rel=1e-6)


def test_a_device_behind_a_slow_link_gets_nothing_where_that_is_best() -> None:
    points = np.array([10.0, 100.0])
    times = [points * 1.0, points * 1.0]
    assert balanced(100, [points] * 2, times, link=[0, 0.0]) == (50, 50)
    assert balanced(100, [points] * 2, times, latency=[0, 200]) == (100, 0)


def test_a_thousand_devices_are_balanced_at_once() -> None:
    points = np.array([1.0, 10.0, 100.0])
    shares = balanced(4096, [points] * 1024, [points * (1 + rank % 2) for rank in range(1024)])
    assert sum(shares) == 4096
    assert shares[0] > shares[1] >= 2


def test_a_device_twice_as_fast_gets_twice_as_many() -> None:
    points = np.array([10.0, 90.0])
    assert balanced(90, [points, points], [points * 1.0, points * 2.0]) == (60, 30)


def test_a_useless_device_gets_nothing() -> None:
    points = np.array([1.0, 100.0])
    assert balanced(100, [points, points], [points * 0.01, np.array([5.0, 9.0])]) == (100, 0)


def test_a_curve_that_is_not_ordered_is_refused() -> None:
    with pytest.raises(InputError, match="cost curve"):
        balanced(4, [np.array([2.0, 1.0])], [np.array([1.0, 2.0])])


def test_an_empty_curve_is_named() -> None:
    full, empty = np.array([1.0, 2.0]), np.array([])
    with pytest.raises(InputError, match="cost curve 1 is empty: it needs at least one point"):
        balanced(4, [full, empty], [full, empty])

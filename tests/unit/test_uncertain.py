"""What a calibration measures: large shares of a slow device by few images, and again what differs by enough."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.calibration.worker import _Segments

LONG, SHORT = 0.1, 0.001


def _measured(
    differing: float, *, segment: int = 0, share: int = 1, spent: float = 0.0, by_few: bool = False
) -> _Segments:
    """Three repetitions of a long and a short segment at three shares, of which two at one place took longer.

    With ``by_few`` all but the smallest share is measured with a quarter of the images only.
    """
    segments = object.__new__(_Segments)
    shares = np.array([0.25, 0.5, 1.0])
    times = np.array([LONG, SHORT])[:, None, None, None, None] * shares[:, None, None, None] * np.ones((2, 3, 2, 5, 3))
    times[:, :, :, 3:] = np.nan  # what further passes would measure
    times[:, :, 0] /= 4
    if by_few:
        times[:, 1:, -1] = np.nan
    times[segment, share, 0 if by_few and share else -1, 1:3] *= 1 + differing
    segments.times, segments.kernels = times, np.ones((2, 3))
    segments._chains, segments._done, segments._spent = {0: None, 1: None}, 3, spent  # type: ignore[dict-item]
    segments._task = SimpleNamespace(weights=(1, 1), fractions=tuple(shares), images=(4, 16))  # type: ignore[assignment]
    segments._by_few = np.isnan(times[:, :, -1, 0, 0])
    segments._context = SimpleNamespace(group=None)  # type: ignore[assignment]
    return segments


@pytest.mark.parametrize("by_few", [False, True], ids=["by all images", "large shares by few"])
@pytest.mark.parametrize("share", [0, 1, 2])
def test_a_share_whose_repetitions_differ_is_measured_again(share: int, by_few: bool) -> None:
    assert _measured(0.1, share=share, by_few=by_few).uncertain() == [share]


def test_what_hardly_differs_or_hardly_matters_is_not() -> None:
    assert _measured(0.005).uncertain() == []
    assert _measured(0.1, segment=1).uncertain() == [], "a hundredth of the step"


def test_what_has_taken_long_already_is_not() -> None:
    assert _measured(0.1, spent=7.0).uncertain() == []


def test_at_first_everything_is_measured() -> None:
    segments = _measured(0.0)
    segments._done = 0
    assert segments.uncertain() == [0, 1, 2]


@pytest.mark.parametrize(
    ("part", "slow", "by_few"),
    [
        (0.5, True, [[False, False, True], [False, False, True], [False, False, False]]),
        (0.2, True, [[False, True, True], [False, False, True], [False, False, False]]),
        (0.9, True, np.zeros((3, 3), dtype=bool)),
        (0.2, False, np.zeros((3, 3), dtype=bool)),
    ],
)
def test_a_slow_device_measures_what_is_more_than_its_part_by_few_images(
    part: float, slow: bool, by_few: list[list[bool]]
) -> None:
    segments = _measured(0.0)
    # The smallest share of each is measured with all images, too.
    segments.kernels = np.array([[1.0, 2.0, 4.0], [np.nan, 1.0, 2.0], [np.nan, np.nan, 3.0]])
    segments._is_long, segments._part = slow, part
    np.testing.assert_array_equal(segments._shares_by_few(), by_few)

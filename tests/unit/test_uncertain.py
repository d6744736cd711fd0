"""What a calibration measures again: where repetitions differ by enough to matter for a step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.calibration.worker import _Segments

LONG, SHORT = 0.1, 0.001


def _measured(differing: float, *, segment: int = 0, share: int = 1, spent: float = 0.0) -> _Segments:
    """Three repetitions of a long and a short segment at three shares, of which two at one place took longer."""
    segments = object.__new__(_Segments)
    shares = np.array([0.25, 0.5, 1.0])
    times = np.array([LONG, SHORT])[:, None, None, None, None] * shares[:, None, None, None] * np.ones((2, 3, 2, 5, 3))
    times[:, :, :, 3:] = np.nan  # what further passes would measure
    times[segment, share, -1, 1:3] *= 1 + differing
    segments.times, segments.kernels = times, np.ones((2, 3))
    segments._chains, segments._done, segments._spent = {0: None, 1: None}, 3, spent  # type: ignore[dict-item]
    segments._task = SimpleNamespace(weights=(1, 1), fractions=tuple(shares))  # type: ignore[assignment]
    segments._context = SimpleNamespace(group=None)  # type: ignore[assignment]
    return segments


@pytest.mark.parametrize("share", [0, 1, 2])
def test_a_share_whose_repetitions_differ_is_measured_again(share: int) -> None:
    assert _measured(0.1, share=share).uncertain() == [share]


def test_what_hardly_differs_or_hardly_matters_is_not() -> None:
    assert _measured(0.005).uncertain() == []
    assert _measured(0.1, segment=1).uncertain() == [], "a hundredth of the step"


def test_what_has_taken_long_already_is_not() -> None:
    assert _measured(0.1, spent=7.0).uncertain() == []


def test_at_first_everything_is_measured() -> None:
    segments = _measured(0.0)
    segments._done = 0
    assert segments.uncertain() == [0, 1, 2]

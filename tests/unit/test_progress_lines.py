"""What is shown of long work: a line at least every few seconds, steps with their epoch, speed and time left."""

from __future__ import annotations

import threading
import time

import pytest

from pipeline import progress
from pipeline.progress import Progress, StepsShown, both, duration


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_work_that_reports_nothing_is_not_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr(progress, "_LOOK_S", 0.001)
    written = threading.Semaphore(0)
    write = Progress._write
    monkeypatch.setattr(Progress, "_write", lambda self: (write(self), written.release()))
    with Progress("prepare") as shown:
        assert written.acquire(timeout=60)
        shown.begin("plan resnet18")
        while "plan resnet18: " not in capsys.readouterr().err:
            assert written.acquire(timeout=60)
    capsys.readouterr()
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


def test_reports_come_no_faster_than_lines_are_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LOOK_S", 1000.0)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = Progress("train")
    for step in range(1, 31):
        now[0] += 1.0
        shown(step, {"loss": 0.5})
    assert lines(capsys) == [f"train: {step}, loss 0.5" for step in (5, 10, 15, 20, 25, 30)]


@pytest.mark.parametrize("shown", [False, None])
def test_nothing_is_written_where_nothing_is_wanted_or_there_is_no_terminal(
    shown: bool | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", -1.0)
    with Progress("train", shown=shown) as silent:
        silent(1, {"loss": 1.0})
    assert lines(capsys) == []


class Told:
    """Takes the place of a progress."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, int | None, str, str | None]] = []

    def show(self, done: int, total: int | None, note: str, title: str | None = None) -> None:
        self.shown.append((done, total, note, title))


def test_steps_are_told_within_their_epoch_with_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told = Told()
    steps = StepsShown(told, "train net", [[8, 8, 4], [8, 8, 4]])  # type: ignore[arg-type]
    steps(1, {"loss": 2.0})
    now[0] = 2.0
    steps(3, {"loss": 1.5})
    now[0] = 4.0
    steps(5, {"loss": 1.0})
    assert told.shown == [
        (1, 3, "loss 2", "train net, epoch 1 of 2"),
        (3, 3, "loss 1.5, 6 images/s, 3 s left", "train net, epoch 1 of 2"),
        (2, 3, "loss 1, 7 images/s, 1 s left", "train net, epoch 2 of 2"),
    ]


def test_steps_of_a_stream_are_counted_without_an_end() -> None:
    told = Told()
    StepsShown(told, "train net", [])(7, {"loss": 2.0})  # type: ignore[arg-type]
    assert told.shown == [(7, None, "loss 2", "train net")]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5939, "99 min"), (7300, "2 h 2 min")]
)
def test_times_are_told_no_finer_than_they_are_known(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_reports_reach_all_who_take_them() -> None:
    first: list[int] = []
    second: list[int] = []
    taker = both(lambda done, _: first.append(done), None, lambda done, _: second.append(done))
    assert taker is not None
    taker(3, {})
    assert (first, second, both(None)) == ([3], [3], None)

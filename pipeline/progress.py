"""How far long work has come, on standard error, as standard output is for results."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

_LINE_INTERVAL_S = 4.5
_LOOK_S = 0.25


class Progress:
    """Steps done of a total: a bar on a terminal, a line every few seconds elsewhere.

    A line comes also while nothing is reported, so that long work is never silent. What is done next may get a title of
    its own. With ``shown`` False nothing is written; with None only a bar, and no lines where there is no terminal.
    """

    def __init__(self, title: str, total: int | None = None, *, shown: bool | None = True) -> None:
        self._title, self._total, self._done, self._note = title, total, 0, ""
        terminal = sys.stderr.isatty()
        self._draws, self._writes = terminal and shown is not False, bool(shown) and not terminal
        self._began_s = self._last_line_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._draws:
            self._bar = _bar()
            self._task = self._bar.add_task(self._title, total=self._total, note="")
            self._bar.start()
        elif self._writes:
            self._thread = threading.Thread(target=self._break_silence, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._bar is not None:
            self._bar.stop()
        if self._thread is not None:
            self._thread.join()

    def begin(self, title: str, total: int | None = None) -> None:
        """Go on with something else, which takes so many steps where that is known."""
        with self._lock:
            self._title, self._total, self._done, self._note = title, total, 0, ""
            self._began_s = time.monotonic()
            if self._bar is not None:
                self._bar.reset(self._task, description=title, total=total, note="")

    def __call__(self, done: int, values: Mapping[str, float]) -> None:
        """Show that `done` steps are done, with the latest values beside; a value `total` says of how many."""
        total = int(values.get("total", self._total or 0)) or None
        self.show(done, total, ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "total"))

    def show(self, done: int, total: int | None, note: str, title: str | None = None) -> None:
        """Show that `done` steps of a total are done, and a note, from now on under another title if there is one."""
        with self._lock:
            self._done, self._total, self._note, self._title = done, total, note, title or self._title
            if self._bar is not None:
                self._bar.update(self._task, completed=done, total=total, note=note, description=self._title)
            elif self._writes and time.monotonic() - self._last_line_s >= _LINE_INTERVAL_S:
                self._write()

    def _write(self) -> None:
        now = self._last_line_s = time.monotonic()
        total = f" of {self._total}" if self._total else ""
        far = f"{self._done}{total}" if self._done else f"{now - self._began_s:.0f} s"
        print(f"{self._title}: {far}{', ' if self._note else ''}{self._note}", file=sys.stderr, flush=True)

    def _break_silence(self) -> None:
        while not self._ended.wait(_LOOK_S):
            with self._lock:
                if time.monotonic() - self._last_line_s >= _LINE_INTERVAL_S:
                    self._write()


class StepsShown:
    """Takes the reports of a training's steps: which epoch it is, images per second and the time left."""

    def __init__(self, progress: Progress, title: str, sizes: Sequence[Sequence[int]]) -> None:
        """``sizes`` are the images of each step, by epoch; empty where nobody knows how many there are."""
        self._progress, self._title, self._sizes = progress, title, sizes
        self._steps = sum(map(len, sizes))
        self._images = [0, *accumulate(size for epoch in sizes for size in epoch)]
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, values: Mapping[str, float]) -> None:
        """Show the report of step number `done`."""
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        parts = [f"{name} {value:.4g}" for name, value in values.items()]
        before, since = self._first
        if not self._sizes or done > self._steps:
            self._progress.show(done, None, ", ".join(parts), self._title)
            return
        number, in_epoch = self._place(done)
        if done > before and now > since:
            parts.append(f"{(self._images[done] - self._images[before]) / (now - since):.4g} images/s")
            parts.append(f"{duration((now - since) / (done - before) * (self._steps - done))} left")
        title = f"{self._title}, epoch {number} of {len(self._sizes)}"
        self._progress.show(in_epoch, len(self._sizes[number - 1]), ", ".join(parts), title)

    def _place(self, done: int) -> tuple[int, int]:
        """Number of the epoch, and of the step in it."""
        for number, sizes in enumerate(self._sizes, 1):
            if done <= len(sizes):
                return number, done
            done -= len(sizes)
        raise AssertionError("more steps than there are")


def duration(seconds: float) -> str:
    """A time that nobody knows exactly, such as 40 s, 12 min or 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min"


Reports = Callable[[int, dict[str, float]], None]
"""Takes the number of steps that are done, and values to show beside it."""


def both(*takers: Reports | None) -> Reports | None:
    """One taker of reports for several, without those that are None; None where there is none."""
    there = [one for one in takers if one is not None]
    if not there:
        return None

    def take(done: int, values: dict[str, float]) -> None:
        for one in there:
            one(done, values)

    return take


def _bar() -> Any:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[note]}"),
    )
    # What is printed meanwhile goes above the bar, unless standard output is a file.
    console, above = Console(stderr=True), sys.stdout.isatty()
    return progress.Progress(*columns, console=console, transient=True, redirect_stdout=above)

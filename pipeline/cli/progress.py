"""How far a command has come, on standard error, as standard output is for results."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

_LINE_INTERVAL_S = 5.0


class Progress:
    """Steps done of a total: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._total = title, total
        self._last_line_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
            )
            # What is printed meanwhile goes above the bar, unless standard output is a file.
            console, above = Console(stderr=True), sys.stdout.isatty()
            self._bar = progress.Progress(*columns, console=console, transient=True, redirect_stdout=above)
            self._task = self._bar.add_task(self._title, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, values: Mapping[str, float]) -> None:
        """Show that `done` steps are done, with the latest values beside; a value `total` says of how many."""
        self._total = int(values.get("total", self._total or 0)) or None
        note = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name != "total")
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        elif time.monotonic() - self._last_line_s >= _LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            total = f" of {self._total}" if self._total else ""
            print(f"{self._title}: {done}{total}{', ' if note else ''}{note}", file=sys.stderr, flush=True)

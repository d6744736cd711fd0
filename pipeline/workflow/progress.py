"""How far a run has come and how long it will still take, in a line after each part of its jobs."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

from pipeline.workflow.parts import KINDS, Part

_POLL_S = 1.0
_TRUST_S = 30.0
"""The expected times count like a part of so many seconds that took just as long as expected."""


class Outlook:
    """The parts of one run: which are done, and how long the others will take if all are off by the same factor."""

    def __init__(self, parts: Sequence[Part], began_s: float) -> None:
        self._parts, self._waiting, self._began_s = tuple(parts), list(parts), began_s

    def look(self) -> bool:
        """Find out which parts are done by now; says whether any has been finished since the last look."""
        before = len(self._waiting)
        self._waiting = [part for part in self._waiting if not self._is_done(part)]
        return len(self._waiting) < before

    def _is_done(self, part: Part) -> bool:
        # What an earlier run left is not part of this one, or no job would make it again.
        try:
            return part.file.stat().st_mtime >= self._began_s
        except OSError:
            return False

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return not self._waiting

    def left_s(self, now_s: float) -> float:
        """Seconds still to go, from what the finished parts took against what they were expected to take."""
        left = sum(part.expected_s for part in self._waiting)
        expected = sum(part.expected_s for part in self._parts) - left
        return left * (now_s - self._began_s + _TRUST_S) / (expected + _TRUST_S)

    def line(self, now_s: float) -> str:
        """What is done of each kind, and the time left."""
        planned = Counter(part.kind for part in self._parts)
        waiting = Counter(part.kind for part in self._waiting)
        done = ", ".join(
            f"{planned[kind] - waiting[kind]} of {planned[kind]} {kind}" for kind in KINDS if planned[kind]
        )
        return f"Done: {done}; {'nothing' if self.done else _duration(self.left_s(now_s))} left."


def follow(parts: Sequence[Part]) -> None:
    """From now on, until this process ends, print a line to standard error whenever parts are done."""
    # A file may carry a time that is a little older than the clock says.
    outlook = Outlook(parts, time.time() - 0.01)
    threading.Thread(target=_watch, args=(outlook,), daemon=True, name="progress").start()


def _watch(outlook: Outlook) -> None:
    _say(outlook)
    while not outlook.done:
        time.sleep(_POLL_S)
        if outlook.look():
            _say(outlook)


def _say(outlook: Outlook) -> None:
    # On a terminal a job may have left a progress bar in this line.
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
    print(f"{clear}{outlook.line(time.time())}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    """In words, such as about 2 h 10 min: no finer than what is left is known."""
    minutes = round(timedelta(seconds=seconds) / timedelta(minutes=1))
    if minutes < 1:
        return "less than a minute"
    hours, rest = divmod(minutes, 60)
    return f"about {f'{hours} h ' if hours else ''}{rest} min"

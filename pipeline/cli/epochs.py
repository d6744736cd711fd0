"""How each epoch went, shown while the next one runs: news from the master's worker by the scheduler."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.progress import duration
from pipeline.run.callbacks import Epoch

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class EpochNews:
    """A callback that tells whoever listens to its topic of each epoch, and remembers them."""

    topic: str
    epochs: list[Epoch] = field(default_factory=list)

    def on_epoch(self, epoch: Epoch) -> None:
        """Pass the epoch on."""
        from distributed import get_worker

        self.epochs.append(epoch)
        # Within a dictionary of its own, as the scheduler adds the worker's address to the one that it is sent.
        get_worker().log_event(self.topic, {"epoch": asdict(epoch)})


class EpochLines:
    """Prints a line per epoch, each once: news may come twice, or later than the end of the training."""

    def __init__(self, total: int) -> None:
        """``total`` is how many epochs there will be."""
        self._total = total
        self._seconds: dict[int, float] = {}
        self._lock = threading.Lock()

    def show(self, epoch: Epoch) -> None:
        """Print the epoch unless it has been printed."""
        with self._lock:
            if epoch.number in self._seconds:
                return
            self._seconds[epoch.number] = epoch.seconds
            parts = [f"loss {epoch.loss:.4f}"]
            if epoch.accuracy is not None:
                parts.append(f"test accuracy {100 * epoch.accuracy:.1f} %")
            parts += [f"{name} {value:.4g}" for name, value in epoch.metrics.items() if name != "accuracy"]
            if epoch.images and epoch.training_seconds > 0:
                parts.append(f"{epoch.images / epoch.training_seconds:.4g} images/s")
            left = self._total - epoch.number
            ahead = sum(self._seconds.values()) / len(self._seconds) * left
            to_go = f", {duration(ahead)} left" if left > 0 else ""
            print(
                f"Epoch {epoch.number} of {self._total}: {', '.join(parts)} ({epoch.seconds:.3g} s{to_go})", flush=True
            )

    def show_all(self, epochs: Iterable[Epoch]) -> None:
        """Print those that have not been printed."""
        for epoch in epochs:
            self.show(epoch)


@contextmanager
def shown_epochs(client: Client, total: int) -> Iterator[tuple[EpochNews, EpochLines]]:
    """A callback for ``fit``, and the lines that its news become, for the length of the block."""
    news, lines = EpochNews(f"pipeline-epochs-{uuid.uuid4().hex}"), EpochLines(total)

    def show(event: tuple[float, dict[str, Any]]) -> None:
        lines.show(Epoch(**event[1]["epoch"]))

    client.subscribe_topic(news.topic, show)
    try:
        yield news, lines
    finally:
        client.unsubscribe_topic(news.topic)

"""How each epoch went, shown while the next one runs: news from the master's worker by the scheduler."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Client

    from pipeline.run.callbacks import Epoch


@dataclass(frozen=True)
class EpochNews:
    """A callback that tells whoever listens to its topic of each epoch, and remembers them."""

    topic: str
    epochs: list[Epoch] = field(default_factory=list)

    def on_epoch(self, epoch: Epoch) -> None:
        """Pass the epoch on."""
        from distributed import get_worker

        self.epochs.append(epoch)
        get_worker().log_event(self.topic, asdict(epoch))


class EpochLines:
    """Prints a line per epoch, each once: news may come twice, or later than the end of the training."""

    def __init__(self) -> None:
        self._shown: set[int] = set()
        self._lock = threading.Lock()

    def show(
        self,
        number: int,
        loss: float,
        accuracy: float | None,
        seconds: float,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Print the epoch unless it has been printed."""
        with self._lock:
            if number in self._shown:
                return
            self._shown.add(number)
            classified = "" if accuracy is None else f", test accuracy {100 * accuracy:.1f} %"
            others = "".join(f", {name} {value:.4g}" for name, value in (metrics or {}).items() if name != "accuracy")
            print(f"Epoch {number}: loss {loss:.4f}{classified}{others} ({seconds:.3g} s)", flush=True)

    def show_all(self, epochs: Iterable[Epoch]) -> None:
        """Print those that have not been printed."""
        for epoch in epochs:
            self.show(**asdict(epoch))


@contextmanager
def shown_epochs(client: Client) -> Iterator[tuple[EpochNews, EpochLines]]:
    """A callback for ``fit``, and the lines that its news become, for the length of the block."""
    news, lines = EpochNews(f"pipeline-epochs-{uuid.uuid4().hex}"), EpochLines()

    def show(event: tuple[float, dict[str, Any]]) -> None:
        lines.show(**event[1])

    client.subscribe_topic(news.topic, show)
    try:
        yield news, lines
    finally:
        client.unsubscribe_topic(news.topic)

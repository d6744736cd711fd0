"""torch's ``DataLoader`` as a training uses it: its options, checked before anything starts, and its batches by epoch.

The order of the samples is decided where the training is started, as all ranks have to know it; the loader of a rank is
told it epoch by epoch. Only a stream (``IterableDataset``) has an order of its own.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from pipeline.data.batches import split_batch
from pipeline.data.randomness import seeded
from pipeline.errors import InputError, first_line

Collate = Callable[[list[Any]], Any]

_OF_FIT = ("batch_size", "shuffle")
"""What is said to ``fit`` itself."""
_OF_THE_ORDER = ("sampler", "batch_sampler", "drop_last")
_OF_TRAINING = (*_OF_THE_ORDER, "collate_fn")
"""What validation images do not go through."""
_OPTIONS = tuple(name for name in inspect.signature(DataLoader).parameters if name not in ("dataset", *_OF_FIT))
_SWITCHES = ("drop_last", "pin_memory", "persistent_workers", "in_order")


def _is_number(value: Any, least: int, kinds: Any = int) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and value >= least


_KINDS: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
    ("a whole number, 0 or more", lambda value: _is_number(value, 0), ("num_workers",)),
    ("seconds, 0 or more", lambda value: _is_number(value, 0, int | float), ("timeout",)),
    ("True or False", lambda value: isinstance(value, bool), _SWITCHES),
    ("a whole number above 0", lambda value: value is None or _is_number(value, 1), ("prefetch_factor",)),
    ("a function", lambda value: value is None or callable(value), ("collate_fn", "worker_init_fn")),
    ("a sampler", lambda value: value is None or isinstance(value, Iterable), ("sampler", "batch_sampler")),
    ("a torch.Generator", lambda value: value is None or isinstance(value, torch.Generator), ("generator",)),
)
"""What a value has to be, by the names of the options."""


def check_data(dataset: Any, what: str = "the data set") -> None:
    """Raise ``InputError`` where a ``DataLoader`` is given as ``what``."""
    if isinstance(dataset, DataLoader):
        raise InputError(
            f"{what} is a DataLoader: give its data set (loader.dataset) and batch_size, and its other options as "
            "loader={...}, as every batch is shared out anew"
        )


def check_loader(dataset: Dataset[Any], options: Mapping[str, Any], batch_size: int) -> None:
    """Raise ``InputError`` where torch's ``DataLoader`` does not take these options for the data set."""
    for name, value in options.items():
        if name in _OF_FIT:
            raise InputError(f"loader option '{name}' belongs to fit itself: give fit(..., {name}={value!r})")
        if name not in _OPTIONS:
            close = difflib.get_close_matches(str(name), _OPTIONS, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(_OPTIONS)}"
            raise InputError(f"loader option '{name}' is unknown: {hint}")
        kind = next((text for text, fits, names in _KINDS if name in names and not fits(value)), None)
        if kind is not None:
            raise InputError(f"loader option {name}={value!r} must be {kind}")
    sizes = {} if options.get("batch_sampler") is not None else {"batch_size": batch_size}
    try:
        DataLoader(dataset, **sizes, **options)  # type: ignore[arg-type]
    except Exception as error:  # torch's own checks raise several kinds
        raise InputError(f"the loader options cannot be used: {first_line(error)}") from error


def is_stream(dataset: object) -> bool:
    """Whether a data set gives its samples in an order of its own."""
    return isinstance(dataset, IterableDataset)


def length_of(sized: object) -> int | None:
    """How many samples (or batches) there are; None where nobody knows."""
    try:
        return len(sized)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError, AttributeError):
        return None


def check_length(
    dataset: Dataset[Any], options: Mapping[str, Any], batch_size: int, epochs: int, max_steps: int | None
) -> None:
    """Raise ``InputError`` where no training of so many steps can be made of the data set."""
    for name, value in (("batch size", batch_size), ("epochs", epochs), ("max_steps", max_steps)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    given = (options.get("batch_sampler"), options.get("sampler"))
    sampler = next((one for one in given if one is not None), None)
    source = dataset if sampler is None else sampler
    count = length_of(source)
    if count is None:
        if max_steps is None:
            raise InputError(
                f"{type(source).__name__} has no length: give max_steps, or let its __len__ say how many there are"
            )
    elif options.get("batch_sampler") is None and batch_size > count:
        has = "the data set, which has" if sampler is None else f"{type(sampler).__name__}, which gives"
        raise InputError(f"batch size {batch_size} is larger than {has} {count} images")


def example_batch(
    dataset: Dataset[Any], images: int = 2, *, collate: Collate | None = None, indices: Sequence[Any] | None = None
) -> Any:
    """The ``Inputs`` of a batch of the first ``images`` samples of a data set, the last one again where it has fewer.

    ``collate`` joins them, as ``DataLoader``'s ``collate_fn``; ``indices`` name them where a sampler does. A single
    tensor is ``x_BCHW``. No random number of the caller is used up. Raises ``InputError`` unless the data set gives
    pairs of images and a label that can be joined to a batch.
    """
    with seeded(0):
        samples = _samples(dataset, images, indices)
        samples = [samples[min(place, len(samples) - 1)] for place in range(images)]
        try:
            batch = (collate or default_collate)(samples)
        except Exception as error:
            raise InputError(
                f"the first {images} samples of {type(dataset).__name__} cannot be joined to a batch: "
                f"{first_line(error)}; give them one size, or a collate_fn that joins them"
            ) from error
    return split_batch(batch, f"the first batch of {type(dataset).__name__}")[0]


def _samples(dataset: Dataset[Any], count: int, indices: Sequence[Any] | None) -> list[Any]:
    name = type(dataset).__name__
    try:
        if isinstance(dataset, IterableDataset):
            found = list(itertools.islice(iter(_copied(dataset)), count))
        else:
            images = length_of(dataset)
            chosen = indices[:count] if indices else range(count if images is None else min(count, images))
            found = [dataset[index] for index in chosen]
    except Exception as error:
        raise InputError(f"{name} cannot give its first samples: {first_line(error)}") from error
    if not found:
        raise InputError(f"{name} gives no samples")
    return found


def _copied(stream: IterableDataset[Any]) -> IterableDataset[Any]:
    """A stream whose samples can be taken without moving on in the one that was given, where it can be copied."""
    try:
        return copy.deepcopy(stream)
    except Exception:  # noqa: BLE001 - of what holds a file or a connection there is only one
        return stream


def validation_options(options: Mapping[str, Any], dataset: Dataset[Any]) -> dict[str, Any]:
    """How validation images are loaded: like those of a training, but in their order and joined in their own way.

    That is torch's, or the ``collate_fn`` that the data set has as an attribute.
    """
    found = {name: value for name, value in options.items() if name not in _OF_TRAINING}
    own = getattr(dataset, "collate_fn", None)
    return found if own is None else {**found, "collate_fn": own}


class _Told:
    """A batch sampler that gives what it was last told."""

    def __init__(self) -> None:
        self.batches: Sequence[Sequence[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter([list(batch) for batch in self.batches])

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """One ``DataLoader`` over all epochs, whose processes may so stay between them.

    It draws from a generator of its own: torch's takes a number from the default one each time it is iterated, and so
    would move what the model draws.
    """

    def __init__(
        self, dataset: Dataset[Any], options: Mapping[str, Any], *, batch_size: int, seed: int, stream: bool = False
    ) -> None:
        """``batch_size`` is that of a stream's batches."""
        self._told = _Told()
        further: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), **options}
        if further["generator"] is None:
            further["generator"] = torch.Generator().manual_seed(seed)
        if stream:
            self._loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, **further)
        else:
            further = {name: value for name, value in further.items() if name not in _OF_THE_ORDER}
            self._loader = DataLoader(dataset, batch_sampler=self._told, **further)

    def epoch(self, batches: Sequence[Sequence[Any]] = ()) -> Iterator[Any]:
        """The batches of these samples, or of a stream once more from its beginning."""
        self._told.batches = batches
        return iter(self._loader)

"""What each rank is fed with: the batches of an epoch, how many images each has, and its turn in an update.

Where the samples of every batch are known beforehand, so is how many images it has. Of a stream, and of what a
``collate_fn`` of the user's own joins, only who has read a batch knows: the master tells the others, batch by batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

from pipeline.cluster.rank import RankContext
from pipeline.data.batches import Batch, images_in, shapes_of, split_batch
from pipeline.data.loading import Loader, is_stream, length_of, validation_options
from pipeline.errors import RunError
from pipeline.plan.plan import Plan
from pipeline.run.batches import part_of
from pipeline.run.recipe import Turn


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What a training is fed with; equal on all ranks."""

    indices: list[list[list[Any]]]
    """Sample indices by epoch and step; empty for a stream."""
    batch_size: int
    """Of a stream's batches, and of those of validation images."""
    epochs: int = 1
    max_steps: int | None = None
    """Where a stream ends in any case."""
    seed: int = 0
    options: Mapping[str, Any]
    """Those of torch's ``DataLoader``."""
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """The shape of one image of each input, which all batches must have; None where any shape will do."""
    strategy: str = ""
    """What needs them to have it."""
    validation_images: int | None = None
    """How many there are; None where only who reads them will know."""
    validates: bool = False
    """Whether there are validation images."""

    @property
    def stream(self) -> bool:
        """Whether only who reads it knows what comes."""
        return not self.indices

    @property
    def told(self) -> bool:
        """Whether the number of images in a batch is only known when it has been read."""
        return self.stream or self.options.get("collate_fn") is not None


def feed_of(
    dataset: Dataset[Any],
    validation: Dataset[Any] | None,
    plan: Plan,
    loader: Mapping[str, Any],
    *,
    indices: list[list[list[Any]]],
    stream: tuple[int, int | None] | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    seed: int,
) -> Feed:
    """What the ranks are fed with: a stream is loaded as it says, of other data the order is known already."""
    epochs, max_steps = stream or (len(indices), None)
    of_order = () if is_stream(dataset) else ("sampler", "batch_sampler", "drop_last")
    counted = None
    if validation is not None and not is_stream(validation):
        joined = validation_options(loader, validation).get("collate_fn")
        counted = length_of(validation) if joined is None else None
    return Feed(
        indices=indices, batch_size=plan.batch_size, epochs=epochs, max_steps=max_steps, seed=seed,
        options={name: value for name, value in loader.items() if name not in of_order},
        shapes=None if plan.strategy == "ddp" else shapes, strategy=plan.strategy,
        validation_images=counted, validates=validation is not None,
    )  # fmt: skip


class Fed(NamedTuple):
    """One batch as a rank gets it."""

    turn: Turn
    size: int
    """Images in the whole batch."""
    own: int
    """How many of them the loss of this rank averages over."""
    batch: Batch | None
    """None where this rank has no images."""


def turns(batches: int, accumulate: int) -> list[Turn]:
    """Each batch's place among those whose gradients are averaged for one update."""
    found = []
    for index in range(batches):
        start = index - index % accumulate
        size = min(accumulate, batches - start)
        found.append(Turn(first=index == start, last=index == start + size - 1, weight=1 / size))
    return found


class WholeBatches:
    """The batches of a program: the master has them, the other ranks know how many images each has."""

    def __init__(self, context: RankContext, dataset: Dataset[Any] | None, feed: Feed, accumulate: int) -> None:
        self._context, self._feed, self._accumulate = context, feed, accumulate
        self._loader = None
        if dataset is not None:
            self._loader = Loader(dataset, feed.options, batch_size=feed.batch_size, seed=feed.seed, stream=feed.stream)

    def epochs(self) -> Iterator[Iterator[Fed]]:
        """The batches of every epoch."""
        if not self._feed.stream:
            return map(self.epoch, self._feed.indices)
        return _stream_epochs(self._feed, self._from_stream)

    def epoch(self, indices: Sequence[Sequence[Any]]) -> Iterator[Fed]:
        """The batches of these samples."""
        places = turns(len(indices), self._accumulate)
        for place, (turn, batch) in enumerate(zip(places, self._read(indices), strict=True), 1):
            size = len(indices[place - 1])
            if self._feed.told:
                (size,) = _announced(self._context, [0 if batch is None else images_in(batch[0])])
            yield Fed(turn, size, size, batch)

    def _read(self, indices: Sequence[Sequence[Any]] = ()) -> Iterator[Batch | None]:
        """What the loader gives; None for each on a rank without one."""
        if self._loader is None:
            return itertools.repeat(None, len(indices))
        return (_checked(batch, self._feed) for batch in self._loader.epoch(indices))

    def _from_stream(self, left: int | None) -> Iterator[Fed]:
        """One pass over the stream: how many batches an update has, the master knows once it has read them."""
        source = None if self._loader is None else itertools.islice(self._read(), left)
        while True:
            group = [] if source is None else list(itertools.islice(source, self._accumulate))
            sizes = [images_in(batch[0]) for batch in group if batch is not None]
            sizes = [size for size in _announced(self._context, sizes, self._accumulate) if size]
            batches: Sequence[Batch | None] = group or [None] * len(sizes)
            for turn, size, batch in zip(turns(len(sizes), self._accumulate), sizes, batches, strict=True):
                yield Fed(turn, size, size, batch)
            if len(sizes) < self._accumulate:
                return


class PartialBatches:
    """The batches of ``ddp``: each rank has its part of each.

    It reads the samples of its part itself; those of a stream the master reads and hands out, as nobody else can know
    what comes next.
    """

    def __init__(self, context: RankContext, dataset: Dataset[Any], feed: Feed, accumulate: int) -> None:
        self._context, self._feed, self._accumulate = context, feed, accumulate
        options = dict(feed.options)
        if feed.stream:
            options["collate_fn"] = _Parts(context.size, options.get("collate_fn") or default_collate)
        self._loader = None
        if context.rank == 0 or not feed.stream:
            self._loader = Loader(
                dataset, options, batch_size=feed.batch_size, seed=feed.seed + context.rank, stream=feed.stream
            )

    def epochs(self) -> Iterator[Iterator[Fed]]:
        """The batches of every epoch."""
        if not self._feed.stream:
            return map(self.epoch, self._feed.indices)
        return _stream_epochs(self._feed, self._from_stream)

    def epoch(self, indices: Sequence[Sequence[Any]]) -> Iterator[Fed]:
        """This rank's part of the batches of these samples."""
        assert self._loader is not None
        rank, ranks = self._context.rank, self._context.size
        parts = [part_of(rank, ranks, batch) for batch in indices]
        # A rank without an image of a small last batch still has to take part: with one image, which counts for
        # nothing.
        read = self._loader.epoch([part or list(batch[:1]) for part, batch in zip(parts, indices, strict=True)])
        places = turns(len(indices), self._accumulate)
        for turn, batch, part, whole in zip(places, read, parts, indices, strict=True):
            own, size, given = len(part), len(whole), _checked(batch, self._feed)
            if self._feed.told:
                own = images_in(given[0]) if part else 0
                size = _summed(self._context, own)
            yield Fed(turn, size, own, given)

    def _from_stream(self, left: int | None) -> Iterator[Fed]:
        source = None if self._loader is None else itertools.islice(self._loader.epoch(), left)
        while True:
            group = [] if source is None else list(itertools.islice(source, self._accumulate))
            places = turns(len(group), self._accumulate)
            handed = [[(turn, *part) for part in parts] for turn, parts in zip(places, group, strict=True)]
            mine = _scattered(self._context, [[parts[rank] for parts in handed] for rank in range(self._context.size)])
            for turn, size, own, batch in mine:
                yield Fed(turn, size, own, _checked(batch, self._feed))
            if len(mine) < self._accumulate:
                return


class ValidationBatches:
    """Images to classify, on the master; with their number in each batch on the other ranks, unless it is ``alone``."""

    def __init__(self, context: RankContext, dataset: Dataset[Any] | None, feed: Feed, *, alone: bool = False) -> None:
        self._context, self._feed, self._alone = context, feed, alone
        self._loader = None
        if dataset is not None:
            options = validation_options(feed.options, dataset)
            self._loader = Loader(
                dataset, options, batch_size=feed.batch_size, seed=feed.seed, stream=is_stream(dataset)
            )

    def __iter__(self) -> Iterator[tuple[int, Batch | None]]:
        """(images in the batch, the batch or None)."""
        images, size = self._feed.validation_images, self._feed.batch_size
        parts = [range(start, min(start + size, images)) for start in range(0, images, size)] if images else []
        read = None if self._loader is None else iter(self._loader.epoch(parts))
        if images is not None and read is None:
            yield from ((len(part), None) for part in parts)
            return
        while True:
            given = None if read is None else next(read, None)
            batch = None if given is None else _checked(given, self._feed)
            count = 0 if batch is None else images_in(batch[0])
            if images is None and not self._alone:
                (count,) = _announced(self._context, [count])
            if not count:
                return
            yield count, batch


class _Parts:
    """Joins the samples of a whole batch to one batch for each rank, as ``collate`` would."""

    def __init__(self, ranks: int, collate: Callable[[list[Any]], Any]) -> None:
        self._ranks, self._collate = ranks, collate

    def __call__(self, samples: list[Any]) -> list[tuple[int, int, Any]]:
        """By rank: images in the whole batch, images of this rank, and its batch."""
        found: list[tuple[int, Any]] = []
        for rank in range(self._ranks):
            part = part_of(rank, self._ranks, range(len(samples)))
            batch = self._collate([samples[place] for place in part] or samples[:1])
            found.append((_count(batch) if part else 0, batch))
        total = sum(own for own, _ in found)
        return [(total, own, batch) for own, batch in found]


def _count(batch: Any) -> int:
    return images_in(split_batch(batch, "a batch", RunError)[0])


def _stream_epochs(feed: Feed, read: Callable[[int | None], Iterator[Fed]]) -> Iterator[Iterator[Fed]]:
    """Passes over a stream, until ``max_steps`` batches have been read in all, or it does not begin anew."""
    left = feed.max_steps
    for number in range(feed.epochs):
        batches = _Counted(read(left))
        first = next(batches, None)
        if first is None and number == 0:
            raise RunError("the stream gave no batch: there is nothing to train on")
        if first is None:
            return
        yield itertools.chain([first], batches)
        if left is not None and (left := left - batches.count) == 0:
            return


class _Counted(Iterator[Fed]):
    """Counts what it hands on."""

    def __init__(self, source: Iterator[Fed]) -> None:
        self._source, self.count = source, 0

    def __next__(self) -> Fed:
        fed = next(self._source)
        self.count += 1
        return fed


def _checked(batch: Any, feed: Feed) -> Batch:
    """The batch as a pair; raises ``RunError`` where it is none, or its images do not have the shapes of the first."""
    inputs, target = split_batch(batch, "a batch", RunError)
    if feed.shapes is not None and (found := shapes_of(inputs)) != feed.shapes:
        raise RunError(
            f"a batch has images of {_text(found)} after others of {_text(feed.shapes)}: {feed.strategy} needs all of "
            "one size; resize or pad them to that (in the data set or a collate_fn), or take strategy='ddp'"
        )
    return inputs, target


def _text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """3x8x12, or with several inputs image 3x8x12 and mask 1x8x12."""
    texts = (f"{name} {'x'.join(map(str, shape)) or 'no axis'}".strip() for name, shape in shapes.items())
    return " and ".join(texts)


def _announced(context: RankContext, sizes: Sequence[int], count: int = 1) -> list[int]:
    """What the master says, ``count`` numbers with zeros behind the last."""
    if context.group is None:
        return [*sizes, *[0] * (count - len(sizes))]
    told = torch.zeros(count, dtype=torch.int64)
    told[: len(sizes)] = torch.tensor(sizes, dtype=torch.int64)
    dist.broadcast(told, 0, group=context.group)
    return [int(size) for size in told]


def _summed(context: RankContext, own: int) -> int:
    total = torch.tensor(own)
    if context.group is not None:
        dist.all_reduce(total, group=context.group)
    return int(total)


def _scattered(context: RankContext, by_rank: list[list[Any]]) -> list[Any]:
    """What the master has for this rank."""
    if context.group is None:
        return by_rank[0]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, by_rank if context.rank == 0 else None, src=0, group=context.group)
    found: list[Any] = mine[0]
    return found

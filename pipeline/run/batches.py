"""Which images make up which batch: the same for every strategy, from the seed alone or as a sampler says."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, Dataset

from pipeline.data.loading import length_of
from pipeline.data.randomness import seeded
from pipeline.errors import InputError, first_line


def batch_indices(
    images: int,
    batch_size: int,
    *,
    epochs: int,
    max_steps: int | None,
    shuffle: bool,
    seed: int,
    drop_last: bool = False,
) -> list[list[list[int]]]:
    """Image indices by epoch and step; every epoch sees every image once, and the last batch of it may be smaller.

    ``drop_last`` leaves that one out then. ``max_steps`` cuts the whole list to that many batches.
    """
    generator = torch.Generator().manual_seed(seed)
    used = images - images % batch_size if drop_last else images
    left = epochs * -(-used // batch_size) if max_steps is None else max_steps
    found: list[list[list[int]]] = []
    for _ in range(epochs):
        order = (torch.randperm(images, generator=generator) if shuffle else torch.arange(images)).tolist()
        steps = [order[start : start + batch_size] for start in range(0, used, batch_size)][:left]
        left -= len(steps)
        if steps:
            found.append(steps)
    return found


def part_of(rank: int, ranks: int, batch: Sequence[int]) -> list[int]:
    """The equal part of a batch that a rank gets under ``ddp``; the first ranks take the remainder."""
    size, remainder = divmod(len(batch), ranks)
    start = rank * size + min(rank, remainder)
    return list(batch[start : start + size + (rank < remainder)])


def order(
    dataset: Dataset[Any],
    options: Mapping[str, Any],
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    shuffle: bool,
    seed: int,
) -> list[list[list[Any]]]:
    """Sample indices by epoch and step: as a sampler among the ``options`` gives them, else from the seed alone."""
    if options.get("sampler") is not None or options.get("batch_sampler") is not None:
        return _sampled(dataset, options, batch_size=batch_size, epochs=epochs, max_steps=max_steps, seed=seed)
    return batch_indices(
        len(dataset),  # type: ignore[arg-type]
        batch_size,
        epochs=epochs,
        max_steps=max_steps,
        shuffle=shuffle,
        seed=seed,
        drop_last=bool(options.get("drop_last")),
    )


def _sampled(
    dataset: Dataset[Any],
    options: Mapping[str, Any],
    *,
    batch_size: int,
    epochs: int,
    max_steps: int | None,
    seed: int,
) -> list[list[list[Any]]]:
    """As the sampler among the ``options`` gives them.

    One that has no generator of its own draws from one that is seeded with ``seed``.
    """
    sampler = options.get("sampler")
    chosen = options.get("batch_sampler")
    batches: Iterable[Any] = (
        BatchSampler(sampler, batch_size, bool(options.get("drop_last"))) if chosen is None else chosen  # type: ignore[arg-type]
    )
    source = sampler if chosen is None else chosen
    name, images = type(source).__name__, length_of(dataset)
    found: list[list[list[Any]]] = []
    left = max_steps
    with seeded(seed):
        for _ in range(epochs):
            try:
                steps = [list(batch) for batch in itertools.islice(batches, left)]
            except Exception as error:
                raise InputError(f"{name} cannot say which samples to take: {first_line(error)}") from error
            for index in itertools.chain.from_iterable(steps):
                if images is not None and isinstance(index, int) and not -images <= index < images:
                    raise InputError(f"{name} gives sample {index} of a data set that has {images}")
            if not all(steps):
                raise InputError(f"{name} gives a batch without samples")
            if steps:
                found.append(steps)
            if left is not None and (left := left - len(steps)) == 0:
                break
    if not found:
        raise InputError(f"{name} gives no batch")
    return found

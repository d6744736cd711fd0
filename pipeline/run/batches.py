"""Which images make up which batch: the same for every strategy, from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

Batch = tuple[torch.Tensor, torch.Tensor]


def batch_indices(
    images: int, batch_size: int, *, epochs: int, max_steps: int | None, shuffle: bool, seed: int
) -> list[list[list[int]]]:
    """Image indices by epoch and step; every epoch sees every image once, and the last batch of it may be smaller.

    ``max_steps`` cuts the whole list to that many batches.
    """
    generator = torch.Generator().manual_seed(seed)
    left = epochs * -(-images // batch_size) if max_steps is None else max_steps
    found: list[list[list[int]]] = []
    for _ in range(epochs):
        order = (torch.randperm(images, generator=generator) if shuffle else torch.arange(images)).tolist()
        steps = [order[start : start + batch_size] for start in range(0, images, batch_size)][:left]
        left -= len(steps)
        if steps:
            found.append(steps)
    return found


def batches(
    dataset: Dataset[Any], indices: Sequence[Sequence[int]], options: Mapping[str, Any] | None = None
) -> Iterator[Batch]:
    """The batches themselves, as torch's own loader makes them with ``options``."""
    # With a generator of its own it leaves torch's, from which networks draw, alone.
    given = {"generator": torch.Generator(), **(options or {})}
    yield from DataLoader(dataset, batch_sampler=[list(one) for one in indices], **given)


def part_of(rank: int, ranks: int, batch: Sequence[int]) -> list[int]:
    """The equal part of a batch that a rank gets under ``ddp``; the first ranks take the remainder."""
    size, remainder = divmod(len(batch), ranks)
    start = rank * size + min(rank, remainder)
    return list(batch[start : start + size + (rank < remainder)])

"""The random numbers of Python, numpy and torch, which a model, a data set or a sampler may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_NUMPY_SEEDS = 2**32


def seed_all(seed: int) -> None:
    """Begin the random numbers of Python, numpy and torch anew, as for a plain loop that is seeded with ``seed``."""
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)  # noqa: NPY002 - what a user's own code draws from
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """For the length of the block all random numbers follow from ``seed``; afterwards they go on as they were."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % _NUMPY_SEEDS)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that also reseeds every CUDA device
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)  # noqa: NPY002

"""One network of the zoo: how it is made, what it is given, and what its output is held against."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from tests.zoo.losses import of_all

CLASSES = 4
IMAGES = 17
"""Two batches of 6 and a smaller last one of 5."""
BATCH = 6
SEED = 0
_MADE_WITH = 3
"""Another seed for the weights, so that the training does not draw the same numbers again."""

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """A network of some package."""

    name: str
    package: str
    """The distribution it is from, as pip knows it."""
    make: Callable[[], nn.Module]
    """Imports the package and gives the network with random weights, in float32."""
    image_shape: tuple[int, ...]
    label_shape: tuple[int, ...] | None = ()
    """Shape of the classes of one image: none for one class, (H, W) for one each pixel; None where the label is an
    image of numbers like the input."""
    loss: Loss = of_all
    note: str = ""
    """How it was cut down."""
    refusal: str = ""
    """Why it may be refused; empty where it has to train."""

    def build(self) -> nn.Module:
        """The network in float64, with the same weights every time."""
        seeded(_MADE_WITH)
        return self.make().double().train()

    def dataset(self) -> TensorDataset:
        """Random images and labels, the same every time."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(IMAGES, *self.image_shape, generator=generator, dtype=torch.float64)
        if self.label_shape is None:
            return TensorDataset(images, torch.rand(images.shape, generator=generator, dtype=torch.float64))
        return TensorDataset(images, torch.randint(0, CLASSES, (IMAGES, *self.label_shape), generator=generator))

    @property
    def version(self) -> str:
        """The version of the package."""
        return metadata.version(self.package)


def seeded(seed: int) -> None:
    """Seed all generators that a network may draw from."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- what networks draw from is numpy's old generator
    torch.manual_seed(seed)


def trimmed(model: nn.Module, equal: int) -> nn.Module:
    """``model`` with at most so many blocks in a row whose weights have the same shapes; only of plain sequences."""
    for parent in model.modules():
        if type(parent) is not nn.Sequential:
            continue
        kept: list[tuple[str, nn.Module]] = []
        for name, child in parent.named_children():
            last = [_shapes(one) for _, one in kept[-equal:]]
            if len(last) < equal or not _shapes(child) or any(shapes != _shapes(child) for shapes in last):
                kept.append((name, child))
        for name in [name for name, _ in parent.named_children()]:
            delattr(parent, name)
        for name, child in kept:
            parent.add_module(name, child)
    return model


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


def words(options: Mapping[str, object]) -> str:
    """Options as one would write them in a call."""
    return ", ".join(f"{name}={value}" for name, value in options.items())

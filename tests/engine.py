"""What the engine's tests share: a plain torch loop to compare with, and how two trainings differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.utils.data import TensorDataset

from pipeline.run.batches import batch_indices
from pipeline.run.recipe import OptimizerFactory

IMAGES = 22
BATCH = 8
"""Does not divide the images: the last batch of each epoch is smaller."""


def images(shape: tuple[int, ...] = (3, 32, 32), *, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """Random images and labels."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(0, 10, (IMAGES,), generator=generator),
    )


def plain_loop(
    model: nn.Module, dataset: TensorDataset, optimizer: OptimizerFactory, *, epochs: int = 2, seed: int = 0
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a copy of ``model`` as any torch tutorial would; losses by step and the final state dict."""
    model = copy.deepcopy(model)
    update = optimizer(model.parameters())
    x_BCHW, y_B = dataset.tensors
    dtype = next(model.parameters()).dtype
    losses = []
    epochs_of_batches = batch_indices(len(y_B), BATCH, epochs=epochs, max_steps=None, shuffle=True, seed=seed)
    for batch in (batch for epoch in epochs_of_batches for batch in epoch):
        update.zero_grad()
        loss = nn.functional.cross_entropy(model(x_BCHW[batch].to(dtype)), y_B[batch])
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def largest_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two state dicts, relative to the largest entry of each tensor."""
    assert list(found) == list(expected)
    worst = 0.0
    for name, tensor in expected.items():
        scale = tensor.abs().max().item() or 1.0
        worst = max(worst, (found[name] - tensor).abs().max().item() / scale)
    return worst

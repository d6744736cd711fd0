"""What the engine's tests share: a plain torch loop to compare with, and how two trainings differ."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import TensorDataset

from pipeline.run.batches import batch_indices
from pipeline.run.groups import ParameterGroups
from pipeline.run.recipe import Loss, OptimizerFactory, SchedulerFactory

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
    model: nn.Module,
    dataset: TensorDataset,
    optimizer: OptimizerFactory,
    *,
    batch_size: int = BATCH,
    epochs: int = 2,
    seed: int = 0,
    groups: ParameterGroups | None = None,
    loss: Loss = nn.functional.cross_entropy,
    scheduler: SchedulerFactory | None = None,
    scheduled_by: str = "epoch",
    clip_norm: float | None = None,
    clip_value: float | None = None,
    accumulate: int = 1,
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train a copy of ``model`` as any torch tutorial would; losses by step and the final state dict."""
    model = copy.deepcopy(model).train()
    update = optimizer(model.parameters() if groups is None else groups(model))
    schedule = scheduler(update) if scheduler is not None else None
    x_BCHW, y_B = dataset.tensors
    dtype = next(model.parameters()).dtype
    losses: list[float] = []
    torch.manual_seed(seed)
    for epoch in batch_indices(len(y_B), batch_size, epochs=epochs, max_steps=None, shuffle=True, seed=seed):
        done = len(losses)
        for start in range(0, len(epoch), accumulate):
            together = epoch[start : start + accumulate]
            update.zero_grad()
            for batch in together:
                one = loss(model(x_BCHW[batch].to(dtype)), y_B[batch])
                (one / len(together)).backward()
                losses.append(one.item())
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(model.parameters(), clip_value)
            update.step()
            if schedule is not None and scheduled_by == "step":
                schedule.step()
        if schedule is not None and scheduled_by == "epoch":
            mean = sum(len(batch) * one for batch, one in zip(epoch, losses[done:], strict=True)) / len(y_B)
            schedule.step(*([mean] if isinstance(schedule, ReduceLROnPlateau) else []))
    return losses, model.state_dict()


def largest_difference(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    """The largest difference between two state dicts, relative to the largest entry of each tensor."""
    assert list(found) == list(expected)
    worst = 0.0
    for name, tensor in expected.items():
        scale = tensor.abs().max().item() or 1.0
        worst = max(worst, (found[name] - tensor).abs().max().item() / scale)
    return worst

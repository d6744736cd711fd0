"""Split training gives what one device gives: losses and all weights to 1e-9 relative in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn

import pipeline
from pipeline.cluster.devices import discover
from pipeline.networks import network
from pipeline.plan.strategies import Shares
from tests.engine import BATCH, images, largest_difference, plain_loop

OPTIMIZERS = {
    "SGD with momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=1e-3),
}
SHARES: dict[str, Shares] = {
    "one rank": (1.0,),
    "two equal": (0.5, 0.5),
    "two unequal": (0.3, 0.7),
    "one has a single kernel": {"conv1": (1, 5), "conv2": (9, 1)},
    "one has none": {"conv1": (6, 0), "conv2": (10, 0)},
    "the master has none": {"conv1": (0, 6), "conv2": (0, 10)},
    "three, each without one layer": {"conv1": (0, 1, 5), "conv2": (4, 6, 0)},
    "four unequal": (0.1, 0.2, 0.3, 0.4),
    "four, two of them idle": {"conv1": (0, 3, 0, 3), "conv2": (0, 1, 0, 9)},
    "more devices than kernels": {"conv1": (1, 2, 2, 1), "conv2": (0, 0, 0, 10)},
}


def _ranks(shares: Shares) -> int:
    return len(next(iter(shares.values()))) if isinstance(shares, dict) else len(shares)


def _check(client: Client, model: nn.Module, strategy: str, shares: Shares | None, ranks: int, optimizer: str) -> None:
    dataset = images()
    losses, weights = plain_loop(model, dataset, OPTIMIZERS[optimizer])
    result = pipeline.fit(
        model, dataset, client, members=discover(client)[:ranks], batch_size=BATCH, epochs=2,
        strategy=strategy, shares=shares, optimizer=OPTIMIZERS[optimizer],
    )  # fmt: skip
    np.testing.assert_allclose(result.history.loss.values, losses, rtol=1e-9)
    assert largest_difference(result.model.state_dict(), weights) < 1e-9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shares", SHARES.values(), ids=list(SHARES))
@pytest.mark.parametrize("strategy", ["paper", "kernel"])
def test_split_training_equals_one_device(client: Client, strategy: str, shares: Shares, optimizer: str) -> None:
    _check(client, network("6:10").double(), strategy, shares, _ranks(shares), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("equal", 2), ("equal", 3), ("equal", 4)])
def test_strategies_without_shares_equal_one_device(client: Client, strategy: str, ranks: int, optimizer: str) -> None:
    _check(client, network("6:10").double(), strategy, None, ranks, optimizer)


def test_ddp_without_batch_statistics_equals_one_device(client: Client) -> None:
    _check(client, network("6:10").double(), "ddp", None, 3, "SGD with momentum")


class _Branches(nn.Module):
    """Written as a class: odd convolutions, BatchNorm, a residual sum, functional calls, two dense layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 7, 5, stride=2, padding=3, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(7)
        self.second = nn.Conv2d(7, 7, 3, padding=1, padding_mode="circular")
        self.activate = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.hidden = nn.Linear(63, 12)
        self.last = nn.Linear(12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.activate(self.norm(self.first(x)))
        y = self.pool(torch.relu(self.second(y) + y))
        return self.last(torch.relu(self.hidden(torch.flatten(y, 1))))


class _DependsOnData(nn.Module):
    """Cannot be traced: stays whole on the master."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).mean(dim=(2, 3))
        return y if y.sum() > 0 else -y


class _Tied(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 4, 3)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.dense = nn.Linear(4, 10)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(torch.tanh(self.twice(torch.tanh(self.entry(x))))) * self.scale
        return self.dense(y.mean(dim=(2, 3)))


class _Handwritten(nn.Module):
    """What people write: functional in-place activation, a mask, and a view by the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5)
        self.next = nn.Conv2d(6, 8, 5, stride=2)
        self.dense = nn.Linear(8 * 12 * 12, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu(self.next(self.conv(x)), inplace=True)
        y = y * (y > 0.1)
        return self.dense(y.view(y.size(0), -1))


class _Table(nn.Module):
    """A submodule that is given a buffer of the model instead of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5)
        self.of_table = nn.Linear(4, 6)
        self.register_buffer("table", torch.linspace(-1, 1, 4))
        self.dense = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(torch.tanh(self.conv(x)).mean(dim=(2, 3)) * self.of_table(self.table))


def test_a_handwritten_model_can_be_calibrated_and_planned(client: Client) -> None:
    _check(client, _Handwritten().double(), "auto", None, 2, "Adam")


@pytest.mark.parametrize("strategy", ["paper", "kernel"])
def test_another_memory_format_is_kept_exact(client: Client, strategy: str) -> None:
    model = network("6:10").double().to(memory_format=torch.channels_last)
    _check(client, model, strategy, (0.3, 0.7), 2, "SGD with momentum")


@pytest.mark.parametrize("strategy", ["paper", "kernel"])
@pytest.mark.parametrize(
    "model",
    [_Branches, _DependsOnData, _Tied, _Handwritten, _Table],
    ids=["branches", "data-dependent", "tied", "handwritten", "table"],
)
def test_models_written_as_classes_are_exact_too(client: Client, model: type[nn.Module], strategy: str) -> None:
    torch.manual_seed(3)
    _check(client, model().double(), strategy, (0.5, 0.2, 0.3), 3, "SGD with momentum")


def test_a_dense_network_is_split_too(client: Client) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(4500, 16), nn.ReLU(), nn.Linear(16, 10))
    _check(client, model.double(), "kernel", (0.25, 0.75), 2, "Adam")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64], ids=str)
def test_images_of_any_type_are_trained_on(client: Client, dtype: torch.dtype) -> None:
    model, dataset = network("6:10"), images(dtype=dtype)
    losses, _ = plain_loop(model, dataset, OPTIMIZERS["SGD with momentum"], epochs=1)
    result = pipeline.fit(
        model, dataset, client, members=discover(client)[:2], batch_size=BATCH, strategy="kernel", shares=(0.5, 0.5),
        optimizer=OPTIMIZERS["SGD with momentum"],
    )  # fmt: skip
    np.testing.assert_allclose(result.history.loss.values, losses, rtol=1e-4)

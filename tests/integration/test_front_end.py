"""Networks that are hard to capture, split and trained as a plain loop trains them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from distributed import Client
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

import pipeline
from pipeline.data.randomness import seed_all
from tests.engine import largest_difference

BATCH, IMAGES = 6, 14
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    devices = [pipeline.Device("cpu"), pipeline.Device("cpu", speed=0.5)]
    with pipeline.local_cluster(devices, dashboard=False) as connected:
        yield connected


class _Augmented(Dataset[Any]):
    """Images that draw from torch's generator, as random crops and flips do."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(0, 4, (IMAGES,), generator=generator)

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        return (image.flip(-1) if float(torch.rand(())) < 0.5 else image), self.labels[index]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # noqa: ARG004 - what torch calls it with
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        return gradient


class _Binary(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Straight.apply(x)  # type: ignore[no-any-return, no-untyped-call]


class _Tokens(nn.Module):
    """Attention over patches with a class token, positions, masks, and paths that are dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 17, 8))
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.places
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.8) / 0.8 if self.training else 1.0
        y = self.norm(tokens)
        tokens = tokens + self.attention(y, y, y, need_weights=False)[0] * kept
        return tokens[:, 0]


@dataclass
class _Found:
    classes: torch.Tensor
    features: torch.Tensor


class _Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class _Telling(nn.Module):
    """Gives a dataclass, and keeps a mean of what it saw in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = _Standardised(3, 8, 3), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: torch.Tensor) -> _Found:
        y = torch.where((y := self.stem(x)) > 0, y, 0.1 * y).mean((2, 3))
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        return _Found(self.head(y - self.mean), y)


def _chain(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), *parts)


def _pooled(width: int = 8) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: _chain(nn.Dropout2d(0.3), nn.ReLU(), nn.Dropout(0.2), nn.AlphaDropout(0.1), *_pooled()),
    "dropout of another rank": lambda: _chain(nn.Dropout3d(0.3), *_pooled()),
    "a custom function": lambda: _chain(_Binary(), nn.Conv2d(8, 8, 3), *_pooled()),
    "attention": lambda: _chain(_Tokens(), nn.Linear(8, 4)),
    "a dataclass": _Telling,
}


def _loss(output: Any, y_B: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.classes if isinstance(output, _Found) else output, y_B)


def _plain(model: nn.Module, dataset: Dataset[Any]) -> tuple[list[float], dict[str, torch.Tensor]]:
    update, losses = SGD(model.parameters()), []
    seed_all(0)
    for start in range(0, IMAGES, BATCH):
        x_BCHW, y_B = default_collate([dataset[index] for index in range(start, min(start + BATCH, IMAGES))])
        update.zero_grad()
        loss = _loss(model(x_BCHW), y_B)
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("strategy", ["kernel", "batch"])
@pytest.mark.parametrize("build", MODELS.values(), ids=list(MODELS))
def test_it_trains_as_on_one_device(client: Client, build: Callable[[], nn.Module], strategy: Any) -> None:
    def made() -> nn.Module:
        torch.manual_seed(3)
        return build().double()

    losses, state = _plain(made(), _Augmented())
    result = pipeline.fit(
        made(), _Augmented(), client=client, batch_size=BATCH, epochs=1, strategy=strategy, shares=(0.6, 0.4),
        optimizer=SGD, loss=_loss, shuffle=False, seed=0,
    )  # fmt: skip
    assert result.history.loss.values == pytest.approx(losses, rel=1e-9)
    assert largest_difference(result.model.state_dict(), state) < 1e-9
    assert result.plan.split == pytest.approx(1.0)


def test_several_inputs_are_split(client: Client) -> None:
    class _Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.dense = nn.Conv2d(3, 8, 3), nn.Linear(2, 8)

        def forward(self, image: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
            return (F.relu(self.conv(image)).mean((2, 3)) * self.dense(facts))[:, :4]

    class _Pairs(_Augmented):
        def __getitem__(self, index: int) -> Any:
            image, label = super().__getitem__(index)
            return {"image": image, "facts": image.mean((1, 2))[:2]}, label

    torch.manual_seed(3)
    model = _Two().double()
    found = {
        strategy: pipeline.fit(
            model, _Pairs(), client=client, batch_size=BATCH, strategy=strategy, shares=(0.6, 0.4), optimizer=SGD
        ).history.loss.values
        for strategy in ("kernel", "batch")
    }
    alone = pipeline.fit(model, _Pairs(), client=client, batch_size=BATCH, strategy="single", optimizer=SGD)
    for losses in found.values():
        assert losses == pytest.approx(alone.history.loss.values, rel=1e-9)

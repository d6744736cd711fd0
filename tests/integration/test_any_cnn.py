"""Models as people write them, and recipes as people use them: trained in parts as on one device, to 1e-9."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distributed import Client
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

import pipeline
from pipeline._torchvision import make_importable
from pipeline.cluster.devices import discover
from pipeline.cluster.gang import RankContext, run_gang
from pipeline.errors import InputError
from pipeline.graph.effects import Effect
from pipeline.graph.trace import trace
from pipeline.plan.labels import DDP_LABELS
from pipeline.run.callbacks import Epoch
from pipeline.run.clock import Clock
from pipeline.run.ddp import DataParallel
from pipeline.run.recipe import Recipe, Turn
from tests.engine import images, largest_difference, plain_loop

make_importable()
from torchvision.ops import StochasticDepth  # noqa: E402

SHARES = (0.5, 0.3, 0.2)
IMAGES = images((3, 8, 8))
MOMENTUM = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
DECAY = functools.partial(torch.optim.SGD, lr=0.05, weight_decay=0.1)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with pipeline.local_cluster([pipeline.Device("cpu")] * 3, dashboard=False) as connected:
        yield connected


def _fit(client: Client, model: nn.Module, strategy: str, dataset: TensorDataset = IMAGES, **how: Any) -> Any:
    ready = {"batch_size": 8, "epochs": 1, "optimizer": MOMENTUM, "shares": SHARES, **how}
    return pipeline.fit(model, dataset, client, members=discover(client)[:3], strategy=strategy, **ready)


def _check(
    client: Client,
    model: nn.Module,
    strategy: str,
    *,
    dataset: TensorDataset = IMAGES,
    tolerance: float = 1e-9,
    **how: Any,
) -> Any:
    ready = {"batch_size": 8, "epochs": 1, "optimizer": MOMENTUM, **how}
    as_given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = {"groups" if name == "parameter_groups" else name: value for name, value in ready.items()}
    losses, weights = plain_loop(model, dataset, **plain)
    result = _fit(client, model, strategy, dataset, **ready)
    np.testing.assert_allclose(result.history.loss.values, losses, rtol=tolerance)
    assert largest_difference(result.model.state_dict(), weights) < tolerance
    assert largest_difference(model.state_dict(), as_given) == 0
    return result


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and channels == out
        self.shortcut = (
            nn.Sequential()
            if same
            else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(5)
        self.blocks = nn.Sequential(_Block(5, 5), _Block(5, 7, 2))
        self.dense = nn.Linear(7, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks(F.relu(self.norm(self.stem(x)), inplace=True))
        return self.dense(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class Preactivated(nn.Module):
    """Reads again what an activation has overwritten: plain torch reads the activated values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.dense = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        out = self.relu(x)
        x = self.norm(self.conv(out) + x)
        kept = x
        x += 1
        return self.dense((x + kept).mean((2, 3)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.groups = nn.GroupNorm(4, 8, affine=False)
        self.dense = nn.Linear(8, 10)
        self.register_buffer("mean", torch.linspace(-1, 1, 8).view(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.groups(self.norm(self.stem(x)) - self.mean)
        y = torch.tanh(self.norm(self.conv(y)))
        y = self.groups(torch.cat([y[:, 4:], y[:, :4]], 1))
        return self.dense((torch.tanh(self.norm(self.conv(y))) - self.mean).mean((2, 3)))


class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.other = nn.Conv2d(6, 6, 3, padding=1)
        self.other.weight = self.one.weight
        self.read = nn.Conv2d(6, 6, 1)
        self.dense = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.read(self.other(torch.tanh(self.one(torch.tanh(self.stem(x)))))))
        return self.dense(F.conv2d(y, self.read.weight).mean((2, 3)))


Heads = namedtuple("Heads", ["main", "auxiliary"])


class TwoHeads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.dense = nn.Linear(8, 10)
        self.auxiliary = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> Any:
        y = F.relu(self.conv1(x))
        main = self.dense(F.relu(self.conv2(y)).mean((2, 3)))
        other = self.auxiliary(y.amax((2, 3)))
        return {"tuple": (main, other), "dict": {"main": main, "other": other}, "names": Heads(main, other)}[self.kind]


def _of_both_heads(output: Any, y_B: torch.Tensor) -> torch.Tensor:
    main, other = output.values() if isinstance(output, dict) else output
    return F.cross_entropy(main, y_B) + 0.3 * F.cross_entropy(other, y_B)


class SeveralResults(nn.Module):
    """Returns what cannot travel: tensors in a tuple of their own, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.dense = nn.Linear(6, 20)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        return self.dense(y.mean((2, 3))).chunk(2, 1), y.shape, y.chunk(2, 1)


def _of_several(output: Any, y_B: torch.Tensor) -> torch.Tensor:
    (one, other), _, parts = output
    return F.cross_entropy(one, y_B) + F.cross_entropy(other, y_B) + parts[1].square().mean()


class _Gate(nn.Module):
    """Looks at its data, and keeps running statistics and a count of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = self.seen + len(x)
        y = self.norm(self.conv(x))
        return F.relu(y, inplace=True) if x.mean() > 0 else torch.tanh(y)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.gate = _Gate(6)
        self.conv2 = nn.Conv2d(6, 7, 3)
        self.dense = nn.Linear(7, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(F.relu(self.conv2(self.gate(self.conv1(x)))).mean((2, 3)))


class PartlyFrozen(nn.Module):
    """Weights that are frozen, detached, under ``no_grad``, not used or of no use to the loss: none may decay."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 6, 3, padding=1).requires_grad_(False)
        self.norm = nn.BatchNorm2d(6)
        self.norm.weight.requires_grad_(False)
        self.detached = nn.Conv2d(6, 6, 3, padding=1)
        self.without = nn.Conv2d(6, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.conv.bias.requires_grad_(False)  # type: ignore[union-attr]
        self.unused = nn.Conv2d(6, 6, 3)
        self.aside = nn.Conv2d(6, 5, 3)
        self.statistics = nn.BatchNorm2d(5)
        self.dense = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.frozen(x))
        self.statistics(self.aside(y))
        with torch.no_grad():
            z = torch.relu(self.without(y))
        y = self.conv(y) * z + torch.relu(self.detached(y)).detach()
        return self.dense(y.mean((2, 3)))


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.of_channels = nn.Dropout2d(0.3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.alpha = nn.AlphaDropout(0.2)
        self.norm = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.by_row = StochasticDepth(0.4, "row")
        self.by_batch = StochasticDepth(0.4, "batch")
        self.of_features = nn.Dropout(0.5)
        self.dense = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.of_channels(F.relu(self.conv1(x)))
        y = self.norm(self.alpha(F.selu(self.conv2(y))))
        y = y + self.by_row(self.conv3(y))
        y = y + self.by_batch(self.conv3(y))
        y = F.dropout(y.permute(0, 2, 3, 1), 0.25, training=self.training)
        return self.dense(self.of_features(y.mean((1, 2))))


class ReadsParameters(nn.Module):
    """A normalised input, layer scale, a learned bias, one slope for all channels, optional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.bias = nn.Parameter(torch.linspace(-1, 1, 6).view(6, 1, 1))
        self.spatial = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 12)
        self.narrow = nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.full((6,), 0.5))
        self.slope = nn.PReLU()
        self.dense = nn.Linear(6, 10)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: torch.Tensor, features: bool = False, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = x - self.mean
        x = self.stem(x) + self.bias
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))) * self.scale
        x = self.slope(x + y.permute(0, 3, 1, 2))
        if mask is not None:
            x = x * mask
        return x if features else self.dense(x.mean((-2, -1))) * self.temperature


class Norms(nn.Module):
    """Every kind of BatchNorm, one of which the model keeps in evaluation mode, and its state with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.averaging = nn.BatchNorm2d(6, momentum=None)
        self.conv2 = nn.Conv2d(6, 7, 3, padding=1)
        self.untracked = nn.BatchNorm2d(7, track_running_stats=False)
        self.frozen = nn.BatchNorm2d(7, affine=False)
        self.hidden = nn.Linear(7, 8)
        self.of_features = nn.BatchNorm1d(8)
        self.dense = nn.Linear(8, 10)
        self.steps, self.features = 0, None

    def train(self, mode: bool = True) -> Norms:
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features = y = self.averaging(self.conv1(x))
        y = self.frozen(torch.tanh(self.untracked(self.conv2(y)))).mean((2, 3))
        return self.dense(F.relu(self.of_features(self.hidden(y))))


class Reshaped(nn.Module):
    """Channel shuffle by shapes, parts of channels, items set, squeeze and excitation, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, padding_mode="reflect")
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.squeeze, self.excite = nn.Linear(8, 3), nn.Linear(3, 8)
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1, output_padding=1)
        self.dense = nn.Linear(6 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.stem(x))
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, -1, h, w)
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, self.depthwise(right)), 1)
        x[:, 0] = 0
        x[:, 1:3] *= 2
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3)))))).view(b, c, 1, 1)
        return self.dense(F.max_pool2d(self.up(x), 2).view(x.size(0), -1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a small ResNet": ResNet,
    "read after an activation in place": Preactivated,
    "modules used twice": Twice,
    "weights tied": TiedWeights,
    "a submodule that looks at its data": Gated,
    "partly frozen": PartlyFrozen,
    "dropouts": Dropouts,
    "parameters read in forward": ReadsParameters,
    "all kinds of BatchNorm": Norms,
    "channels moved about": Reshaped,
}


def _made(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return model().double()


@pytest.mark.parametrize("strategy", ["kernel", "batch"])
@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
def test_models_as_people_write_them(client: Client, model: Callable[[], nn.Module], strategy: str) -> None:
    _check(client, _made(model), strategy, optimizer=DECAY if model is PartlyFrozen else MOMENTUM)


@pytest.mark.parametrize("model", [ResNet, Gated, PartlyFrozen, Dropouts])
def test_convolutions_of_any_model_can_be_split_alone(client: Client, model: Callable[[], nn.Module]) -> None:
    _check(client, _made(model), "paper", optimizer=DECAY)


@pytest.mark.parametrize("kind", ["tuple", "dict", "names"])
def test_a_loss_can_take_several_outputs(client: Client, kind: str) -> None:
    strategy = "batch" if kind == "tuple" else "kernel"
    _check(client, _made(lambda: TwoHeads(kind)), strategy, loss=_of_both_heads)


@pytest.mark.parametrize("strategy", ["kernel", "batch"])
def test_a_model_can_return_what_cannot_travel(client: Client, strategy: str) -> None:
    _check(client, _made(SeveralResults), strategy, loss=_of_several)


def test_only_the_submodule_that_cannot_be_traced_stays_whole() -> None:
    graph = trace(_made(Gated), torch.zeros(2, 3, 8, 8))
    assert [one.name for one in graph.operations if one.effect is Effect.WHOLE] == ["gate"]


@pytest.mark.parametrize("strategy", ["kernel", "batch"])
def test_validation_is_that_of_the_trained_model_in_evaluation_mode(client: Client, strategy: str) -> None:
    result = _check_with_validation(client, _made(Dropouts), strategy)
    x_BCHW, y_B = IMAGES.tensors
    with torch.no_grad():
        expected = (result.model.eval()(x_BCHW).argmax(1) == y_B).double().mean().item()
    assert result.history.accuracy.values[-1] == pytest.approx(expected, abs=1e-12)


def _check_with_validation(client: Client, model: nn.Module, strategy: str) -> Any:
    losses, _ = plain_loop(model, IMAGES, MOMENTUM)
    result = _fit(client, model, strategy, epochs=2, validation=IMAGES)
    np.testing.assert_allclose(result.history.loss.values, losses, rtol=1e-9)
    return result


def _without_decay_for_norms(model: nn.Module) -> list[dict[str, Any]]:
    trained = [one for one in model.parameters() if one.requires_grad]
    return [
        {"params": [one for one in trained if one.dim() > 1], "weight_decay": 0.1},
        {"params": [one for one in trained if one.dim() <= 1], "lr": 0.2},
    ]


RECIPES: dict[str, dict[str, Any]] = {
    "parameter groups": {"parameter_groups": _without_decay_for_norms},
    "schedule by epoch": {"scheduler": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.3), "epochs": 3},
    "schedule by step": {
        "scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=8),
        "scheduled_by": "step",
        "epochs": 2,
    },
    "schedule by the loss": {
        "scheduler": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=0.5),
        "epochs": 3,
    },
    "clipped norm": {"clip_norm": 0.05},
    "clipped values": {"clip_value": 0.01},
    "two batches for an update": {"accumulate": 2, "epochs": 2},
    "three batches for an update, clipped": {"accumulate": 3, "batch_size": 4, "clip_norm": 0.1},
    "a last batch smaller than there are ranks": {"batch_size": 7, "epochs": 2},
    "Adam": {"optimizer": functools.partial(torch.optim.Adam, lr=1e-3)},
    "AdamW": {"optimizer": functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)},
    "RMSprop": {"optimizer": functools.partial(torch.optim.RMSprop, lr=1e-3, momentum=0.5)},
    "Adagrad": {"optimizer": functools.partial(torch.optim.Adagrad, lr=1e-2)},
}


@pytest.mark.parametrize(
    ("recipe", "strategy"), [(recipe, ("kernel", "batch", "paper")[index % 3]) for index, recipe in enumerate(RECIPES)]
)
def test_recipes_as_people_use_them(client: Client, recipe: str, strategy: str) -> None:
    how = RECIPES[recipe]
    if how.get("batch_size") == 7:
        strategy = "batch"  # 22 images: the last batch has one, which leaves two ranks without
        _check(client, _made(ReadsParameters), strategy, **how)
        return
    # Adam divides by roots of squares, which makes much of the rounding of gradients that are nearly zero.
    _check(client, _made(ReadsParameters if "optimizer" in how else ResNet), strategy, **how)


def test_the_norm_of_weights_in_copies_is_clipped_once(client: Client) -> None:
    _check(client, _made(ResNet), "batch", clip_norm=0.05, accumulate=2)


def test_ddp_averages_over_batches_and_ranks_alike(client: Client) -> None:
    _check(client, _made(TiedWeights), "ddp", accumulate=3, clip_norm=0.1, batch_size=4, epochs=2)


def _sums_of_ddp(context: RankContext, turns: list[Turn]) -> int:
    """How many buckets are summed in so many turns."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
    parallel = DataParallel(context, model, Recipe(loss=F.cross_entropy, optimizer=MOMENTUM))
    summed: list[int] = []

    def summing(_, bucket):  # type: ignore[no-untyped-def]
        summed.append(bucket.index())
        future = dist.all_reduce(bucket.buffer(), group=context.group, async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    parallel._parallel.register_comm_hook(None, summing)
    for turn in turns:
        clock = Clock(len(DDP_LABELS), offset=0.0, keep=1)
        with clock.step():
            parallel.train_step(1 / context.size, torch.randn(2, 3, 8, 8), torch.tensor([1, 2]), clock, turn)
    return len(summed)


def test_ddp_sums_once_for_all_batches_of_an_update(client: Client) -> None:
    members = discover(client)[:2]
    turns = [Turn(first=place == 0, last=place == 2, weight=1 / 3) for place in (0, 1, 2)]
    each, once = (
        run_gang(client, members, _sums_of_ddp, [(one,)] * 2, label="sums of ddp") for one in ([Turn()] * 3, turns)
    )
    assert each == [3, 3]
    assert once == [1, 1]


@pytest.mark.parametrize("strategy", ["kernel", "batch"])
def test_single_precision_is_exact_to_single_precision(client: Client, strategy: str) -> None:
    torch.manual_seed(3)
    _check(client, ReadsParameters(), strategy, dataset=images((3, 8, 8), dtype=torch.float32), tolerance=1e-4)


class _ByTheNorm(torch.optim.Optimizer):
    """Steps by the norm of each weight, as LARS does."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                one.sub_(0.1 * one.norm() * one.grad)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [(torch.optim.LBFGS, r"the optimiser cannot be used: .*closure"), (_ByTheNorm, "_ByTheNorm mixes elements")],
)
def test_optimisers_that_need_whole_weights_are_refused(client: Client, optimizer: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        _fit(client, _made(TiedWeights), "kernel", optimizer=optimizer)
    assert len(str(refusal.value).splitlines()) == 1


class _StopAfterTwo:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_epoch(self, epoch: Epoch) -> bool:
        self.losses.append(epoch.loss)
        return epoch.number == 2


def test_a_callback_can_end_the_training(client: Client) -> None:
    losses, weights = plain_loop(_made(ResNet), IMAGES, MOMENTUM, epochs=2)
    result = _fit(client, _made(ResNet), "batch", epochs=5, callbacks=[_StopAfterTwo()])
    np.testing.assert_allclose(result.history.loss.values, losses, rtol=1e-9)
    assert largest_difference(result.model.state_dict(), weights) < 1e-9
    (ended,) = result.callbacks
    assert ended.losses == pytest.approx(
        [np.average(losses[:3], weights=[8, 8, 6]), np.average(losses[3:], weights=[8, 8, 6])]
    )

"""Models as people write them, for the tests of the engine: each has something that is hard to split."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeline._torchvision import make_importable

make_importable()
from torchvision.ops import StochasticDepth  # noqa: E402


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


def loss_of_both_heads(output: Any, y_B: torch.Tensor) -> torch.Tensor:
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


def loss_of_several(output: Any, y_B: torch.Tensor) -> torch.Tensor:
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

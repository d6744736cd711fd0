"""Random small CNNs, in all that people put into one, for the tests of the engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

CLASSES = 5
_LARGEST = 12
"""Pixels a side, beyond which nothing is made larger."""

Shape = tuple[int, int, int]


class _Call(nn.Module):
    """A function as a module, which a trace sees through."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class _Act(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kind = self.kind
        if kind == "relu in place":
            return F.relu(x, True)
        if kind == "add in place":
            x += 0.3
            return x
        if kind == "scale in place":
            return x.mul_(0.7)
        if kind == "clamp":
            return x.clamp(-1.5, 1.5)
        if kind == "gelu":
            return F.gelu(x)
        if kind == "neither more nor less":
            return x - x.mean(1, keepdim=True) / (1 + x.square().mean((2, 3), keepdim=True))
        return torch.softmax(x, 1) + x if kind == "softmax" else torch.tanh(x)


class _Residual(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module, kind: str) -> None:
        super().__init__()
        self.branch, self.shortcut, self.kind = branch, shortcut, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.branch(x)
        if self.kind == "in place":
            y += self.shortcut(x)
            return y
        if self.kind == "gated":
            return self.shortcut(x) * torch.sigmoid(y)
        if self.kind == "detached":
            return self.shortcut(x) + y.detach() * x.mean()
        if self.kind == "without gradient":
            with torch.no_grad():
                y = self.branch(x)
            return self.shortcut(x) + y
        return self.shortcut(x) + y


class _Concatenated(nn.Module):
    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class _Parted(nn.Module):
    def __init__(self, first: int, branch: nn.Module, kind: str) -> None:
        super().__init__()
        self.first, self.branch, self.kind = first, branch, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "chunk":
            one, other = x.chunk(2, dim=1)
        elif self.kind == "split":
            one, other = torch.split(x, [self.first, x.shape[1] - self.first], 1)
        else:
            one, other = x[:, : self.first], x[:, self.first :]
        return torch.cat((other, self.branch(one)), dim=1)


class _SetItem(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 1.5
        y[:, 0] = 0
        y[:, 1:] += 0.5
        return y


class _Shuffled(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.size()
        return x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


class _Excited(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        dense = kind == "dense"
        self.squeeze = nn.Linear(channels, 3) if dense else nn.Conv2d(channels, 3, 1)
        self.excite = nn.Linear(3, channels) if dense else nn.Conv2d(3, channels, 1)
        self.spatial = nn.Conv2d(channels, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "spatial":
            return x * torch.sigmoid(self.spatial(x))
        if self.kind == "dense":
            weight = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).view(x.size(0), -1, 1, 1)
        else:
            weight = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(weight)


class _Scaled(nn.Module):
    def __init__(self, shape: Sequence[int], kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(tuple(shape)) + 0.5)
        self.register_buffer("shift", torch.rand(tuple(shape)))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.weight - self.shift
        return x + self.weight if self.kind == "twice" else x


class _Last(nn.Module):
    """A module for tensors whose channels are last.

    Of more than one channel, as with one it depends on in-place operations what order torch takes a tensor to be in.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*modules)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Twice(nn.Module):
    def __init__(self, inner: nn.Module, between: nn.Module) -> None:
        super().__init__()
        self.inner, self.between = inner, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.between(self.inner(x)))


class _LooksAtData(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if x.square().sum() > -1 else x


class _FunctionalDropout(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.3, training=self.training)


class _Head(nn.Module):
    def __init__(self, kind: str, layers: nn.Module) -> None:
        super().__init__()
        self.kind, self.layers = kind, layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "mean":
            x = x.mean((2, 3))
        elif self.kind == "largest":
            x = x.amax(dim=(-2, -1))
        elif self.kind == "view":
            x = x.contiguous().view(x.size(0), -1)
        elif self.kind == "reshape":
            x = x.reshape(x.shape[0], -1)
        else:
            x = torch.flatten(x, 1)
        return self.layers(x)


def random_network(draw: random.Random, shape: Shape) -> nn.Module:
    """A network for images of ``shape`` that ``draw`` decides, with ``CLASSES`` outputs, in float64."""
    torch.manual_seed(draw.randrange(1 << 16))
    maker = _Maker(draw)
    layers, shape = maker.layers(shape, draw.randint(1, 7))
    network = nn.Sequential(*layers, maker.head(shape)).double()
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own and draw.random() < 0.1:
            own[draw.randrange(len(own))].requires_grad_(False)
    if not any(one.requires_grad for one in network.parameters()):
        network.requires_grad_(True)
    return network


class _Maker:
    def __init__(self, draw: random.Random) -> None:
        self._draw = draw

    def layers(self, shape: Shape, count: int) -> tuple[list[nn.Module], Shape]:
        found = []
        for _ in range(count):
            layer, shape = self._layer(shape)
            found.append(layer)
        return found, shape

    def head(self, shape: Shape) -> nn.Module:
        draw, found = self._draw, []
        kind = draw.choice(["mean", "largest", "view", "reshape", "flatten"])
        features = shape[0] if kind in ("mean", "largest") else math.prod(shape)
        for _ in range(draw.choice([0, 1, 1, 2])):
            wide = draw.randint(2, 9)
            found += [nn.Linear(features, wide, bias=draw.random() < 0.8)]
            extra = [nn.ReLU(True), nn.Tanh(), nn.BatchNorm1d(wide), nn.Dropout(0.4), nn.LayerNorm(wide), nn.PReLU()]
            found += draw.sample(extra, draw.randint(0, 2))
            features = wide
        return _Head(kind, nn.Sequential(*found, nn.Linear(features, CLASSES)))

    def _layer(self, shape: Shape) -> tuple[nn.Module, Shape]:
        make = self._draw.choices(
            [self._convolution, self._kept, self._resized, self._joined], weights=[4, 5, 2, 3]
        )[0]  # fmt: skip
        layer = make(shape)
        was = layer.training
        with torch.no_grad():
            try:
                made = layer.eval()(torch.zeros(2, *shape))
            except (RuntimeError, ValueError):  # a window larger than what is left of the image
                return self._layer(shape)
            finally:
                layer.train(was)
        result = (made.shape[1], made.shape[2], made.shape[3])
        return (layer, result) if min(result) > 0 else self._layer(shape)

    def _convolution(self, shape: Shape) -> nn.Module:
        draw, channels = self._draw, shape[0]
        out = draw.randint(1, 9)
        kind = draw.choice(["plain", "plain", "plain", "grouped", "depthwise", "transposed"])
        groups = 1
        if kind == "grouped":
            out = channels * draw.choice([1, 2]) if draw.random() < 0.5 else out
            groups = draw.choice([one for one in range(1, 7) if channels % one == 0 and out % one == 0])
        if kind == "depthwise":
            out, groups = channels * draw.choice([1, 1, 2]), channels
        bias = draw.random() < 0.7
        if kind == "transposed":
            groups = draw.choice([one for one in range(1, 7) if channels % one == 0 and out % one == 0])
            stride = draw.choice([1, 2]) if max(shape) < _LARGEST // 2 else 1
            return nn.ConvTranspose2d(
                channels, out, draw.choice([2, 3]), stride, draw.choice([0, 1]), groups=groups, bias=bias,
                output_padding=draw.randint(0, stride - 1),
            )  # fmt: skip
        return nn.Conv2d(
            channels, out, draw.choice([1, 2, 3, 3, (1, 3), (3, 2)]), draw.choice([1, 1, 2, (2, 1)]),
            draw.choice([0, 1, 1, (1, 0)]), draw.choice([1, 1, 2]), groups, bias,
            draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"]),
        )  # fmt: skip

    def _kept(self, shape: Shape) -> nn.Module:
        """What leaves the shape as it is."""
        return self._draw.choice([self._norm, self._norm, self._activation, self._activation, self._noise, self._odd])(
            shape
        )

    def _norm(self, shape: Shape) -> nn.Module:
        draw, channels = self._draw, shape[0]
        affine = draw.random() < 0.8
        groups = draw.choice([one for one in range(1, channels + 1) if channels % one == 0])
        return draw.choice(
            [
                nn.BatchNorm2d(channels, affine=affine),
                nn.BatchNorm2d(channels, momentum=draw.choice([None, 0.3])),
                nn.BatchNorm2d(channels, track_running_stats=False, affine=affine),
                nn.GroupNorm(groups, channels, affine=affine),
                nn.InstanceNorm2d(channels, affine=affine, track_running_stats=draw.random() < 0.2),
                nn.LocalResponseNorm(2),
                nn.LayerNorm(list(shape)),
                *([_Last(nn.LayerNorm(channels))] if channels > 1 else []),
            ]
        )

    def _activation(self, shape: Shape) -> nn.Module:
        kinds = ["relu in place", "add in place", "scale in place", "clamp", "gelu", "neither more nor less", "softmax"]
        modules = [
            nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.PReLU(), nn.PReLU(shape[0]),
            nn.SiLU(), nn.Sigmoid(), nn.Softplus(), nn.Hardswish(), nn.Identity(),
        ]  # fmt: skip
        return self._draw.choice([*modules, *map(_Act, kinds)])

    def _noise(self, shape: Shape) -> nn.Module:
        return self._draw.choice(
            [
                nn.Dropout(0.3), nn.Dropout(0.3, inplace=True), nn.Dropout2d(0.3), nn.AlphaDropout(0.2),
                nn.FeatureAlphaDropout(0.2), _FunctionalDropout(), nn.Dropout(0.0),
                *([_Last(nn.Dropout(0.3))] if shape[0] > 1 else []),
            ]
        )  # fmt: skip

    def _odd(self, shape: Shape) -> nn.Module:
        draw, channels = self._draw, shape[0]
        groups = draw.choice([one for one in range(1, channels + 1) if channels % one == 0])
        same = nn.Conv2d(channels, channels, 3, padding=1, groups=draw.choice([1, groups]))
        return draw.choice(
            [
                _Excited(channels, draw.choice(["dense", "convolved", "spatial"])),
                _Scaled(draw.choice([(channels, 1, 1), (1, channels, 1, 1), (), (1,)]), draw.choice(["once", "twice"])),
                _Shuffled(groups), nn.ChannelShuffle(groups), _SetItem(),
                _Twice(same, draw.choice([nn.Tanh(), nn.ReLU(True), _Act("softmax"), _Shuffled(groups)])),
                _Twice(draw.choice([nn.BatchNorm2d(channels), nn.GroupNorm(groups, channels, affine=False)]), same),
                *([_Last(nn.Linear(channels, 5), nn.GELU(), nn.Linear(5, channels))] if channels > 1 else []),
                _LooksAtData(nn.Sequential(same, nn.ReLU(inplace=True))),
            ]
        )  # fmt: skip

    def _resized(self, shape: Shape) -> nn.Module:
        draw = self._draw
        larger = [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.ZeroPad2d((1, 0, 0, 1))]
        shuffles = [nn.PixelUnshuffle(2)] if shape[1] % 2 == shape[2] % 2 == 0 and shape[0] < 6 else []
        return draw.choice(
            [
                nn.MaxPool2d(2), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2, 1),
                nn.AdaptiveAvgPool2d(draw.choice([2, 3, (3, None)])), nn.AdaptiveMaxPool2d(draw.choice([2, 3])),
                nn.LPPool2d(2, 2), *(larger if max(shape[1:]) < _LARGEST // 2 else []), *shuffles,
                *([nn.PixelShuffle(2)] if shape[0] % 4 == 0 and max(shape[1:]) < _LARGEST // 2 else []),
            ]
        )  # fmt: skip

    def _joined(self, shape: Shape) -> nn.Module:
        draw, channels = self._draw, shape[0]
        kind = draw.choice(["residual", "residual", "concatenated", "parted"])
        if kind == "parted" and channels > 1:
            how = draw.choice(["chunk", "split", "items"] if channels % 2 == 0 else ["split", "items"])
            first = channels // 2 if how == "chunk" else draw.randint(1, channels - 1)
            return _Parted(first, nn.Sequential(*self._branch((first, *shape[1:]), draw.randint(1, 6))), how)
        if kind == "concatenated":
            branches = [self._branch(shape, draw.randint(1, 4)) for _ in range(draw.choice([2, 2, 3]))]
            return _Concatenated([nn.Sequential(*one) for one in branches])
        out = channels if draw.random() < 0.7 else draw.randint(1, 8)
        shortcut = nn.Sequential() if out == channels else nn.Conv2d(channels, out, 1)
        branch = nn.Sequential(*self._branch(shape, out))
        kind = draw.choice(["sum", "sum", "in place", "gated", "detached", "without gradient"])
        return _Residual(branch, shortcut, kind)

    def _branch(self, shape: Shape, out: int) -> list[nn.Module]:
        """Layers that keep the size of the image."""
        draw, found = self._draw, []
        channels = shape[0]
        for width in [draw.randint(1, 6)] * draw.randint(0, 1) + [out]:
            found += [self._kept((channels, *shape[1:])) for _ in range(draw.randint(0, 1))]
            found.append(nn.Conv2d(channels, width, *draw.choice([(1,), (3, 1, 1), (3, 1, 2, 2)])))
            channels = width
            found += [self._kept((channels, *shape[1:])) for _ in range(draw.randint(0, 2))]
        return found

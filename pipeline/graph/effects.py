"""What each operation does to a layout: one small table, and the only place that knows operation types."""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Effect(Enum):
    """How an operation relates the layouts of its inputs to that of its output.

    All but the last treat every image by itself (of BATCHNORM the sums over images can be exchanged), and so keep B.
    """

    KERNEL = "kernel"
    """Makes output channels from all input channels with a weight: convolution and dense layer."""
    GROUPED = "grouped"
    """A convolution in groups: keeps K where the borders of the groups allow."""
    CHANNELWISE = "channelwise"
    """Channel ``k`` of the output needs only channel ``k`` of each input (and of the parameters): keeps K."""
    BATCHNORM = "batchnorm"
    """Channelwise, with statistics over all images."""
    FLATTEN = "flatten"
    """Every channel becomes ``H * W`` adjacent channels: keeps K with scaled shares."""
    IMAGEWISE = "imagewise"
    """Needs all channels of an image, and no weights to speak of: every rank that has all channels can do it."""
    WHOLE = "whole"
    """Anything else: it runs on the master."""


class Scope(Enum):
    """Which axis of its input an operation of the table takes for the channels."""

    ANY = "any"
    """Works element by element: whichever axis the channels are on."""
    SECOND = "second"
    """Takes axis 1 for the channels."""


_ACTIVATIONS = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus,
    nn.LogSigmoid, nn.Softsign, nn.Threshold,
)  # fmt: skip
_POOLS_AND_PADDINGS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.LPPool1d, nn.LPPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d,
    nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d,
    nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d, nn.Upsample,
    nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.GroupNorm, nn.PReLU,
)  # fmt: skip
_ELEMENTWISE_FUNCTIONS = (
    torch.relu, torch.sigmoid, torch.tanh, torch.abs, torch.exp, torch.neg, torch.clamp, torch.sqrt, torch.square,
    torch.add, operator.add, torch.mul, operator.mul, torch.sub, operator.sub, torch.div, operator.truediv,
    operator.neg, operator.pow, torch.pow,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.softplus, F.softsign, F.logsigmoid,
    "relu", "sigmoid", "tanh", "abs", "exp", "neg", "clamp", "sqrt", "square", "add", "mul", "sub", "div", "pow",
    "contiguous", "clone",
)  # fmt: skip
_POOL_FUNCTIONS = (
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.interpolate,
)  # fmt: skip
_IMAGEWISE = (nn.LayerNorm, nn.LocalResponseNorm, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.GLU)

TABLE: dict[Any, tuple[Effect, Scope]] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (Effect.KERNEL, Scope.SECOND)),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (Effect.KERNEL, Scope.SECOND)),
    nn.Linear: (Effect.KERNEL, Scope.ANY),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (Effect.BATCHNORM, Scope.SECOND)),
    **dict.fromkeys(_ACTIVATIONS, (Effect.CHANNELWISE, Scope.ANY)),
    **dict.fromkeys(_POOLS_AND_PADDINGS, (Effect.CHANNELWISE, Scope.SECOND)),
    **dict.fromkeys(_ELEMENTWISE_FUNCTIONS, (Effect.CHANNELWISE, Scope.ANY)),
    **dict.fromkeys(_POOL_FUNCTIONS, (Effect.CHANNELWISE, Scope.SECOND)),
    **dict.fromkeys(_IMAGEWISE, (Effect.IMAGEWISE, Scope.SECOND)),
    F.layer_norm: (Effect.IMAGEWISE, Scope.SECOND),
}
"""Effect and scope by the type of a module, a function, or the name of a method of a tensor.

Operations that depend on their arguments (reshaping, concatenation, reductions) and the random ones have rules of their
own in ``pipeline.graph.rules``.
"""


def register(operation: type[nn.Module] | Callable[..., Any], effect: Effect, scope: Scope = Scope.SECOND) -> None:
    """Tell what a module type or function of your own does; without this it runs on the master.

    Holds in this process and, as the graph is made again on every device, has to be called where they start, too.
    Raises ``ValueError`` for effects that need more than a word: KERNEL, GROUPED, BATCHNORM and FLATTEN.
    """
    if effect not in (Effect.CHANNELWISE, Effect.IMAGEWISE, Effect.WHOLE):
        raise ValueError(f"{effect} cannot be registered: only CHANNELWISE, IMAGEWISE and WHOLE can")
    TABLE[operation] = (effect, scope)


_RANDOM_MODULES: dict[type[nn.Module], str] = {
    nn.Dropout: "element", nn.Dropout1d: "channel", nn.Dropout2d: "channel", nn.Dropout3d: "channel",
    nn.AlphaDropout: "alpha element", nn.FeatureAlphaDropout: "alpha channel",
}  # fmt: skip
RANDOM_FUNCTIONS: dict[Any, str] = {
    F.dropout: "element", torch.dropout: "element", F.dropout1d: "channel", F.dropout2d: "channel",
    F.dropout3d: "channel", F.alpha_dropout: "alpha element", F.feature_alpha_dropout: "alpha channel",
}  # fmt: skip


def random_kind(module: nn.Module) -> str | None:
    """What one draw of a random module decides: an element, a channel of an image, or (depth) an image or the batch."""
    if (type(module).__module__, type(module).__name__) == ("torchvision.ops.stochastic_depth", "StochasticDepth"):
        return "depth"  # by name: importing torchvision takes a second
    return _RANDOM_MODULES.get(type(module))

"""What each operation does to a layout: one small table, and the only place that knows operation types."""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F


class Effect(Enum):
    """How an operation relates the layouts of its inputs to that of its output."""

    KERNEL = "kernel"
    """Makes output channels from all input channels with a weight: convolution and dense layer."""
    CHANNELWISE = "channelwise"
    """Channel ``k`` of the output needs only channel ``k`` of each input (and of the parameters): keeps K."""
    FLATTEN = "flatten"
    """Every channel becomes ``H * W`` adjacent channels: keeps K with scaled shares."""
    WHOLE = "whole"
    """Anything else: it runs on the master."""


_KERNEL_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_CHANNELWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid, nn.Softsign,
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.InstanceNorm2d,
)  # fmt: skip

_CHANNELWISE_FUNCTIONS = frozenset({
    torch.relu, torch.sigmoid, torch.tanh, torch.add, operator.add, torch.mul, operator.mul,
    F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid,
    F.softplus, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
})  # fmt: skip

_CHANNELWISE_METHODS = frozenset({"relu", "sigmoid", "tanh", "add", "mul", "contiguous"})


def effect_of(node: fx.Node, module: nn.Module | None) -> Effect:
    """The effect of one traced operation; ``module`` is the submodule it calls, if it calls one."""
    if module is not None:
        return _effect_of_module(module)
    if node.op == "call_function" and node.target in _CHANNELWISE_FUNCTIONS:
        return Effect.CHANNELWISE
    if node.op == "call_method" and node.target in _CHANNELWISE_METHODS:
        return Effect.CHANNELWISE
    if node.target in (torch.flatten, "flatten") and _flatten_range(node) == (1, -1):
        return Effect.FLATTEN
    return Effect.WHOLE


def _effect_of_module(module: nn.Module) -> Effect:
    # Exact types: a subclass may override forward with anything.
    if type(module) in _KERNEL_MODULES and getattr(module, "groups", 1) == 1:
        return Effect.KERNEL
    if type(module) in _CHANNELWISE_MODULES:
        return Effect.CHANNELWISE
    if isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0:
        return Effect.CHANNELWISE
    if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return Effect.FLATTEN
    return Effect.WHOLE


def _flatten_range(node: fx.Node) -> tuple[Any, Any]:
    """``(start_dim, end_dim)`` of a call of flatten."""
    given = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return given.get("start_dim", 0), given.get("end_dim", -1)

"""The networks of the study, torchvision's classification networks, and a user's own: each by its name."""

from __future__ import annotations

import difflib
import re
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from pipeline import factories
from pipeline._torchvision import make_importable
from pipeline.errors import InputError

STUDY_NETWORKS = ("50:500", "150:800", "300:1000", "500:1500")
"""Widths of the two convolutions; only the last is the paper's, the others are this project's choice."""

_WIDTHS = re.compile(r"([+-]?\d+):([+-]?\d+)")
_KERNEL_SIZE = 5
_POOL_SIZE = 2

# An auxiliary head makes the training output a tuple, which no ordinary loss takes. The default initialisation of these
# two is slow and announced to change, so it is named.
_WITHOUT_AUXILIARY_HEAD = {"aux_logits": False, "init_weights": True}


def network(
    name: str, *, classes: int = 10, image_shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0
) -> nn.Module:
    """Build a network with initial weights that depend on the arguments only; the global generators stay untouched.

    Args:
        name: "K1:K2" for two 5x5 convolutions of K1 and K2 kernels without padding, each followed by ReLU and 2x2 max
            pooling, and one dense layer; the name of a torchvision classification network; or `package.module:factory`
            for a callable that returns a module. It needs no argument; the number of classes is passed as
            `num_classes` or `classes` where it takes that.
        classes: Number of outputs.
        image_shape: Channels, height and width of an image.
        seed: Of the initial weights.

    Returns:
        A network in training mode, float32, on the CPU; (N, *image_shape) -> (N, classes). The study's networks are an
        `nn.Sequential` of conv1, relu1, pool1, conv2, relu2, pool2, flatten and dense.

    Raises:
        InputError: The name is unknown, a width or number of classes is below 1, the factory fails, or the images do
            not fit the network.
    """
    if classes < 1:
        raise InputError(f"A network with {classes} classes cannot be built: it needs at least 1.")
    check_name(name)
    name = name.strip()
    # Not torch.manual_seed: that also reseeds every CUDA device.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if widths := _WIDTHS.fullmatch(name):
            return _study_network(name, int(widths[1]), int(widths[2]), classes, image_shape)
        if factories.is_factory(name):
            return factories.build(name, classes, image_shape)
        return _torchvision_network(name, classes, image_shape)


def takes_grey(name: str, classes: int) -> bool:
    """Whether the network of that name is a user's own whose first convolution takes one channel.

    Raises:
        InputError: As `network`, where it cannot be made.
    """
    if not factories.is_factory(name.strip()):
        return False
    with torch.random.fork_rng(devices=[]):
        return factories.channels(name.strip(), classes) == 1


def check_name(name: str) -> None:
    """Raise InputError, as `network` does, where no network has the name; builds nothing."""
    name = name.strip()
    if widths := _WIDTHS.fullmatch(name):
        if min(int(widths[1]), int(widths[2])) < 1:
            raise InputError(f"Network '{name}' has a convolution without kernels: both widths must be at least 1.")
        return
    if factories.is_factory(name):
        factories.find_factory(name)
        return
    make_importable()
    from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{close[0]}'" if close else "such as resnet18"
        raise InputError(
            f"Network '{name}' is unknown: give the widths of two convolutions as K1:K2, such as 50:500, "
            f"the name of a torchvision classification network ({hint}), or your own as package.module:factory."
        )


def _study_network(
    name: str, width1: int, width2: int, classes: int, image_shape: tuple[int, int, int]
) -> nn.Sequential:
    channels, *size = image_shape
    for _ in range(2):
        size = [(length - _KERNEL_SIZE + 1) // _POOL_SIZE for length in size]
    if channels < 1 or min(size) < 1:
        raise _misfit(name, image_shape, "two 5x5 convolutions with 2x2 pooling need at least 16x16 pixels")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, width1, _KERNEL_SIZE),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(_POOL_SIZE),
            conv2=nn.Conv2d(width1, width2, _KERNEL_SIZE),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(_POOL_SIZE),
            flatten=nn.Flatten(),
            dense=nn.Linear(width2 * size[0] * size[1], classes),
        )
    )


def _torchvision_network(name: str, classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    from torchvision import models

    options: dict[str, Any] = {"weights": None, "num_classes": classes}
    if name in ("googlenet", "inception_v3"):
        options |= _WITHOUT_AUXILIARY_HEAD
    elif name.startswith("vit_"):
        options["image_size"] = image_shape[1]
    elif name.startswith("maxvit"):
        options["input_size"] = image_shape[1:]
    try:
        model: nn.Module = models.get_model(name, **options)
        _compute_shapes(model, image_shape)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise _misfit(name, image_shape, reason.rstrip(".")) from error
    return model


def _compute_shapes(model: nn.Module, image_shape: tuple[int, int, int]) -> None:
    """Run the model on shapes alone: tells at once what calibration would find out minutes later."""
    tensors = {
        tensor_name: tensor.detach().to("meta")
        for tensor_name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    with torch.no_grad():
        torch.func.functional_call(model.eval(), tensors, torch.empty(2, *image_shape, device="meta"))
    model.train()


def _misfit(name: str, image_shape: tuple[int, int, int], reason: str) -> InputError:
    shape = "x".join(map(str, image_shape))
    return InputError(f"Network '{name}' cannot take images of shape {shape} (channels x height x width): {reason}.")

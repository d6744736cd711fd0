"""torchvision's classification models in a form that a few steps in float64 can be compared on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline._torchvision import make_importable

CNN_FAMILIES = (
    "alexnet", "vgg", "resnet", "resnext", "wide_resnet", "densenet", "googlenet", "inception_v3", "squeezenet",
    "mobilenet", "mnasnet", "shufflenet", "efficientnet", "regnet", "convnext",
)  # fmt: skip
"""Beginnings of the names of torchvision's convolutional networks; the others are transformers."""
_MOST_PARAMETERS = 40_000_000
_DENSE_WIDTH = 256
_SEED = 0


@dataclass(frozen=True)
class Specimen:
    """A model, the images to try it on, and how it was cut down to fit."""

    model: nn.Module
    image_shape: tuple[int, int, int]
    note: str
    """Empty for the model as it is."""


def names() -> list[str]:
    """All classification models of torchvision."""
    make_importable()
    from torchvision import models

    return list(models.list_models(module=models))


def specimen(name: str, classes: int = 10) -> Specimen:
    """A torchvision model with random weights; the largest ones with reduced depth or width.

    Auxiliary heads are kept. Weights depend on the name only.
    """
    make_importable()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        return _made(name, classes)


def _made(name: str, classes: int) -> Specimen:
    from torchvision import models

    if name in _REDUCED:
        model, note = _REDUCED[name](classes)
        return Specimen(model, (3, 64, 64), note)
    size = 56 if name == "vit_h_14" else 299 if name == "inception_v3" else 64
    options = {"image_size": size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    model = models.get_model(name, weights=None, num_classes=classes, **options)
    note = ""
    if name.startswith("vgg"):
        model.classifier = _narrow_head(model.classifier, classes)
        note = f"dense layers {_DENSE_WIDTH} wide"
    elif sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMETERS:
        _trim(model)
        note = "at most two equal blocks in a row"
    return Specimen(model, (3, size, size), note)


def _narrow_head(head: nn.Sequential, classes: int) -> nn.Sequential:
    """VGG's three dense layers, narrower."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    sizes = {0: (first.in_features, _DENSE_WIDTH), 3: (_DENSE_WIDTH, _DENSE_WIDTH), 6: (_DENSE_WIDTH, classes)}
    return nn.Sequential(*(nn.Linear(*sizes[i]) if i in sizes else copy.copy(one) for i, one in enumerate(head)))


def _trim(model: nn.Module) -> None:
    """Of more than two blocks in a row with weights of the same shapes, keep two: depth without more to see."""
    for parent in model.modules():
        if not isinstance(parent, nn.Sequential):
            continue
        kept: list[tuple[str, nn.Module]] = []
        for name, child in parent.named_children():
            before = [_shapes(one) for _, one in kept[-2:]]
            if len(before) == 2 and _shapes(child) and before[0] == before[1] == _shapes(child):
                continue
            kept.append((name, child))
        for name in [name for name, _ in parent.named_children()]:
            delattr(parent, name)
        for name, child in kept:
            parent.add_module(name, child)


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in module.parameters()]


def _regnet_y_128gf(classes: int) -> tuple[nn.Module, str]:
    from torchvision.models.regnet import BlockParams, RegNet

    parameters = BlockParams.from_init_params(depth=8, w_0=64, w_a=40.0, w_m=2.52, group_width=32, se_ratio=0.25)
    return RegNet(parameters, num_classes=classes), "an eighth of the width, 8 blocks"


def _maxvit_t(classes: int) -> tuple[nn.Module, str]:
    from torchvision.models.maxvit import MaxVit

    model = MaxVit(
        input_size=(64, 64), stem_channels=64, partition_size=2, block_channels=[64, 128, 256, 512],
        block_layers=[1, 1, 2, 1], head_dim=32, stochastic_depth_prob=0.2, num_classes=classes,
    )  # fmt: skip
    return model, "windows of 2 for the small images, one block less per stage"


_REDUCED: dict[str, Callable[[int], tuple[nn.Module, str]]] = {
    "regnet_y_128gf": _regnet_y_128gf, "maxvit_t": _maxvit_t
}  # fmt: skip

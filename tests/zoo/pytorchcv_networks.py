"""Networks of pytorchcv, https://github.com/osmr/pytorchcv."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from tests.zoo.specimen import CLASSES, Specimen, trimmed, words


def _cv(name: str, size: int = 64, *, equal: int = 1, pixels: int = 0, **options: Any) -> Specimen:
    """A model of pytorchcv for images of `size`; with `pixels` one that gives a map of so many pixels a side.

    Those for CIFAR-10 insist on ten classes.
    """
    cifar = name.endswith("_cifar10")

    def make() -> nn.Module:
        from pytorchcv.model_provider import get_model

        sizes: dict[str, Any] = {} if cifar else {"num_classes": CLASSES, "in_size": (size, size)}
        return _cut(get_model(name, **sizes, **options), equal)

    return _specimen(name, 32 if cifar else size, make, pixels, words(options))


def _cv_made(name: str, module: str, maker: str, *, size: int = 32, equal: int = 1, **options: Any) -> Specimen:
    """A smaller model than any that pytorchcv has a name for."""

    def make() -> nn.Module:
        made = getattr(import_module(f"pytorchcv.models.{module}"), maker)
        return _cut(made(num_classes=CLASSES, in_size=(size, size), **options), equal)

    return _specimen(name, size, make, 0, words(options))


def _cut(model: nn.Module, equal: int) -> nn.Module:
    """With few equal blocks, and a last pooling that takes what there is: most are for images of 224 pixels."""
    for part in ("features", "output"):
        if isinstance(getattr(getattr(model, part, None), "final_pool", None), nn.AvgPool2d):
            getattr(model, part).final_pool = nn.AdaptiveAvgPool2d(1)
    return trimmed(model, equal) if equal else model


def _specimen(name: str, size: int, make: Callable[[], nn.Module], pixels: int, note: str) -> Specimen:
    return Specimen(
        name=f"pytorchcv {name}",
        package="pytorchcv",
        make=make,
        image_shape=(3, size, size),
        label_shape=(pixels, pixels) if pixels else (),
        note=note,
    )


NETWORKS = (
    # Residual networks and what was made of them.
    _cv("airnet50_1x64d_r16"),
    _cv("bam_resnet18"),
    _cv("cbam_resnet18"),
    _cv("diaresnet20_cifar10"),
    _cv("diapreresnet20_cifar10"),
    _cv("diracnet18v2"),
    _cv("drnc26"),
    _cv("ibn_resnet50"),
    _cv("isqrtcovresnet18"),
    _cv("octresnet10_ad2"),
    _cv("preresnet20_cifar10"),
    _cv("pyramidnet110_a48_cifar10"),
    _cv("resattnet56", equal=0),
    _cv("resdropresnet20_cifar10"),
    _cv("resnesta18"),
    _cv("resneta10"),
    _cv("ror3_56_cifar10"),
    _cv("scnet50", 128),
    _cv("sepreresnet20_cifar10"),
    _cv("shakedropresnet20_cifar10"),
    _cv("shakeshakeresnet20_2x16d_cifar10"),
    _cv("sharesnet18"),
    _cv_made("wrn10_2", "wrn_cifar", "get_wrn_cifar", blocks=10, width_factor=2),
    _cv_made("wrn14_2_1bit", "wrn1bit_cifar", "get_wrn1bit_cifar", blocks=14, width_factor=2),
    _cv_made(
        "irevnet",
        "irevnet",
        "IRevNet",
        size=64,
        equal=0,
        init_block_channels=12,
        final_block_channels=3072,
        channels=[[24, 24], [96, 96], [384, 384], [1536, 1536]],
    ),
    # Dense and multi-branch ones.
    _cv("bninception"),
    _cv("condensenet74_c4_g4"),
    _cv("densenet40_k12_cifar10"),
    _cv("dla46xc"),
    _cv("fishnet99"),
    _cv_made(
        "fractalnet",
        "fractalnet_cifar",
        "CIFARFractalNet",
        equal=0,
        channels=[16, 16, 32, 32, 64],
        num_columns=3,
        dropout_probs=[0.0, 0.1, 0.2, 0.3, 0.4],
        loc_drop_prob=0.15,
        glob_drop_ratio=0.5,
    ),
    _cv("hardnet39ds"),
    _cv("msdnet22_cifar10"),
    _cv("peleenet"),
    _cv("sparsenet121", equal=0),
    _cv("xdensenet40_2_k24_bc_cifar10"),
    _cv("nin_cifar10"),
    # Mobile.
    _cv("channelnet", equal=0),
    _cv("dicenet_wd5", 224),
    _cv("espnetv2_wd2"),
    _cv("fdmobilenet_wd4"),
    _cv("igcv3_wd4"),
    _cv("menet108_8x1_g3"),
    _cv("mobilenet_wd4"),
    _cv("proxylessnas_mobile"),
    _cv("shufflenet_g3_wd4"),
    _cv("shufflenetv2_wd2"),
    _cv("shufflenetv2b_wd2"),
    _cv("sqnxt23v5_w1"),
    _cv("squeezenet_v1_1"),
    # Of pixels.
    _cv("bisenet_resnet18_celebamaskhq", pixels=64),
    _cv("cgnet_cityscapes", pixels=64),
    _cv("ctxnet_cityscapes", pixels=64),
    _cv("dabnet_cityscapes", pixels=64),
    _cv("edanet_cityscapes", pixels=64),
    _cv("enet_cityscapes", pixels=64),
    _cv("erfnet_cityscapes", pixels=64),
    _cv("esnet_cityscapes", pixels=64),
    _cv("espcnet_cityscapes", pixels=64),
    _cv("fastscnn_cityscapes", pixels=64),
    _cv("lednet_cityscapes", pixels=64),
    _cv("linknet_cityscapes", pixels=64),
    _cv("unet_cityscapes", 32, pixels=32),
)

"""Networks of MONAI, https://github.com/Project-MONAI/MONAI, for pictures and for volumes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from tests.zoo.losses import of_all, of_first, of_image, of_stack, of_variational
from tests.zoo.specimen import CLASSES, Loss, Specimen, words

_PICTURE = (32, 32)
_VOLUME = (16, 16, 16)


def _monai(
    kind: str,
    space: tuple[int, ...],
    options: dict[str, Any],
    *,
    colours: int = 1,
    label: str = "pixels",
    loss: Loss = of_all,
    variant: str = "",
    module: str = "",
) -> Specimen:
    """A network of `monai.networks.nets`; `label` is pixels, class or image."""

    def make() -> nn.Module:
        nets = import_module("monai.networks.nets" + (f".{module}" if module else ""))
        made: nn.Module = getattr(nets, kind)(**options)
        return made

    return Specimen(
        name=" ".join(filter(None, ("monai", kind, f"{len(space)}d", variant))),
        package="monai",
        make=make,
        image_shape=(colours, *space),
        label_shape={"pixels": space, "class": (), "image": None}[label],
        loss=loss,
        note=words(options),
    )


def _maps(kind: str, space: tuple[int, ...], *, variant: str = "", loss: Loss = of_all, **options: Any) -> Specimen:
    """One that gives a class for each pixel."""
    usual = {"spatial_dims": len(space), "in_channels": 1, "out_channels": CLASSES}
    return _monai(kind, space, usual | options, variant=variant, loss=loss)


def _classifies(kind: str, space: tuple[int, ...], **options: Any) -> Specimen:
    """One that gives a class for each image."""
    return _monai(kind, space, {"spatial_dims": len(space)} | options, label="class")


def _paints(kind: str, space: tuple[int, ...], loss: Loss, **options: Any) -> Specimen:
    """One that gives an image."""
    return _monai(kind, space, {"spatial_dims": len(space)} | options, label="image", loss=loss)


_CODER = {"channels": (8, 16, 32), "strides": (2, 2, 2)}
_UNET = {"channels": (8, 16, 32), "strides": (2, 2)}
_DYNUNET = {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "filters": (8, 16, 32)}
_BASIC = {"features": (8, 8, 16, 16, 32, 8)}
_SWIN = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4), "feature_size": 12}
_VIT = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 4}
_FEW = {"in_channels": 1, "out_channels": CLASSES}

NETWORKS = (
    # A class for each pixel or voxel.
    _maps("UNet", _PICTURE, **_UNET, num_res_units=2, dropout=0.1),
    _maps("UNet", _VOLUME, **_UNET, num_res_units=2, norm="batch"),
    _maps("UNet", _VOLUME, **_UNET, variant="plain"),
    _maps("BasicUNet", _PICTURE, **_BASIC, dropout=0.1),
    _maps("BasicUNet", (32, 16, 16), **_BASIC),
    _maps("BasicUNetPlusPlus", _PICTURE, **_BASIC, deep_supervision=True),
    _maps("SegResNet", _PICTURE, init_filters=8, dropout_prob=0.1),
    _maps("SegResNet", _VOLUME, init_filters=8, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
    _maps("SegResNetDS", _VOLUME, init_filters=8, blocks_down=(1, 1, 1), dsdepth=2),
    _maps("DynUNet", _PICTURE, **_DYNUNET, deep_supervision=True, deep_supr_num=1, loss=of_stack),
    _maps("DynUNet", _VOLUME, **_DYNUNET, res_block=True, norm_name="batch"),
    _maps("AttentionUnet", _PICTURE, **_UNET),
    _maps("AttentionUnet", _VOLUME, **_UNET),
    _maps("VNet", _PICTURE, dropout_dim=2),
    _maps("UNETR", _PICTURE, img_size=_PICTURE, feature_size=8, **_VIT),
    _maps("UNETR", _VOLUME, img_size=_VOLUME, feature_size=8, **_VIT),
    _maps("SwinUNETR", (64, 64), **_SWIN),
    _maps("HighResNet", _PICTURE, dropout_prob=0.1),
    _maps("HighResNet", (8, 8, 8)),
    _maps("AHNet", _PICTURE, layers=(1, 1, 1, 1), psp_block_num=2),
    _maps("MedNeXt", _VOLUME, init_filters=8, kernel_size=3, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1, 1)),
    _maps("RegUNet", _VOLUME, num_channel_initial=8, depth=2),
    _monai("Restormer", _PICTURE, {"spatial_dims": 2, **_FEW, "dim": 16, "num_refinement_blocks": 1},
           module="restormer"),
    _monai("FlexibleUNet", _PICTURE, {**_FEW, "backbone": "efficientnet-b0"}),
    _monai("FlexibleUNet", _PICTURE, {**_FEW, "backbone": "resnet18"}, variant="resnet18"),
    _monai("Quicknat", _PICTURE, {"num_classes": CLASSES, "num_filters": 8}),
    # A class for each image.
    _classifies("DenseNet", _PICTURE, **_FEW, block_config=(2, 2, 2), dropout_prob=0.1),
    _classifies("DenseNet", _VOLUME, **_FEW, block_config=(2, 2, 2)),
    _classifies("SEResNet50", _PICTURE, in_channels=1, num_classes=CLASSES, layers=(1, 1, 1, 1)),
    _classifies("SEResNext50", (32, 32, 32), in_channels=1, num_classes=CLASSES, layers=(1, 1, 1, 1)),
    _classifies("EfficientNetBN", (64, 64), model_name="efficientnet-b0", pretrained=False, in_channels=1,
                num_classes=CLASSES),
    _classifies(
        "ResNet", _VOLUME, block="basic", layers=(1, 1, 1, 1), block_inplanes=(8, 16, 32, 64), n_input_channels=1,
        num_classes=CLASSES,
    ),
    _monai(
        "ViT", _VOLUME, {"in_channels": 1, "img_size": _VOLUME, "patch_size": (8, 8, 8), "classification": True,
        "num_classes": CLASSES, "num_layers": 2, "post_activation": "x", **_VIT}, label="class", loss=of_first,
    ),
    # An image again.
    _paints("AutoEncoder", _PICTURE, of_image, out_channels=1, in_channels=1, **_CODER),
    _paints("VarAutoEncoder", _PICTURE, of_variational, in_shape=(1, *_PICTURE), out_channels=1, latent_size=4,
            **_CODER),
    _paints(
        "ViTAutoEnc", _VOLUME, of_image, in_channels=1, img_size=_VOLUME, patch_size=(4, 4, 4), num_layers=2, **_VIT
    ),
    _paints(
        "AutoencoderKL", _PICTURE, of_variational, in_channels=1, out_channels=1, channels=(8, 16), num_res_blocks=1,
        attention_levels=(False, True), latent_channels=2, norm_num_groups=4,
    ),
)  # fmt: skip

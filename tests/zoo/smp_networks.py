"""Networks of segmentation-models-pytorch, https://github.com/qubvel-org/segmentation_models.pytorch."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.specimen import CLASSES, Specimen, words


def _smp(decoder: str, encoder: str, size: int = 64, **options: Any) -> Specimen:
    """A decoder on an encoder, with a class for each pixel."""

    def make() -> nn.Module:
        import segmentation_models_pytorch as smp

        made: nn.Module = getattr(smp, decoder)(
            encoder_name=encoder, encoder_weights=None, in_channels=3, classes=CLASSES, **options
        )
        return made

    return Specimen(
        name=f"smp {decoder} {encoder}",
        package="segmentation-models-pytorch",
        make=make,
        image_shape=(3, size, size),
        label_shape=(size, size),
        note=words(options),
    )


_NARROW = {"decoder_channels": (64, 32, 32, 16, 16)}

NETWORKS = (
    _smp("Unet", "resnet18", **_NARROW),
    _smp("Unet", "mobilenet_v2", **_NARROW, decoder_attention_type="scse"),
    _smp("Unet", "efficientnet-b0", **_NARROW),
    _smp("Unet", "mit_b0", **_NARROW),
    _smp("Unet", "timm-regnetx_002", **_NARROW),
    _smp("Unet", "tu-convnext_atto", encoder_depth=4, decoder_channels=(64, 32, 32, 16)),
    _smp("Unet", "densenet121", **_NARROW),
    _smp("UnetPlusPlus", "mobilenet_v2", **_NARROW),
    _smp("MAnet", "resnet18", **_NARROW, decoder_pab_channels=16),
    _smp("Linknet", "resnet18"),
    _smp("FPN", "resnet18", decoder_dropout=0.2),
    _smp("PSPNet", "resnet18", psp_out_channels=64, psp_dropout=0.2),
    _smp("PAN", "mobilenet_v2", 128),
    _smp("DeepLabV3", "mobilenet_v2", decoder_channels=64),
    _smp("DeepLabV3Plus", "mobilenet_v2", decoder_channels=64),
    _smp("UPerNet", "resnet18", decoder_channels=32),
    _smp("Segformer", "mit_b0", decoder_segmentation_channels=64),
)

"""Networks of torchvision: segmentation, video, and those of its classification models that differ most.

All 80 of its classification models are in the table of `python -m pipeline parity --all`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.specimen import CLASSES, Specimen, trimmed, words


def _torchvision(
    name: str, space: tuple[int, ...] = (64, 64), *, equal: int = 0, pixels: bool = False, **options: Any
) -> Specimen:
    def make() -> nn.Module:
        from pipeline._torchvision import make_importable

        make_importable()
        from torchvision import models

        if pixels:
            options["weights_backbone"] = None
        model: nn.Module = models.get_model(name, weights=None, num_classes=CLASSES, **options)
        return trimmed(model, equal) if equal else model

    return Specimen(
        name=f"torchvision {name}",
        package="torchvision",
        make=make,
        image_shape=(3, *space),
        label_shape=space if pixels else (),
        note=words(options),
    )


NETWORKS = (
    _torchvision("lraspp_mobilenet_v3_large", pixels=True),
    _torchvision("deeplabv3_mobilenet_v3_large", pixels=True, aux_loss=True),
    _torchvision("fcn_resnet50", (32, 32), pixels=True, equal=1, aux_loss=True),
    _torchvision("r3d_18", (4, 32, 32), equal=1),
    _torchvision("mc3_18", (4, 32, 32), equal=1),
    _torchvision("r2plus1d_18", (4, 24, 24), equal=1),
    _torchvision("swin3d_t", (4, 64, 64), equal=2),
    _torchvision("googlenet", init_weights=True, aux_logits=True),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("squeezenet1_1"),
    _torchvision("resnet18"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("densenet121"),
    _torchvision("swin_v2_t", equal=2),
)

"""Networks of transformers, https://github.com/huggingface/transformers, from small configurations."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.losses import of_logits
from tests.zoo.specimen import CLASSES, Specimen, words


def _transformers(
    kind: str,
    *,
    task: str = "ForImageClassification",
    size: int = 64,
    pixels: int = 0,
    config: str = "",
    **options: Any,
) -> Specimen:
    """The model of a kind for a task, made from `kind`Config with the given options."""

    def make() -> nn.Module:
        import transformers

        configuration = getattr(transformers, f"{config or kind}Config")(num_labels=CLASSES, **options)
        made: nn.Module = getattr(transformers, f"{kind}{task}")(configuration)
        return made

    return Specimen(
        name=f"transformers {kind}{task}",
        package="transformers",
        make=make,
        image_shape=(3, size, size),
        label_shape=(pixels, pixels) if pixels else (),
        loss=of_logits,
        note=words(options),
    )


_FOUR = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
_PLAIN = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 64,
    "patch_size": 8,
}  # fmt: skip
_BACKBONE = {
    "model_type": "resnet", "embedding_size": 16, "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    **_FOUR,
}  # fmt: skip
_PIXELS = {"task": "ForSemanticSegmentation"}

NETWORKS = (
    _transformers("ResNet", embedding_size=16, **_FOUR, layer_type="basic"),
    _transformers("RegNet", embedding_size=16, **_FOUR, groups_width=8),
    _transformers("ConvNext", **_FOUR, layer_scale_init_value=0.1, drop_path_rate=0.1),
    _transformers("ConvNextV2", **_FOUR),
    _transformers("MobileNetV1", depth_multiplier=0.25),
    _transformers("MobileNetV2", depth_multiplier=0.35),
    _transformers("MobileNetV2", **_PIXELS, depth_multiplier=0.35, pixels=64),
    _transformers("EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640),
    _transformers("Bit", embedding_size=32, hidden_sizes=[32, 32, 64, 64], depths=[1, 1, 1, 1], num_groups=8),
    _transformers("ViT", **_PLAIN),
    _transformers("DeiT", **_PLAIN),
    _transformers("Beit", **_PLAIN),
    _transformers("Dinov2", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8),
    _transformers("ViTMSN", **_PLAIN),
    _transformers("Swin", image_size=64, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    _transformers("Swinv2", image_size=64, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    _transformers("PoolFormer", **_FOUR),
    _transformers("Cvt", embed_dim=[16, 32, 32], num_heads=[1, 2, 2], depth=[1, 2, 3]),
    _transformers("Levit", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1]),
    _transformers("Segformer", hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    _transformers(
        "Segformer",
        **_PIXELS,
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        pixels=64,
    ),
    _transformers("MobileViT", image_size=64, hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64]),
    _transformers(
        "MobileViT",
        **_PIXELS,
        image_size=64,
        pixels=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 8, 16, 24, 32, 40, 64],
    ),
    _transformers("MobileViTV2", width_multiplier=0.5),
    _transformers(
        "FocalNet", image_size=64, embed_dim=16, depths=[1, 1, 2], focal_levels=[2, 2, 2], hidden_sizes=[16, 32, 64]
    ),
    _transformers(
        "Pvt", image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]
    ),
    _transformers(
        "PvtV2", image_size=64, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]
    ),
    _transformers("SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[16, 16, 32, 32]),
    _transformers(
        "HGNetV2",
        embedding_size=16,
        stem_channels=[3, 8, 16],
        stage_in_channels=[16, 32, 64, 128],
        stage_mid_channels=[8, 16, 32, 64],
        stage_out_channels=[32, 64, 128, 256],
        hidden_sizes=[32, 64, 128, 256],
        stage_num_blocks=[1, 1, 1, 1],
        depths=[1, 1, 1, 1],
    ),
    _transformers(
        "Hiera", image_size=[64, 64], embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], patch_size=[7, 7]
    ),
    _transformers(
        "UperNet",
        **_PIXELS,
        pixels=64,
        hidden_size=32,
        auxiliary_channels=16,
        auxiliary_in_channels=32,
        backbone_config=_BACKBONE,
    ),
)

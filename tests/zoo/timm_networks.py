"""Networks of timm, https://github.com/huggingface/pytorch-image-models."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.specimen import CLASSES, Specimen, trimmed, words


def _timm(name: str, size: int = 64, *, equal: int = 2, **options: Any) -> Specimen:
    """A model of timm for images of `size`, cut down to `equal` equal blocks in a row (0: as it is)."""

    def make() -> nn.Module:
        import timm

        model = timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)
        return trimmed(model, equal) if equal else model

    return Specimen(name=f"timm {name}", package="timm", make=make, image_shape=(3, size, size), note=words(options))


NETWORKS = (
    # Residual networks and what was made of them.
    _timm("resnet10t"),
    _timm("resnet18d", drop_path_rate=0.2),
    _timm("resnet50", drop_block_rate=0.1, equal=1),
    _timm("resnext50_32x4d", equal=1),
    _timm("ecaresnet26t"),
    _timm("seresnext26d_32x4d"),
    _timm("legacy_seresnet18"),
    _timm("skresnet18"),
    _timm("resnest14d"),
    _timm("res2net50_14w_8s", equal=1),
    _timm("gcresnext26ts"),
    _timm("resnet50_clip", equal=1),
    _timm("gernet_s"),
    _timm("halonet26t", self_attn_kwargs={"block_size": 2, "halo_size": 1}),
    _timm("botnet26t_256", img_size=64),
    _timm("lambda_resnet26t"),
    _timm("resnetv2_18"),
    _timm("resnetv2_50x1_bit", equal=1),
    _timm("resnetv2_50d_evos", equal=1),
    _timm("resnetv2_50d_frn", equal=1),
    _timm("tresnet_m", equal=1),
    # Without BatchNorm.
    _timm("nfnet_l0", equal=1),
    _timm("dm_nfnet_f0", depths=(1, 1, 1, 1), channels=(64, 64, 128, 128), group_size=16),
    _timm("nf_regnet_b0"),
    _timm("nf_ecaresnet26"),
    # RegNet, DenseNet, DPN, DLA, HRNet, CSP and the like.
    _timm("regnetx_002"),
    _timm("regnety_002"),
    _timm("regnetz_b16"),
    _timm("densenet121"),
    _timm("dpn48b"),
    _timm("dla34", equal=1),
    _timm("dla46_c"),
    _timm("hrnet_w18_small"),
    _timm("ese_vovnet19b_slim_dw"),
    _timm("cs3darknet_focus_s"),
    _timm("darknet17", equal=1),
    _timm("cspnext_tiny"),
    _timm("hgnetv2_b0"),
    # Inception.
    _timm("inception_v4", 96, equal=1),
    _timm("legacy_xception", equal=1),
    # Mobile.
    _timm("efficientnet_b0", drop_path_rate=0.2, drop_rate=0.2),
    _timm("tf_efficientnet_b0"),
    _timm("tf_efficientnet_cc_b0_4e"),
    _timm("efficientnetv2_rw_t"),
    _timm("mixnet_s"),
    _timm("mnasnet_small"),
    _timm("mobilenetv1_100"),
    _timm("mobilenetv2_050"),
    _timm("mobilenetv3_small_050"),
    _timm("mobilenetv4_conv_small_035"),
    _timm("lcnet_035"),
    _timm("tinynet_e"),
    _timm("ghostnet_050"),
    _timm("ghostnetv2_100"),
    _timm("ghostnetv3_050"),
    _timm("rexnet_100"),
    _timm("repvgg_a0"),
    _timm("mobileone_s0"),
    _timm("repvit_m0_9"),
    _timm("fasternet_t0"),
    _timm("starnet_s1"),
    _timm("shvit_s1"),
    _timm("efficientformerv2_s0", 64, img_size=64),
    _timm("efficientvit_b0"),
    _timm("efficientvit_m0", 64, img_size=64),
    _timm("efficientvim_m1"),
    _timm("iformer_t"),
    _timm("csatv2"),
    # ConvNeXt and the like.
    _timm("convnext_atto", ls_init_value=0.1),
    _timm("convnextv2_atto"),
    _timm("inception_next_atto"),
    _timm("convmixer_768_32", equal=1),
    _timm("mambaout_femto"),
    _timm("focalnet_tiny_srf", equal=1),
    _timm("poolformer_s12"),
    _timm("caformer_s18"),
    _timm("edgenext_xx_small"),
    _timm("fastvit_t8"),
    _timm("fastvit_mci0"),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050"),
    _timm("swiftformer_xs"),
    _timm("visformer_tiny", img_size=64),
    # Convolutions and attention, or attention alone.
    _timm("coatnet_pico_rw_224", img_size=64),
    _timm("maxvit_rmlp_pico_rw_256", img_size=64),
    _timm("coat_lite_tiny", img_size=64),
    _timm("crossvit_tiny_240", 60),
    _timm("levit_128s", img_size=64),
    _timm("levit_conv_128s", img_size=64),
    _timm("mvitv2_tiny", img_size=64),
    _timm("nest_tiny", img_size=64),
    _timm("pit_ti_224", img_size=64),
    _timm("pvt_v2_b0"),
    _timm("sequencer2d_s", img_size=64),
    _timm("swin_tiny_patch4_window7_224", img_size=64, window_size=4),
    _timm("swinv2_tiny_window8_256", img_size=64, window_size=4),
    _timm("swinv2_cr_tiny_ns_224", img_size=64),
    _timm("twins_svt_small", img_size=64),
    _timm("volo_d1_224", img_size=64),
    _timm("xcit_nano_12_p8_224"),
    _timm("cait_xxs24_224", img_size=64),
    _timm("deit3_small_patch16_224", img_size=64, depth=2),
    _timm("deit_tiny_distilled_patch16_224", img_size=64, depth=2),
    _timm("beit_base_patch16_224", img_size=64, depth=2, embed_dim=96, num_heads=4),
    _timm("eva02_tiny_patch14_224", 56, img_size=56, depth=2),
    _timm("vit_tiny_patch16_224", img_size=64, depth=2),
    _timm("vit_tiny_r_s16_p8_224", img_size=64),
    _timm("vit_relpos_small_patch16_224", img_size=64, depth=2),
    _timm("mixer_s32_224", img_size=64),
)

"""Image classifiers that benches train on random images: torchvision's families, and timm's, the smallest of each."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

CLASSES, SIDE = 10, 64
# Sides of the networks that do not take 64x64 images.
SIDES = {"inception_v3": 75, "maxvit_t": 224, "timm:levit_128s": 224, "timm:mobilevit_xxs": 64, "timm:crossvit_tiny_240": 240}
TORCHVISION = (
    "alexnet", "vgg11", "squeezenet1_1", "densenet121", "googlenet", "inception_v3", "shufflenet_v2_x0_5", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet0_5", "resnet18", "resnext50_32x4d", "wide_resnet50_2", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_y_400mf", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t",
)  # fmt: skip
TIMM = (
    "timm:mobilenetv3_small_050", "timm:mobilevit_xxs", "timm:edgenext_xx_small", "timm:efficientnet_lite0", "timm:resnet10t",
    "timm:regnety_002", "timm:convnext_atto", "timm:levit_128s", "timm:poolformer_s12", "timm:deit_tiny_patch16_224",
    "timm:mixer_s32_224", "timm:ghostnet_050",
)  # fmt: skip
MORE_TIMM = (
    "timm:tinynet_e", "timm:lcnet_035", "timm:mobilenetv4_conv_small", "timm:starnet_s1", "timm:fastvit_t8", "timm:repvgg_a0",
    "timm:resnest14d", "timm:rexnet_100", "timm:skresnet18", "timm:dla34", "timm:hrnet_w18_small", "timm:efficientvit_b0",
    "timm:efficientformer_l1", "timm:visformer_tiny", "timm:pvt_v2_b0", "timm:tiny_vit_5m_224", "timm:convit_tiny", "timm:resmlp_12_224",
    "timm:gmlp_ti16_224", "timm:crossvit_tiny_240",
)  # fmt: skip


def side_of(name: str) -> int:
    """Return the height and width of a network's images."""
    needs_its_own = ("_224", "efficientformer_l1", "visformer_tiny", "convit_tiny")
    return SIDES.get(name, 224 if name.startswith("timm:") and name.endswith(needs_its_own) else SIDE)


def shape_of(name: str) -> tuple[int, ...]:
    """Return the shape of a network's samples."""
    return (int(name[4:].split("-")[0]),) if name.startswith("mlp:") else (3, side_of(name), side_of(name))


def builder_of(name: str) -> Callable[[], Any]:
    """Return the function that builds a network; `mlp:WIDTH-...-WIDTH`, torchvision's names, and timm's after `timm:`."""

    def build() -> Any:
        from torch import nn

        if name.startswith("mlp:"):
            widths = [int(width) for width in name[4:].split("-")]
            pairs = pairwise(widths)
            return nn.Sequential(nn.Flatten(), *[layer for pair in pairs for layer in (nn.Linear(*pair), nn.ReLU())][:-1])
        if name.startswith("timm:"):
            import timm

            return timm.create_model(name[5:], num_classes=CLASSES)
        import torchvision

        options: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            options = {"aux_logits": False, "init_weights": False}
        elif name.startswith("vit"):
            options = {"image_size": SIDE}
        elif name.startswith("maxvit"):
            options = {"input_size": (side_of(name), side_of(name))}
        return torchvision.models.get_model(name, num_classes=CLASSES, **options)

    return build

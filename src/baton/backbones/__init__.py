"""Backbones: networks registered with timm, one architecture family per file.

Importing this package registers them, so that `timm.create_model("wrn_16_2")` works; every one of timm's own models is
a backbone too. A new family is one more module in the import below.
"""

from baton.backbones import (  # noqa: F401  (importing registers)
    alexnet_bn,
    allcnn,
    autoresolution_image,
    autoresolution_patch,
    converted,
    dae_encoder,
    deeplab,
    diracnet,
    diracnet_plain,
    fully_convolutional,
    nin,
    njet_allcnn,
    njet_efficientnet,
    njet_nin,
    njet_resnet,
    resnet_cifar,
    split_brain,
    toy_cnn,
    unet,
    vgg_small,
    wide_resnet,
    wide_resnet_imagenet,
)
from baton.backbones.factory import create_backbone, list_backbones

__all__ = ["create_backbone", "list_backbones"]

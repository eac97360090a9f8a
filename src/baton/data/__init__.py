"""Data modules: one data source per file. Images are uint8 on the host and RGB in [0, 1] on the device."""

from baton.data.cifar import CIFAR10 as CIFAR10
from baton.data.cifar import CIFAR100 as CIFAR100
from baton.data.image_folder import ImageFolder as ImageFolder
from baton.data.imagenet import ImageNet as ImageNet
from baton.data.mask_folder import MaskFolder as MaskFolder
from baton.data.mnist import MNIST as MNIST
from baton.data.mnist import FashionMNIST as FashionMNIST
from baton.data.multi_scale_fashion_mnist import MultiScaleFashionMNIST as MultiScaleFashionMNIST
from baton.data.shapes import Shapes as Shapes
from baton.data.shapes_masks import ShapesMasks as ShapesMasks
from baton.data.stl10 import STL10 as STL10
from baton.data.svhn import SVHN as SVHN
from baton.data.voc_segmentation import VOCSegmentation as VOCSegmentation

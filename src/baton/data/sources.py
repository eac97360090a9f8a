"""All data modules, so that their short names are known."""

from baton.data.cifar import CIFAR10 as CIFAR10
from baton.data.cifar import CIFAR100 as CIFAR100
from baton.data.shapes_module import Shapes as Shapes

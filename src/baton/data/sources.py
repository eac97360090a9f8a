"""All data modules, so that their short names are known."""

from baton.data.cifar import CIFAR10 as CIFAR10

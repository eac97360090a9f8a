"""Layers: plain modules without Lightning."""

from baton.layers.dirac import DiracConv2d as DiracConv2d
from baton.layers.folding import fold as fold
from baton.layers.unpooling import SwitchedMaxPool2d as SwitchedMaxPool2d
from baton.layers.unpooling import SwitchedUnpool2d as SwitchedUnpool2d
from baton.layers.unpooling import Switches as Switches

"""Layers: plain modules without Lightning."""

from baton.layers.conversion import convert as convert
from baton.layers.deformable import DeformableConv2d as DeformableConv2d
from baton.layers.dirac import DiracConv2d as DiracConv2d
from baton.layers.folding import fold as fold
from baton.layers.folding import plain_convolutions as plain_convolutions
from baton.layers.njet import NJetConv2d as NJetConv2d
from baton.layers.njet_pyramid import NJetPyramid2d as NJetPyramid2d
from baton.layers.patch_fit import fit_patch as fit_patch
from baton.layers.spatial import spatial_conv as spatial_conv
from baton.layers.subsampling import SafeSubsample as SafeSubsample
from baton.layers.subsampling import SubsampledNJet as SubsampledNJet
from baton.layers.unpooling import SwitchedMaxPool2d as SwitchedMaxPool2d
from baton.layers.unpooling import SwitchedUnpool2d as SwitchedUnpool2d
from baton.layers.unpooling import Switches as Switches
